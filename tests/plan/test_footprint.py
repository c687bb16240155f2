"""Memory of a GPU with activations: the profile, the verdict, and what fits instead. No torch."""

from __future__ import annotations

import re
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.models.record_profiles import requests
from turbolm.errors import UserError
from turbolm.plan.flops import span_of_documents, training_flops_per_token
from turbolm.plan.footprint import PARTS, estimate_activations
from turbolm.plan.machine import described_machine
from turbolm.plan.parameters import estimate_size
from turbolm.plan.plan import build_plan
from turbolm.plan.profile import Cost, Heads, ModelProfile, Peak, chunk_rows, mean_span
from turbolm.plan.profiles import find_profile
from turbolm.plan.summary import Summary, collect_summary
from turbolm.plan.text import render_summary
from turbolm.recipe.load import load_recipe

REPOSITORY = Path(__file__).parents[2]
LLAMA_8B = str(REPOSITORY / "recipes/llama3.1-8b/pretrain/config.yaml")
TOO_LARGE = ("execution.zero_stage=1", "execution.micro_batch=16384", "cluster.gpu=A100-40GB")


def summary_of(*overrides: str) -> Summary:
    return collect_summary(load_recipe(LLAMA_8B, overrides), LLAMA_8B, overrides, lambda *_: {})


def profile_8b() -> ModelProfile:
    profile = summary_of().profile
    assert profile is not None
    return profile


@pytest.mark.parametrize("request_", list(requests().values()), ids=lambda one: one["config"]["model_type"])
def test_every_recipe_has_a_profile_that_survives_json(request_: dict, tmp_path: Path) -> None:  # type: ignore[type-arg]
    profile, why = find_profile(request_["config"], request_["dropout"], tmp_path, may_trace=False)
    assert profile is not None, why
    assert ModelProfile.from_json(profile.to_json()) == profile
    lengths = [100, 4000]
    size = estimate_size(request_["config"])
    if size is None:  # a type without a formula: experts, or layers that see a window
        assert request_["config"]["model_type"] in ("gemma3_text", "olmo2", "olmoe", "qwen3_moe", "smollm3")
        return
    of_profile, by_formula = (training_flops_per_token(one, span_of_documents(lengths)) for one in (profile, size))
    assert of_profile == pytest.approx(by_formula, rel=1e-9)


def test_published_parameters_and_bytes_of_8b() -> None:
    profile = profile_8b()
    assert profile.num_parameters == 8_030_261_248
    assert profile.parameters_by_kind() == {
        "embedding": 128256 * 4096,
        "head": 128256 * 4096,
        "matrix": 32 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336),
        "vector": 65 * 4096,
        "expert": 0,
    }
    # With full recomputation a layer keeps its input; without, 784.5 MiB for 4,096 tokens were measured before.
    (layer,) = profile.layers
    assert layer.at("full", "flash", 2).saved == Cost(per_token=2 * 4096)
    assert layer.at("none", "flash", 2).saved.at(4096, 4096) / 2**20 == pytest.approx(784.5, abs=0.1)


def test_mean_span_counts_pairs() -> None:
    """Against every pair of a query and a key that a mask lets through."""
    for kind, limit in (("full", None), ("window", 3), ("chunk", 3)):
        for lengths in ([1], [7], [3, 8, 2], [9, 9]):
            pairs = sum(
                1
                for length in lengths
                for query in range(length)
                for key in range(query + 1)
                if kind == "full"
                or (kind == "window" and query - key < 3)
                or (kind == "chunk" and query // 3 == key // 3)
            )
            assert mean_span(lengths, kind, limit) == pairs / sum(lengths)
    assert mean_span([]) == 0


def test_peaks_and_chunks() -> None:
    peak = Peak((Cost(fixed=100.0), Cost(per_token=1.0)))
    assert [peak.at(tokens, 8) for tokens in (1, 100, 300)] == [100, 100, 300]
    assert Peak(()).at(1, 1) == 0
    assert chunk_rows("full", 4096, 100, 8, "cuda") == 0
    assert chunk_rows("chunked", 4096, 2**17, 8, "cuda") == 1024  # 2^27 logits
    assert chunk_rows("chunked", 4097, 2**17, 8, "cuda") == 820  # five equal chunks, not four and one row
    assert chunk_rows("liger", 16384, 32000, 4096, "cuda") == 2048  # the example in Liger's source


def test_a_recipe_that_does_not_fit_is_refused_with_three_ways_that_fit() -> None:
    with pytest.raises(UserError) as caught:
        summary_of(*TOO_LARGE)
    ways = re.findall(r"fits with (.*) \(", str(caught.value))
    assert len(ways) == 3, str(caught.value)
    for way in ways:
        found = summary_of(*TOO_LARGE, *way.split())
        assert found.footprint is not None and found.gpu_memory_bytes == 40 * 2**30
        assert found.footprint.verdict(found.gpu_memory_bytes) == "FITS"
        assert "FITS: " in render_summary(found)


def test_components_add_up_and_move_with_their_causes() -> None:
    base = summary_of("execution.activation_checkpointing=none").footprint
    assert base is not None
    parts = (base.weights, base.gradients, base.master, base.optimizer, base.gathered, base.buckets, base.copies)
    assert sum(parts) == base.state_bytes > 0
    parts += (base.saved, base.working, base.loss, base.context, base.margin)
    assert sum(parts) == base.total_bytes == base.counted_bytes + base.context + base.margin
    numbers = {name for name, value in asdict(base).items() if type(value) is int}
    assert numbers == {*PARTS, "offloaded", "host_bytes"}, "every figure of the GPU has a name on the page"
    recomputed = summary_of("execution.activation_checkpointing=full").footprint
    offloaded = summary_of("execution.activation_checkpointing=offloaded", "execution.compile=none").footprint
    assert recomputed is not None and offloaded is not None
    assert offloaded.total_bytes < recomputed.total_bytes < base.total_bytes
    assert offloaded.offloaded == 32 * 8192 * 4096 * 2  # the input of each layer


def test_activations_of_shared_sequences_fall_with_the_group() -> None:
    """But for the output of attention, kept on both sides of the exchange, and keys repeated for 16 processes."""

    def saved(shared_by: int, *overrides: str) -> float:
        asked = (f"execution.sequence_parallel={shared_by}", "execution.activation_checkpointing=none", *overrides)
        recipe = load_recipe(LLAMA_8B, asked)
        machine = described_machine(recipe)
        assert machine is not None
        return estimate_activations(build_plan(recipe, machine), profile_8b()).saved

    assert profile_8b().heads == Heads(32, 32, 8, 128)
    tokens, layers, bf16 = 8192, 32, 2
    for shared_by, kept in ((2, 4096), (8, 4096), (16, 4096 + 2 * 8 * 128)):
        extra = layers * tokens * kept * bf16
        assert shared_by * saved(shared_by) == pytest.approx(saved(1) + extra, rel=1e-4)
    masks = layers * 2 * 8192 * 8192  # in bf16, one a layer, of the whole sequence on every process
    dense = [saved(shared_by, "execution.attention=sdpa") for shared_by in (1, 4)]
    assert 4 * (dense[1] - masks) == pytest.approx(dense[0] - masks + layers * tokens * 4096 * bf16, rel=1e-3)


def test_every_second_layer_is_halfway() -> None:
    def saved(kind: str) -> float:
        overrides = (f"execution.activation_checkpointing={kind}",)
        recipe = load_recipe(LLAMA_8B, overrides)
        machine = described_machine(recipe)
        assert machine is not None
        return estimate_activations(build_plan(recipe, machine), profile_8b()).saved

    assert saved("2") == pytest.approx((saved("none") + saved("full")) / 2, rel=1e-6)


def test_compiled_code_is_an_upper_bound_and_is_not_refused() -> None:
    found = summary_of("execution.compile=layers", "execution.micro_batch=16384", "cluster.gpu=A100-40GB")
    assert found.footprint is not None and found.footprint.is_upper_bound
    assert "an upper bound" in render_summary(found)


def test_a_way_to_run_that_was_not_traced_is_noted() -> None:
    found = summary_of("execution.attention=eager")
    assert found.footprint is None
    assert [note for note in found.notes if note.startswith("activations are not estimated: the model was not traced")]


def test_a_tracer_that_did_not_end_is_asked_again_and_a_refusal_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"model_type": "llama", "hidden_size": 24}
    ends = [
        subprocess.TimeoutExpired("tracer", 300),
        subprocess.CompletedProcess("tracer", -9, "", ""),
        subprocess.CompletedProcess("tracer", 0, '{"problem": "mixes tokens"}\n', ""),
    ]

    def run(*_: Any, **__: Any) -> Any:
        end = ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    monkeypatch.setattr(subprocess, "run", run)
    why = [find_profile(config, 0.0, tmp_path)[1] for _ in range(4)]
    assert why == ["tracing takes more than 300 s", "the tracer failed: exit code -9", "mixes tokens", "mixes tokens"]
    assert not ends
