"""Parameter counts against the models that transformers builds (without memory, on the meta device)."""

from __future__ import annotations

from typing import Any

import pytest

from turbolm.plan.parameters import estimate_size

SMALL: dict[str, Any] = {"vocab_size": 128, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "pad_token_id": None}
GQA = SMALL | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": 128, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64}

CONFIGS: list[dict[str, Any]] = [
    {"model_type": "llama"},
    {"model_type": "llama", **SMALL},
    {"model_type": "llama", **GQA, "tie_word_embeddings": True},
    {"model_type": "llama", **GQA, "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    {"model_type": "llama", **SMALL, "num_key_value_heads": None, "head_dim": None},
    {"model_type": "mistral", "num_hidden_layers": 2},
    {"model_type": "mistral", **GQA, "head_dim": 8},
    {"model_type": "qwen2", "num_hidden_layers": 2},
    {"model_type": "qwen2", **GQA, "tie_word_embeddings": True},
    {"model_type": "qwen3", "num_hidden_layers": 2},
    {"model_type": "qwen3", **GQA, "attention_bias": True},
    {"model_type": "qwen3", **GQA, "head_dim": 16, "tie_word_embeddings": True},
    {"model_type": "gemma2", "num_hidden_layers": 2},
    {"model_type": "gemma2", **GQA, "head_dim": 32, "attention_bias": True, "tie_word_embeddings": False},
    {"model_type": "phi3", "num_hidden_layers": 2},
    {"model_type": "phi3", **GQA},
    {"model_type": "gpt2"},
    {"model_type": "gpt2", **GPT2},
    {"model_type": "gpt2", **GPT2, "n_inner": 100, "tie_word_embeddings": False},
    {"model_type": "gpt2", "vocab_size": 128, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    {"model_type": "gpt2", **GPT2, "intermediate_size": 100},  # not a key of GPT-2: without effect
    {"model_type": "gpt_neox", "num_hidden_layers": 2},
    {"model_type": "gpt_neox", **SMALL},
    {"model_type": "gpt_neox", **SMALL, "attention_bias": False, "tie_word_embeddings": True},
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: ",".join(f"{v}" for v in config.values())[:60])
def test_counts_match_the_model_that_transformers_builds(config: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    embedding = sum(size for name, size in sizes.items() if "embed" in name or "wte" in name or "wpe" in name)
    matrices = sum(
        p.numel() for name, p in model.named_parameters() if p.ndim == 2 and (".layers." in name or ".h." in name)
    )
    head = model.get_output_embeddings().weight

    counts = estimate_size(config)
    assert counts is not None
    assert counts.total == sum(sizes.values())
    assert counts.embedding == embedding
    assert counts.head == (0 if head is model.get_input_embeddings().weight else head.numel())
    assert counts.matmul == matrices + head.numel()


def test_published_models() -> None:
    llama = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
    llama |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    counts = estimate_size(llama)
    assert counts is not None
    assert counts.total == 8_030_261_248
    gpt2 = estimate_size({"model_type": "gpt2"})
    assert gpt2 is not None
    assert gpt2.total == 124_439_808


def test_attention_width() -> None:
    """Heads x head size x layers: Qwen 3's heads are wider than its hidden size, GPT-2's are not."""
    widths = [estimate_size(config) for config in ({"model_type": "qwen3", **GQA}, {"model_type": "gpt2"})]
    assert [size and size.attention_width for size in widths] == [4 * 128 * 2, 768 * 12]


def test_unknown_types_are_none_and_bad_sizes_are_named() -> None:
    assert estimate_size({"model_type": "mamba"}) is None
    assert estimate_size({}) is None
    with pytest.raises(
        ValueError, match=r"^model.config.hidden_size: expected a whole number of at least 1, got '4k'$"
    ):
        estimate_size({"model_type": "llama", "hidden_size": "4k"})
