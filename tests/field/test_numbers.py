"""Numbers that cannot mean what they say: spans shorter than a step, and values that are suggested and not accepted."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from tests.train.harness import make_recipe
from turbolm.errors import UserError
from turbolm.launch.local import accelerate_config
from turbolm.plan.machine import Machine
from turbolm.plan.plan import build_plan
from turbolm.plan.rates import preview_steps
from turbolm.plan.spans import check_spans, span_notes
from turbolm.plan.summary import collect_summary
from turbolm.plan.text import render_summary
from turbolm.recipe.document import Problem
from turbolm.recipe.load import RecipeError, dump_recipe, load_recipe
from turbolm.recipe.schema import Recipe
from turbolm.train.fresh import start_fresh
from turbolm.train.run_contract import as_started, settle_contract
from turbolm.train.run_directory import run_directory
from turbolm.units import Span

CPUS = Machine(0, None, None, num_cpus=2, cpu_has_bf16=True, memory_bytes=2**34)
BATCH, BUDGET = 512, 51_200  # 100 steps
# Key, text, what is said. GitHub has the first kind as warmup_steps and save_steps of the Trainer, which are numbers.
CASES = [
    ("schedule.warmup", 50, "50 tokens are less than one step (512 tokens); write `50 steps` if you mean steps, or at"),
    ("schedule.warmup", "511", "at least 512"),
    ("schedule.warmup", 1, "write `1 step` if"),
    ("checkpoint.every", 20, "write `20 steps`"),
    ("checkpoint.every", 500, "tokens are less than one step (512 tokens); write at least 512"),  # 500 steps: too many
    ("checkpoint.keep_every", 10, "write `10 steps`"),
    ("evaluation.every", 10, "write `10 steps`"),
    ("schedule.weight_decay", {"start": 1, "end": 0, "over": 80}, "schedule.weight_decay.over: 80 tokens"),
    ("train.batch_ramp", {"start": 256, "over": 40}, "train.batch_ramp.over: 40 tokens are less than one step (256"),
    ("train.batch_ramp", {"at": {"0%": 256, "10": 512}}, "train.batch_ramp.at: 10 tokens are less than one step (256"),
    ("data.length_schedule", {"name": "growth", "start": 16, "over": 9}, "data.length_schedule.over: 9 tokens"),
    ("train.random_restarts", {"over": 5}, "train.random_restarts.over: 5 tokens"),
    ("schedule", {"name": "wsd", "decay": 20}, "schedule.decay: 20 tokens"),
    ("schedule", {"name": "warm_restarts", "cycle": 20}, "schedule.cycle: 20 tokens"),
]
FINE = [
    ("schedule.warmup", 0), ("schedule.warmup", "0 steps"), ("schedule.warmup", "0%"), ("schedule.warmup", 512),
    ("schedule", {"name": "wsd", "decay": 0}), ("checkpoint.every", "1 step"), ("evaluation.every", "0.1%"),
]  # fmt: skip


def recipe_with(folder: Path, key: str, value: Any, **train: Any) -> Recipe:
    section, _, name = key.partition(".")
    sections: dict[str, Any] = {"train": {"budget": BUDGET, "global_batch": BATCH, **train}}
    sections[section] = {**sections.get(section, {}), **({name: value} if name else value)}
    return make_recipe(folder, **sections)


@pytest.mark.parametrize(("key", "value", "told"), CASES)
def test_a_span_shorter_than_a_step_is_refused(key: str, value: Any, told: str, tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, key, value)
    for ask in (check_spans, as_started, start_fresh):
        with pytest.raises(UserError, match=re.escape(told)):
            ask(recipe)
    with pytest.raises(UserError, match=re.escape(told)):
        collect_summary(recipe, "r.yaml", [], accelerate_config)


@pytest.mark.parametrize(("key", "value"), FINE)
def test_none_and_a_whole_step_are_fine(key: str, value: Any, tmp_path: Path) -> None:
    check_spans(recipe_with(tmp_path, key, value))


def test_an_old_run_keeps_what_it_has(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, "schedule.warmup", 50)
    run = run_directory(recipe)
    run.path.mkdir(parents=True)
    settle_contract(run, recipe, "store")
    run.metrics.write_text('{"step": 1}\n')
    assert as_started(recipe)[0].schedule.warmup == Span(50, "tokens")


def test_generated_spans_come_to_the_steps_they_say(tmp_path: Path) -> None:
    """Spans x batches x ramps; what is said of each is counted here step by step."""
    rng, refused, told = random.Random(0), 0, 0
    for _ in range(300):
        bins = rng.choice([1, 3, 16])
        full, ramp = 32 * bins * 4, rng.choice([None, {"start": 32 * bins, "num_levels": 4, "over": "40%"}])
        amount = rng.choice([0, 1, 7, 31, 32, 100, full // 4 - 1, full // 4, full - 1, full, 5 * full + 1])
        warmup = rng.choice([amount, f"{rng.randrange(60)} steps", f"{rng.choice([0, 0.1, 1, 2.5, 30])}%"])
        recipe = recipe_with(tmp_path, "schedule.warmup", warmup, budget=50 * full, global_batch=full, batch_ramp=ramp)
        plan = build_plan(recipe, CPUS, world_size=1)
        steps = list(preview_steps(plan))
        ends, first = [step["tokens_seen"] for step in steps], steps[0]["tokens_seen"]
        is_short = isinstance(warmup, int) and 0 < warmup < first
        refusal = None
        try:
            check_spans(recipe)
        except UserError as error:
            refusal = str(error)
        assert (refusal is not None) == is_short, (warmup, first)
        if refusal is not None:
            refused += 1
            for text in re.findall(r"`(.+?)` if|at least (\d+)", refusal):
                check_spans(recipe_with(tmp_path, "schedule.warmup", text[0] or int(text[1]), budget=50 * full,
                                        global_batch=full, batch_ramp=ramp))  # fmt: skip
            continue
        unit = {"steps": full, "share": 50 * full, "tokens": 1}[recipe.schedule.warmup.unit]
        tokens = recipe.schedule.warmup.amount * unit
        counted = sum(end - (end - before) < tokens for before, end in zip([0, *ends], ends, strict=False))
        notes = [note for note in span_notes(recipe, plan.curriculum) if note.startswith("schedule.warmup")]
        if 0 < tokens < first:
            assert notes == [f"schedule.warmup: {recipe.schedule.warmup} is {tokens / first:.2g} of a step"]
        elif tokens > 0 and recipe.schedule.warmup.unit == "steps" and counted != recipe.schedule.warmup.amount:
            assert f"are {counted} steps of this run" in notes[0] or tokens >= 50 * full
        else:
            assert notes == [] or tokens >= 50 * full
        told += bool(notes)
    assert refused > 20 and told > 20


def test_what_the_plan_suggests_is_accepted(tmp_path: Path) -> None:
    """Each suggestion, written into the recipe, loads and plans."""
    rng, tried = random.Random(0), 0
    file = tmp_path / "recipe.yaml"
    lengths: list[Any] = [None, None, {"name": "growth", "start": 16}, {"name": "buckets", "smallest": 8}]
    while tried < 60:
        seq_len, processes = rng.choice([32, 64, 48]), rng.choice([1, 2, 3, 8])
        full = seq_len * processes * rng.choice([1, 2, 5])
        ramp = rng.choice(
            [None, None, {"start": seq_len * processes}, {"at": {"0%": seq_len * processes, "10%": full}}]
        )
        try:
            recipe = make_recipe(
                tmp_path,
                data={"seq_len": seq_len, "length_schedule": rng.choice(lengths)},
                train={"budget": rng.choice([1, 3, 40, 10**4, 10**7]) * full, "global_batch": full, "batch_ramp": ramp},
                cluster={"processes_per_node": processes},
                execution={"micro_batch": rng.choice(["auto", "auto", seq_len, full])},
                schedule={"warmup": rng.choice(["2%", full, 3 * full, "4 steps"])},
            )
            file.write_text(dump_recipe(recipe))
            summary = collect_summary(load_recipe(file), str(file), [], accelerate_config)
        except UserError:
            continue
        tried += 1
        text = render_summary(summary)
        suggested = re.findall(r"^  {2,}(optimizer\.lr|train\.global_batch) (\S+)", text, re.MULTILINE)
        assert [key for key, _ in suggested][:1] == ["optimizer.lr"]
        overrides = [f"{key}={value}" for key, value in suggested]
        for chosen in ([one] for one in overrides), [overrides]:
            for some in chosen:
                collect_summary(load_recipe(file, some), str(file), some, accelerate_config)


def problems_of(file: Path, overrides: list[str]) -> list[Problem]:
    try:
        load_recipe(file, overrides)
    except RecipeError as error:
        return error.problems
    return []


def test_the_nearest_batches_are_accepted(tmp_path: Path) -> None:
    rng, file, told = random.Random(0), tmp_path / "recipe.yaml", 0
    base = dump_recipe(make_recipe(tmp_path))
    for _ in range(150):
        file.write_text(base)
        overrides = {
            "train.global_batch": rng.randrange(20, 400), "train.budget": rng.randrange(50, 600),
            "execution.micro_batch": rng.choice(["auto", rng.randrange(1, 200)]),
        }  # fmt: skip
        given = [f"{key}={value}" for key, value in overrides.items()]
        problems = problems_of(file, given)
        for problem in problems:
            for value in re.findall(r"\d+", problem.message.partition("nearest: ")[2]):
                told += 1
                others = {one.key for one in problems} - {problem.key}
                left = {one.key for one in problems_of(file, [*given, f"{problem.key}={value}"])}
                assert left <= others, (given, problem.message)
    assert told > 50


GPT = {"model_type": "gpt2", "n_embd": 4096, "n_layer": 48, "n_head": 32, "n_positions": 2048, "vocab_size": 50304}


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "soap", "muon", "sgd"])
@pytest.mark.parametrize("fp8", ["off", "rowwise"])
def test_a_stage_that_fits_is_one_that_works(optimizer: str, fp8: str, tmp_path: Path) -> None:
    for gpus in (1, 4, 8, 64):
        sections: dict[str, Any] = {
            "model": {"config": GPT},
            "data": {"seq_len": 1024},
            "train": {"budget": 2**30, "global_batch": 2**20, "precision": "auto", "fp8": fp8},
            "optimizer": {"name": optimizer, "lr": 1e-3},
            "cluster": {"device": "auto", "gpu": "H100-80GB", "gpus_per_node": gpus},
            "execution": {"zero_stage": 1},
        }
        try:
            collect_summary(make_recipe(tmp_path, **sections), "r.yaml", [], accelerate_config)
            continue
        except (UserError, ValueError) as error:
            text = str(error)
        changed = {}
        if fits := re.search(r"zero_stage: (\d) fits", text):
            changed = {"zero_stage": int(fits[1])}
        elif "offload_optimizer=true" in text:
            changed = {"offload_optimizer": True}
        if changed:
            sections["execution"] |= changed
            recipe = make_recipe(tmp_path, **sections)
            (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
            load_recipe(tmp_path / "r.yaml")
            if "zero_stage" in changed:
                collect_summary(recipe, "r.yaml", [], accelerate_config)


KERNELS = [  # GitHub has both as errors of the first step: FlashAttention on a V100, and in fp32
    ({"device": "cpu"}, {"attention": "flash"}, {}, "execution.attention: flash needs CUDA, and this is a CPU"),
    ({"device": "cpu"}, {"attention": "varlen"}, {}, "execution.attention: varlen needs CUDA"),
    ({"device": "cpu"}, {"attention": "flex"}, {}, "execution.attention: flex cannot train on a CPU"),
    ({"device": "cpu"}, {"loss": "liger"}, {}, "execution.loss: liger needs CUDA"),
    ({"device": "cpu"}, {}, {"fp8": "rowwise"}, "train.fp8: rowwise needs a GPU"),
    ({"gpu": "V100-32GB"}, {"attention": "flash"}, {"precision": "fp16"}, "needs an Ampere GPU or a later one, got V1"),
    ({"gpu": "V100-32GB"}, {"attention": "varlen"}, {}, "needs an Ampere GPU or a later one, got V100-32GB"),
    ({"gpu": "A100-80GB"}, {"attention": "flash"}, {"precision": "fp32"}, "computes in bf16 and fp16, not in fp32"),
    ({"gpu": "A100-80GB"}, {"attention": "varlen", "zero_stage": 0}, {"precision": "auto"}, "not in fp32"),
    ({"gpu": "A100-80GB"}, {}, {"fp8": "rowwise", "precision": "bf16"}, "train.fp8: rowwise needs one of "),
    ({"gpu": "H100-80GB"}, {"attention": "flash", "loss": "liger"}, {"precision": "bf16", "fp8": "rowwise"}, None),
    ({"gpu": "V100-32GB"}, {"attention": "flex", "loss": "liger"}, {"precision": "fp16"}, None),
    ({"device": "auto"}, {"attention": "flash"}, {"precision": "auto"}, None),  # a machine that nobody described
]


@pytest.mark.parametrize(("cluster", "execution", "train", "told"), KERNELS)
def test_kernels_that_a_described_device_does_not_have(
    cluster: dict[str, Any], execution: dict[str, Any], train: dict[str, Any], told: str | None, tmp_path: Path
) -> None:
    """By loading the recipe, so that plan, submit and train refuse it alike, before a job waits in a queue."""
    file, plain = tmp_path / "r.yaml", make_recipe(tmp_path)
    file.write_text(dump_recipe(plain))
    described = {"device": "auto", "gpus_per_node": 1, **cluster} if "gpu" in cluster else cluster
    given = [f"{section}.{key}={value}" for section, values in (("cluster", described), ("execution", execution),
             ("train", train)) for key, value in values.items()]  # fmt: skip
    if told is None:
        load_recipe(file, given)
        return
    with pytest.raises(RecipeError, match=re.escape(told)):
        load_recipe(file, given)


def test_kernels_that_this_machine_does_not_have(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, cluster={"device": "auto"}, execution={"attention": "varlen", "loss": "liger"})
    with pytest.raises(UserError) as refusal:
        build_plan(recipe, CPUS)
    assert [line.partition(" ")[0] for line in str(refusal.value).splitlines()] == [
        "execution.attention:",
        "execution.loss:",
    ]
    old = Machine(1, "NVIDIA V100", (7, 0), num_cpus=2, cpu_has_bf16=False, memory_bytes=2**34)
    with pytest.raises(UserError, match="varlen needs an Ampere GPU or a later one, got NVIDIA V100"):
        build_plan(recipe, old)
