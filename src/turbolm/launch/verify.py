"""What `turbolm verify` does: find out what a path is, and check its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from turbolm.checkpoint.manifest import read_manifest
from turbolm.checkpoint.verify import verify_checkpoint
from turbolm.data.prepare.build import store_folder
from turbolm.data.store import token_store
from turbolm.errors import UserError
from turbolm.recipe.load import load_recipe
from turbolm.train.run_contract import as_started, with_commits


def verify_path(path: Path, overrides: Sequence[str]) -> str:
    """Return the line about an intact checkpoint or token store; a recipe stands for its store.

    Raises UserError with every corrupt file.
    """
    if path.is_file():
        path = store_folder(with_commits(as_started(load_recipe(str(path), overrides))[0]))
        is_store = True
    else:
        # A store may have lost its manifest, or its shards.
        is_store = (path / "tokenizer").is_dir() or any(path.glob("shard-*"))
    if is_store:
        return f"{path}: intact; {_verify_store(path)} shards"
    problems = verify_checkpoint(path)
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    manifest = read_manifest(path)
    return f"{path}: intact; step {manifest['step']}, {len(manifest['files'])} files"


def _verify_store(folder: Path) -> int:
    """Return the number of shards. Raises UserError with every corrupt file."""
    manifest = token_store.read_manifest(folder)
    damage = token_store.find_damage(folder, manifest, full=True)
    if problems := [f"{folder}: {name}: {problem}" for name, problem in damage]:
        raise UserError("\n".join([*problems, f"{token_store.REPAIR}."]))
    return len(manifest["shards"])
