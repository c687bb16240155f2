"""Render an adapted recipe as YAML: every value with its reason."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Union

from turbolm.recipe.load import dump_values

_COMMENT_COLUMN, _WIDTH = 33, 110


@dataclass(frozen=True)
class Entry:
    """A value of the recipe and its reason."""

    value: Any
    why: str = ""


Entries = Mapping[str, Union[Entry, "Entries"]]


def plain(entries: Entries) -> dict[str, Any]:
    """Return the values without reasons."""
    return {key: entry.value if isinstance(entry, Entry) else plain(entry) for key, entry in entries.items()}


def render_recipe(title: str, command: str, findings: Mapping[str, str], entries: Entries) -> str:
    """Return the recipe as YAML with the findings in its opening comment."""
    lines = [f"# {title}", "#", f"# command:   {command}", "#", "# What a small copy of the model showed:"]
    for name, text in findings.items():
        lines += _wrapped(text, f"#   {name:<10} ", f"#   {'':<10} ")
    return "\n".join([*lines, *_lines(entries, "")]) + "\n"


def _lines(entries: Entries, indent: str) -> Iterator[str]:
    for key, entry in entries.items():
        if not isinstance(entry, Entry):
            yield f"{indent}{key}:"
            yield from _lines(entry, indent + "  ")
            continue
        value = entry.value
        is_row = isinstance(value, list) and not any(isinstance(one, (dict, list)) for one in value)
        body = [f"{key}: {json.dumps(value)}"] if is_row else dump_values({key: value}).splitlines()
        with_reason = f"{indent}{body[0]:<{_COMMENT_COLUMN - 1 - len(indent)}} # {entry.why}"
        if not entry.why or (len(with_reason) <= _WIDTH and len(body) == 1):
            yield with_reason if entry.why else f"{indent}{body[0]}"
        else:
            for paragraph in entry.why.splitlines():
                yield from _wrapped(paragraph, f"{indent}# ", f"{indent}# ")
            yield f"{indent}{body[0]}"
        yield from (f"{indent}{more}" for more in body[1:])


def _wrapped(text: str, first: str, then: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=then, break_long_words=False, break_on_hyphens=False
    )
