"""The files that ship with turbolm: recipes (found by name), DeepSpeed bases, the Slurm template. Torch-free.

Their source is at the top level of the repository. A wheel holds copies of them (`force-include` in pyproject.toml);
in a checkout, and so in an editable install, the checkout's own files are read, because copies would go stale there.
"""

from __future__ import annotations

import os
from pathlib import Path

from turbolm.errors import UserError, did_you_mean

_PACKAGE = Path(__file__).parent


def shipped(*parts: str) -> Path:
    """A shipped file or folder, such as `recipes`: of $TURBOLM_HOME, else of the wheel or of the checkout."""
    if home := os.environ.get("TURBOLM_HOME"):
        return Path(home, *parts)
    copies = _PACKAGE / "share"
    return (copies if copies.is_dir() else _PACKAGE.parents[1]).joinpath(*parts)


def read_shipped(*parts: str) -> str:
    """The text of a shipped file. Raises UserError when it is not there."""
    path = shipped(*parts)
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        raise UserError(
            f"{path} is missing; install turbolm again, or set TURBOLM_HOME to the folder of a turbolm checkout"
        ) from None


def recipes_by_name() -> dict[str, Path]:
    """Every shipped recipe by its folder, such as `llama3.1-8b/pretrain`, without the pieces that recipes extend."""
    folder = shipped("recipes")
    paths = {path.parent.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("config.yaml"))}
    return {name: path for name, path in paths.items() if not name.startswith("_")}


def find_recipe(name: str) -> str:
    """The path of a recipe file given as a path, or of a shipped recipe given by name; a path wins.

    `llama3.1-8b` is enough of a name where there is one recipe for that model, or one to pretrain it. Raises UserError.
    """
    if name.endswith((".yaml", ".yml")) or (os.path.exists(name) and not os.path.isdir(name)):
        return name
    known = recipes_by_name()
    exact = known.get(name) or known.get(f"{name}/pretrain")
    found = [exact] if exact else [path for key, path in known.items() if key.startswith(f"{name}/")]
    if len(found) == 1:
        here = Path.cwd()
        return str(found[0].relative_to(here) if found[0].is_relative_to(here) else found[0])
    if found:
        options = ", ".join(key for key in known if key.startswith(f"{name}/"))
        raise UserError(f"{name} names several recipes: {options}")
    hint = did_you_mean(name, [*known, *(key.split("/")[0] for key in known)]) or f" (known: {', '.join(known)})"
    raise UserError(f"{name[:100]!r} is neither a file nor a shipped recipe{hint}")
