"""The documents of `evaluation.sets` behind URLs, which `prepare` keeps tokenized in the cache (cache_dir/sets).

So the ranks need no network, nor does a later start: it uses, with a line, the documents as they were last listed.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from turbolm.data.native import IntArray
from turbolm.data.prepare.listings import cache_folder, listing_of, tell_once
from turbolm.data.store.token_store import TokenStore
from turbolm.errors import UserError
from turbolm.files import sha256_json, write_atomic
from turbolm.recipe.contract import comparable_section
from turbolm.recipe.schema import Recipe
from turbolm.storage import StorageError

_VERSION = 2
Documents = tuple[list[IntArray], list[str]]  # and what a user should know about how they were read


def list_sets(recipe: Recipe) -> dict[int, list[Any]]:
    """Return the listing of each set behind URLs, by its number; the last one where the service cannot be asked.

    Raises UserError with all problems.
    """
    listings, problems = {}, []
    for number, source in _url_sets(recipe):
        try:
            listings[number] = listing_of(recipe, source)
        except StorageError as error:
            try:
                listings[number] = listing_of(recipe, source, recorded=True)
            except StorageError:
                problems.append(str(error))
                continue
            tell_once(f"{error}. The documents of {source.key} as they were last listed are used")
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return listings


def are_kept(recipe: Recipe, store: TokenStore) -> bool:
    """Return whether the cache has the documents of all sets behind URLs. Raises UserError."""
    return all(_path(recipe, store, number, listing).is_file() for number, listing in list_sets(recipe).items())


def kept_documents(
    recipe: Recipe, store: TokenStore, number: int, read: Callable[[], Documents], listing: list[Any] | None = None
) -> Documents:
    """Return the tokenized documents of a set behind URLs, with notes: kept ones, or what `read` returns, to keep.

    `listing`: that of `list_sets`, by default the one that was kept. Raises UserError.
    """
    source = recipe.evaluation.sets[number].under(f"evaluation.sets.{number}")
    path = _path(recipe, store, number, listing or listing_of(recipe, source, recorded=True))
    with suppress(OSError, ValueError, KeyError, EOFError, BadZipFile), np.load(path, allow_pickle=False) as found:
        return np.split(found["tokens"], found["ends"][:-1]), found["notes"].tolist()
    documents, notes = read()
    with suppress(OSError):  # a cache that cannot be written: rank 0 reads them again
        content, ends = io.BytesIO(), np.cumsum([len(one) for one in documents])
        np.savez(content, tokens=np.concatenate(documents), ends=ends, notes=np.array(notes, str))
        write_atomic(path, content.getvalue())
    return documents, notes


def _url_sets(recipe: Recipe) -> Iterator[tuple[int, Any]]:
    for number, source in enumerate(recipe.evaluation.sets):
        if source.has_urls:
            yield number, source.under(f"evaluation.sets.{number}")


def _path(recipe: Recipe, store: TokenStore, number: int, listing: list[Any]) -> Path:
    """Return where the documents of a set are kept: under the hash of all that determines them."""
    content = {
        "version": _VERSION,
        "source": {
            key: value for key, value in comparable_section(recipe.evaluation.sets[number]).items() if key != "label"
        },
        "files": listing,
        "tokens": recipe.evaluation.tokens,
        "on_bad_document": recipe.data.on_bad_document,
        "special_tokens_in_text": recipe.tokenizer.special_tokens_in_text,
        "tokenizer": [store.manifest[key] for key in ("tokenizer_fingerprint", "bos_id", "eos_id")],
    }
    return cache_folder(recipe) / "sets" / f"{sha256_json(content)[:32]}.npz"
