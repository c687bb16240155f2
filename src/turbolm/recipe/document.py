"""Parse YAML into a tree of plain values with their file and line.

All problems of a text are collected, so one pass reports several duplicate keys. The dialect is YAML 1.2's core schema:
only `true` and `false` are booleans, `off` and `on` are text, `1e-5` is a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from turbolm.errors import UserError

MAX_FILE_BYTES = 128 * 1024  # PyYAML reads about 100 kB a second; a recipe has 2 kB
MAX_DEPTH = 24
MAX_VALUES = 5_000  # counted with expanded aliases, so that nested aliases cannot blow up
_MAX_DIGITS = 40

_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Problem:
    """One problem, and where it is."""

    file: str  # a path as the user would write it, or "command line: key=value"
    line: int | None
    key: str  # dotted path, empty for a whole file
    message: str

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        text = f"{where}: {self.key}: {self.message}" if self.key else f"{where}: {self.message}"
        return " ".join(text.splitlines())


class RecipeError(UserError):
    """All problems of a recipe, one per line."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(map(str, self.problems)))


@dataclass(frozen=True)
class Tree:
    """A value and its origin: the line of its key in a mapping, or its own line in a list."""

    value: Any  # dict[str, Tree], list[Tree], or a scalar
    file: str
    line: int | None

    def plain(self) -> Any:
        """Return the plain value."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def nearest(self, path: Iterable[str | int]) -> Tree:
        """Return the value at `path`, or the closest one around it."""
        here = self
        for part in path:
            if isinstance(here.value, list):
                children: dict[Any, Tree] = dict(enumerate(here.value))
            else:
                children = here.value if isinstance(here.value, dict) else {}
            if part not in children:
                break
            here = children[part]
        return here


def parse_document(text: str, file: str, problems: list[Problem], show_lines: bool = True) -> Tree | None:
    """Return the tree of one YAML document, or None if it is not YAML. Problems are added to `problems`.

    An empty document is a tree whose value is None.
    """
    loader = None
    line: int | None
    try:
        loader = _Composer(text)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problems.append(
            Problem(file, line if show_lines else None, "", f"character U+{error.character:04X} is not allowed")
        )
        return None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark and show_lines else None
        problems.append(Problem(file, line, "", _syntax_message(error, show_lines)))
        return None
    finally:
        if loader is not None:
            loader.dispose()
    if node is None:
        return Tree(None, file, 1 if show_lines else None)
    return _Builder(file, problems, show_lines).build(node, "")


def join_key(parent: str, key: str | int) -> str:
    """Join `optimizer` and `lr` to `optimizer.lr`; quote a key that would garble a message."""
    shown = str(key)
    if not shown.isprintable() or not shown or len(shown) > 80:
        shown = ascii(shown[:80])
    return f"{parent}.{shown}" if parent else shown


class _Composer(yaml.SafeLoader):
    """Parses text to nodes, with the scalars of YAML 1.2 and limits on depth and size."""

    yaml_implicit_resolvers: ClassVar[dict] = {}  # type: ignore[misc]

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._num_values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        self._num_values += 1
        for value, most, what in ((self._depth, MAX_DEPTH, "levels"), (self._num_values, 2 * MAX_VALUES, "values")):
            if value > most:
                mark = self.peek_event().start_mark
                raise yaml.MarkedYAMLError(problem=f"more than {most} {what}", problem_mark=mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


# The core schema, https://yaml.org/spec/1.2.2/#103-core-schema
SCALARS = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    (
        "float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
)
for _name, _pattern, _first in SCALARS:
    _Composer.add_implicit_resolver(_TAG + _name, _pattern, _first)


class _Builder:
    """Builds a tree from nodes; problems are recorded and skipped."""

    def __init__(self, file: str, problems: list[Problem], show_lines: bool) -> None:
        self.file, self.problems, self.show_lines = file, problems, show_lines
        self.num_values = 0
        self.open_nodes: set[int] = set()

    def build(self, node: yaml.Node, key: str, key_node: yaml.Node | None = None) -> Tree:
        line = self._line(key_node or node)
        self.num_values += 1
        if id(node) in self.open_nodes:
            self._refuse(node, key, "an alias to the value that it is part of")
            return Tree(None, self.file, line)
        if self.num_values > MAX_VALUES or len(self.open_nodes) > MAX_DEPTH:
            if self.num_values <= 2 * MAX_VALUES:
                self._refuse(node, key, f"the aliases expand to more than {MAX_VALUES} values or {MAX_DEPTH} levels")
                self.num_values = 2 * MAX_VALUES + 1  # report it once, and stop building
            return Tree(None, self.file, line)
        self.open_nodes.add(id(node))
        value: Any
        if isinstance(node, yaml.MappingNode):
            value = self._mapping(node, key)
        elif isinstance(node, yaml.SequenceNode):
            self._refuse_tag(node, key, "seq")
            value = []
            for index, child in enumerate(node.value):
                value.append(self.build(child, join_key(key, index)))
        else:
            value = self._scalar(node, key, key_node or node)
        self.open_nodes.discard(id(node))
        return Tree(value, self.file, line)

    def _mapping(self, node: yaml.MappingNode, key: str) -> dict[str, Tree]:
        self._refuse_tag(node, key, "map")
        children: dict[str, Tree] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            name = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
                shown = repr(name) if isinstance(name, str) else "a list or mapping"
                self._refuse(key_node, key, f"keys must be text, got {shown}; put it in quotes")
                continue
            path = join_key(key, name)
            if name == "<<":
                self._refuse(
                    key_node, path, "merge keys are not supported; put the shared part in a file and use `extends:`"
                )
            elif _has_surrogate(name):
                self._refuse(key_node, path, "not valid Unicode")
            elif name in children:
                self._refuse(key_node, path, f"duplicate key; it is already set on line {lines[name]}")
            else:
                lines[name] = key_node.start_mark.line + 1
                children[name] = self.build(value_node, path, key_node)
        return children

    def _scalar(self, node: yaml.Node, key: str, key_node: yaml.Node) -> Any:
        text, kind = node.value, node.tag.removeprefix(_TAG)
        if _has_surrogate(text):
            self._refuse(key_node, key, "not valid Unicode")
        elif kind == "str":
            return text
        elif kind == "null":
            return None
        elif kind == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        elif kind in ("int", "float") and (number := _number(text)) is not None:
            return float(number) if kind == "float" else number
        elif kind in ("bool", "int", "float"):
            self._refuse(key_node, key, f"expected a finite number of at most {_MAX_DIGITS} digits, got {text[:60]!r}")
        else:
            self._refuse(key_node, key, f"the tag {node.tag[:80]!r} is not supported")
        return None

    def _refuse_tag(self, node: yaml.Node, key: str, kind: str) -> None:
        if node.tag != _TAG + kind:
            self._refuse(node, key, f"the tag {node.tag[:80]!r} is not supported")

    def _refuse(self, node: yaml.Node, key: str, message: str) -> None:
        self.problems.append(Problem(self.file, self._line(node), key, message))

    def _line(self, node: yaml.Node) -> int | None:
        return node.start_mark.line + 1 if self.show_lines else None


def _number(text: str) -> int | float | None:
    """Return a finite number of YAML 1.2; None for anything else."""
    try:
        if len(text) > _MAX_DIGITS:
            return None
        if re.match(r"^0[ox]", text):
            return int(text, 0)
        if re.match(r"^[-+]?[0-9]+$", text):
            return int(text)
        value = float(text)
        return value if math.isfinite(value) else None
    except ValueError:
        return None


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _syntax_message(error: yaml.MarkedYAMLError, show_column: bool) -> str:
    problem = error.problem or error.context or "cannot be read"
    if "'\\t'" in problem:
        problem = "a tab cannot indent YAML; use spaces"
    elif "another document" in problem or "single document" in str(error.context):
        problem = "more than one YAML document; remove the `---` line"
    column = f" (column {error.problem_mark.column + 1})" if error.problem_mark and show_column else ""
    return f"not valid YAML: {problem[:200]}{column}"
