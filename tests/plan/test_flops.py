"""FLOPs per token by hand and by torch's counter."""

from __future__ import annotations

from typing import Any

import pytest

from turbolm.plan.flops import span_of_documents, training_flops_per_token
from turbolm.plan.parameters import estimate_size
from turbolm.plan.profile import LayerKind, ModelProfile, mean_span

TINY = {"model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": None}


def by_formula(config: dict[str, Any], span: float) -> float:
    size = estimate_size(config)
    assert size is not None
    return training_flops_per_token(size, lambda *_: span)


def test_by_hand() -> None:
    # One layer: q 32x64, k and v 32x32 each, o 64x32, three of 32x48; the head 32x100.
    matmul = 2 * (32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 48) + 32 * 100
    assert matmul == 24_704
    assert by_formula(TINY, 10) == 6 * 24_704 + 12 * 2 * 64 * 10
    assert by_formula(TINY | {"tie_word_embeddings": True}, 0) == 6 * 24_704


def test_a_profile_counts_windows_and_chunks_and_only_layers_with_attention() -> None:
    """Documents of 10 and 4 tokens: every pair of a query and a key that a layer lets through, by hand."""
    layers = (
        LayerKind("full_attention", 2, 0, "full", None, 100.0, 16.0, ()),
        LayerKind("sliding_attention", 3, 0, "window", 4, 100.0, 16.0, ()),
        LayerKind("chunked_attention", 1, 0, "chunk", 4, 100.0, 8.0, ()),
        LayerKind("mamba", 5, 0, "none", None, 40.0, 0.0, ()),
    )
    profile = ModelProfile("test", (), 0, False, 50.0, layers, (), (), {})
    full = 55 + 10
    window = (1 + 2 + 3 + 4 * 7) + 10
    chunk = 10 + 10 + 3 + 10
    matrices = 50 + 2 * 100 + 3 * 100 + 100 + 5 * 40
    forward = 14 * matrices + 16 * (2 * full + 3 * window) + 8 * chunk
    assert 14 * training_flops_per_token(profile, span_of_documents([10, 4])) == pytest.approx(3 * forward)


def test_by_the_flop_counter_of_torch() -> None:
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in TINY.items() if key != "model_type"}
    config = AutoConfig.for_model("llama", attn_implementation="eager", **fields)
    model = AutoModelForCausalLM.from_config(config)
    batch, seq_len = 2, 24
    tokens = torch.randint(0, 100, (batch, seq_len))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    # Eager attention computes the whole square, so the span is the sequence.
    expected = by_formula(TINY, seq_len)
    assert counter.get_total_flops() == expected * batch * seq_len


def test_mean_span() -> None:
    assert mean_span([4]) == (1 + 2 + 3 + 4) / 4
    assert mean_span([1, 1, 1]) == 1
    assert mean_span([4, 2]) == (10 + 3) / 6
    assert mean_span([]) == 0
