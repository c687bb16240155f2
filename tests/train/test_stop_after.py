"""`execution.stop_after`: a run that stops early is a prefix of the run that does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoint.test_resume import read_tensors
from tests.train.harness import BINS_PER_BATCH, MODELS, SEQ_LEN, make_recipe, train_in_world
from turbolm.data.prepare.build import prepare
from turbolm.recipe.schema import Recipe
from turbolm.reliability.outcome import read_outcome
from turbolm.report.metrics import Line, read_metrics
from turbolm.train.run_directory import is_finished, run_directory

STOP, END = 4, 10


def of(folder: Path, name: str, **execution: object) -> Recipe:
    recipe = make_recipe(
        folder,
        evaluation={"every": "20%"},
        schedule={"name": "cosine"},
        model={"config": MODELS["llama"], "init": "zero_outputs"},
        optimizer={"name": "muon"},
        logging={"sample_tokens": 0},
        execution={"zero_stage": 1, "cache_dir": str(folder / "cache"), "runs_dir": str(folder / "runs"), **execution},
    )
    return recipe.model_copy(update={"name": name})


def curve(recipe: Recipe) -> list[tuple[Line, ...]]:
    keys = ("step", "train/loss", "train/lr", "train/grad_norm", "eval/loss")
    lines = read_metrics(run_directory(recipe).metrics)
    return [tuple(line.get(key) for key in keys) for line in lines]


@pytest.mark.slow
def test_a_run_that_stops_early_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    """With outputs that start at zero, whose gradients alone are not zero in the first step, under Muon."""
    whole, early = of(tmp_path, "whole"), of(tmp_path, "early", stop_after="40%")
    prepare(whole)
    assert train_in_world(whole, 1) == 0
    run = run_directory(early)
    assert train_in_world(early, 1) == 0  # not 75: nobody shall start it again
    assert not is_finished(run, early.train.budget)
    expected = curve(whole)
    assert expected[-1][-1] < expected[1][1] - 0.3  # it learns
    upto = [line for line in expected if line[0] <= STOP]
    assert curve(early) == upto and upto[-1][-1] is not None  # evaluated there as well
    outcome = read_outcome(run.attempt(1))
    assert outcome is not None and (outcome.status, outcome.exit_code) == ("stopped", 0)
    lines = run.metrics.read_text().splitlines(keepends=True)  # as if it had been interrupted in that evaluation
    run.metrics.write_text("".join(line for line in lines if '"eval/loss"' not in line or '"step": 4,' not in line))
    assert curve(early) != upto
    assert train_in_world(early, 1) == 0 and curve(early) == upto
    tokens = of(tmp_path, "early", stop_after=6 * BINS_PER_BATCH * SEQ_LEN)
    assert train_in_world(tokens, 1) == 0 and len([line for line in curve(early) if line[1] is not None]) == 6
    assert train_in_world(of(tmp_path, "early"), 1) == 0
    assert curve(early) == expected
    ends = [read_tensors(run_directory(one).checkpoints / f"step-{END:08d}") for one in (whole, early)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
