"""What `turbolm plan` shows of a step is what the step is trained with."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.fixtures.record import FOLDER
from turbolm.cli import app
from turbolm.plan.machine import Machine
from turbolm.plan.plan import build_plan
from turbolm.plan.rates import preview_steps, step_rates
from turbolm.plan.summary import collect_summary
from turbolm.recipe.load import load_recipe

CPU = Machine(0, None, None, num_cpus=4, cpu_has_bf16=False, memory_bytes=2**34)
RAMPS = ("schedule.weight_decay={start: 1, end: 0}", "schedule.momentum={start: 0.8, end: 0.9, over: 5 steps}")


def recorded_steps(name: str) -> list[dict[str, Any]]:
    lines = (FOLDER / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "train/lr" in line]


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_every_step_of_a_recorded_run_was_trained_at_the_rate_that_is_shown(name: str) -> None:
    preview = list(preview_steps(build_plan(load_recipe(FOLDER / f"{name}.yaml"), CPU)))
    recorded = recorded_steps(name)
    assert len(preview) == 10 and len(recorded) == 6
    for line in recorded:
        shown = preview[line["step"] - 1]
        assert {key: line[key] for key in ("step", "tokens_seen", "train/lr")} == {
            key: shown[key] for key in ("step", "tokens_seen", "train/lr")
        }


def test_the_curve_has_the_first_and_last_step_and_only_exact_values() -> None:
    path = FOLDER / "zero1.yaml"
    recipe = load_recipe(path, ["train.budget=25600", *RAMPS])
    summary = collect_summary(recipe, str(path), (), lambda *_: {})
    exact = [(256 * (step + 1), step_rates(summary.plan, step).lr) for step in range(100)]
    assert len(summary.learning_rate) == 61
    assert set(summary.learning_rate) <= set(exact)
    assert (summary.learning_rate[0], summary.learning_rate[-1]) == (exact[0], exact[-1])


def test_plan_prints_every_step() -> None:
    result = CliRunner().invoke(app, ["plan", str(FOLDER / "zero1.yaml"), "--steps", *RAMPS], catch_exceptions=False)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[0]["weight_decay_factor"] == pytest.approx(0.95)  # the middle of the first step of ten
    assert [line["momentum"] for line in lines[4:6]] == pytest.approx([0.89, 0.9])


def test_kinds_with_a_learning_rate_of_their_own_are_shown_beside_the_others() -> None:
    """Matrices: 2e-2 instead of 4e-3, falling over the last 80 of 100 steps; vectors: a quarter; the rest over 20."""
    overrides = [
        "execution.micro_batch=256",
        "optimizer={name: muon, lr: 4e-3, peak_lrs: {matrices: 2e-2}, lr_multipliers: {vectors: 0.25}}",
        "schedule={name: wsd, warmup: '0', decay: 20%, min_lr_ratio: 0, decays: {matrices: 80%}}",
        "train={budget: 25600, global_batch: 256}",
        "cluster.device=cpu",
        "cluster.processes_per_node=1",
    ]
    plan = build_plan(load_recipe("recipes/quickstart/config.yaml", overrides), CPU)
    steps = list(preview_steps(plan))
    names = [name for name in steps[0] if name.startswith("train/lr")]
    assert names == ["train/lr", "train/lr/matrices", "train/lr/vectors"]
    found = {number: [steps[number][name] for name in names] for number in (0, 59, 90)}
    assert found[0] == pytest.approx([4e-3, 2e-2, 1e-3])
    assert found[59] == pytest.approx([4e-3, 2e-2 * 40.5 / 80, 1e-3])
    assert found[90] == pytest.approx([4e-3 * 9.5 / 20, 2e-2 * 9.5 / 80, 1e-3 * 9.5 / 20])
