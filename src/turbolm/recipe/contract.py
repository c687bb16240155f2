"""The learning contract of a recipe: what is learned, as plain data with a fingerprint.

Two runs with one fingerprint follow one loss curve. How a recipe spells a number, orders its keys or is carried out
does not change the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from turbolm.recipe.schema import CONTRACT_SECTIONS, Anomalies, Recipe

_MAX_EXACT = 2**53  # beyond it a float no longer names one whole number


def contract_of(recipe: Recipe) -> dict[str, Any]:
    """The contract sections of a recipe in plain JSON types, every default filled in.

    `anomalies` is left out where it is all default: most runs never meet one, and those from before there was such a
    section keep their fingerprint. So is `train.restarts` where there are none.
    """
    left_out = {"anomalies"} if recipe.anomalies == Anomalies() else set()
    contract = _plain(recipe.model_dump(mode="json", include=set(CONTRACT_SECTIONS) - left_out))
    assert isinstance(contract, dict)
    if recipe.train.restarts is None:
        del contract["train"]["restarts"]
    return contract


def canonical_json(obj: object) -> str:
    """One text for one value: sorted keys, no spaces, floats in their shortest exact form.

    Raises ValueError for NaN and infinities, which JSON does not have.
    """
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint(contract: Mapping[str, Any]) -> str:
    """SHA-256 of the contract's canonical form, in hexadecimal."""
    return hashlib.sha256(canonical_json(_plain(contract)).encode()).hexdigest()


def changed_keys(old: object, new: object, key: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every difference, by key. A missing value is given as None.

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
    """Tuples as lists, and a float that is a whole number as that number: `1.0` and `1` are one spelling apart."""
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child) for child in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < _MAX_EXACT:
        return int(value)
    return value
