"""Find the names of its configuration that a model's code reads, in the source of Transformers.

A configuration class keeps every name it is given, so a misspelled setting trains without a word. The class declares
most of the names that count; some are read only by the modeling code, as in `getattr(config, "head_dim", None)`.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import RopeParameters

_ROPE_MODULE = RopeParameters.__module__
# What PreTrainedModel and the attention masks read of any configuration.
_READ_BY_BASE = ("tie_word_embeddings", "initializer_range", "per_layer_config", "is_causal")
_DEFINITION = re.compile(r"^(?=class |def |\w+ = |@)", re.MULTILINE)
_DEFINED = re.compile(r"(?:class |def )?(\w+)")
_READ = re.compile(r'(\w*(?:config|cfg))\.([a-zA-Z]\w*)|(?:get|has)attr\((?:self\.)?(\w*(?:config|cfg)), "(\w+)"')
_KEY = re.compile(r'(?<=\w)\["(\w+)"\]|\.(?:get|pop|setdefault)\(\s*"(\w+)"|"(\w+)" (?:not in|in|==|!=) ')


@cache
def names_read(module: str, model: str) -> frozenset[tuple[str, str]]:
    """Return what a model class reads, with all that it mentions in its module: pairs such as (config, head_dim)."""
    parts = _DEFINITION.split(_text(module))
    source = {defined[1]: part for part in parts if (defined := _DEFINED.match(part))}
    found = {("config", name) for name in _READ_BY_BASE}
    seen: set[str] = set()
    waiting = {model}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        found |= {(one[1] or one[3], one[2] or one[4]) for one in _READ.finditer(source[name])}
        waiting |= (source.keys() & re.findall(r"\w+", source[name])) - seen
    return frozenset(found)


def keys_read(*classes: type[PreTrainedConfig | PreTrainedModel]) -> frozenset[str]:
    """Return the keys that the modules of these classes look up in mappings, and those of rotary positions."""
    modules = {base.__module__ for one in classes for base in one.__mro__ if ".models." in base.__module__}
    groups = [groups for module in (*modules, _ROPE_MODULE) for groups in _KEY.findall(_text(module))]
    return frozenset(key for keys in groups for key in keys if key) | RopeParameters.__annotations__.keys()


@cache
def _text(module: str) -> str:
    file = importlib.import_module(module).__file__
    return Path(file).read_text(encoding="utf-8") if file else ""
