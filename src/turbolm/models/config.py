"""Make a model's configuration from a recipe, or report each problem in one line with its key.

Transformers keeps every name it is given, so a misspelled setting would train without a word; here a name that nothing
reads is refused. `turbolm plan`, `submit` and `train` all use this module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any
from unittest.mock import patch

from transformers import AutoModelForCausalLM, PreTrainedConfig, modeling_rope_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from turbolm.errors import UserError, did_you_mean
from turbolm.models.config_errors import Path, Problem, Search, find_culprits, without
from turbolm.models.config_names import ROPE_NAMES, Reader, Unread, declared_names, unread_names, valid_names
from turbolm.recipe.document import join_key
from turbolm.recipe.model_config import NOT_LEARNED, lay_over

_MAX_LAYERS, _MAX_SIZE, _MAX_SETTINGS = 2_000, 2**28, 300
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim")  # fmt: skip
_DECIDED_HERE = {
    "return_dict": (True, "the trainer needs it true"),
    "output_attentions": (False, "the trainer needs it false"),
    "output_hidden_states": (False, "the trainer needs it false"),
    "attn_implementation": (None, "execution.attention chooses the kernel"),
    "_attn_implementation": (None, "execution.attention chooses the kernel"),
    "experts_implementation": (None, "the trainer chooses it"),
    "quantization_config": (None, "new weights are trained unquantized"),
    "compression_config": (None, "new weights are trained unquantized"),
}
"""Names under `model.config` that turbolm sets itself: their value, and why."""


@dataclass(frozen=True)
class Source:
    """A configuration as the recipe gives it: what a config.json says, and the recipe's own keys."""

    file: Mapping[str, Any] | None
    config: Mapping[str, Any] | None

    @property
    def values(self) -> dict[str, Any]:
        """Both, merged."""
        return lay_over(self.file, self.config) or {}

    def is_own(self, path: Path) -> bool:
        """Whether the recipe itself sets this."""
        here: Any = self.config
        for part in path:
            if not isinstance(here, Mapping) or part not in here:
                return False
            here = here[part]
        return True

    def line(self, problem: Problem) -> str:
        """Return the problem with its key in the recipe."""
        name = shown(problem.path)
        if self.file is None or (name and self.is_own(problem.path)):
            return f"model.config{'.' if name else ''}{name}: {problem.message}"
        return f"model.config_file: {name}{': ' if name else ''}{problem.message}"


def shown(path: Path) -> str:
    """Return a dotted path; a name that would garble a message is quoted."""
    return reduce(join_key, path, "")


@dataclass(frozen=True)
class Checked:
    """A configuration and what is wrong with it."""

    reader: Reader
    search: Search  # the configuration, made without refused values, and with misspelled names corrected
    problems: list[Problem]
    unread: list[Unread]  # names of the file that nothing reads


def make_config(file: Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> PreTrainedConfig:
    """Return the configuration to train. Raises UserError with every problem of its names and values."""
    source = Source(file, config)
    checked = check_config(source)
    if checked.problems:
        raise UserError("\n".join(map(source.line, checked.problems)))
    made: PreTrainedConfig = checked.search.result
    return made


def check_config(source: Source) -> Checked:
    """Check names and values. Raises UserError for a model type that is no causal language model."""
    reader, values = find_reader(source), source.values
    if len(values) > _MAX_SETTINGS:
        raise UserError(source.line(Problem((), f"{len(values)} settings, which no model has")))
    unread = list(unread_names(reader, values))
    refused = [one for one in unread if source.is_own(one.path) and (one.is_misspelled or not one.is_off)]
    problems = [*_decided_here(source), *_too_large(reader, values)]
    for path in (*(one.path for one in refused), *(problem.path for problem in problems)):
        values = without(values, path)
    for one in refused:
        if one.is_misspelled and one.nearest and one.nearest not in values and len(one.path) == 1:
            values[one.nearest] = source.values[one.path[0]]
    with rope_warnings():
        search = find_culprits(reader.kind.model_type, values, reader.make)
    made, read = search.result, search.values
    problems = [*_no_such_setting(reader, source, refused, made), *problems, *search.problems]
    if made is not None and search.is_sound:
        bad = [*_bad_sizes(reader, made, read), *_bad_token_ids(made, source)]
        problems += [*bad, *_unused_rope_keys(reader, source, read)]
        for one in unread:  # what is left of these is switched off
            read = without(read, one.path)
        with rope_warnings():
            problems += _without_effect(reader, made, source, read)
        search = replace(search, is_sound=not bad)
    return Checked(reader, search, problems, [one for one in unread if not source.is_own(one.path)])


def find_reader(source: Source) -> Reader:
    """Return the classes of a causal language model. Raises UserError where Transformers has none, or a wrapper."""
    values = source.values
    model_type = str(values.get("model_type"))
    if model_type == "mistral" and "layer_types" in values:
        model_type = "ministral"  # as AutoConfig.from_pretrained takes it
    is_known = model_type in CONFIG_MAPPING  # whose `get` does not load what is not loaded yet
    kind = CONFIG_MAPPING[model_type] if is_known else None
    text_type = _text_model(kind, values) if kind else None
    if kind is None:
        message = f"transformers knows no model type {model_type[:100]!r}{did_you_mean(model_type, CONFIG_MAPPING)}"
    elif text_type in CONFIG_MAPPING and CONFIG_MAPPING[text_type] in AutoModelForCausalLM._model_mapping:
        how = "which takes the text part of the file" if source.file else "with that type's own settings"
        message = f"{model_type} wraps a text model; set model.config.model_type: {text_type}, {how}"
    elif kind not in AutoModelForCausalLM._model_mapping:
        part = f", and none for its text part, {text_type}" if text_type else ""
        message = f"transformers has no causal language model {model_type!r}{part}"
    elif not hasattr(kind, "vocab_size"):
        message = f"{model_type} has no vocabulary: it wraps models, or is a part of one; choose a text model"
    else:
        return Reader(kind, AutoModelForCausalLM._model_mapping[kind])
    raise UserError(source.line(Problem(("model_type",), message)))


def _text_model(kind: type[PreTrainedConfig], values: Mapping[str, Any]) -> str | None:
    """Return the model type of the text part of a multimodal configuration."""
    if "text_config" not in kind.sub_configs:
        return None
    given = values.get("text_config")
    if isinstance(given, Mapping) and given.get("model_type") in CONFIG_MAPPING:
        return str(given["model_type"])
    try:
        part = kind().get_text_config(decoder=True)
    except Exception:  # a class that has no defaults
        return None
    return str(part.model_type) if type(part) is not kind else None


def _no_such_setting(
    reader: Reader, source: Source, refused: list[Unread], made: PreTrainedConfig | None
) -> Iterator[Problem]:
    for one in refused:
        # A value that the class derives, or another type's name for a setting, whose value is already the case.
        names = one.path if one.is_misspelled else (*one.path, one.nearest or "")
        if len(one.path) == 1 and any(_value(made, name) == source.values[one.path[0]] for name in names):
            continue
        hint = f"; did you mean {one.nearest!r}?" if one.nearest else ""
        yield Problem(one.path, f"{reader.kind.model_type} has no such setting{hint}")


def _decided_here(source: Source) -> Iterator[Problem]:
    for name, (value, reason) in _DECIDED_HERE.items():
        if source.is_own((name,)) and source.values[name] not in (value, None):
            yield Problem((name,), f"{reason}; remove the key")


def _too_large(reader: Reader, values: Mapping[str, Any]) -> Iterator[Problem]:
    """Find sizes that would exhaust the machine before any error is raised."""
    for name, value in values.items():
        most = _MAX_LAYERS if re.search(r"(layers?|blocks|depth)$", name) else _MAX_SIZE
        is_size = type(value) is int and type(getattr(reader.kind, name, None)) in (int, type(None))
        if is_size and value > most and name in valid_names(reader):
            yield Problem((name,), f"expected at most {most}, got {value}")


def _bad_sizes(reader: Reader, made: PreTrainedConfig, values: Mapping[str, Any]) -> Iterator[Problem]:
    for name in _SIZES:
        key, size = _given(reader, values, name), _value(made, name)
        if key and type(size) is int and size < 1:
            yield Problem((key,), f"expected a whole number of at least 1, got {size}")
    heads, groups = (_value(made, name) for name in ("num_attention_heads", "num_key_value_heads"))
    given = [_given(reader, values, name) for name in ("num_key_value_heads", "num_attention_heads")]
    key = given[0] or given[1]
    if key and type(heads) is int and type(groups) is int and heads > 0 and groups > 0 and heads % groups:
        yield Problem((key,), f"{heads} attention heads cannot share {groups} heads of keys and values: not a multiple")


def _given(reader: Reader, values: Mapping[str, Any], name: str) -> str | None:
    """Return the key under which a setting is given: its common name, or this type's own."""
    names = reader.kind.attribute_map
    kept = names.get(name, name)
    return next((key for key in values if names.get(key, key) == kept), None)


def _value(made: PreTrainedConfig | None, name: str) -> Any:
    """Return a setting of the whole model; None where there is none, or each layer has its own."""
    try:
        return getattr(made, name, None)
    except Exception:
        return None


def _bad_token_ids(made: PreTrainedConfig, source: Source) -> Iterator[Problem]:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = source.values.get(name)
        for one in ids if isinstance(ids, list) else [ids]:
            if type(one) is int and not 0 <= one < made.vocab_size and ids != getattr(type(made), name, None):
                yield Problem((name,), f"expected a token from 0 to {made.vocab_size - 1}, got {one}")


def _unused_rope_keys(reader: Reader, source: Source, values: Mapping[str, Any]) -> Iterator[Problem]:
    """Find settings of rotary positions that their type does not use, by Transformers' own warnings."""
    with rope_warnings() as texts:
        reader.make(values)
    pattern = r"Unrecognized keys in `rope_parameters` for 'rope_type'='([^']*)': \{(.*)\}"
    for found in filter(None, (re.search(pattern, text) for text in texts)):
        for name in re.findall(r"'([^']+)'", found[2]):
            for outer in ROPE_NAMES:
                if source.is_own((outer, name)):
                    yield Problem((outer, name), f"rotary positions of type {found[1]!r} have no such setting")


def _without_effect(
    reader: Reader, made: PreTrainedConfig, source: Source, values: Mapping[str, Any]
) -> Iterator[Problem]:
    """Find keys of the recipe that another name overrides: one of the file, or a newer name of the same setting."""
    for name, value in (source.config or {}).items():
        if name in NOT_LEARNED or name in ("model_type", "per_layer_config") or value is None:
            continue
        if values.get(name) != value:  # refused already, or a part of it
            continue
        if source.file is None and name in declared_names(reader):
            continue
        is_kept = name in valid_names(reader) and _value(made, name) == value
        if is_kept or reader.reacts(values, name) or reader.agrees(values, name):
            continue
        others = [other for other in values if other != name and reader.reacts(without(values, (other,)), name)]
        beside = f" beside {others[0]}" if others else ""
        if others and not source.is_own((others[0],)):
            beside += f" of model.config_file; set model.config.{others[0]}"
        yield Problem((name,), f"has no effect{beside}")


@contextmanager
def rope_warnings() -> Iterator[list[str]]:
    """Collect the warnings of Transformers about rotary positions, and keep them out of the log."""
    texts: list[str] = []
    with patch.object(modeling_rope_utils.logger, "warning", lambda text, *_: texts.append(str(text))):
        yield texts
