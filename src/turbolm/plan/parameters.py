"""Compute the size of a model from its Hugging Face configuration, without building it. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from turbolm.recipe.model_config import heads_of


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model, each weight counted once."""

    total: int
    embedding: int  # the token embedding, and learned positions if any
    head: int  # the output projection; 0 when it is the token embedding
    source: str  # "formula" or "counted"
    idle: int  # weights of experts that a token does not pass through
    attention_width: int  # heads x head size, summed over layers
    matmul: int  # weights a token is multiplied with, including the head even if tied


@dataclass(frozen=True)
class _Family:
    """The differences between model types. A bias is always there, never, or decided by a configuration key."""

    sizes: tuple[int, int, int | None, int, int]  # defaults: vocabulary, hidden, inner, layers, heads
    defaults: Mapping[str, Any] = field(default_factory=dict)  # other defaults of the class in transformers 5
    aliases: Mapping[str, str] = field(default_factory=dict)  # its own names for the common settings
    inner_key: str = "intermediate_size"
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    gated: bool = True  # three matrices in the MLP, not two
    norms_per_layer: int = 2
    norm_bias: bool = False  # LayerNorm, not RMSNorm
    query_key_norm: bool = False
    learned_positions: bool = False
    own_head_dim: bool = True  # False: always hidden_size / heads, and no grouped queries

    def values(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Merge the configuration over the defaults, under the common names."""
        names = ("vocab_size", "hidden_size", self.inner_key, "num_hidden_layers", "num_attention_heads")
        own = {self.aliases.get(name, name): value for name, value in config.items()}
        if not self.own_head_dim:
            own.pop("head_dim", None)
        return {**dict(zip(names, self.sizes, strict=True)), **self.defaults, **own}


_USUAL_HEAD_DIM = 128
_ATTENTION_BIAS: dict[str, Any] = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
_LAYER_NORM: dict[str, Any] = {"mlp_bias": True, "gated": False, "norm_bias": True, "own_head_dim": False}
_GPT2_NAMES = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
_FAMILIES = {
    "llama": _Family((32000, 4096, 11008, 32, 32), mlp_bias="mlp_bias", **_ATTENTION_BIAS),
    "mistral": _Family((32000, 4096, 14336, 32, 32), {"num_key_value_heads": 8}),
    "qwen2": _Family((151936, 4096, 22016, 32, 32), {"num_key_value_heads": 32}, qkv_bias=True),
    "qwen3": _Family(
        (151936, 4096, 22016, 32, 32),
        {"num_key_value_heads": 32, "head_dim": 128},
        query_key_norm=True,
        **_ATTENTION_BIAS,
    ),
    "gemma2": _Family(
        (256000, 2304, 9216, 26, 8),
        {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
        norms_per_layer=4,
        **_ATTENTION_BIAS,
    ),
    "phi3": _Family((32064, 3072, 8192, 32, 32)),
    "gpt2": _Family(
        (50257, 768, None, 12, 12),
        {"max_position_embeddings": 1024, "tie_word_embeddings": True},
        {**_GPT2_NAMES, "n_positions": "max_position_embeddings"},
        inner_key="n_inner",
        qkv_bias=True,
        out_bias=True,
        learned_positions=True,
        **_LAYER_NORM,
    ),
    "gpt_neox": _Family((50432, 6144, 24576, 44, 64), {"attention_bias": True}, **_ATTENTION_BIAS, **_LAYER_NORM),
}


def has_no_experts(config: Mapping[str, Any]) -> bool:
    """Return whether the model type is one of the dense ones that are known here; others may have experts."""
    return config.get("model_type") in _FAMILIES


def estimate_size(config: Mapping[str, Any]) -> ModelSize | None:
    """Return the size of a causal language model, or None for a model type without a formula here.

    Raises ValueError for a size that is not a positive whole number.
    """
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is None or config.get("add_cross_attention"):
        return None
    values = family.values(config)
    size = _reader(values)

    def bias(which: bool | str, width: int) -> int:
        return width if (values.get(which) if isinstance(which, str) else which) else 0

    vocabulary, hidden = map(size, ("vocab_size", "hidden_size"))
    layers, heads, kv_heads, head_dim = _attention_shape(family, values)
    inner = size(family.inner_key, 4 * hidden)
    queries, keys_values = heads * head_dim, 2 * kv_heads * head_dim
    num_wide = 2 if family.gated else 1
    matrices = hidden * (queries + keys_values) + queries * hidden + (num_wide + 1) * hidden * inner
    biases = (
        bias(family.qkv_bias, queries + keys_values)
        + bias(family.out_bias, hidden)
        + bias(family.mlp_bias, num_wide * inner + hidden)
    )
    norm = 2 * hidden if family.norm_bias else hidden
    norms = family.norms_per_layer * norm + (2 * head_dim if family.query_key_norm else 0)
    positions = size("max_position_embeddings") if family.learned_positions else 0
    embedding = (vocabulary + positions) * hidden
    head = 0 if values.get("tie_word_embeddings") else vocabulary * hidden
    return ModelSize(
        total=embedding + head + layers * (matrices + biases + norms) + norm,
        embedding=embedding,
        head=head,
        source="formula",
        idle=0,
        attention_width=layers * queries,
        matmul=layers * matrices + vocabulary * hidden,
    )


def attention_shape(config: Mapping[str, Any]) -> tuple[int, int, int, int] | None:
    """Return layers, heads of queries, heads of keys and the size of a head; None for a type without a formula here.

    Raises ValueError as `estimate_size` does.
    """
    family = _FAMILIES.get(str(config.get("model_type")))
    return None if family is None else _attention_shape(family, family.values(config))


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Return the size of a head that a recipe's configuration names or its type has by default, or a usual one."""
    family = _FAMILIES.get(str(config.get("model_type")))
    found = heads_of((family.values(config) if family else config).get)
    return found[1] if found else _USUAL_HEAD_DIM


def _attention_shape(family: _Family, values: Mapping[str, Any]) -> tuple[int, int, int, int]:
    size = _reader(values)
    layers, _, heads = map(size, ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    size("head_dim", 1)  # raises where it is no size
    found = heads_of(values.get)
    assert found is not None
    return layers, heads, size("num_key_value_heads", heads) if family.own_head_dim else heads, found[1]


def _reader(values: Mapping[str, Any]) -> Callable[..., int]:
    def size(name: str, fallback: int | None = None) -> int:
        value = values.get(name)
        value = fallback if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"model.config.{name}: expected a whole number of at least 1, got {value!r}")
        return value

    return size
