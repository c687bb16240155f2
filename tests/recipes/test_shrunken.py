"""The small copy of every recipe trains 20 steps: all in one process, one after the other."""

from __future__ import annotations

import gc
import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.shrunken import NUM_STEPS, SEQ_LEN, SEQUENCES, VOCAB, shrink_recipe, write_corpus
from tests.world import run_world
from turbolm.data.prepare.build import prepare
from turbolm.plan.machine import Machine
from turbolm.plan.plan import build_plan
from turbolm.plan.rates import step_rates
from turbolm.recipe.contract import contract_of
from turbolm.recipe.load import load_recipe
from turbolm.recipe.schema import Recipe
from turbolm.shipped import recipes_by_name
from turbolm.train.run_directory import run_directory

NAMES = list(recipes_by_name())
GPUS = Machine(8, "NVIDIA H100 80GB HBM3", (9, 0), num_cpus=64, cpu_has_bf16=False, memory_bytes=2**40)


def _train(recipes: list[Recipe]) -> list[int | str]:
    """Train one recipe after another: each one's exit code, or what it said."""
    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from turbolm.train.worker import run_worker

    ends: list[int | str] = []
    torch.set_num_threads(1)
    torch.set_num_threads = lambda _: None  # in models this small, threads mostly wait for each other
    for recipe in recipes:
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        gc.collect()
        output = [os.dup(number) for number in (1, 2)]
        try:
            ends.append(run_worker(recipe))
        except Exception as error:  # the test tells of all of them
            ends.append(f"{type(error).__name__}: {error}")
        for number, before in zip((1, 2), output, strict=True):  # a run sends them to its log
            os.dup2(before, number)
    return ends


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    """The trained copies by name; recipes whose copies are the same, such as variants for other GPUs, share one."""
    folder = tmp_path_factory.mktemp("shrunken")
    write_corpus(folder)
    made = {name: shrink_recipe(name, folder) for name in NAMES}
    kinds = {name: recipe.model_copy(update={"name": "copy"}).model_dump_json() for name, recipe in made.items()}
    distinct = {kind: made[name] for name, kind in reversed(kinds.items())}
    for recipe in distinct.values():
        prepare(recipe, num_workers=1)
    ends = run_world(1, _train, list(distinct.values()), timeout_sec=600)[0]
    assert {recipe.name: end for recipe, end in zip(distinct.values(), ends, strict=True) if end != 0} == {}
    return {name: distinct[kind] for name, kind in kinds.items()}


def lines_of(recipe: Recipe) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have a training loss."""
    lines = map(json.loads, run_directory(recipe).metrics.read_text().splitlines())
    return [line for line in lines if "train/loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_small_copy_trains(name: str, copies: dict[str, Recipe]) -> None:
    recipe, lines = copies[name], lines_of(copies[name])
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert all(math.isfinite(line["train/loss"]) for line in lines)
    assert min(line["train/loss"] for line in lines[-5:]) < lines[0]["train/loss"]
    exported = json.loads((run_directory(recipe).path / "export" / "config.json").read_text())
    assert exported["vocab_size"] == VOCAB
    if recipe.model.rope_parameters is not None:
        theta = recipe.model.rope_parameters.rope_theta
        assert (exported["rope_parameters"]["rope_theta"], exported["max_position_embeddings"]) == (theta, SEQ_LEN)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_its_learning_rate_has_the_shape_of_the_full_recipe(name: str, copies: dict[str, Recipe]) -> None:
    """Halfway and a step before the end, the rate is the full run's in the middle of the same share of its budget."""
    lines, full = lines_of(copies[name]), build_plan(load_recipe(recipes_by_name()[name]), GPUS, GPUS.num_gpus)
    for step in (NUM_STEPS // 2, NUM_STEPS - 1):
        expected = step_rates(full, round(full.num_steps * (step - 0.5) / NUM_STEPS - 0.5)).lr
        assert lines[step - 1]["train/lr"] == pytest.approx(expected, rel=0.03), step


@pytest.mark.slow
def test_the_stages_of_a_mixture_are_those_of_the_full_recipe(copies: dict[str, Recipe]) -> None:
    full = build_plan(load_recipe(recipes_by_name()["smollm3-3b/pretrain"]), GPUS, 192)
    small = build_plan(copies["smollm3-3b/pretrain"], GPUS, 1)
    segments = [segment.weights for segment in full.curriculum.segments]
    assert len(segments) == 3
    assert [segment.weights for segment in small.curriculum.segments] == segments
    starts = [segment.first_step / small.num_steps for segment in small.curriculum.segments]
    # 3,450,000 and 4,198,000 of 4,720,000 steps; a step of the copy is a twentieth of its run.
    assert starts == pytest.approx([0, 3_450_000 / 4_720_000, 4_198_000 / 4_720_000], abs=1 / NUM_STEPS)
    assert all(one < other for one, other in pairwise(starts))


def test_a_copy_keeps_all_but_what_it_names(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    write_corpus(tmp_path, num_sources=2)
    copy = shrink_recipe("gpt2-124m/fineweb-muon", tmp_path)
    full = load_recipe(recipes_by_name()["gpt2-124m/fineweb-muon"])
    assert copy.optimizer == full.optimizer and copy.schedule.name == full.schedule.name == "wsd"
    assert contract_of(copy)["train"] == contract_of(full)["train"] | {
        "budget": NUM_STEPS * SEQUENCES * SEQ_LEN, "global_batch": SEQUENCES * SEQ_LEN, "precision": "fp32",
    }  # fmt: skip
    assert copy.execution.zero_stage == full.execution.zero_stage
    config = copy.model.config
    assert config is not None and (config["n_layer"], config["vocab_size"], config["n_embd"]) == (2, VOCAB, 64)
