"""Every key of a recipe that the pages name, such as `train.budget`, is one: of any choice of a union."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from tests.docs.blocks import running_text
from tests.test_pages import ROOT, pages
from turbolm.recipe.json_schema import recipe_json_schema

SCHEMA = recipe_json_schema()
_KEY = re.compile(
    rf"`((?:{'|'.join(key for key in SCHEMA['properties'] if key not in ('name', 'extends'))})(?:\.\w+)+)(?=[`:= ,])"
)


def inside(nodes: list[dict[str, Any]]) -> tuple[dict[str, list[dict[str, Any]]], bool]:
    """The keys of any of these parts of the schema, and whether one of them takes every key; `N` is any of a list."""
    keys, is_free, left = defaultdict(list), False, list(nodes)
    while left:
        node = left.pop()
        if "$ref" in node:
            left.append(SCHEMA["$defs"][node["$ref"].rpartition("/")[2]])
        left += [one for kind in ("anyOf", "oneOf", "allOf") for one in node.get(kind, ())]
        for key, part in node.get("properties", {}).items():
            keys[key].append(part)
        if "items" in node:
            keys["N"].append(node["items"])
        has_none = node.get("type") == "object" and "properties" not in node
        is_free |= has_none or node.get("additionalProperties", False) is not False
    return keys, is_free


def is_key(path: str) -> bool:
    nodes = [SCHEMA]
    for name in path.split("."):
        keys, is_free = inside(nodes)
        if name not in keys:
            return is_free
        nodes = keys[name]
    return True


def test_keys_in_the_pages_are_keys_of_recipes() -> None:
    named = [(page.relative_to(ROOT), key) for page in pages() for key in _KEY.findall(running_text(page))]
    assert len(named) > 100
    wrong = [f"{page}: {key}" for page, key in named if page.name != "CHANGELOG.md" and not is_key(key)]
    assert [line for line in wrong if not line.endswith((".py", ".json"))] == []


def test_what_is_no_key_is_found() -> None:
    assert all(map(is_key, ("train.budget", "optimizer.peak_lrs.matrices", "model.config.x", "data.sources.N.weight")))
    assert not any(map(is_key, ("train.budgets", "optimizer.lrs", "data.sources.N.weights", "cluster.slurm.tim")))
