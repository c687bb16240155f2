"""The configuration of a model: a published config.json, overridden by the recipe's own keys. Torch-free.

A recipe stores the content of the file, not its path, so a submitted job and a resumed run do not depend on the file.
Settings of the file about its tokenizer, storage and text generation are dropped: the recipe decides those.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from turbolm.recipe.paths import expand_path
from turbolm.redaction import holds_secret

CONFIG_NAME = "config.json"
_MAX_FILE_BYTES = 2**20
_MAX_KEPT_BYTES = 2**16  # a recipe that contains it must stay below the limits of recipe.document
_MAX_KEPT_VALUES = 2_000
_MAX_DEPTH = 12

NOT_LEARNED = frozenset(
    "architectures transformers_version _name_or_path name_or_path _commit_hash torch_dtype dtype use_cache auto_map "
    "quantization_config compression_config bos_token_id eos_token_id pad_token_id return_dict use_return_dict "
    "output_attentions output_hidden_states attn_implementation _attn_implementation _attn_implementation_autoset "
    "experts_implementation id2label label2id num_labels problem_type finetuning_task task_specific_params".split()
)
"""Names of a config.json that do not change what is trained from new weights: the recipe, its tokenizer and the trainer
decide them."""

# What the decoders of Transformers call their sizes, the usual name first; its configuration objects answer to that one
# for all of them, a config.json and a recipe do not.
WIDTH = ("hidden_size", "n_embd", "d_model", "n_embed", "emb_dim")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
HEAD_SIZE = ("head_dim", "attention_head_dim", "kv_channels", "dim_head", "d_head")
FEED_FORWARD = (
    "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "dff", "dim_ff", "d_inner", "decoder_ffn_dim",
    "feed_forward_size",
)  # fmt: skip
# Of models that have another beside it: for experts, or for the layers or the part without them.
OTHER_FEED_FORWARD = (
    "moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size",
    "shared_experts_intermediate_size", "shared_intermediate_size", "expert_ffn_hidden_size", "intermediate_size_mlp",
    "dense_intermediate_size", "prefix_dense_intermediate_size",
)  # fmt: skip
_WITHOUT_ATTENTION = ("mamba2", "xlstm")  # their `num_heads` are those of a state

# Settings of rotary positions with the same meaning for every type.
_ANY_ROPE = ("rope_theta", "partial_rotary_factor")
_ROPE_TYPES = ("rope_type", "type")


def is_dropout(name: str) -> bool:
    """Return whether a setting of this name is a dropout probability."""
    return "dropout" in name or name.endswith(("pdrop", "_drop"))


def size_of(read: Callable[[str], Any], names: Sequence[str]) -> int | None:
    """Return the size that has one of these names in a configuration, which `read` gets by name; None without."""
    found = (read(name) for name in names)
    return next((value for value in found if type(value) is int and value > 0), None)


def heads_of(read: Callable[[str], Any]) -> tuple[int, int] | None:
    """Return the heads of queries and the size of one; None where a configuration, read as in `size_of`, names none.

    Transformers' rule: the size of a head where it is set, else the width over the heads.
    """
    width, heads, own = (size_of(read, names) for names in (WIDTH, HEADS, HEAD_SIZE))
    if heads is None or (width is None and own is None) or read("model_type") in _WITHOUT_ATTENTION:
        return None
    return heads, own or (width or 0) // heads


def lay_over(file: Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Merge `config` over the content of the file: mappings key by key, everything else is replaced.

    Names in `NOT_LEARNED` are dropped from the file, and dropouts of 0, which `model.dropout` sets. Of a multimodal
    file only the text part is used if `config` has its `model_type`. Rotary positions of another type do not keep the
    settings of the file's type. Returns None without a file and a `config`.
    """
    if file is None:
        return None if config is None else dict(config)
    config = config or {}
    base = {
        name: value
        for name, value in text_part(file, config.get("model_type")).items()
        if name not in NOT_LEARNED and not (is_dropout(name) and type(value) in (int, float) and value == 0)
    }
    return _merge(base, config)


def text_part(file: Mapping[str, Any], model_type: object) -> Mapping[str, Any]:
    """Return the text model's part of a multimodal file if it has this type, else the full content."""
    inner = file.get("text_config")
    if not isinstance(inner, Mapping) or model_type is None or model_type == file.get("model_type"):
        return file
    if inner.get("model_type", model_type) != model_type:
        return file
    tied = {name: file[name] for name in ("tie_word_embeddings",) if name in file}
    return {**tied, **inner, "model_type": model_type}


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    types = [[mapping.get(name) for name in _ROPE_TYPES if name in mapping] for mapping in (base, over)]
    if types[0] and types[1] and types[0] != types[1]:
        base = {name: base[name] for name in _ANY_ROPE if name in base}
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def read_config_file(value: object) -> object:
    """Read the config.json at a path as plain values; a mapping that was read before is returned as it is.

    Infinities and NaN become `{__float__: Infinity}`, as Transformers writes them. Raises ValueError.
    """
    if value is None or isinstance(value, Mapping):
        return _plain_mapping(value, "the mapping") if value is not None else None
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected the path of a {CONFIG_NAME} or its folder, got {value!r}")
    path = expand_path(value)
    path = path / CONFIG_NAME if path.is_dir() else path
    try:
        if not path.is_file():
            raise ValueError(f"{path}: no such file; expected a published {CONFIG_NAME}, or its folder")
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError(f"{path}: larger than {_MAX_FILE_BYTES // 1024} KiB, which no {CONFIG_NAME} is")
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: not JSON: {error}") from None
    return _plain_mapping(content, str(path))


def _plain_mapping(content: object, shown: str) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{shown}: expected a JSON object with a model_type, got {type(content).__name__}")
    kept = {name: None if name in NOT_LEARNED and _is_large(value) else value for name, value in content.items()}
    try:
        num_values, plain = _plain(kept)
        text = json.dumps(plain, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown}: {error}") from None
    if num_values > _MAX_KEPT_VALUES or len(text) > _MAX_KEPT_BYTES:
        raise ValueError(f"{shown}: {num_values} values in {len(text)} bytes, which no configuration of a model has")
    if holds_secret(text.decode()):
        raise ValueError(f"{shown}: contains a password, token or key, but recipes are copied; remove it")
    if not isinstance(plain.get("model_type"), str):
        raise ValueError(f"{shown}: names no model_type")
    return plain


def _is_large(value: object) -> bool:
    return isinstance(value, (Mapping, list)) and len(str(value)) > 200


def _plain(value: Any, depth: int = 0) -> tuple[int, Any]:
    """Return the number of values in it, and the value as a recipe can store it."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"more than {_MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        entries = {str(name): _plain(child, depth + 1) for name, child in value.items()}
        return 1 + sum(n for n, _ in entries.values()), {name: child for name, (_, child) in entries.items()}
    if isinstance(value, (list, tuple)):
        children = [_plain(child, depth + 1) for child in value]
        return 1 + sum(n for n, _ in children), [child for _, child in children]
    if isinstance(value, float) and not math.isfinite(value):
        return 2, {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("a whole number of more than 64 bits")
    if not isinstance(value, (str, int, float, bool, type(None))):
        raise ValueError(f"expected JSON, got {type(value).__name__}")
    return 1, value
