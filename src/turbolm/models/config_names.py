"""Tell which names of a configuration a model type reads, and what an unknown name was meant to be."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import ALLOWED_LAYER_TYPES

from turbolm.models.config_errors import Path
from turbolm.models.config_source import keys_read, names_read
from turbolm.recipe.model_config import FEED_FORWARD, HEADS, KEY_VALUE_HEADS, LAYERS, NOT_LEARNED, WIDTH

ROPE_NAMES = ("rope_parameters", "rope_scaling")
_NEAR, _SIMILAR = 0.8, 0.7  # of a misspelling, and of what may be meant, as difflib measures it
# What modelling code calls the configuration it is given.
_VARIABLES = ("config", "cfg", "text_config", "decoder_config")
# Names that different model types have for one setting.
_SAME_SETTING = [
    {*WIDTH, "dim", "embed_dim", "model_dim"},
    {*LAYERS, "depth"},
    {*HEADS},
    {*KEY_VALUE_HEADS, "n_kv_heads", "kv_heads", "n_head_kv"},
    {*FEED_FORWARD, "d_ff", "inner_dim", "mlp_dim"},
    *(
        set(line.split())
        for line in (
            "max_position_embeddings n_positions n_ctx max_seq_len max_seq_length seq_length block_size",
            "rope_theta theta rope_base base rotary_emb_base rotary_base",
            "hidden_act activation_function hidden_activation activation act_fn",
            "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps norm_epsilon eps",
            "num_experts num_local_experts n_routed_experts moe_num_experts",
            "num_experts_per_tok top_k moe_top_k moe_k experts_per_token",
            "tie_word_embeddings tie_embeddings tied_embeddings",
            "rope_type type",
        )
    ),
]


@dataclasses.dataclass(frozen=True)
class Unread:
    """A name that nothing reads, and the valid name that was probably meant."""

    path: Path
    nearest: str | None
    is_misspelled: bool  # looks like a misspelling of `nearest`
    is_off: bool  # says what a model without the setting does anyway


@dataclasses.dataclass(frozen=True)
class Reader:
    """A configuration class and the model that reads it.

    `owner` is what the model's code calls this configuration: another name than `config` for a part of a larger one.
    """

    kind: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    owner: str = "config"

    def make(self, values: Mapping[str, Any]) -> PreTrainedConfig:
        """Return the configuration. Raises whatever Transformers raises."""
        # Its classes write into the mappings that they are given, and read infinities in a form of their own.
        decoded = PreTrainedConfig._decode_special_floats(json.loads(json.dumps(values)))
        return self.kind(**{name: value for name, value in decoded.items() if name != "model_type"})

    def reacts(self, values: Mapping[str, Any], name: str) -> bool:
        """Whether the value of `name` changes anything that counts, or an error; False where `values` are refused."""
        before = self.effect(values)
        without = {key: value for key, value in values.items() if key != name}
        others = [without, *({**values, name: other} for other in _other_values(values[name]))]
        return before is not None and any(self.effect(other) != before for other in others)

    def agrees(self, values: Mapping[str, Any], name: str) -> bool:
        """Whether what a setting does alone holds with all `values`, though other settings decide it."""
        alone, here = self.effect({name: values[name]}), self.effect(values)
        others = [self.effect({name: other}) for other in _other_values(values[name])]
        if alone is None or here is None or None in others:
            return False
        moved = {leaf for leaf in alone for other in others if other and alone[leaf] != other.get(leaf)}
        return bool(moved) and all(here.get(leaf) == alone[leaf] for leaf in moved)

    def effect(self, values: Mapping[str, Any]) -> dict[str, str] | None:
        """Return what counts of the configuration made from `values`, by dotted name; None where they are refused."""
        found: dict[str, str] = {}
        try:
            made = vars(self.make(values))
        except Exception:  # of any kind
            return None
        for name in made.keys() & valid_names(self):
            _flatten(name, made[name], found)
        return found


@cache
def valid_names(reader: Reader) -> frozenset[str]:
    """Return the names that the class declares or has other names for, and those that the model's code reads."""
    kind, owner = reader.kind, reader.owner
    names = declared_names(reader) | set(kind.attribute_map)
    if "rope_parameters" in names:
        names |= {"rope_theta", "rope_scaling"}  # what it was called before Transformers 5
    variables = {owner, *_VARIABLES} - (set(kind.sub_configs) - {owner})
    if owner == "config" and getattr(reader.model, "config_class", kind) is not kind:
        variables = set()  # the model is built from a part of this configuration
    read = names_read(reader.model.__module__, reader.model.__name__)
    names |= {name for variable, name in read if variable in variables}
    return frozenset(name for name in names if not name.startswith("_") and not callable(getattr(kind, name, None)))


def unread_names(reader: Reader, values: Mapping[str, Any]) -> Iterator[Unread]:
    """Yield the names in `values` that neither the class, its old names nor the model's code reads, at any depth."""
    for name, value in values.items():
        if not _is_read(reader, values, name):
            yield _unread(name, values, valid_names(reader), declared_names(reader))
        elif not isinstance(value, Mapping) or name in NOT_LEARNED:
            continue
        elif name in reader.kind.sub_configs:
            part = reader.kind.sub_configs[name]
            if isinstance(part, type) and issubclass(part, PreTrainedConfig):
                yield from _below(name, unread_names(Reader(part, reader.model, name), value))
        elif name == "per_layer_config":
            for layer, inner in value.items():
                if isinstance(inner, Mapping):
                    yield from _below(name, _below(str(layer), unread_names(reader, inner)))
        else:
            keys = keys_read(reader.kind, reader.model) | set(reader.kind.ignore_keys_at_rope_validation or ())
            yield from _below(name, _unread_keys(value, keys, name in ROPE_NAMES))


def _below(name: str, found: Iterator[Unread]) -> Iterator[Unread]:
    return (dataclasses.replace(one, path=(name, *one.path)) for one in found)


def _unread_keys(values: Mapping[str, Any], valid: frozenset[str], is_rope: bool) -> Iterator[Unread]:
    """Yield keys of a mapping that no code looks up; except in rotary positions, only those that look misspelled."""
    valid = valid | set(ALLOWED_LAYER_TYPES) if is_rope else valid
    for name, value in values.items():
        if name not in valid:
            found = _unread(name, values, valid)
            if is_rope or found.is_misspelled:
                yield found
        elif isinstance(value, Mapping):
            yield from _below(name, _unread_keys(value, valid, is_rope))


def _unread(
    name: str, given: Mapping[str, Any], valid: frozenset[str], preferred: frozenset[str] = frozenset()
) -> Unread:
    close = difflib.get_close_matches(name[:100], sorted(valid), n=1, cutoff=_SIMILAR)
    ratio = difflib.SequenceMatcher(None, name, close[0]).ratio() if close else 0.0
    same = [other for group in _SAME_SETTING if name in group for other in sorted(group & valid)]
    if ratio < _NEAR and same:
        close = sorted(same, key=lambda other: other not in preferred)
    return Unread((name,), close[0] if close else None, ratio >= _NEAR, _is_off(given[name]))


def _is_read(reader: Reader, values: Mapping[str, Any], name: str) -> bool:
    if name == "model_type" or name in NOT_LEARNED or name in _generation_names() or name in valid_names(reader):
        return True
    return reader.reacts({name: values[name]}, name) or reader.reacts(values, name)


def _is_off(value: object) -> bool:
    return value is None or value is False or (isinstance(value, (list, Mapping)) and not value)


def declared_names(reader: Reader) -> frozenset[str]:
    """Return the settings of the class, without aliases."""
    return frozenset(field.name for field in dataclasses.fields(reader.kind))


@cache
def _generation_names() -> frozenset[str]:
    """Return names of text generation, which Transformers drops from a configuration."""
    return frozenset(GenerationConfig._get_default_generation_params())


def _flatten(name: str, value: Any, found: dict[str, str]) -> None:
    inner = vars(value) if isinstance(value, PreTrainedConfig) else value
    if isinstance(inner, Mapping):
        for key, child in inner.items():
            _flatten(f"{name}.{key}", child, found)
    else:
        found[name] = repr(value)


def _other_values(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value + 1, value * 2 + 2]
    if isinstance(value, str):
        return [value + "x"]
    if isinstance(value, (list, tuple)):
        return [list(value[:-1]), [*value, *value]]
    if isinstance(value, Mapping):
        return [{}, *({**value, key: other} for key, inner in value.items() for other in _other_values(inner)[:1])]
    return [1, 1.5, True, "x", {"rope_type": "linear", "factor": 2.0}]
