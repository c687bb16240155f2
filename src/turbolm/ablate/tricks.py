"""Parse tricks: the pieces of recipes/_tricks, the user's own pieces, and settings on the command line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbolm.errors import UserError
from turbolm.plan.recipe_table import trick_files
from turbolm.recipe.load import load_piece

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PLUS = re.compile(r"\+(?=[a-z_]+(?:\.[\w]+)*=)")


@dataclass(frozen=True)
class Trick:
    """Settings laid over a recipe. `overrides` are as `load_recipe` takes them; `keys` are the dotted keys they set."""

    name: str
    overrides: tuple[str | Path, ...]
    keys: tuple[str, ...]


def parse_tricks(texts: Sequence[str]) -> list[Trick]:
    """Tricks as the command line spells them: `muon,own/piece.yaml,short:train.budget=1M+data.packing=concat`.

    Raises UserError with everything that is wrong.
    """
    entries = [entry.strip() for text in texts for entry in _split(text) if entry.strip()]
    known = {path.stem: path for path in trick_files()}
    if not entries:
        raise UserError(f"name the tricks to measure with --tricks a,b,c; known: {', '.join(known)}")
    tricks: list[Trick] = []
    problems: list[str] = []
    for entry in entries:
        try:
            trick = _parse(entry, known)
        except UserError as error:
            problems.append(str(error))
            continue
        if trick.name in [other.name for other in tricks]:
            problems.append(f"--tricks: {trick.name} is listed twice")
        tricks.append(trick)
    if problems:
        raise UserError("\n".join(problems))
    return tricks


def _split(text: str) -> list[str]:
    """Split at the commas outside of [...] and {...}."""
    entries, depth = [""], 0
    for char in text:
        depth += (char in "[{") - (char in "]}")
        if char == "," and depth == 0:
            entries.append("")
        else:
            entries[-1] += char
    return entries


def _parse(entry: str, known: Mapping[str, Path]) -> Trick:
    name, colon, settings = entry.partition(":")
    if colon:
        check_name("--tricks", name)
        overrides = _PLUS.split(settings)
        keys = tuple(override.partition("=")[0].strip() for override in overrides)
        return Trick(name, tuple(overrides), keys)
    if entry in known:
        path = known[entry]
    elif entry.endswith((".yaml", ".yml")):
        path = Path(entry)
        check_name("--tricks", path.stem)
    else:
        near = difflib.get_close_matches(entry.lower(), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--tricks: unknown trick {entry[:100]!r}; {hint}(known: {', '.join(known)})")
    return Trick(path.stem, (path,), tuple(_leaves(load_piece(path))))


def check_name(option: str, name: str, max_length: int = 50) -> str:
    """Return the name if it can be part of a path. Raises UserError."""
    if len(name) > max_length or not _NAME.fullmatch(name):
        raise UserError(f"{option}: expected a name of letters, digits, '.', '_' and '-', got {name[:100]!r}")
    return name


def _leaves(values: Mapping[str, Any], parent: str = "") -> list[str]:
    keys = []
    for name, value in values.items():
        key = f"{parent}.{name}" if parent else str(name)
        keys += _leaves(value, key) if isinstance(value, Mapping) and value else [key]
    return keys
