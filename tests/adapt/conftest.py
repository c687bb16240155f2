"""`turbolm adapt` without the processes of its own that try and count a model: importing torch again takes seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from turbolm.adapt.findings import model_section
from turbolm.adapt.subject import Subject
from turbolm.errors import UserError

Adapt = Callable[..., str]
_FOUND: dict[str, str] = {}  # of each model that was tried, by its section


@pytest.fixture
def adapt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Adapt:
    """`turbolm.adapt.run.adapt` in an empty folder."""
    from turbolm.adapt import run
    from turbolm.models import count
    from turbolm.models.preflight import examine
    from turbolm.plan.count import Answer
    from turbolm.recipe.schema import Model

    def examine_here(subject: Subject, seq_len: int) -> dict[str, Any]:
        section = Model.model_validate(model_section(subject))
        key = f"{seq_len} {section.model_dump_json()}"
        try:
            _FOUND[key] = _FOUND.get(key) or json.dumps(examine(section, seq_len))
        except UserError as error:
            raise UserError(f"{subject.given} cannot be trained: {error}") from None
        found: dict[str, Any] = json.loads(_FOUND[key])
        return found

    def answer_here(request: str) -> Answer:
        asked = json.loads(request)
        return count.examine(asked["file"], asked["config"])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "examine", examine_here)
    monkeypatch.setattr("turbolm.plan.count._run_examiner", answer_here)
    return run.adapt
