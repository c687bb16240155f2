"""NaN, Inf and spikes in a loss or a gradient: the same decision everywhere, and weights that never saw them.

What a run does around its faulty batches is compared, to the bit, with a plain loop that is not given these batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.chaos.faults import CRASH, Fault, flip_a_bit, train_on, train_with_faults
from tests.checkpoint.test_resume import read_tensors
from tests.train.harness import BINS_PER_BATCH, MODELS, SEQ_LEN, make_recipe
from tests.world import run_world
from turbolm.checkpoint.manifest import BUFFERS
from turbolm.data.prepare.build import prepare
from turbolm.recipe.schema import Recipe
from turbolm.report.metrics import read_lines, read_metrics

pytestmark = pytest.mark.chaos
STEPS = 10
NAN, INF = math.nan, math.inf
EVERYWHERE = (0, 1)
OFFLOADED = {"offload_optimizer": True, "adam_kernel": "torch"}


def recipe_of(folder: Path, name: str, *, anomalies: Mapping[str, Any] | None = None, **execution: Any) -> Recipe:
    precision, optimizer = execution.pop("precision", "fp32"), execution.pop("optimizer", {})
    model, train = execution.pop("model", "llama"), execution.pop("train", {})
    recipe = make_recipe(
        folder,
        model={"config": MODELS[model]},
        train={"budget": STEPS * BINS_PER_BATCH * SEQ_LEN, "precision": precision, **train},
        optimizer=optimizer,
        checkpoint={"every": "2 steps", "keep_last": 9},
        evaluation={"tokens": 2 * SEQ_LEN},
        logging={"sample_tokens": 0},
        execution={"micro_batch": 2 * SEQ_LEN, **execution},
        anomalies=dict(anomalies or {}),
    )
    return recipe.model_copy(update={"name": name})


def run_path(recipe: Recipe) -> Path:
    return Path(recipe.execution.runs_dir) / recipe.name


def checkpoint(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def assert_same(ours: Path, theirs: Path) -> None:
    found, expected = read_tensors(ours), read_tensors(theirs)
    assert found.keys() == expected.keys()
    assert {name.split("/")[0] for name in found} >= {"weight"}
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def events(recipe: Recipe) -> list[dict[str, Any]]:
    return [line for line in read_lines(run_path(recipe) / "metrics.jsonl") if "anomaly" in line]


def _skips(folder: Path, stage: int, execution: dict[str, Any]) -> None:
    """Two starts with faults, and the reference."""
    recipe = recipe_of(folder, f"zero{stage}", zero_stage=stage, **execution)
    dropped = {
        0: ("gradient", INF, [1]),  # at step 1, on one rank
        4: ("loss", NAN, [0]),  # right after a resume
        5: ("reported loss", INF, [1]),
        7: ("gradient", NAN, EVERYWHERE),
    }
    crashed = train_with_faults(recipe, {**dropped, 4: CRASH})
    assert crashed == "before batch 4", crashed
    assert train_with_faults(recipe, dropped) == 0
    plain = [(step, None if step in dropped else step) for step in range(STEPS)]
    train_on(recipe, plain, [STEPS], folder / f"reference{stage}")


def check_skips(folder: Path, stage: int, **execution: Any) -> None:
    prepare(recipe_of(folder, "any"))
    run_world(2, _skips, folder, stage, execution)
    recipe = recipe_of(folder, f"zero{stage}", zero_stage=stage, **execution)
    assert_same(checkpoint(run_path(recipe) / "checkpoints", STEPS), checkpoint(folder / f"reference{stage}", STEPS))
    found = [
        (event["step"], event["data/batch"], event["anomaly"], event["anomaly/decision"]) for event in events(recipe)
    ]
    assert found == [(n, n - 1, "non_finite", "skip") for n in (1, 5, 6, 8)]
    steps = [line for line in read_metrics(run_path(recipe) / "metrics.jsonl") if "train/loss" in line]
    assert [line["data/batch"] for line in steps] == list(range(STEPS))
    clean = [line["step"] for line in steps if isinstance(line["train/grad_norm"], float)]
    assert clean == [2, 3, 4, 7, 9, 10], "no later clean step is skipped"


@pytest.mark.parametrize("stage", [0, 3])
def test_a_faulty_batch_is_as_if_it_had_not_been_there(stage: int, tmp_path: Path) -> None:
    check_skips(tmp_path, stage)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "execution"),
    [  # with those above every pair of stage, precision and offload; Muon's is stage 2 in fp32
        (1, {"precision": "bf16"}), (1, {}), (3, {"precision": "bf16"}), (3, OFFLOADED),
        (2, {**OFFLOADED, "precision": "bf16"}), (2, {"optimizer": {"name": "muon"}}),
    ],
)  # fmt: skip
def test_a_faulty_batch_at_other_layouts(stage: int, execution: dict[str, Any], tmp_path: Path) -> None:
    check_skips(tmp_path, stage, **execution)


def _rolls_back(folder: Path, stage: int, settings: Mapping[str, Any] | None = None) -> list[int | str]:
    policy = {"max_in_a_row": 2, "max_rollbacks": 1}
    recipe = recipe_of(folder, f"back{stage}", anomalies=policy, zero_stage=stage, **(settings or {}))
    bad: Fault = ("loss", NAN, [1])
    # Three in a row: not to step 4, which was saved among them, but to step 2, without batches 2 to 5. Three more, and
    # it has gone back as often as it may.
    stopped = train_with_faults(recipe, dict.fromkeys((3, 4, 5, 9, 10, 11), bad))
    finished = train_with_faults(recipe, {})  # from step 6, which must remember what was left out
    batches = [0, 1, 6, 7, 8, None, 10, 11, 12, 13]
    train_on(recipe, list(enumerate(batches)), [4, STEPS], folder / "reference")
    return [stopped, finished]


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_too_many_in_a_row_go_back_leave_the_batches_out_and_at_last_stop(stage: int, tmp_path: Path) -> None:
    prepare(recipe_of(tmp_path, "any"))
    answers = run_world(2, _rolls_back, tmp_path, stage)
    assert answers[0] == answers[1], "all ranks decide alike"
    stopped, finished = answers[0]
    assert "stopped at step 8, batch 11: loss nan" in stopped
    assert "rolled back 1 times" in stopped
    assert finished == 0
    recipe = recipe_of(tmp_path, f"back{stage}")
    checkpoints = run_path(recipe) / "checkpoints"
    for step in (4, STEPS):
        assert_same(checkpoint(checkpoints, step), checkpoint(tmp_path / "reference", step))
    found = [(event["step"], event["data/batch"], event["anomaly/decision"]) for event in events(recipe)]
    assert found == [
        (4, 3, "skip"), (5, 4, "skip"), (6, 5, "rollback"), (6, 9, "skip"), (7, 10, "skip"), (8, 11, "stop"),
    ]  # fmt: skip
    back = events(recipe)[2]
    assert (back["anomaly/to_step"], back["anomaly/skipped_batches"]) == (2, [2, 6])
    steps = [line for line in read_metrics(run_path(recipe) / "metrics.jsonl") if "train/loss" in line]
    assert [line["data/batch"] for line in steps] == [0, 1, 6, 7, 8, 9, 10, 11, 12, 13]


@pytest.mark.slow
def test_biases_of_routers_go_back_and_skip_too(tmp_path: Path) -> None:
    """And no evaluation moves them, of which the reference has none."""
    settings = {"model": "glm4_moe", "train": {"router_bias_update": 0.01}}
    prepare(recipe_of(tmp_path, "any"))
    assert run_world(2, _rolls_back, tmp_path, 2, settings)[0][1] == 0
    checkpoints = run_path(recipe_of(tmp_path, "back2")) / "checkpoints"
    for step in (4, STEPS):
        assert_same(checkpoint(checkpoints, step), checkpoint(tmp_path / "reference", step))
        ours, theirs = (load_file(checkpoint(one, step) / BUFFERS) for one in (checkpoints, tmp_path / "reference"))
        biases = [name for name in ours if name.endswith("e_score_correction_bias")]
        assert len(biases) == 2 and all(torch.equal(ours[name], theirs[name]) for name in biases)
        assert all(0 < ours[name].abs().max() < 0.01 * (step + 0.5) for name in biases)


def _meets_spikes(folder: Path, layouts: list[dict[str, Any]]) -> list[int | str]:
    """A gradient a thousand times too large, once the window of 8 steps is full and once before."""
    answers = []
    for layout in layouts:
        recipe = spiky(folder, layout)
        early: Fault = ("gradient", 1000.0, EVERYWHERE)
        # A loss that is reported a hundred times too large has a gradient as ever.
        faults = {2: early, 8: ("gradient", 1000.0, [1]), 10: ("reported loss", 100.0, [0])}
        answers.append(train_with_faults(recipe, faults))
        plain = [(step, None if step in (8, 10) else step) for step in range(12)]
        train_on(recipe, plain, [12], folder / f"{recipe.name}-reference", {2: early})
    return answers


def spiky(folder: Path, layout: dict[str, Any]) -> Recipe:
    name = "-".join(str(value) for value in layout.values())
    recipe = recipe_of(folder, name, anomalies={"spikes": "skip", "window": 8, "threshold": 25}, **layout)
    return recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"budget": 12 * BINS_PER_BATCH * SEQ_LEN})}
    )


def check_spikes(folder: Path, layouts: list[dict[str, Any]]) -> None:
    prepare(spiky(folder, layouts[0]))
    for answers in run_world(2, _meets_spikes, folder, layouts):
        assert answers == [0] * len(layouts)
    for layout in layouts:
        recipe = spiky(folder, layout)
        found = [(event["step"], event["anomaly"], event["anomaly/decision"]) for event in events(recipe)]
        assert found == [(9, "norm_spike", "skip"), (11, "loss_spike", "skip")]
        reference = folder / f"{recipe.name}-reference"
        assert_same(checkpoint(run_path(recipe) / "checkpoints", 12), checkpoint(reference, 12))


def test_a_spike_of_the_norm_or_of_the_loss_is_not_applied(tmp_path: Path) -> None:
    check_spikes(tmp_path, [{"zero_stage": 2}, {"zero_stage": 1, "precision": "bf16"}])


@pytest.mark.slow
def test_a_spike_is_not_applied_at_any_stage(tmp_path: Path) -> None:
    check_spikes(tmp_path, [
        {"zero_stage": 0}, {"zero_stage": 3, "precision": "bf16"}, {"zero_stage": 2, **OFFLOADED},
        {"zero_stage": 3, **OFFLOADED},
    ])  # fmt: skip


def _flips(folder: Path, stage: int, name: str) -> list[int | str]:
    recipe = recipe_of(folder, f"flip{stage}", zero_stage=stage, replica_check=1)
    return [flip_a_bit(recipe, 5, name, on_rank=1)]


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_bit_flipped_in_one_copy_of_the_weights_is_found_and_stops_the_run(stage: int, tmp_path: Path) -> None:
    name = "model.norm.weight"
    prepare(recipe_of(tmp_path, "any"))
    for (answer,) in run_world(2, _flips, tmp_path, stage, name):
        assert isinstance(answer, str)
        assert "the copies of the weights differ after step 5" in answer
        assert f"{name} on rank 1 is not what it is on rank 0" in answer
    saved = sorted(path.name for path in (run_path(recipe_of(tmp_path, f"flip{stage}")) / "checkpoints").iterdir())
    assert saved == ["step-00000002", "step-00000004"], "none was written since"
