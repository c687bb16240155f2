"""Find the setting behind an error of Transformers, and put the error in plain words.

Errors come from its validators, from the constructors of layers and from torch, and most name no setting. The culprit
is the setting without which the error goes away, found by removing one after another.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from turbolm.errors import did_you_mean
from turbolm.recipe.messages import describe
from turbolm.recipe.model_config import HEADS, KEY_VALUE_HEADS

Path = tuple[str, ...]
Attempt = Callable[[Mapping[str, Any]], Any]

_MAX_PROBLEMS = 20
_MAX_TEXT = 300
_SEARCH_SEC = 60.0
_HEADS = (*HEADS, *KEY_VALUE_HEADS)  # 1 divides every width
_KINDS = {
    "int": "a whole number",
    "float": "a number such as 0.02",
    "str": "text",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "NoneType": "null",
}


@dataclass(frozen=True)
class Problem:
    """What is wrong with one setting: its path in the configuration, empty for the whole of it."""

    path: Path
    message: str


@dataclass(frozen=True)
class Search:
    """What a search for the settings behind errors found."""

    problems: list[Problem]
    result: Any  # made from the values that are left; None where an error remains
    values: Mapping[str, Any]
    is_sound: bool  # False where the values that replace refused ones may cause errors of their own


def find_culprits(
    model_type: str,
    values: Mapping[str, Any],
    attempt: Attempt,
    seconds: float = _SEARCH_SEC,
    only_sure: bool = False,
    usual: Mapping[str, Any] | None = None,
) -> Search:
    """Return what `attempt` makes of `values` without the settings that it raises for, and the problems with those.

    The search takes no more than `seconds`. Where no setting is behind an error the problem has no path. With
    `only_sure` a setting is named only if nothing is raised without it. `usual` has values of settings that may be
    missing.
    """
    found: list[Problem] = []
    deadline = time.monotonic() + seconds
    is_sound = True
    while True:
        try:
            return Search(found, attempt(values), values, is_sound)
        except Exception as error:
            is_typed = isinstance(error, StrictDataclassFieldValidationError)
            if not is_sound and not is_typed:
                return Search(found, None, values, False)  # it may come from what was removed
            typed = _refused_field(values, str(error)) if is_typed else None
            trials = _trials(values, usual or {}, str(error))
            path, rest = typed or _culprit(values, attempt, error, trials, deadline, only_sure)
            if not path:
                trials = _together(values, usual or {})
                path, rest = _culprit(values, attempt, error, trials, deadline, only_sure=True)
            found.append(_explain(model_type, values, path, error))
            if not path or len(found) == _MAX_PROBLEMS:
                return Search(found, None, values, False)
            is_size = "expected int" in str(error) or "expected float" in str(error)
            is_size = is_size or not isinstance(_at(values, path), (str, Mapping))
            is_given = path in set(_paths(values))  # else it was missing, and has a value that may not fit
            is_sound = is_sound and is_given and (_at(rest, path) is not None or not is_size)
            values = rest


def _refused_field(values: Mapping[str, Any], text: str) -> tuple[Path, Mapping[str, Any]] | None:
    """The setting that a validator names, and values with the number that its text spells, or without it."""
    field = re.search(r"field '([^']+)'", text)
    if field is None or field[1] not in values:
        return None
    number = re.search(r"expected int, got (?:str|float)", text) and re.fullmatch(
        r"(\d{1,18})(\.0)?", str(values[field[1]])
    )
    return (field[1],), {**values, field[1]: int(number[1])} if number else without(values, (field[1],))


def _culprit(
    values: Mapping[str, Any],
    attempt: Attempt,
    error: Exception,
    trials: Iterator[tuple[Path, Mapping[str, Any]]],
    deadline: float,
    only_sure: bool,
) -> tuple[Path, Mapping[str, Any]]:
    """Find the setting without which the error disappears or changes. Returns it and the values to continue with."""
    better: tuple[Path, Mapping[str, Any]] = ((), values)
    for path, tried in trials:
        if time.monotonic() > deadline:
            break
        try:
            attempt(tried)
        except Exception as other:
            is_new = _kind_of(other) != _kind_of(error) and path[-1] not in str(other) and "None" not in str(other)
            if not better[0] and is_new and not only_sure:
                better = (path, tried)
        else:
            return path, tried
    return better


def _trials(values: Mapping[str, Any], usual: Mapping[str, Any], text: str) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Each setting, with values without it: first those that the error mentions, last those that may be missing."""
    paths = list(_paths(values))
    paths.sort(key=lambda path: (path[-1] not in _HEADS, re.search(rf"\b{re.escape(path[-1])}\b", text) is None))
    for path in paths:
        yield path, without(values, path)
        if path[-1] in _HEADS and len(path) == 1:
            yield path, {**values, path[0]: 1}
    for name, value in usual.items():
        if name not in values:
            yield (name,), {**values, name: value}


def _together(values: Mapping[str, Any], usual: Mapping[str, Any]) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Values with one more of the missing settings each time: several may be missing at once."""
    for name, value in usual.items():
        if name not in values:
            values = {**values, name: value}
            yield (name,), values


def _kind_of(error: Exception) -> tuple[str, str]:
    """An error without the numbers and words that it quotes."""
    return type(error).__name__, re.sub(r"'[^']*'|[\d.]+", "", str(error))


def _paths(values: Mapping[str, Any], above: Path = ()) -> Iterator[Path]:
    """Every setting but the model type, those of a mapping before it."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _paths(value, (*above, name))
        if (*above, name) != ("model_type",):
            yield (*above, name)


def without(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return `values` without one setting."""
    name, *rest = path
    if rest and isinstance(values.get(name), Mapping):
        return {**values, name: without(values[name], tuple(rest))}
    return {key: value for key, value in values.items() if key != name}


def _at(values: Any, path: Path) -> Any:
    for part in path:
        values = values[part] if isinstance(values, Mapping) and part in values else None
    return values


def _explain(model_type: str, values: Mapping[str, Any], path: Path, error: Exception) -> Problem:
    """One sentence about an error and the setting behind it."""
    value = _at(values, path)
    text = " ".join(str(error.__cause__ or error).split())
    if isinstance(error, StrictDataclassFieldValidationError):
        return Problem(path, _type_message(text, value))
    known = {*ACT2FN, *ROPE_INIT_FUNCTIONS}
    if isinstance(error, KeyError) and isinstance(value, str) and value not in known:
        return Problem(path, f"{model_type} knows no {describe(value)}{did_you_mean(value, known)}")
    plain = isinstance(error, ValueError) or error.__cause__ is not None
    cause = _cut(text if plain else f"{type(error).__name__}: {text}")
    if path and path[-1] not in (_at(values, path[:-1]) or {}):
        return Problem(path, f"{model_type} needs it: {cause}")
    return Problem(path, f"{model_type} cannot be built with {describe(value)}: {cause}" if path else cause)


def _type_message(text: str, value: object) -> str:
    """Put `Field 'x' expected int, got str (value: '1')` as a recipe's messages do; what says more is kept."""
    one = re.match(r"Field '[^']*' expected (\w+), got ", text)
    several = re.search(r"doesn't match any type in \((.*?)\)\.", text)
    names = [one[1]] if one else re.findall(r"(\w+)'>", several[1]) if several else []
    kinds = list(dict.fromkeys(_KINDS[name] for name in names if name in _KINDS))
    if not kinds:
        return _cut(re.sub(r"^Field '[^']*' ", "", text))
    return f"expected {' or '.join(kinds)}, got {describe(value)}"


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."
