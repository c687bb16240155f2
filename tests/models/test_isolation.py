"""Documents packed in one row do not see each other, on the models people train; and the check that proves it works."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from turbolm.errors import UserError
from turbolm.models.attention import model_inputs
from turbolm.models.build import (
    build_config,
    build_model,
    carries_state_across_documents,
)
from turbolm.models.isolation import check_isolation, measure_leak
from turbolm.models.recompute import apply_activation_checkpointing
from turbolm.recipe.schema import Model

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2, **SHAPE},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16, **SHAPE},
    "mistral-sliding": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 6, **SHAPE},
}
LEAKING = {
    "bloom": {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4},  # ALiBi from the attention mask
    "opt": {"model_type": "opt", "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 64},
}  # fmt: skip
VOCAB, SEQ_LEN, SPLIT = 128, 32, 14
CPU = torch.device("cpu")


def make_model(config: dict[str, Any], attention: str, checkpointing: str = "none") -> PreTrainedModel:
    section = Model(config=config)
    completed = build_config(section, seq_len=SEQ_LEN, vocab_size=VOCAB, bos_token_id=0, eos_token_id=0)
    model = build_model(section, completed, seed=0, attention=attention)
    apply_activation_checkpointing(model, checkpointing)
    return model.train()


def packed_row(seed: int) -> dict[str, np.ndarray]:
    """Two documents in a row; the second is always the same."""
    first = np.random.default_rng(seed).integers(0, VOCAB, SPLIT)
    second = np.random.default_rng(99).integers(0, VOCAB, SEQ_LEN - SPLIT)
    positions = np.concatenate([np.arange(SPLIT), np.arange(SEQ_LEN - SPLIT)])
    return {"input_ids": np.concatenate([first, second])[None], "position_ids": positions[None]}


# Flex attention is compiled for every model, which takes 10 s each.
KERNELS = [(name, "sdpa") for name in CONFIGS] + [
    pytest.param(name, "flex", marks=[] if name == "llama" else pytest.mark.slow) for name in CONFIGS
]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(("name", "attention"), KERNELS)
def test_the_second_document_does_not_see_the_first(name: str, attention: str, checkpointing: str) -> None:
    model = make_model(CONFIGS[name], attention, checkpointing)
    with torch.set_grad_enabled(attention != "flex"):  # torch has no backward pass of flex attention on a CPU
        rows = [model(**model_inputs(packed_row(seed), attention, CPU)).logits[0, SPLIT:] for seed in (1, 2)]
        assert (rows[0] - rows[1]).abs().max() <= 1e-6
        alone = {key: value[:, SPLIT:] for key, value in packed_row(1).items()}
        separate = model(**model_inputs(alone, attention, CPU)).logits[0]
    assert (rows[0] - separate).abs().max() <= 1e-5, "nor does it lose sight of its own past"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_would_leak(name: str) -> None:
    """Transformers' default `use_cache` drops the document mask, in training mode too: why we always turn it off."""
    model = make_model(CONFIGS[name], "sdpa")
    inputs = [{**model_inputs(packed_row(seed), "sdpa", CPU), "use_cache": True} for seed in (1, 2)]
    rows = [model(**values).logits[0, SPLIT:] for values in inputs]
    assert (rows[0] - rows[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", LEAKING)
def test_the_check_refuses_models_that_leak(name: str) -> None:
    model = make_model(LEAKING[name], "eager")
    settings = {"vocab_size": VOCAB, "seq_len": SEQ_LEN, "attention": "eager", "device": CPU}
    assert measure_leak(model, **settings)[0] > 1e-3
    with pytest.raises(UserError, match="data.packing: with eager attention this model lets packed documents see"):
        check_isolation(model, precision="fp32", **settings)
    with pytest.raises(UserError):
        check_isolation(model.to(torch.bfloat16), precision="bf16", **settings)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_check_passes_models_that_isolate(precision: str) -> None:
    model = make_model(CONFIGS["llama"], "sdpa").to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    settings = {"vocab_size": VOCAB, "seq_len": SEQ_LEN, "attention": "sdpa", "device": CPU}
    assert check_isolation(model, precision=precision, **settings) <= 1e-6


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1}, "mamba carries a recurrent state"),
        ({"model_type": "llama", **SHAPE}, None),
    ],
)
def test_recurrent_models_are_known_before_they_run(config: dict[str, Any], reason: str | None) -> None:
    model = make_model(config, "eager")
    found = carries_state_across_documents(model.config, type(model))
    assert found is None if reason is None else reason in str(found)
