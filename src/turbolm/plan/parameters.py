"""Parameter counts from a Hugging Face configuration, without building the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """The shape of a decoder-only transformer, with the defaults of its configuration class filled in."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_learned_positions: int  # 0 with rotary positions
    tied_head: bool

    @property
    def attention_width(self) -> int:
        """Heads times their size: the width of the queries, which need not be `hidden_size`."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class ParameterCounts:
    """How many parameters a model has, each weight counted once."""

    total: int
    embedding: int  # token embedding, and the positions where they are learned
    head: int  # output projection; 0 when it is the token embedding
    per_layer: int
    non_embedding: int  # total - embedding - head: the layers and the final norm
    matmul: int  # weights a token is multiplied with: the matrices of the layers, and the head even when tied


@dataclass(frozen=True)
class _Family:
    """What tells one model type from another. A bias is always there, never, or where a configuration key says so."""

    defaults: Mapping[str, Any]  # those of the configuration class in transformers 5
    aliases: Mapping[str, str] = field(default_factory=dict)  # its own names for the common ones
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


def _sizes(vocab: int, hidden: int, inner: int | None, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | ({} if inner is None else {"intermediate_size": inner}) | others


_FAMILIES = {
    "llama": _Family(
        _sizes(32000, 4096, 11008, 32, 32, attention_bias=False, mlp_bias=False, tie_word_embeddings=False),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "mistral": _Family(
        _sizes(32000, 4096, 14336, 32, 32, num_key_value_heads=8, tie_word_embeddings=False),
    ),
    "qwen2": _Family(
        _sizes(151936, 4096, 22016, 32, 32, num_key_value_heads=32, tie_word_embeddings=False),
        qkv_bias=True,
    ),
    "qwen3": _Family(
        _sizes(
            151936,
            4096,
            22016,
            32,
            32,
            num_key_value_heads=32,
            head_dim=128,
            attention_bias=False,
            tie_word_embeddings=False,
        ),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        query_key_norm=True,
    ),
    "gemma2": _Family(
        _sizes(
            256000,
            2304,
            9216,
            26,
            8,
            num_key_value_heads=4,
            head_dim=256,
            attention_bias=False,
            tie_word_embeddings=True,
        ),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        norms_per_layer=4,
    ),
    "phi3": _Family(
        _sizes(32064, 3072, 8192, 32, 32, tie_word_embeddings=False),
    ),
    "gpt2": _Family(
        _sizes(50257, 768, None, 12, 12, max_position_embeddings=1024, tie_word_embeddings=True),
        aliases={
            "n_embd": "hidden_size",
            "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads",
            "n_positions": "max_position_embeddings",
        },
        inner_key="n_inner",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated=False,
        norm_bias=True,
        learned_positions=True,
        own_head_dim=False,
    ),
    "gpt_neox": _Family(
        _sizes(50432, 6144, 24576, 44, 64, attention_bias=True, tie_word_embeddings=False),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias=True,
        gated=False,
        norm_bias=True,
        own_head_dim=False,
    ),
}


def read_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """The shape a configuration describes, or None for a model type that is not known here.

    Raises ValueError for a size that is not a positive whole number.
    """
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is None or config.get("add_cross_attention"):
        return None
    values = _values(family, config)

    def size(name: str, fallback: int | None = None) -> int:
        value = values.get(name)
        value = fallback if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"model.config.{name}: expected a whole number of at least 1, got {value!r}")
        return value

    hidden_size, num_heads = size("hidden_size"), size("num_attention_heads")
    head_dim = hidden_size // num_heads
    return Architecture(
        model_type=str(config["model_type"]),
        vocab_size=size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=size(family.inner_key, 4 * hidden_size),
        num_layers=size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=size("num_key_value_heads", num_heads) if family.own_head_dim else num_heads,
        head_dim=size("head_dim", head_dim) if family.own_head_dim else head_dim,
        num_learned_positions=size("max_position_embeddings") if family.learned_positions else 0,
        tied_head=bool(values["tie_word_embeddings"]),
    )


def estimate_parameters(config: Mapping[str, Any]) -> ParameterCounts | None:
    """The parameter counts of a causal language model, or None for a model type that is not known here."""
    shape = read_architecture(config)
    if shape is None:
        return None
    family = _FAMILIES[shape.model_type]
    values = _values(family, config)
    hidden, inner, queries = shape.hidden_size, shape.intermediate_size, shape.attention_width
    keys_values = 2 * shape.num_kv_heads * shape.head_dim
    num_wide = 2 if family.gated else 1

    def bias(which: bool | str, width: int) -> int:
        return width if (values.get(which) if isinstance(which, str) else which) else 0

    matrices = hidden * (queries + keys_values) + queries * hidden + (num_wide + 1) * hidden * inner
    biases = (
        bias(family.qkv_bias, queries + keys_values)
        + bias(family.out_bias, hidden)
        + bias(family.mlp_bias, num_wide * inner + hidden)
    )
    norm = 2 * hidden if family.norm_bias else hidden
    norms = family.norms_per_layer * norm + (2 * shape.head_dim if family.query_key_norm else 0)
    per_layer = matrices + biases + norms
    embedding = (shape.vocab_size + shape.num_learned_positions) * hidden
    head = 0 if shape.tied_head else shape.vocab_size * hidden
    non_embedding = shape.num_layers * per_layer + norm
    return ParameterCounts(
        total=embedding + head + non_embedding,
        embedding=embedding,
        head=head,
        per_layer=per_layer,
        non_embedding=non_embedding,
        matmul=shape.num_layers * matrices + shape.vocab_size * hidden,
    )


def _values(family: _Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration over the defaults, under the common names."""
    return {**family.defaults, **{family.aliases.get(name, name): value for name, value in config.items()}}
