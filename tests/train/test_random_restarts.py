"""Random restarts: the run that goes on is, to the bit, one that began with the chosen weights."""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.checkpoint.test_resume import read_tensors
from tests.train.harness import BINS_PER_BATCH, SEQ_LEN, make_recipe
from tests.world import run_world
from turbolm.ablate.measure import measure_run
from turbolm.data.prepare.build import prepare
from turbolm.errors import EXIT_REQUEUE
from turbolm.launch.job import newest_step
from turbolm.recipe.schema import Recipe
from turbolm.report.metrics import Line, read_metrics
from turbolm.train.run_directory import run_directory

BATCH = BINS_PER_BATCH * SEQ_LEN
STEPS, TRIED, SEEDS = 10, 4, 3
SEED = 6  # so that neither the first candidate nor the last is the best
INITIAL = [SEED, SEED + 1_000_003, SEED + 2_000_006]


def recipe_of(folder: Path, name: str, *, restarts: bool = False, **sections: Any) -> Recipe:
    train = {"seed": SEED, "budget": STEPS * BATCH, **sections.pop("train", {})}
    if restarts:
        train["random_restarts"] = {"seeds": SEEDS, "over": f"{TRIED} steps"}
    recipe = make_recipe(
        folder,
        train=train,
        evaluation={"tokens": 2 * SEQ_LEN, "weight_average": {"last": "100%"}},
        checkpoint={"every": "100%"},
        logging={"sample_tokens": 0},
        **sections,
    )
    return recipe.model_copy(update={"name": name})


def _start_over() -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    gc.collect()


class Killed(Exception):
    """The run dies here."""


def _restarted(recipe: Recipe, faults: list[str]) -> list[Any]:
    """Start the run anew after each fault: what each start ended with, and how many candidates were done then."""
    import turbolm.train.random_restarts as restarts
    from turbolm.train.worker import run_worker

    clean_step = restarts.take_step
    ends: list[Any] = []
    for fault in [*faults, "none"]:
        _start_over()
        steps = 0

        def faulty_step(session: Any, batch: Any, fault: str = fault) -> Any:
            nonlocal steps
            steps += 1
            if fault == "killed" and steps == TRIED + 2:  # within the second candidate
                raise Killed
            if fault == "stopped" and steps == TRIED + 1:  # within the third: an earlier start finished one
                session.context.stop.request("the test")
            return clean_step(session, batch)

        with patch.object(restarts, "take_step", faulty_step):
            try:
                ends.append(run_worker(recipe))
            except Killed:
                ends.append("killed")
        ends.append(newest_step(run_directory(recipe)))
    return ends


def _plain(recipe: Recipe, initial_seeds: list[int]) -> None:
    """The reference: whole plain runs, whose weights, and nothing else, are drawn from other seeds than their own."""
    import turbolm.train.build as build_module
    from turbolm.train.worker import run_worker

    clean_build = build_module.build_model
    for seed in initial_seeds:

        def build(*arguments: Any, initial_seed: int = seed, **keywords: Any) -> Any:
            return clean_build(*arguments, **{**keywords, "seed": initial_seed})

        _start_over()
        with patch.object(build_module, "build_model", build):
            assert run_worker(recipe.model_copy(update={"name": f"{recipe.name}-{seed}"})) == 0


def _both(recipe: Recipe, plain: Recipe, faults: list[str], initial_seeds: list[int]) -> list[Any]:
    ends = _restarted(recipe, faults)
    _plain(plain, initial_seeds)
    return ends


def steps_of(folder: Path) -> list[Line]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if "train/loss" in line]


def curve(lines: list[Line]) -> list[tuple[Any, ...]]:
    keys = ("step", "tokens_seen", "train/loss", "train/grad_norm", "train/lr", "data/samples")
    return [tuple(line[key] for key in keys) for line in lines]


def judged_loss(folder: Path) -> float:
    """Of the last quarter of the tried steps: with four, the fourth."""
    return float(steps_of(folder)[TRIED - 1]["train/loss"])


def assert_same_state(ours: Path, theirs: Path) -> None:
    found, expected = (read_tensors(path / "checkpoints" / f"step-{STEPS:08d}") for path in (ours, theirs))
    assert found.keys() == expected.keys() and {"exp_avg", "weight_average"} <= {n.partition("/")[0] for n in found}
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_killed_and_stopped_it_still_goes_on_with_the_best_start(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "restarts", restarts=True)
    prepare(recipe)
    ends = run_world(2, _both, recipe, recipe_of(tmp_path, "plain"), ["killed", "stopped"], INITIAL)
    assert ends[0] == ["killed", 1, EXIT_REQUEUE, 2, 0, STEPS], "a candidate is done again, those before it are not"
    run, plain = run_directory(recipe).path, [tmp_path / "runs" / f"plain-{seed}" for seed in INITIAL]
    losses = [judged_loss(path) for path in plain]
    chosen = min(range(SEEDS), key=losses.__getitem__)
    assert chosen == 1, f"else the test shows less; take another seed: {losses}"
    results = json.loads((run / "results.json").read_text())
    assert results["restarts"] == {
        "steps": TRIED,
        "seeds": INITIAL,
        "losses": pytest.approx(losses, rel=1e-12),
        "chosen": chosen,
        "extra_tokens": (SEEDS - 1) * TRIED * BATCH,
    }
    assert results["tokens_seen"] == STEPS * BATCH
    assert (results["weight_average"]["first_step"], results["weight_average"]["count"]) == (1, STEPS)
    assert all("evaluation.weight_average" not in log.read_text() for log in run.glob("attempts/*/log.rank0.txt"))
    assert curve(steps_of(run)) == curve(steps_of(plain[chosen]))
    assert_same_state(run, plain[chosen])
    lost = [path for number, path in enumerate(plain) if number != chosen]
    for number, path in enumerate(plain):
        kept = run / "restarts" / f"candidate-{number}.jsonl"
        assert kept.exists() == (path in lost)
        if path in lost:
            assert curve(read_metrics(kept)) == curve(steps_of(path)[:TRIED])
    assert sorted(path.name for path in (run / "restarts").iterdir() if path.is_dir()) == []
    measured = measure_run(run, seed=SEED, lr=recipe.optimizer.lr)
    alone = [line for file in (run / "restarts").glob("*.jsonl") for line in read_metrics(file)]
    assert measured.tokens == (STEPS + (SEEDS - 1) * TRIED) * BATCH and measured.steps == STEPS
    seconds = sum(line["data/batch_tokens"] / line["perf/tokens_per_sec"] for line in [*alone, *steps_of(run)])
    assert math.isclose(measured.training_sec, seconds)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision", "settings"),
    [
        (1, "bf16", {"optimizer": {"name": "muon"}}),
        (2, "fp32", {"execution": {"offload_optimizer": True}}),
        (3, "bf16", {"model": {"dropout": 0.1}, "execution": {"activation_checkpointing": "full"}}),
    ],
)
def test_every_stage_begins_as_a_plain_run_of_that_seed(
    stage: int, precision: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**settings, "execution": {**settings.get("execution", {}), "zero_stage": stage}}
    settings["train"] = {"precision": precision}
    recipe, plain = (recipe_of(tmp_path, name, restarts=name == "all", **settings) for name in ("all", "plain"))
    prepare(recipe)
    run_world(2, _both, recipe, plain, [], INITIAL)
    run = run_directory(recipe).path
    restarts = json.loads((run / "results.json").read_text())["restarts"]
    same = [tmp_path / "runs" / f"plain-{seed}" for seed in INITIAL]
    assert restarts["losses"] == pytest.approx([judged_loss(path) for path in same], rel=1e-12)
    assert curve(steps_of(run)) == curve(steps_of(same[restarts["chosen"]]))


def _with_bad_candidates(recipe: Recipe, bad: set[int]) -> int | str:
    import turbolm.train.random_restarts as restarts
    from turbolm.errors import RunError
    from turbolm.train import step
    from turbolm.train.worker import run_worker

    clean_loss, clean_train = step.micro_batch_loss, restarts._train_candidate
    is_bad = False

    def train(session: Any, metrics: Path, num_steps: int) -> Any:
        nonlocal is_bad
        is_bad = int(metrics.stem.rpartition("-")[2]) in bad
        try:
            return clean_train(session, metrics, num_steps)
        finally:
            is_bad = False

    def loss(*arguments: Any) -> Any:
        objective, nll = clean_loss(*arguments)
        factor = math.nan if is_bad else 1.0
        return objective * factor, nll * factor

    _start_over()
    with patch.object(restarts, "_train_candidate", train), patch.object(step, "micro_batch_loss", loss):
        try:
            return run_worker(recipe)
        except RunError as error:
            return str(error)


def _some_and_all_bad(some: Recipe, every: Recipe) -> list[int | str]:
    return [_with_bad_candidates(some, {0, 2}), _with_bad_candidates(every, {0, 1, 2})]


@pytest.mark.slow
def test_candidates_with_an_anomaly_are_given_up(tmp_path: Path) -> None:
    some, every = recipe_of(tmp_path, "some", restarts=True), recipe_of(tmp_path, "every", restarts=True)
    prepare(some)
    ends = run_world(1, _some_and_all_bad, some, every)[0]
    assert ends[0] == 0 and "every candidate of train.random_restarts met an anomaly" in ends[1]
    restarts = json.loads((run_directory(some).path / "results.json").read_text())["restarts"]
    assert restarts["chosen"] == 1 and restarts["losses"] == [None, restarts["losses"][1], None]
    assert len(curve(steps_of(run_directory(some).path))) == STEPS
