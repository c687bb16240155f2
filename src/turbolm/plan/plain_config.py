"""Recognize configurations that are certainly valid, so that planning does not need Transformers. Torch-free.

Transformers checks all others (`turbolm.plan.count.examine_model`), which takes seconds the first time. It accepts
every configuration that is plain here (tests/plan/test_plain_config.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_MAX_SIZE, _MAX_LAYERS = 2**20, 512
_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value <= _MAX_SIZE


def _is_share(value: object) -> bool:
    return type(value) is float and 0 <= value < 1


def _is_bool(value: object) -> bool:
    return type(value) is bool


def _is_activation(value: object) -> bool:
    return value in _ACTIVATIONS


def _is_rope(value: object) -> bool:
    """Return whether these are the default rotary positions, or Llama 3's."""
    if not isinstance(value, Mapping):
        return False
    numbers = {name: number for name, number in value.items() if name != "rope_type"}
    if not all(type(number) in (int, float) and number >= 1 for number in numbers.values()):
        return False
    if value.get("rope_type") == "default":
        return set(numbers) <= {"rope_theta"}
    factors = {"rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    return (
        value.get("rope_type") == "llama3"
        and set(numbers) == factors
        and type(numbers["original_max_position_embeddings"]) is int
        and numbers["low_freq_factor"] < numbers["high_freq_factor"]
    )


_SETTINGS: dict[str, dict[str, Callable[[object], bool]]] = {
    "llama": {
        **dict.fromkeys(
            ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
             "head_dim max_position_embeddings").split(), _is_size,
        ),
        **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_cache"), _is_bool),
        **dict.fromkeys(("rms_norm_eps", "initializer_range", "attention_dropout"), _is_share),
        "hidden_act": _is_activation,
        "rope_parameters": _is_rope,
    },
    "gpt2": {
        **dict.fromkeys(("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"), _is_size),
        **dict.fromkeys(("tie_word_embeddings", "use_cache"), _is_bool),
        **dict.fromkeys(
            ("layer_norm_epsilon", "initializer_range", "resid_pdrop", "embd_pdrop", "attn_pdrop"), _is_share
        ),
        "activation_function": _is_activation,
    },
}  # fmt: skip


def is_plain(config: Mapping[str, Any]) -> bool:
    """Return whether the model type is well known and every setting is a usual one with a valid value."""
    checks = _SETTINGS.get(str(config.get("model_type")))
    if checks is None:
        return False
    values = {name: value for name, value in config.items() if name != "model_type"}
    if not all(name in checks and checks[name](value) for name, value in values.items()):
        return False
    if config["model_type"] == "gpt2":
        width, heads, layers = (
            values.get(name, usual) for name, usual in (("n_embd", 768), ("n_head", 12), ("n_layer", 12))
        )
        return bool(width % heads == 0 and layers <= _MAX_LAYERS)
    width, heads = values.get("hidden_size", 4096), values.get("num_attention_heads", 32)
    if width % heads or heads % values.get("num_key_value_heads", heads):
        return False
    return bool(values.get("head_dim", width // heads) % 2 == 0 and values.get("num_hidden_layers", 32) <= _MAX_LAYERS)
