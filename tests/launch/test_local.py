"""What the launcher of one machine makes of how its ranks ended."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from turbolm.launch import local
from turbolm.reliability.outcome import FINISHED, Outcome, read_outcome, write_outcome
from turbolm.train.run_directory import RunDirectory


@pytest.mark.parametrize("returncode", [0, -9])
def test_a_run_that_is_killed_while_it_exports_has_finished(
    returncode: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher says what the killed rank could not."""
    run, cure = RunDirectory(tmp_path), "the export did not end: `turbolm export STEP OUT` makes one"
    run.attempt(1).mkdir(parents=True)
    plan: Any = SimpleNamespace(world_size=1, recipe=SimpleNamespace(execution=None))

    def train(*_: Any) -> None:
        write_outcome(run.attempt(1), Outcome(FINISHED, 0, cure))

    with ExitStack() as stack:
        for name in ("launch_command", "accelerate_config", "process_environment", "precision_override"):
            stack.enter_context(patch.object(local, name))
        stack.enter_context(patch.object(local, "start_ranks", return_value=SimpleNamespace(returncode=returncode)))
        stack.enter_context(patch.object(local, "wait_for_ranks", train))
        assert local.launch(plan, run, 1, "recipe.yaml", []) == 0
    assert capsys.readouterr().err == ("" if returncode == 0 else f"turbolm: {cure}\n")
    outcome = read_outcome(run.attempt(1))
    assert outcome is not None and outcome.status == FINISHED
