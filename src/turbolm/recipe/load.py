"""Load recipes from files: `extends:`, `scale:`, overrides, and all problems at once with their positions."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import ValidationError

from turbolm.recipe.checks import check_recipe, check_values, find_secrets
from turbolm.recipe.document import (
    MAX_DEPTH,
    MAX_FILE_BYTES,
    SCALARS,
    Problem,
    RecipeError,
    Tree,
    join_key,
    parse_document,
)
from turbolm.recipe.fields import Section
from turbolm.recipe.lengths import LENGTH_SCHEDULES, LengthSchedule
from turbolm.recipe.messages import Finding, describe, validation_findings
from turbolm.recipe.optimizers import OPTIMIZERS, Optimizer
from turbolm.recipe.scale import Scaling, derive, find_problems, read_scale
from turbolm.recipe.schedules import SCHEDULES, Schedule
from turbolm.recipe.schema import RENAMED, RENAMED_CHOICES, Recipe

__all__ = ["Problem", "RecipeError", "dump_recipe", "dump_values", "load_piece", "load_recipe", "load_scaled"]

_MAX_FILES = 64
_COMMAND_LINE = "command line: "  # prefix of an override's origin
# Sections whose `name` chooses their settings: the common base, the choices, and the default.
_CHOICES: dict[tuple[str, ...], tuple[type[Section], Mapping[str, type[Section]], str | None]] = {
    ("optimizer",): (Optimizer, OPTIMIZERS, "adamw"),
    ("schedule",): (Schedule, SCHEDULES, "cosine"),
    ("data", "length_schedule"): (LengthSchedule, LENGTH_SCHEDULES, None),
}


def load_recipe(path: str | Path, overrides: Sequence[str | Path] = ()) -> Recipe:
    """Load the recipe in the file `path`, merged over the files that it extends, with overrides on top, in order.

    An override is `key.path=value`, or the path of a piece (a file as in recipes/_tricks). Raises RecipeError with
    every problem of every file, override and value.
    """
    return _load(Path(path), overrides, (), ()).recipe


def load_scaled(
    path: str | Path, overrides: Sequence[str | Path] = (), tuned_overrides: Sequence[str | Path] = ()
) -> tuple[Recipe, Scaling | None]:
    """Load a recipe and what its `scale` derives (`turbolm.recipe.scale`), None without one.

    `tuned_overrides` are laid over the recipe that `scale` names. Raises RecipeError.
    """
    loaded = _load(Path(path), overrides, tuned_overrides, ())
    return loaded.recipe, loaded.scaling


@dataclass(frozen=True)
class _Loaded:
    recipe: Recipe
    scaling: Scaling | None
    files: frozenset[str]  # real paths of the recipe and of what it extends


def _load(
    path: Path,
    overrides: Sequence[str | Path],
    tuned_overrides: Sequence[str | Path],
    chain: tuple[tuple[str, str], ...],
    asked: Problem | None = None,
) -> _Loaded:
    """Load a recipe; `chain` has the real path and shown name of each recipe whose `scale` led here.

    That the file cannot be read is a problem of the key that `asked` for it.
    """
    problems: list[Problem] = []
    shown = os.path.normpath(path) if str(path) else "recipe"
    reader = _Reader(problems)
    tree = reader.read(path, shown, (), asked or Problem(shown, None, "", ""))
    complete = tree is not None
    tree = tree or Tree({}, shown, None)
    for override in overrides:
        if isinstance(override, Path):
            piece = reader.read(override, str(override), (), Problem(str(override), None, "", ""))
            tree = tree if piece is None else _lay_over(tree, piece)
        else:
            tree = _override(tree, override, problems)
    tree, scaling = _scaled(tree, reader, tuned_overrides, (*chain, (_real(path), shown)))
    recipe, findings = _validate(tree.plain())
    told = {(problem.file, problem.line, problem.key) for problem in problems}
    for finding in findings:
        problem = _problem(tree, finding)
        if (problem.file, problem.line, problem.key) in told or (
            finding.needs_all and not (complete and reader.complete)
        ):
            continue
        problems.append(problem)
    if problems or recipe is None:
        files = list(dict.fromkeys(problem.file for problem in problems))
        raise RecipeError(sorted(problems, key=lambda problem: (files.index(problem.file), problem.line or 0)))
    return _Loaded(recipe, scaling, frozenset(reader.files.values()))


def load_piece(path: Path) -> dict[str, Any]:
    """Load a part of a recipe as plain values, merged over what it extends. They are validated only within a recipe.

    Raises RecipeError.
    """
    problems: list[Problem] = []
    tree = _Reader(problems).read(path, str(path), (), Problem(str(path), None, "", ""))
    if problems or tree is None:
        raise RecipeError(problems)
    values: dict[str, Any] = tree.plain()
    return values


def dump_recipe(recipe: Recipe) -> str:
    """Return the full recipe as YAML, including defaults; it loads back to an equal one."""
    return dump_values(recipe.model_dump(mode="json"))


def dump_values(values: dict[str, Any]) -> str:
    """Return plain values as the YAML of a recipe, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _validate(data: Any) -> tuple[Recipe | None, list[Finding]]:
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        return None, validation_findings(error) + check_values(data) + list(find_secrets(data))
    return recipe, check_recipe(recipe) + list(find_secrets(data))


def _problem(tree: Tree, finding: Finding) -> Problem:
    origin = tree.nearest(finding.path)
    key = ""
    for part in finding.path:
        key = join_key(key, part)
    return Problem(origin.file, origin.line, key, finding.message)


# ------------------------------------------------------------------------------------------------ files and extends


class _Reader:
    """Reads a file and what it extends. `complete` becomes False if a file could not be used."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        self.files: dict[str, str] = {}  # real paths by shown name
        self.num_files = 0
        self.complete = True

    def read(self, path: Path, shown: str, chain: tuple[tuple[str, str], ...], asked: Problem) -> Tree | None:
        """Return the merged tree of one file; `chain` has the real path and shown name of each file that led here."""
        real = _real(path)
        names = [name for _, name in chain]
        self.files[shown] = real
        self.num_files += 1
        if real in [known for known, _ in chain]:
            self._refuse(asked, f"a file extends itself: {' -> '.join([*names, shown])}")
            return None
        if self.num_files > _MAX_FILES:
            if self.num_files == _MAX_FILES + 1:
                self._refuse(asked, f"more than {_MAX_FILES} files are extended")
            return None
        text, trouble, line = _read_text(path)
        if line is not None:
            self._refuse(Problem(shown, line, "", ""), trouble)
            return None
        if trouble:
            self._refuse(asked, f"{trouble}: {shown}" if asked.key else trouble)
            return None
        tree = parse_document(text, shown, self.problems)
        if tree is None:
            self.complete = False
            return None
        if not isinstance(tree.value, dict):
            found = describe(tree.plain())
            what = "the file is empty" if tree.value is None else f"expected a mapping of keys at the top, got {found}"
            self._refuse(Problem(shown, tree.line, "", ""), what)
            return None
        return self._extend(tree, path, shown, (*chain, (real, shown)))

    def _extend(self, tree: Tree, path: Path, shown: str, chain: tuple[tuple[str, str], ...]) -> Tree:
        own = Tree({key: value for key, value in tree.value.items() if key != "extends"}, tree.file, tree.line)
        own = _with_place(_with_new_names(own, self.problems), path)
        extends = tree.value.get("extends")
        if extends is None:
            return own
        merged = None
        for entry in extends.value if isinstance(extends.value, list) else [extends]:
            asked = Problem(entry.file, entry.line, "extends", "")
            if not isinstance(entry.value, str) or not entry.value:
                self._refuse(asked, "expected a path or a list of paths, relative to this file")
                continue
            name = os.path.normpath(os.path.join(os.path.dirname(shown), entry.value))
            if not entry.value.endswith((".yaml", ".yml")):  # messages never quote other kinds of files
                self._refuse(asked, f"expected a file whose name ends with .yaml or .yml, got {describe(entry.value)}")
                continue
            base = self.read(path.parent / entry.value, name, chain, asked)
            if base is not None:
                merged = base if merged is None else _lay_over(merged, base)
        return own if merged is None else _lay_over(merged, own)

    def _refuse(self, asked: Problem, message: str) -> None:
        """Record the problem at the key that names the file."""
        self.complete = False
        self.problems.append(Problem(asked.file, asked.line, asked.key, message))


def _real(path: Path) -> str:
    return os.path.realpath(path) if "\0" not in str(path) else str(path)


def _read_text(path: Path) -> tuple[str, str, int | None]:
    """Return the text of a file, the problem with it (or ""), and the problem's line if it has one."""
    try:
        # A pipe or a device may never answer, and opening one can act on it.
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            return "", "not a regular file", None
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            at = content.count(b"\n") + 1
            return "", f"the file is larger than {MAX_FILE_BYTES // 1024} KiB, which no recipe is", at
        return content.decode("utf-8-sig"), "", None
    except FileNotFoundError:
        return "", "no such file", None
    except IsADirectoryError:
        inside = path / "config.yaml"
        return "", "is a directory, not a file" + (f"; did you mean {inside}?" if inside.is_file() else ""), None
    except UnicodeDecodeError as error:
        return "", "the file is not UTF-8 text", error.object.count(b"\n", 0, error.start) + 1
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return "", f"cannot be read: {getattr(error, 'strerror', None) or error}", None


def _lay_over(base: Tree, child: Tree) -> Tree:
    """Merge `child` over `base`; if it chooses another optimizer or schedule, drop the old one's settings."""
    for path, (common, _, default) in _CHOICES.items():
        old, new = _section(base, path), _section(child, path)
        before = old["name"].value if "name" in old else default
        if old and "name" in new and new["name"].value != before:
            base = _replace(base, path, {key: value for key, value in old.items() if key in common.model_fields})
    return _merge(base, child)


def _section(tree: Tree, path: Sequence[str]) -> dict[str, Tree]:
    """Return the mapping at `path`, or an empty one."""
    for part in path:
        tree = tree.value.get(part, Tree(None, "", None)) if isinstance(tree.value, dict) else Tree(None, "", None)
    return tree.value if isinstance(tree.value, dict) else {}


def _replace(tree: Tree, path: Sequence[str], section: dict[str, Tree]) -> Tree:
    """Return the tree with the mapping at `path` replaced, if it has one."""
    if not path:
        return Tree(section, tree.file, tree.line)
    return Tree({**tree.value, path[0]: _replace(tree.value[path[0]], path[1:], section)}, tree.file, tree.line)


def _merge(base: Tree, child: Tree) -> Tree:
    """Merge mappings key by key; everything else is replaced. Keys of both have the child's position."""
    if not isinstance(base.value, dict) or not isinstance(child.value, dict):
        return child
    merged = dict(base.value)
    for key, value in child.value.items():
        merged[key] = _merge(merged[key], value) if key in merged else value
    return Tree(merged, child.file, child.line)


# ----------------------------------------------------------------------------------------------------------- scale


def _with_place(tree: Tree, path: Path) -> Tree:
    """Return the tree of one file with its `scale.from` relative to the working directory, not to the file."""
    scale = _section(tree, ("scale",))
    named = scale.get("from")
    if named is None or not isinstance(named.value, str) or not named.value:
        return tree
    return _replace(tree, ("scale",), {**scale, "from": Tree(str(path.parent / named.value), named.file, named.line)})


def _scaled(
    tree: Tree, reader: _Reader, tuned_overrides: Sequence[str | Path], chain: tuple[tuple[str, str], ...]
) -> tuple[Tree, Scaling | None]:
    """Return the tree with what its `scale` derives in place of `scale`. Problems are added to the reader's."""
    asked = tree.value.get("scale")
    tree = Tree({key: value for key, value in tree.value.items() if key != "scale"}, tree.file, tree.line)
    if asked is None or asked.value is None:
        return tree, None
    given = read_scale(asked, reader.problems)
    tuned = None if given is None else _tuned(given[0], tuned_overrides, chain, reader.problems)
    if given is None or tuned is None:
        reader.complete = False
        return tree, None
    (named, rules), reference = given, tuned.recipe

    def is_own(key: str) -> bool:
        here = tree
        for part in key.split("."):
            if not isinstance(here.value, dict) or part not in here.value:
                return False
            here = here.value[part]
        return reader.files.get(here.file) not in tuned.files

    try:
        batch = Tree(reference.train.global_batch, asked.file, asked.line)
        draft = _merge(Tree({"train": Tree({"global_batch": batch}, asked.file, asked.line)}, asked.file, None), tree)
        recipe = Recipe.model_validate(draft.plain())
    except ValidationError:
        return draft, None  # which is told when the whole is validated
    name = os.path.normpath(named.value)
    refused = list(find_problems(recipe, reference, name, rules))
    reader.problems += [Problem(named.file, named.line, "scale.from", message) for message in refused]
    if refused:
        return draft, None
    scaling = derive(recipe, reference, name, rules, is_own)
    for key, value in scaling.applied.items():
        tree = _set(tree, key.split("."), Tree(value, asked.file, asked.line), "", reader.problems)
    return tree, scaling


def _tuned(
    named: Tree, overrides: Sequence[str | Path], chain: tuple[tuple[str, str], ...], problems: list[Problem]
) -> _Loaded | None:
    """Load the recipe that `scale.from` names."""
    asked = Problem(named.file, named.line, "scale.from", "")
    names = [name for _, name in chain] + [os.path.normpath(named.value)]
    if _real(Path(named.value)) in [real for real, _ in chain]:
        problems.append(replace(asked, message=f"a recipe scales from itself: {' -> '.join(names)}"))
        return None
    if len(chain) > MAX_DEPTH:
        problems.append(replace(asked, message=f"more than {MAX_DEPTH} recipes scale from each other"))
        return None
    try:
        return _load(Path(named.value), overrides, (), chain, asked)
    except RecipeError as error:
        problems += error.problems
        return None


# ---------------------------------------------------------------------------------------------------- renamed keys


def _with_new_names(tree: Tree, problems: list[Problem]) -> Tree:
    """Return the tree of one file with renamed keys under their new names; warn on standard error."""
    for old, new in RENAMED.items():
        *path, last = old.split(".")
        section = _section(tree, path)
        if last not in section:
            continue
        at, rest = section[last], {key: value for key, value in section.items() if key != last}
        if new in rest:
            message = f"is called {new} now, and {new} stands here too; remove one"
            problems.append(Problem(at.file, at.line, old, message))
        else:
            rest[new] = at
            _tell_of_new_name(at, old, new)
        tree = _replace(tree, path, rest)
    for key, names in RENAMED_CHOICES.items():
        *path, last = key.split(".")
        section = _section(tree, path)
        if last in section:
            tree = _replace(tree, path, {**section, last: _with_new_value(section[last], key, names)})
    return tree


def _with_new_value(value: Tree, key: str, names: Mapping[str, str]) -> Tree:
    if not isinstance(value.value, str) or value.value not in names:
        return value
    _tell_of_new_name(value, f"{key} {value.value}", names[value.value])
    return Tree(names[value.value], value.file, value.line)


def _tell_of_new_name(value: Tree, old: str, new: str) -> None:
    where = value.file if value.line is None else f"{value.file}:{value.line}"
    print(f"turbolm: warning: {where}: {old} is called {new} now", file=sys.stderr)


# -------------------------------------------------------------------------------------------------------- overrides


def _override(tree: Tree, override: str, problems: list[Problem]) -> Tree:
    """Return the tree with one `key.path=value` from the command line applied."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    origin = f"{_COMMAND_LINE}{override if override.isprintable() and len(override) <= 200 else ascii(override[:200])}"
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        problems.append(Problem(origin, None, "", "expected key.path=value, such as optimizer.lr=3e-4"))
        return tree
    if parts[0] in ("extends", "scale"):
        problems.append(Problem(origin, None, parts[0], "can only be set in a file"))
        return tree
    if len(text) > MAX_FILE_BYTES:
        problems.append(Problem(origin, None, "", "the value is too long"))
        return tree
    value = parse_document(text, origin, problems, show_lines=False)
    if value is None:
        return tree
    for old, new in RENAMED.items():
        names = old.split(".")
        if parts[: len(names)] == names:
            _tell_of_new_name(value, old, new)
            parts[len(names) - 1] = new
    value = _with_new_value(value, key, RENAMED_CHOICES.get(key.strip(), {}))
    return _without_former_choice(_set(tree, parts, value, "", problems))


def _without_former_choice(tree: Tree) -> Tree:
    """If the command line chooses an optimizer or schedule, drop the files' settings that it does not have."""
    for path, (_, kinds, _) in _CHOICES.items():
        section = _section(tree, path)
        kind = kinds.get(str(section["name"].value)) if "name" in section else None
        if kind is not None and section["name"].file.startswith(_COMMAND_LINE):
            kept = {
                key: value
                for key, value in section.items()
                if key in kind.model_fields or value.file.startswith(_COMMAND_LINE)
            }
            tree = _replace(tree, path, kept)
    return tree


def _set(tree: Tree, parts: Sequence[str], value: Tree, at: str, problems: list[Problem]) -> Tree:
    if not parts:
        return _merge(tree, value)
    part, rest = parts[0], parts[1:]
    key = join_key(at, part)
    if isinstance(tree.value, list):
        if not part.isdecimal() or len(part) > 6 or int(part) >= len(tree.value):
            wanted = f"a number from 0 to {len(tree.value) - 1}" if tree.value else "a value for the whole list"
            problems.append(Problem(value.file, None, key, f"no such entry of the list; expected {wanted}"))
            return tree
        entries = list(tree.value)
        entries[int(part)] = _set(entries[int(part)], rest, value, key, problems)
        return Tree(entries, tree.file, tree.line)
    if tree.value is not None and not isinstance(tree.value, dict):
        problems.append(Problem(value.file, None, key, f"{at} is a value, not a mapping of keys"))
        return tree
    children = dict(tree.value or {})
    # New mappings come entirely from the command line.
    child = children.get(part, Tree(None, value.file, None))
    children[part] = _set(child, rest, value, key, problems)
    return Tree(children, tree.file, tree.line)


# ------------------------------------------------------------------------------------------------------------- dump


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as another type, and never writes aliases."""

    yaml_implicit_resolvers: ClassVar[dict] = {  # type: ignore[misc]
        first: list(resolvers) for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in SCALARS:
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)
