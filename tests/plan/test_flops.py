"""FLOPs per token by hand and by torch's counter."""

from __future__ import annotations

import pytest

from turbolm.plan.flops import training_flops_per_token
from turbolm.plan.profile import mean_span

TINY = {"model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": None}


def test_by_hand() -> None:
    # One layer: q 32x64, k and v 32x32 each, o 64x32, three of 32x48; the head 32x100.
    matmul = 2 * (32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 48) + 32 * 100
    assert matmul == 24_704
    assert training_flops_per_token(TINY, 10) == 6 * 24_704 + 12 * 2 * 64 * 10
    assert training_flops_per_token(TINY | {"tie_word_embeddings": True}, 0) == 6 * 24_704
    assert training_flops_per_token({"model_type": "mamba"}, 10) is None


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
    expected = training_flops_per_token(TINY, seq_len)
    assert expected is not None
    assert counter.get_total_flops() == expected * batch * seq_len


def test_mean_span() -> None:
    assert mean_span([4]) == (1 + 2 + 3 + 4) / 4
    assert mean_span([1, 1, 1]) == 1
    assert mean_span([4, 2]) == (10 + 3) / 6
    assert mean_span([]) == 0
