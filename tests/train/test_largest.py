"""What does not fit fails at once: the largest micro-batch of a schedule runs before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.train.harness import MODELS, SEQ_LEN, make_recipe
from tests.world import run_world
from turbolm.data.prepare.build import prepare
from turbolm.errors import RunError
from turbolm.plan.machine import detect_machine
from turbolm.plan.plan import build_plan
from turbolm.recipe.schema import Recipe
from turbolm.train.largest import memory_told, micro_batch_shapes

GROWTH = {"name": "growth", "start": 8, "over": "60%", "num_lengths": 3}


def grows(folder: Path, name: str, **execution: Any) -> Recipe:
    return make_recipe(
        folder,
        model={"config": {**MODELS["llama"], "attention_dropout": 0.1}},
        data={"length_schedule": GROWTH, "validation": 0},
        train={"global_batch": 8 * SEQ_LEN, "budget": 8 * 8 * SEQ_LEN},
        execution={"micro_batch": 2 * SEQ_LEN, **execution},
        checkpoint={"every": "100%"},
    ).model_copy(update={"name": name})


def test_the_shapes_of_a_schedule(tmp_path: Path) -> None:
    plan = build_plan(grows(tmp_path, "growth"), detect_machine(), 2)
    assert micro_batch_shapes(plan, 0) == {(8, 8), (4, 16), (2, 32)}
    last = plan.curriculum.segments[-1].first_step
    assert micro_batch_shapes(plan, last) == {(2, 32)}
    ramp = make_recipe(
        tmp_path,
        train={"global_batch": 8 * SEQ_LEN, "batch_ramp": {"start": 4 * SEQ_LEN, "over": "50%", "num_levels": 2}},
        execution={"micro_batch": 4 * SEQ_LEN},
    )
    assert micro_batch_shapes(build_plan(ramp, detect_machine(), 2), 0) == {(2, 32), (4, 32)}


@pytest.mark.parametrize("stages", [(2,), pytest.param((0, 1, 3), marks=pytest.mark.slow)], ids=str)
def test_the_largest_micro_batch_runs_first_and_changes_nothing(stages: tuple[int, ...], tmp_path: Path) -> None:
    """With dropout, whose random numbers it must not take."""
    recipes = {(stage, runs): grows(tmp_path, f"s{stage}{runs}", zero_stage=stage)
               for stage in stages for runs in (False, True)}  # fmt: skip
    prepare(recipes[stages[0], True])
    for found in run_world(2, _train_noting_shapes, recipes, timeout_sec=300):
        for stage in stages:
            plain, tried = found[stage, False], found[stage, True]
            assert plain["shapes"][0] == (8, 8)
            assert tried["shapes"] == [(2, 32), *plain["shapes"]]
            assert tried["trained"] == plain["trained"] and len(plain["trained"]) == 8


def _train_noting_shapes(recipes: dict[tuple[int, bool], Recipe]) -> dict[tuple[int, bool], dict[str, Any]]:
    from tests.chaos.faults import train_with_faults
    from turbolm.report.metrics import read_lines
    from turbolm.train import largest, loop, step
    from turbolm.train.run_directory import run_directory

    found: dict[tuple[int, bool], dict[str, Any]] = {}
    clean = step.micro_batch_loss
    for (stage, runs), recipe in recipes.items():
        shapes: list[tuple[int, ...]] = []

        def noting(engine: Any, micro_batch: Any, attention: str, shapes: Any = shapes) -> Any:
            shapes.append(micro_batch["input_ids"].shape)
            return clean(engine, micro_batch, attention)

        with (
            patch.object(step, "micro_batch_loss", noting),
            patch.object(largest, "micro_batch_loss", noting),
            patch.object(loop, "run_largest", largest.run_largest if runs else lambda _: None),
        ):
            assert train_with_faults(recipe, {}) == 0
        lines = [line for line in read_lines(run_directory(recipe).metrics) if "train/loss" in line]
        trained = [(line["train/loss"], line["train/grad_norm"]) for line in lines]
        found[stage, runs] = {"shapes": shapes, "trained": trained}
    return found


def test_what_does_not_fit_is_told_with_what_to_change(tmp_path: Path) -> None:
    plan = build_plan(grows(tmp_path, "oom", zero_stage=1), detect_machine(), 2)
    with pytest.raises(RunError) as caught, memory_told(plan, "step 1"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 1")
    assert str(caught.value) == (
        "step 1: CUDA out of memory. Set one or more of execution.micro_batch=32, execution.zero_stage=2, "
        "execution.zero_stage=3, execution.activation_checkpointing=full, execution.offload_optimizer=true; "
        "`turbolm plan` shows what takes the memory"
    )
    plan = build_plan(grows(tmp_path, "no offload", zero_stage=0), detect_machine(), 2)
    with pytest.raises(RunError) as caught, memory_told(plan, "step 1"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "execution.zero_stage=1" in str(caught.value), "offload_optimizer is refused at stage 0, so not proposed"
    assert "offload" not in str(caught.value)
    changes = {"micro_batch": 32, "zero_stage": 3, "activation_checkpointing": "full", "offload_optimizer": True}
    plan = build_plan(grows(tmp_path, "none", **changes), detect_machine(), 2)
    with pytest.raises(RunError, match="Use more or larger GPUs"), memory_told(plan, "step 1"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="another"), memory_told(plan, "step 1"):
        raise RuntimeError("another")
