"""Other ways to run a recipe: what is shown, in what order, and what is not."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from turbolm.errors import UserError
from turbolm.plan.estimate import Estimate, estimate
from turbolm.plan.exchange import group_sizes
from turbolm.plan.explore import Asked, explore
from turbolm.plan.fitting import ways_that_fit
from turbolm.plan.footprint import estimate_footprint
from turbolm.plan.machine import Machine, described_machine
from turbolm.plan.plan import Plan, build_plan
from turbolm.plan.profile import Activations, Cost, Heads, LayerKind, LossBytes, ModelProfile, Peak, Tensor
from turbolm.plan.projection import project
from turbolm.plan.search import Candidate, Goal, search, search_lines
from turbolm.recipe.contract import contract_of
from turbolm.recipe.gpus import GPUS
from turbolm.recipe.load import load_recipe
from turbolm.report.projection import write_projection

RECIPE = str(Path(__file__).parents[2] / "recipes/llama3.1-8b/pretrain/config.yaml")
GPU_BYTES = GPUS["H100-80GB"].memory_bytes
HIDDEN, INNER, LAYERS, VOCABULARY = 4096, 14336, 32, 128256


def llama_8b() -> ModelProfile:
    """Llama 3.1 8B: shapes exact, bytes of activations about right (784 MiB a layer for 4,096 tokens are kept)."""
    shapes = {"q": (HIDDEN, HIDDEN), "k": (1024, HIDDEN), "v": (1024, HIDDEN), "o": (HIDDEN, HIDDEN)}
    shapes |= {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    tensors = [Tensor("embed", (VOCABULARY, HIDDEN), "embedding")]
    for layer in range(LAYERS):
        tensors += [Tensor(f"layers.{layer}.{name}.weight", shape, "matrix") for name, shape in shapes.items()]
    tensors.append(Tensor("head", (VOCABULARY, HIDDEN), "head"))
    matrix = sum(a * b for a, b in shapes.values())
    kept = {"none": 200_000.0, "selective": 100_000.0, "full": 2.0 * HIDDEN}
    twice = {"none": 0.0, "selective": 200_000.0, "full": 400_000.0}
    ways = tuple(
        Activations(mode, "flash", 2, Cost(kept[mode]), Peak((Cost(200_000.0),)), Cost(4e5), Cost(8e5 + twice[mode]))  # type: ignore[arg-type]
        for mode in kept
    )
    layer_kind = LayerKind("full_attention", LAYERS, matrix, "full", None, 2.0 * matrix, 4.0 * HIDDEN, ways)
    loss = LossBytes("chunked", 2, Cost(8192.0), Peak((Cost(0, per_row=8.0 * VOCABULARY),)), Peak(()), Cost(0))
    around = tuple(
        Activations(mode, kernel, 2, Cost(0), Peak(()), Cost(0), Cost(0))  # type: ignore[arg-type]
        for mode in kept
        for kernel in ("flash", "sdpa")
    )
    head = 2.0 * VOCABULARY * HIDDEN
    return ModelProfile("llama", tuple(tensors), 0, False, head, (layer_kind,), around, (loss,), {})


PROFILE = llama_8b()
ANY = Goal()


def machine_of(*overrides: str) -> tuple[object, Machine]:
    recipe = load_recipe(RECIPE, overrides)
    machine = described_machine(recipe)
    assert machine is not None
    return recipe, machine


def found_on(nodes: int, goal: Goal = ANY) -> list[Candidate]:
    recipe, machine = machine_of(f"cluster.num_nodes={nodes}", "cluster.price_per_gpu_hour=2")

    def estimator(plan: Plan) -> Estimate | None:
        return estimate(plan, PROFILE, machine)

    return search(recipe, machine, PROFILE, GPU_BYTES, estimator, goal)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def on_512_gpus() -> list[Candidate]:
    return found_on(64)


def test_the_best_come_first_and_what_does_not_fit_last(on_512_gpus: list[Candidate]) -> None:
    found = on_512_gpus
    assert len(found) > 20
    fits = [one.verdict == "FITS" for one in found]
    assert fits == sorted(fits, reverse=True) and any(fits) and not all(fits)
    times = [one.estimate.bill.run_sec for one in found if one.estimate]
    assert times == sorted(times)


def test_each_line_of_overrides_launches_what_it_promises(on_512_gpus: list[Candidate]) -> None:
    """Loaded again from its overrides, a candidate has the same memory and time, and the contract of the recipe."""
    found = on_512_gpus
    overrides = ["cluster.num_nodes=64", "cluster.price_per_gpu_hour=2"]
    contract = contract_of(load_recipe(RECIPE, overrides))
    for one in found[:3]:
        words = shlex.split(one.command(RECIPE, overrides, "submit"))
        assert words[:3] == ["turbolm", "submit", RECIPE]
        recipe, machine = machine_of(*words[3:])
        plan = build_plan(recipe, machine)  # type: ignore[arg-type]
        assert estimate_footprint(plan, PROFILE).verdict(GPU_BYTES) == "FITS"
        again = estimate(plan, PROFILE, machine)
        assert again is not None and one.estimate is not None
        assert again.bill.run_sec == pytest.approx(one.estimate.bill.run_sec)
        assert contract_of(recipe) == contract  # type: ignore[arg-type]


def test_others_lose_for_a_reason(on_512_gpus: list[Candidate]) -> None:
    found = on_512_gpus
    text = "\n".join(search_lines(found, Goal(), RECIPE, (), "submit"))
    assert "not calibrated" in text and "a model, not a measurement" in text
    best = found[0].values
    others = {0, 1, 2, 3} - {best["execution.zero_stage"]}
    assert all(
        f"execution.zero_stage={stage}:" in text
        for stage in others
        if any(one.values["execution.zero_stage"] == stage for one in found)
    )
    poor = "\n".join(search_lines(found, Goal(budget_usd=1.0), RECIPE, (), "submit"))
    assert "0 of them meet the goal" in poor and "costs" in poor


def test_what_does_not_fit_is_told_with_its_memory() -> None:
    recipe, machine = machine_of("cluster.gpu=A100-40GB")

    def estimator(plan: Plan) -> Estimate | None:
        return estimate(plan, PROFILE, machine)

    found = search(recipe, machine, PROFILE, GPUS["A100-40GB"].memory_bytes, estimator, ANY)  # type: ignore[arg-type]
    text = "\n".join(search_lines(found, ANY, RECIPE, (), "submit"))
    assert "execution.activation_checkpointing=none: DOES NOT FIT" in text


def test_with_a_deadline_the_cheapest_in_time_wins() -> None:
    month = 30 * 86400.0
    found = found_on(8, Goal(deadline_sec=month))
    assert {one.values["cluster.num_nodes"] for one in found} == {2, 4, 8, 16, 32, 64}
    in_time = [one for one in found if one.estimate and one.estimate.bill.run_sec <= month]
    assert found[0] is min(in_time, key=lambda one: one.estimate.bill.gpu_hours)  # type: ignore[union-attr, return-value]
    assert in_time[-1].values["cluster.num_nodes"] != 2, "two nodes take months"


def test_what_is_asked_wrongly_is_refused() -> None:
    for overrides, asked, expected in (
        ((), Asked(search=True, gpus=12), "--gpus: expected a multiple of cluster.gpus_per_node (8), got 12"),
        ((), Asked(gpus=16), "--gpus, --deadline and --budget-usd choose among execution plans; add --search"),
        ((), Asked(search=True, as_json=True), "--search prints text; leave out --json"),
        ((), Asked(project=True, steps=True), "leave out --search and --project"),
        ((), Asked(search=True, html=Path("a.html")), "--html draws projections; add --project"),
        (
            ("cluster.price_per_gpu_hour=null",),
            Asked(search=True, budget_usd=1000),
            "--budget-usd needs cluster.price_per_gpu_hour",
        ),
        (("cluster.gpu=null", "cluster.gpus_per_node=null"), Asked(search=True), "need cluster.gpu"),
    ):
        recipe = load_recipe(RECIPE, overrides)
        with pytest.raises(UserError, match=expected.replace("(", r"\(").replace(")", r"\)")):
            list(explore(recipe, RECIPE, overrides, asked, write_projection))


def test_projections_keep_the_batch_or_the_share_of_it() -> None:
    recipe, machine = machine_of()

    def verdict(plan: Plan) -> str:
        return estimate_footprint(plan, PROFILE).verdict(GPU_BYTES)

    strong, weak = (
        project(recipe, machine, lambda plan: estimate(plan, PROFILE, machine), verdict, weak=weak)  # type: ignore[arg-type]
        for weak in (False, True)
    )
    assert [one.num_gpus for one in strong] == [8 * 2**k for k in range(12)], "8 to 16,384"
    assert {one.global_batch_tokens for one in strong} == {4194304}
    assert strong[-1].estimate is None and "sequences" in strong[-1].remark, "4M tokens are 512 sequences of 8,192"
    assert strong[3].remark == "FITS"
    assert all(one.global_batch_tokens == 65536 * one.num_gpus for one in weak)
    rates = [one.estimate.bill.tokens_per_sec / one.num_gpus for one in weak if one.estimate]
    assert len(rates) == 12 and all(b <= a * 1.02 for a, b in zip(rates, rates[1:], strict=False))


SHARED = replace(PROFILE, heads=Heads(LAYERS, 32, 8, 128))
CONFIG = {"model_type": "llama"}
LONG = ("cluster.num_nodes=8", "data.seq_len=131072", "execution.sequence_parallel=8", "execution.micro_batch=131072")


def test_sequences_are_shared_where_there_are_fewer_than_gpus() -> None:
    """32 sequences of 131,072 tokens for 64 GPUs: one process cannot have one of its own."""
    recipe, machine = machine_of(*LONG)
    plan = build_plan(recipe, machine)  # type: ignore[arg-type]
    groups = group_sizes(plan, CONFIG, SHARED)
    assert groups == [1, 2, 4, 8]

    def estimator(plan: Plan) -> Estimate | None:
        return estimate(plan, SHARED, machine)

    found = search(recipe, machine, SHARED, GPU_BYTES, estimator, ANY, groups=groups)  # type: ignore[arg-type]
    assert {one.values["execution.sequence_parallel"] for one in found} == {2, 4, 8}
    assert found[0].verdict == "FITS"
    text = "\n".join(search_lines(found, ANY, RECIPE, LONG, "submit"))
    assert "sequences shared by 8" in text and "execution.sequence_parallel=2: +" in text
    for size in (2, 4, 8):
        one = next(one for one in found if one.values["execution.sequence_parallel"] == size)
        words = shlex.split(one.command(RECIPE, LONG, "submit"))
        again = build_plan(*machine_of(*words[3:]))  # type: ignore[arg-type]
        assert again.batch.sequence_parallel == size
        assert estimate_footprint(again, SHARED) == one.footprint
        micro = again.batch.micro_batch_bins
        assert micro < size, "as many sequences as processes need no exchange"


def test_groups_are_proposed_only_where_all_divides_and_the_type_is_known(on_512_gpus: list[Candidate]) -> None:
    assert {one.values["execution.sequence_parallel"] for one in on_512_gpus} == {1}

    def sizes(config: dict[str, object], profile: ModelProfile, *overrides: str) -> list[int]:
        return group_sizes(build_plan(*machine_of(*overrides)), config, profile)  # type: ignore[arg-type]

    assert sizes(CONFIG, SHARED) == [1, 2, 4, 8]
    assert sizes(CONFIG, replace(SHARED, heads=Heads(LAYERS, 36, 4, 128))) == [1, 2, 4]
    assert sizes(CONFIG, SHARED, "cluster.gpus_per_node=6", "train.global_batch=393216") == [1, 2]
    assert sizes(CONFIG, PROFILE) == [1], "heads are not known"
    assert sizes({"model_type": "mamba"}, SHARED) == [1]
    assert sizes({**CONFIG, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, SHARED) == [1]
    assert sizes(CONFIG, SHARED, "execution.attention=eager") == [1]


def test_sharing_sequences_makes_a_run_fit() -> None:
    recipe, machine = machine_of(*LONG, "execution.sequence_parallel=2", "execution.zero_stage=3")
    gpu_bytes = GPUS["A100-40GB"].memory_bytes

    def ways(*groups: int) -> str:
        return str(ways_that_fit(recipe, machine, SHARED, gpu_bytes, groups))  # type: ignore[arg-type]

    assert "execution.sequence_parallel=" in ways(1, 2, 4, 8)
    assert "execution.sequence_parallel=" not in ways()
