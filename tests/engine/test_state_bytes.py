"""Tensors that DeepSpeed really holds, between two micro-batches and in the update, against `plan/zero_memory.py`.

benchmarks/planner.py does the same for more models; here a new version of DeepSpeed that holds others fails.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
from benchmarks import planner

from tests.world import run_world
from turbolm.plan.machine import Machine
from turbolm.plan.plan import build_plan
from turbolm.recipe.schema import Recipe

CONFIG = {"model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 160}
CONFIG |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CELLS = [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]


def plan_of(stage: int, precision: str) -> Any:
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "model": {"config": CONFIG},
            "tokenizer": {"train": {}},
            "data": {"seq_len": 32},
            "train": {"budget": "1M", "global_batch": 4 * 64, "precision": precision},
            "cluster": {"device": "cpu"},
            "execution": {"zero_stage": stage, "micro_batch": 64, "communication_bucket": 20_000, "loss": "full"},
        }
    )
    machine = Machine(0, None, None, 2, cpu_has_bf16=True, memory_bytes=0)
    return build_plan(recipe, machine, world_size=2)


def count(cells: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """Bytes of all tensors of this rank: between the micro-batches of the second step, and at most in its update."""
    found = []
    for cell in cells:
        found.append(_count(*cell))
        gc.collect()  # once more than _tensor_bytes does: finalizers keep some tensors for the first time
    return found


def _count(stage: int, precision: str) -> tuple[int, int]:
    plan = plan_of(stage, precision)
    inputs, updating = planner._inputs(plan, CONFIG["vocab_size"], "sdpa"), [0]
    before = planner._tensor_bytes()
    engine = planner._engine(plan, "sdpa")
    for step in range(2):
        for is_boundary in (False, True):
            if step and is_boundary:
                between = planner._tensor_bytes() - before
                engine.optimizer.register_step_pre_hook(lambda *_: updating.append(planner._tensor_bytes() - before))
            objective, *_ = engine(**inputs)
            engine.backward_and_step(objective / 128, is_boundary=is_boundary)
            del objective
    engine.deepspeed_engine.destroy()
    return between, max(updating)


@pytest.mark.parametrize(
    "cells", [CELLS[2:4], pytest.param([*CELLS[:2], *CELLS[4:]], marks=pytest.mark.slow)], ids=["some", "others"]
)
def test_the_planner_counts_the_tensors_that_deepspeed_holds(cells: list[tuple[int, str]]) -> None:
    import torch

    from turbolm.models.config import make_config
    from turbolm.models.profile import _build, _tensors
    from turbolm.plan.zero_memory import estimate_zero_memory

    tensors = list(_tensors(_build(make_config(CONFIG, None), "sdpa", torch.float32)))
    by_rank = run_world(2, count, cells)
    for at, cell in enumerate(cells):
        state = estimate_zero_memory(tensors, plan_of(*cell))
        always = state.weights + state.master + state.optimizer
        resting, updating = state.resting, state.updating
        expected = (
            always + state.small_weights + resting.gradients + resting.buckets,
            always + updating.gradients + updating.buckets + updating.copies,
        )
        counted = tuple(max(found[at][moment] for found in by_rank) for moment in (0, 1))
        assert counted == pytest.approx(expected, rel=0.005), cell
