"""What planning takes for plain without asking, Transformers accepts, and counts as the formula does."""

from __future__ import annotations

from typing import Any

import pytest

from turbolm.plan.parameters import estimate_size
from turbolm.plan.plain_config import is_plain

LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "vocab_size": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}

PLAIN: list[dict[str, Any]] = [
    {**LLAMA, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": True},
    {**LLAMA, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5, "initializer_range": 0.01},
    {**LLAMA, "hidden_act": "gelu_pytorch_tanh", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    {**LLAMA, "rope_parameters": LLAMA3, "max_position_embeddings": 64, "attention_dropout": 0.1, "use_cache": False},
    {"model_type": "gpt2"},
    {**GPT2, "n_positions": 64, "n_inner": 48, "activation_function": "relu", "layer_norm_epsilon": 1e-6},
    {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.1, "attn_pdrop": 0.2, "tie_word_embeddings": False},
]
NOT_PLAIN: list[dict[str, Any]] = [
    {"model_type": "mixtral"},
    {**LLAMA, "hiden_size": 32},
    {**LLAMA, "hidden_size": "32"},
    {**LLAMA, "hidden_size": True},
    {**LLAMA, "num_attention_heads": 3},
    {**LLAMA, "num_key_value_heads": 3},
    {**LLAMA, "num_attention_heads": 32},
    {**LLAMA, "num_hidden_layers": 10**6},
    {**LLAMA, "hidden_act": "gleu"},
    {**LLAMA, "rms_norm_eps": 1},
    {**LLAMA, "rope_parameters": {"rope_type": "default", "theta": 1e6}},
    {**LLAMA, "rope_parameters": {"rope_type": "default", "factor": 2.0}},
    {**LLAMA, "rope_parameters": {**LLAMA3, "rope_type": "yarn"}},
    {**LLAMA, "rope_theta": 1e6},
    {**GPT2, "n_ctx": 64},
    {**GPT2, "n_head": 3},
]


def test_plain_configurations_are_accepted_and_counted_alike() -> None:
    pytest.importorskip("torch")
    from turbolm.models.count import examine

    for config in PLAIN:
        assert is_plain(config), config
        answer, counts = examine(None, config), estimate_size(config)
        assert answer.problems == answer.notes == (), config
        assert answer.size is not None and counts is not None
        sizes = (answer.size.total, answer.size.embedding, answer.size.head)
        assert sizes == (counts.total, counts.embedding, counts.head)


@pytest.mark.parametrize("config", NOT_PLAIN, ids=lambda config: str(list(config.items())[-1]))
def test_everything_else_is_asked_about(config: dict[str, Any]) -> None:
    assert not is_plain(config)
