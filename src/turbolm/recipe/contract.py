"""The learning contract of a recipe: what is learned, as plain data with a fingerprint.

Two runs with one fingerprint follow one loss curve. The spelling of numbers, the order of keys and the execution plan
do not change the fingerprint.

Recipes grow: a key that older runs do not have is marked in the schema with the value that means "as before"
(`fields.Before`). A contract has every key. Comparisons and fingerprints omit keys with that value. A run that is older
than a key, or than its current default, keeps what it was trained with (`pin_to`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from turbolm.recipe.fields import Before, FormerDefault, Section
from turbolm.recipe.schedules import FORMERLY_IN_ALL
from turbolm.recipe.schema import CONTRACT_SECTIONS, RENAMED, RENAMED_CHOICES, Recipe

_MAX_EXACT = 2**53  # beyond it a float is not a unique integer
_TAGS = ("name", "type")  # the tags that choose among the classes of a union


def contract_of(recipe: Recipe) -> dict[str, Any]:
    """Return the contract sections of a recipe in plain JSON types, with every default filled in.

    A configuration from a file is stored as the merged result: the same settings in a file or in the recipe are the
    same contract.
    """
    sections = recipe.model_dump(mode="json", include=set(CONTRACT_SECTIONS))
    sections["model"] |= {"config": recipe.model.full_config, "config_file": None}
    contract = _plain(sections)
    assert isinstance(contract, dict)
    return contract


def comparable(contract: Mapping[str, Any], schema: type[Section] = Recipe) -> dict[str, Any]:
    """Return a contract under today's names, without keys whose value is "as before"."""
    return dict(_without_unchanged(schema, _with_new_names(contract)))


def comparable_section(section: Section) -> dict[str, Any]:
    """Return one section in plain JSON types, without keys whose value is "as before"."""
    return dict(_without_unchanged(type(section), section.model_dump(mode="json")))


def _with_new_names(contract: Mapping[str, Any]) -> dict[str, Any]:
    return _renamed(json.loads(json.dumps(contract)), RENAMED, RENAMED_CHOICES)


def _as_fingerprinted(contract: Mapping[str, Any]) -> dict[str, Any]:
    """Return the comparable part of a contract, in the original format of fingerprints."""
    keys = {f"{key.rpartition('.')[0]}.{new}": key.rpartition(".")[2] for key, new in RENAMED.items()}
    choices = {key: {new: old for old, new in names.items()} for key, names in RENAMED_CHOICES.items()}
    result = _renamed(comparable(contract), keys, choices)
    if "schedule" in result:
        result["schedule"] = FORMERLY_IN_ALL | result["schedule"]
    return result


def _renamed(
    contract: dict[str, Any], keys: Mapping[str, str], choices: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Rename keys and choices of the contract in place; all of them are in sections."""
    for key, new in keys.items():
        section, name = key.split(".")
        if name in contract.get(section, {}):
            contract[section][new] = contract[section].pop(name)
    for key, names in choices.items():
        section, name = key.split(".")
        if contract.get(section, {}).get(name) in names:
            contract[section][name] = names[contract[section][name]]
    return contract


def _without_unchanged(
    section: type[Section], values: Mapping[str, Any], others: frozenset[str] = frozenset()
) -> Iterator[tuple[str, Any]]:
    """Remove keys that `section` does not have and that belong to the `others` it was chosen among."""
    for name, value in values.items():
        field = section.model_fields.get(name)
        if field is None:
            if name not in others:
                yield name, value
        elif not any(_same(value, marker.value) for marker in _markers(field, Before)):
            yield name, _inner(field.annotation, value)


def _inner(annotation: Any, value: Any) -> Any:
    if isinstance(value, list):
        return [_inner(annotation, entry) for entry in value]
    if isinstance(value, dict):
        sections = list(_sections(annotation))
        others = frozenset(name for section in sections for name in section.model_fields)
        for section in sections:
            if _is_chosen(section, value):
                return dict(_without_unchanged(section, value, others))
    return value


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """Return the section classes that an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def _is_chosen(section: type[Section], value: Mapping[str, Any]) -> bool:
    """Return whether the value's tag, if the section has one, is this section's."""
    tags = {tag: get_args(section.model_fields[tag].annotation) for tag in _TAGS if tag in section.model_fields}
    return all(value.get(tag) in names for tag, names in tags.items() if names)


def _markers(field: FieldInfo, kind: type[Any]) -> list[Any]:
    return [entry for entry in field.metadata if isinstance(entry, kind)]


def _same(plain: Any, marked: Any) -> bool:
    marked = marked.model_dump(mode="json") if isinstance(marked, BaseModel) else marked
    return _plain(plain) == _plain(marked) and type(_plain(plain)) is type(_plain(marked))


def pin_to(recipe: Recipe, old: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
    """Return the recipe that resumes a run of the contract `old`, and a line for each default that is not today's.

    If the recipe leaves a key at its default, a run from before the key keeps the value of `Before`, and a run that
    recorded a `FormerDefault` keeps that. A value that the recipe sets is never changed.
    """
    pinned: list[str] = []
    values, update = _with_new_names(old), {}
    for name in CONTRACT_SECTIONS:
        section = getattr(recipe, name)
        given = values.get(name)
        if isinstance(given, dict):
            update[name] = _pin(section, given, name, pinned)
    return recipe.model_copy(update=update), pinned


def _pin(section: Any, old: Mapping[str, Any], at: str, pinned: list[str]) -> Any:
    update: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section) and isinstance(old.get(name), dict):
            update[name] = _pin(value, old[name], f"{at}.{name}", pinned)
            continue
        if name in section.model_fields_set:
            continue
        former = [m.value for m in _markers(field, FormerDefault) if name in old and _same(old[name], m.value)]
        before = [m.value for m in _markers(field, Before) if name not in old]
        for wanted in (former + before)[:1]:
            if wanted != value:
                update[name] = wanted
                pinned.append(f"{at}.{name}: {wanted} (the default is {value} now)")
    return section.model_copy(update=update)


def canonical_json(obj: object) -> str:
    """Return the canonical JSON text: sorted keys, no spaces, floats in their shortest exact form.

    Raises ValueError for NaN and infinities, which JSON does not have.
    """
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint(contract: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the canonical text of the contract's comparable part, in hexadecimal."""
    return hashlib.sha256(canonical_json(_plain(_as_fingerprinted(contract))).encode()).hexdigest()


def changed_keys(old: object, new: object, key: str = "") -> list[tuple[str, Any, Any]]:
    """Return (dotted key, old value, new value) for every difference, by key. A missing value is None.

    Mappings are compared key by key; a list that differs is reported as a whole.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        changes = []
        for name in sorted({*old, *new}):
            path = f"{key}.{name}" if key else name
            if name in old and name in new:
                changes += changed_keys(old[name], new[name], path)
            else:
                changes.append((path, old.get(name), new.get(name)))
        return changes
    return [] if _plain(old) == _plain(new) and type(_plain(old)) is type(_plain(new)) else [(key, old, new)]


def _plain(value: object) -> object:
    """Convert tuples to lists, and integral floats to integers: `1.0` and `1` are the same value."""
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child) for child in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < _MAX_EXACT:
        return int(value)
    return value
