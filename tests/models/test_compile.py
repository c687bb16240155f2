"""Compiled models give what they gave before, from one graph for each sequence length (and one more for evaluation)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch._inductor import config as inductor_config

from tests.models.test_isolation import CONFIGS, VOCAB, make_model, packed_sequence
from turbolm.data.batch.collate import fill_cu_seqlens
from turbolm.errors import UserError
from turbolm.models import attention as attention_module
from turbolm.models.attention import model_inputs
from turbolm.models.compile import apply_compile, compilations

CPU = torch.device("cpu")
LENGTHS = (16, 32)


def sequences(seq_len: int, num_documents: list[int], seed: int) -> dict[str, np.ndarray]:
    """As many sequences as numbers are given, each of so many documents."""
    generator = np.random.default_rng(seed)
    positions = [
        np.concatenate([np.arange(len(part)) for part in np.array_split(np.arange(seq_len), number)])
        for number in num_documents
    ]
    return {
        "input_ids": generator.integers(0, VOCAB, (len(num_documents), seq_len)),
        "position_ids": np.stack(positions),
    }


def batches(seq_len: int) -> list[dict[str, np.ndarray]]:
    """Micro-batches of 64 tokens. Transformers leaves the mask out where every sequence is one document."""
    num_sequences = 64 // seq_len
    return [
        sequences(seq_len, [1 + (seed + number) % 3 * (seed > 0) for number in range(num_sequences)], seed)
        for seed in range(4)
    ]


CASES = [("layers", "none", "llama", "eager")] + [
    pytest.param(mode, checkpointing, name, "aot_eager", marks=pytest.mark.slow)
    for mode in ("model", "layers")
    for checkpointing in ("none", "full")
    for name in ("llama", "gpt2")
]


@pytest.mark.parametrize(("mode", "checkpointing", "name", "backend"), CASES)
def test_one_compilation_for_each_length_and_one_more_to_evaluate(
    mode: str, checkpointing: str, name: str, backend: str
) -> None:
    plain = make_model(CONFIGS[name], "sdpa", checkpointing)
    compiled = make_model(CONFIGS[name], "sdpa", checkpointing)
    apply_compile(compiled, mode, backend=backend)
    for _ in range(2):  # lengths come back late in a schedule
        for seq_len in LENGTHS:
            for batch in batches(seq_len):
                norms = []
                for model in (plain, compiled):
                    model.zero_grad()
                    logits = model(**model_inputs(batch, "sdpa", CPU)).logits
                    logits.square().mean().backward()
                    norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
                torch.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=1e-7)
    assert compilations.count == len(LENGTHS)
    assert compilations.take_new()[0] == len(LENGTHS) and compilations.take_new() == (0, 0.0)
    compiled.eval()
    with torch.no_grad():
        for seq_len in (*LENGTHS, *LENGTHS):
            for batch in batches(seq_len):
                got = compiled(**model_inputs(batch, "sdpa", CPU)).logits
                torch.testing.assert_close(got, plain(**model_inputs(batch, "sdpa", CPU)).logits)
    assert compilations.count == 2 * len(LENGTHS)


@pytest.mark.parametrize("mode", ["model", pytest.param("layers", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["mistral-sliding", *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS)])
def test_documents_stay_apart(name: str, mode: str) -> None:
    model = make_model(CONFIGS[name], "sdpa")
    apply_compile(model, mode, backend="eager")
    split = int(np.flatnonzero(packed_sequence(1)["position_ids"][0] == 0)[1])
    first, second = (model(**model_inputs(packed_sequence(seed), "sdpa", CPU)).logits[0, split:] for seed in (1, 2))
    assert (first - second).abs().max() <= 1e-6
    assert compilations.count >= 1


@torch.library.custom_op("turbolm_test::count_slices", mutates_args=())
def count_slices(query: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Something that depends on how many slices there are."""
    return query * cu_seqlens.shape[0]


@count_slices.register_fake
def _(query: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(query)


def with_boundaries(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As `collate` makes a micro-batch for what is compiled; no sequence of `batches` has more than 3 documents."""
    positions = batch["position_ids"]
    ends = np.append(np.flatnonzero(positions.ravel() == 0)[1:], positions.size)
    return {**batch, "cu_seqlens": fill_cu_seqlens(ends, 3 * len(positions))}


@pytest.mark.parametrize("mode", ["layers", pytest.param("model", marks=pytest.mark.slow)])
def test_slices_compile_a_few_sizes_at_most(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The varlen kernel needs a GPU; an operator that takes the same boundaries stands in for it."""

    def forward(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[Any, None]:
        assert mask is None
        scaled = query / kwargs["max_length_q"]  # a number: another one compiles anew
        return count_slices(scaled, kwargs["cu_seq_lens_q"]).transpose(1, 2).contiguous(), None

    name = attention_module.ATTENTION_NAMES["varlen"]
    monkeypatch.setitem(attention_module.AttentionInterface._global_mapping, name, forward)
    model = make_model(CONFIGS["llama"], "varlen")
    apply_compile(model, mode, backend="eager")
    sizes, numbers = set(), set()
    for seq_len in (*LENGTHS, *LENGTHS):
        for batch in batches(seq_len):
            inputs = model_inputs(with_boundaries(batch), "varlen", CPU)
            model(**inputs)
            sizes.add((seq_len, len(inputs["cu_seq_lens_q"]), inputs["max_length_q"]))
            numbers.add((seq_len, np.count_nonzero(batch["position_ids"] == 0)))
    assert compilations.count == len(sizes) < len(numbers)
    assert {size[1:] for size in sizes if size[0] == 16} <= {(5, 16), (9, 16), (13, 16)}  # 4 to 12 slices


def test_a_model_that_is_not_one_graph_is_refused() -> None:
    model = make_model(CONFIGS["llama"], "sdpa")
    model.model.layers[0].mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    apply_compile(model, "layers", backend="eager")
    with pytest.raises(UserError, match=r"execution\.compile: llama cannot be compiled by layers: .*; use none"):
        model(**model_inputs(packed_sequence(1), "sdpa", CPU))


def test_a_cpu_without_a_compiler_is_refused() -> None:
    # Not through monkeypatch, which would leave torch without the setting afterwards.
    without = inductor_config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        apply_compile(make_model(CONFIGS["llama"], "sdpa"), "model")
