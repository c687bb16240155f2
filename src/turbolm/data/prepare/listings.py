"""The listings of sources. One with URLs is kept in the cache: ranks need no network, nor does a start without one."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from turbolm.files import read_json, sha256_json, write_json
from turbolm.recipe.paths import use_path
from turbolm.recipe.schema import Recipe
from turbolm.recipe.sources.base import BaseSource, FileSource

_RANK = "TORCHELASTIC_RUN_ID"  # in the environment of every rank of `accelerate launch`, also of a single one


def cache_folder(recipe: Recipe) -> Path:
    """Return the folder `execution.cache_dir`."""
    return use_path(recipe.execution.cache_dir, "execution.cache_dir")


def listing_of(recipe: Recipe, source: BaseSource, *, recorded: bool = False) -> list[Any]:
    """Return a source's listing. Ranks, and others with `recorded`, get the one that was kept, if there is one.

    Raises UserError, and StorageError where files behind URLs cannot be listed.
    """
    if not isinstance(source, FileSource) or not source.has_urls:
        return list(source.listing())
    record = cache_folder(recipe) / "urls" / f"{sha256_json(list(source.path))[:16]}.json"
    is_rank = int(os.environ.get("WORLD_SIZE") or 1) > 1 or _RANK in os.environ
    if (is_rank or recorded) and isinstance(files := (read_json(record) or {}).get("files"), list):
        return files
    files = list(source.listing())
    with suppress(OSError):  # a cache that cannot be written: the ranks ask for themselves
        write_json(record, {"path": list(source.path), "files": files})
    return files


@cache
def tell_once(line: str) -> None:
    """Print a line on standard error, once a process."""
    print(f"turbolm: {line}", file=sys.stderr, flush=True)
