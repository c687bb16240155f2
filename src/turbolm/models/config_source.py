"""Which names of its configuration a model's code reads, from the source of Transformers.

A configuration class keeps every name it is given, so a misspelt setting trains without a word. The class declares most
of the names that count; some only the modelling code reads, such as `getattr(config, "head_dim", None)`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

# What PreTrainedModel reads of any configuration that matters for training.
_READ_BY_BASE = ("tie_word_embeddings", "initializer_range", "per_layer_config")
_SHARED_MODULES = ("transformers.masking_utils", "transformers.modeling_rope_utils")
_OF_GENERATION = frozenset({"create_masks_for_generate"})


@cache
def names_read(module: str, model: str) -> frozenset[tuple[str, str]]:
    """What a model's class reads of its configuration: pairs of the variable and the name, as in `config.head_dim`.

    Followed are its definition and all that it mentions, in modelling modules and in Transformers' masks and rotary
    positions.
    """
    found = {("config", name) for name in _READ_BY_BASE}
    seen: set[tuple[str, str]] = set()
    waiting = [(module, model)]
    while waiting:
        module, name = place = waiting.pop()
        if place in seen or name in _OF_GENERATION:
            continue
        seen.add(place)
        source = _read_module(module)
        if name in source.imported:
            waiting.append(source.imported[name])
        elif name in source.defined:
            found |= source.defined[name].attributes
            waiting += [(module, used) for used in source.defined[name].names]
    return frozenset(found)


def keys_read(*classes: type[PreTrainedConfig | PreTrainedModel]) -> frozenset[str]:
    """Keys by which the modules of these classes look into mappings, and those of rotary positions in general."""
    modules = {base.__module__ for one in classes for base in one.__mro__ if ".models." in base.__module__}
    found: set[str] = set()
    for module in (*modules, "transformers.modeling_rope_utils"):
        found |= _keys(_parse(module))
    return frozenset(key for key in found if key.isidentifier())


class _Definition:
    def __init__(self, node: ast.AST) -> None:
        self.attributes = frozenset(_attributes(node))
        self.names = frozenset(child.id for child in ast.walk(node) if isinstance(child, ast.Name))


class _Source:
    """The definitions at the top of a module, and where the names that it imports are defined."""

    def __init__(self, module: str, tree: ast.Module) -> None:
        self.defined: dict[str, _Definition] = {}
        self.imported: dict[str, tuple[str, str]] = {}
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                self.defined[node.name] = _Definition(node)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    if isinstance(target, ast.Name):
                        self.defined[target.id] = _Definition(node)
            elif isinstance(node, ast.ImportFrom):
                home = importlib.util.resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
                if home in _SHARED_MODULES or (home.startswith("transformers.models.") and ".modeling_" in home):
                    self.imported |= {alias.asname or alias.name: (home, alias.name) for alias in node.names}


@cache
def _read_module(name: str) -> _Source:
    return _Source(name, _parse(name))


@cache
def _parse(name: str) -> ast.Module:
    file = importlib.import_module(name).__file__
    return ast.parse(Path(file).read_text(encoding="utf-8")) if file else ast.Module([], [])


def _attributes(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(variable, name) of `config.NAME`, `self.config.NAME`, `getattr(config, "NAME", ...)`."""
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute):
            owner, name = _variable(child.value), child.attr
        elif (
            isinstance(child, ast.Call)
            and isinstance(child.func, ast.Name)
            and child.func.id in ("getattr", "hasattr")
            and len(child.args) > 1
            and isinstance(child.args[1], ast.Constant)
        ):
            owner, name = _variable(child.args[0]), str(child.args[1].value)
        else:
            continue
        if owner.endswith(("config", "cfg")):
            yield owner, name


def _variable(node: ast.expr) -> str:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get_text_config":
        return "config"
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _keys(tree: ast.AST) -> set[str]:
    """The constants in `mapping["KEY"]`, `mapping.get("KEY")`, `"KEY" in mapping`, and the fields of typed dicts."""
    found: set[str] = set()
    for child in ast.walk(tree):
        if isinstance(child, ast.Subscript) and isinstance(child.slice, ast.Constant):
            found.add(str(child.slice.value))
        elif isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute) and child.args:
            if child.func.attr in ("get", "pop", "setdefault") and isinstance(child.args[0], ast.Constant):
                found.add(str(child.args[0].value))
        elif isinstance(child, ast.Compare) and isinstance(child.left, ast.Constant):
            found.add(str(child.left.value))
        elif isinstance(child, ast.ClassDef) and any(ast.unparse(base) == "TypedDict" for base in child.bases):
            found |= {field.target.id for field in child.body
                      if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)}  # fmt: skip
    return found
