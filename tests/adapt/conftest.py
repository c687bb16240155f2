"""`turbolm adapt` without the processes of its own that try and count a model: importing torch again takes seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from turbolm.adapt.subject import Subject

Adapt = Callable[..., str]


@pytest.fixture
def adapt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Adapt:
    """`turbolm.adapt.run.adapt` in an empty folder."""
    from turbolm.adapt import run
    from turbolm.errors import UserError
    from turbolm.models.count import count_parameters
    from turbolm.models.preflight import examine
    from turbolm.recipe.schema import Model

    def examine_here(subject: Subject) -> dict[str, Any]:
        given: dict[str, Any] = {"config": {"model_type": subject.model_type}}
        if subject.config_file is not None:
            given = {"config_file": str(subject.config_file)}
        try:
            return json.loads(json.dumps(asdict(examine(Model.model_validate(given)))))
        except UserError as error:
            raise UserError(f"{subject.given} cannot be trained: {error}") from None

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "examine", examine_here)
    monkeypatch.setattr("turbolm.plan.count._count", lambda text: count_parameters(json.loads(text)))
    return run.adapt
