"""Explain pydantic's errors in plain words, by their path in the recipe."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from turbolm.recipe.fields import Section
from turbolm.recipe.schema import Recipe

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Finding:
    """One problem with the values. `needs_all`: it may be caused by a part that could not be read."""

    path: Path
    message: str
    needs_all: bool = False


# Keys of other programs, and their equivalents here.
_ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "max_lr": "optimizer.lr",
    "min_lr": "schedule.min_lr_ratio",
    "warmup_steps": "schedule.warmup",
    "warmup_ratio": "schedule.warmup",
    "lr_scheduler_type": "schedule.name",
    "max_steps": "train.budget",
    "num_train_epochs": "train.budget",
    "batch_size": "train.global_batch",
    "global_batch_size": "train.global_batch",
    "per_device_train_batch_size": "execution.micro_batch",
    "micro_batch_size": "execution.micro_batch",
    "max_seq_len": "data.seq_len",
    "max_seq_length": "data.seq_len",
    "block_size": "data.seq_len",
    "grad_clip": "train.max_grad_norm",
    "dtype": "train.precision",
    "gradient_checkpointing": "execution.activation_checkpointing",
    "sequence_parallel_size": "execution.sequence_parallel",
    "context_parallel_size": "execution.sequence_parallel",
    "sp_size": "execution.sequence_parallel",
    "save_steps": "checkpoint.every",
    "eval_steps": "evaluation.every",
    "logging_steps": "logging.every_steps",
}
_DERIVED = {
    "gradient_accumulation_steps": "it is derived from train.global_batch and execution.micro_batch",
    "world_size": "it is derived from cluster.num_nodes and cluster.processes_per_node",
}

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number such as 3e-4",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
}
_MOST_FINDINGS = 100
_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def validation_findings(error: ValidationError) -> list[Finding]:
    """Return one finding for each key that pydantic refused, in pydantic's order; of very many, the first ones."""
    by_path: dict[Path, list[tuple[ErrorDetails, type[Section] | None]]] = {}
    for details in error.errors(include_url=False):
        path, section = _path_and_section(details["loc"])
        if details["type"] in ("union_tag_invalid", "union_tag_not_found"):
            path = (*path, _tag_key(path))
        by_path.setdefault(path, []).append((details, section))
    refused = list(by_path.items())
    findings = [_finding(path, branches) for path, branches in refused[:_MOST_FINDINGS]]
    if more := refused[_MOST_FINDINGS:]:  # a file that is no recipe; the nearest key of each takes a millisecond
        findings.append(Finding(more[0][0], f"refused as well, and so are {len(more) - 1} more keys"))
    return findings


def describe(value: object) -> str:
    """Return a value as the user wrote it, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}" if value else "an empty list"
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    return shown if len(shown) <= 100 else shown[:97] + "..."


def known_keys(section: type[Section] = Recipe, parent: str = "") -> Iterable[str]:
    """Return every key of a recipe as a dotted path, without those of list entries."""
    for name, field in section.model_fields.items():
        key = f"{parent}.{name}" if parent else name
        yield key
        for choice in _choices(field.annotation):
            if isinstance(choice, type) and issubclass(choice, Section):
                yield from known_keys(choice, key)


def _finding(path: Path, branches: list[tuple[ErrorDetails, type[Section] | None]]) -> Finding:
    details, section = branches[0]
    kind = details["type"]
    if kind == "extra_forbidden":
        return Finding(path, _unknown_key(path, section))
    if kind == "missing" and isinstance(path[-1], int):
        return Finding(path[:-1], f"too few entries: number {path[-1] + 1} is missing")
    if kind == "missing":
        field = section.model_fields.get(str(path[-1])) if section else None
        hint = f" ({field.description})" if field is not None and field.description else ""
        return Finding(path, f"required key is missing{hint}", needs_all=True)
    if kind == "union_tag_not_found":
        return Finding(path, "required key is missing", needs_all=True)
    whole_section = kind == "value_error" and isinstance(details["input"], Mapping)
    return Finding(path, _refusal([one for one, _ in branches], path), needs_all=whole_section)


def _refusal(branches: list[ErrorDetails], path: Path) -> str:
    """Return one message for a value, however many alternatives refused it."""
    for details in branches:  # right type, value out of range: the other alternatives do not matter
        if details["type"] in _BOUNDS:
            words, name = _BOUNDS[details["type"]]
            bound = details["ctx"][name]
            shown = bound if isinstance(bound, int) else f"{bound:g}"
            return f"must be {words} {shown}, got {describe(details['input'])}"
    if len(branches) == 1:
        return _single(branches[0], path)
    value = branches[0]["input"]
    choices = [_expected(details) for details in branches]
    if any(choice is None for choice in choices):
        return next(_single(details, path) for details, choice in zip(branches, choices, strict=True) if choice is None)
    return f"expected {', or '.join(filter(None, choices))}, got {describe(value)}{_nearest_literal(branches, value)}"


def _expected(details: ErrorDetails) -> str | None:
    """Return the expected value, for the sentence `expected ..., got ...`."""
    kind = details["type"]
    if kind == "literal_error":
        return str(details["ctx"]["expected"])
    if kind == "union_tag_invalid":
        *most, last = str(details["ctx"]["expected_tags"]).split(", ")
        return f"{', '.join(most)} or {last}"
    if kind == "value_error" and (match := re.match(r"^expected (.*), got ", str(details["ctx"]["error"]))):
        return match[1]
    return _EXPECTED.get(kind)


def _single(details: ErrorDetails, path: Path) -> str:
    kind, value = details["type"], details["input"]
    if kind == "value_error":
        return _cut(str(details["ctx"]["error"]))
    if kind == "string_pattern_mismatch" and path == ("name",):
        return f"expected letters, digits, '.', '_' and '-', at most 100, no sign in front, got {describe(value)}"
    if kind == "string_pattern_mismatch":
        return f"expected text without line breaks and control characters, got {describe(value)}"
    if kind == "string_too_short":
        return "must not be empty"
    if kind in ("too_short", "too_long"):
        bound = "min_length" if kind == "too_short" else "max_length"
        words = "at least" if kind == "too_short" else "at most"
        return f"must have {words} {details['ctx'][bound]} entries, got {describe(value)}"
    expected = _expected(details)
    if expected is None:
        return _cut(details["msg"][:1].lower() + details["msg"][1:])
    if kind == "union_tag_invalid":
        value = value.get(str(path[-1])) if isinstance(value, Mapping) else value
    quotes = "; put it in quotes" if kind == "string_type" and isinstance(value, (bool, int, float)) else ""
    empty = "; fill it in or remove the key" if value is None else ""
    return f"expected {expected}, got {describe(value)}{_nearest_literal([details], value)}{quotes}{empty}"


def _nearest_literal(branches: list[ErrorDetails], value: object) -> str:
    if not isinstance(value, str):
        return ""
    allowed = [
        text
        for details in branches
        if details["type"] in ("literal_error", "union_tag_invalid")
        for text in re.findall(r"'([^']*)'", str(_expected(details)))
    ]
    lowered = {text.lower(): text for text in allowed}
    near = difflib.get_close_matches(value.lower()[:100], lowered, n=1, cutoff=0.6)
    return f"; did you mean {lowered[near[0]]!r}?" if near else ""


def _unknown_key(path: Path, section: type[Section] | None) -> str:
    key = str(path[-1])[:100]
    here = list(section.model_fields) if section else []
    known = f" (known: {', '.join(here)})" if here else ""
    if key in _DERIVED:
        return f"unknown key; {_DERIVED[key]}"
    elsewhere, full = _paths_of_keys(), ".".join(str(part) for part in path)
    near_here = difflib.get_close_matches(key, here, n=1, cutoff=0.6)
    near_elsewhere = difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.75)
    if key in _all_keys():  # `optimizer.lr: 1` as one key
        meant = key
    elif full in _all_keys():  # of another alternative
        meant = full
    elif key in elsewhere or key in _ELSEWHERE:
        meant = elsewhere.get(key) or _ELSEWHERE[key]
    elif near_here:
        meant = near_here[0]
    elif near_elsewhere:
        meant = elsewhere[near_elsewhere[0]]
    else:
        return f"unknown key{known}"
    if len(path) > 1 and meant == full:
        owners = [str(_tag_value(one)) for one in _choices(Recipe.model_fields[str(path[0])].annotation)
                  if key in one.model_fields]  # fmt: skip
        mine = f" of {_tag_value(section)}" if section else ""
        return f"not a setting{mine}, but of {', '.join(owners)}{known}"
    if "." in key and meant == key:
        return f"unknown key; write {key.rpartition('.')[2]!r} below {key.rpartition('.')[0]!r}"
    return f"unknown key; did you mean {meant!r}?{known}"


@cache
def _all_keys() -> frozenset[str]:
    return frozenset(known_keys())


@cache
def _paths_of_keys() -> dict[str, str]:
    """Return the dotted path of every key, by its last part."""
    paths: dict[str, str] = {}
    for full in known_keys():
        paths.setdefault(full.rpartition(".")[2], full)
    return paths


def _path_and_section(loc: tuple[int | str, ...]) -> tuple[Path, type[Section] | None]:
    """Return a pydantic location without the names of union branches, and the section of its last key."""
    path: list[str | int] = []
    choices: tuple[Any, ...] = (Recipe,)
    owner: type[Section] | None = None
    for part in loc:
        sections = [choice for choice in choices if isinstance(choice, type) and issubclass(choice, Section)]
        tuples = [choice for choice in choices if get_origin(choice) is tuple]
        if len(sections) > 1:  # the tag of a discriminated union branch
            choices = tuple(one for one in sections if part in get_args(one.model_fields[_tag_of(one)].annotation))
        elif sections:
            owner = sections[0]
            path.append(part)
            field = owner.model_fields.get(str(part))
            choices = _choices(field.annotation) if field is not None else ()
        elif tuples and isinstance(part, int):
            path.append(part)
            choices = _choices(get_args(tuples[0])[0])
    return tuple(path), owner


def _tag_of(section: type[Section]) -> str:
    """Return the tag key of a union of sections."""
    return "type" if "type" in section.model_fields else "name"


def _tag_value(section: type[Section]) -> object:
    return get_args(section.model_fields[_tag_of(section)].annotation)[0]


def _tag_key(path: Path) -> str:
    """Return the same for the path where the choice was refused: an entry of a list, or the key itself."""
    return "type" if "sources" in path else "name"


def _choices(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type, without None and annotations."""
    if get_origin(annotation) is Annotated:
        return _choices(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(choice for one in get_args(annotation) for choice in _choices(one))
    return () if annotation is type(None) else (annotation,)


def _cut(message: str) -> str:
    return message if len(message) <= 300 else message[:297] + "..."
