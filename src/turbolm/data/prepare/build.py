"""Build the token store of a recipe: split, tokenize in parallel, write shards.

The key determines every byte of a store: the number of processes, the engine and interruptions make no difference. The
manifest is written last, so a store with a manifest is complete.

Memory does not grow with the corpus: texts for a worker are in files. What takes memory is a row group of the source
for each process that reads, each worker's tokenizer, the sample the tokenizer is trained on
(`tokenizer.train.sample_bytes`), and 16 to 23 bytes for each distinct document if duplicates are skipped
(`data.deduplicate`).
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from turbolm.data.prepare.counts import check_counts, short_documents, spelled_out
from turbolm.data.prepare.cut import Dropped, cut_shards
from turbolm.data.prepare.engines import EngineMismatch, EngineName, choose_engine
from turbolm.data.prepare.listings import cache_folder, listing_of, tell_once
from turbolm.data.prepare.progress import Meter, OnProgress, Progress, locked
from turbolm.data.prepare.reader import SHORT_KEY, SourceSizes, check_left_out, empty_files
from turbolm.data.prepare.remote_store import (
    BUILT_FROM,
    another_store,
    fetch,
    key_at,
    known_key,
    look_up,
    note_built_from,
    note_key,
)
from turbolm.data.prepare.same_content import (
    can_be_compared,
    cannot_record,
    find_recorded,
    find_same,
    has_record,
    hash_files,
    may_be_same,
    save_record,
    without_times,
)
from turbolm.data.prepare.sample import Sample, read_sample
from turbolm.data.prepare.shards import Layout, Shard, write_shards
from turbolm.data.prepare.texts import texts_in
from turbolm.data.prepare.tokenizer import (
    copy_tokenizer,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    tokenizer_fingerprint,
    train_tokenizer,
    vocabulary_size,
)
from turbolm.data.store.token_store import (
    FORMAT_VERSION,
    MANIFEST,
    SPLITS,
    TOKENIZER_FOLDER,
    check_file,
    check_held_out,
    file_record,
    manifest_sha256,
    open_store,
)
from turbolm.errors import UserError, explain_os_error
from turbolm.files import load_json, sha256_json, write_json
from turbolm.hub import tokenizer_path
from turbolm.recipe.contract import comparable_section
from turbolm.recipe.paths import make_folder
from turbolm.recipe.schema import Recipe
from turbolm.recipe.sources.urls import clear_fetched, forget_urls
from turbolm.storage import StorageError

# Shards grow up to this size from a sixteenth of it, so that a small corpus has work for several processes as well.
SHARD_TEXT_BYTES = 32 * 10**6
_MAX_AUTO_WORKERS = 64
# Measured (benchmarks/prepare_readers.py): so many tokenize what one process reads.
_WORKERS_OF_A_READER: dict[EngineName, int] = {"gigatoken": 2, "words": 12, "tokenizers": 30}
_ENGINE_BYTES = 8 * 10**6  # a smaller corpus is done before a faster engine would be loaded and checked
_SAMPLE_STATE = "sample.jsonl"
_TOKENIZER_RECORD = "tokenizer-files.json"
_SHARD = ("source", "tokens", "index", "train", "validation")  # the rest of a record is for resuming, or is summed up


class Processes(NamedTuple):
    """How many processes tokenize, and how many read; None: as many as feed them."""

    workers: int
    readers: int | None


def prepare(
    recipe: Recipe,
    *,
    num_workers: int | None = None,
    num_readers: int | None = None,
    on_progress: OnProgress = lambda progress: None,
    warn: Callable[[str], None] = lambda message: print(f"turbolm: {message}", file=sys.stderr),
) -> Path:
    """Build the recipe's token store unless it exists; return its folder.

    A store of files with the same bytes and other times or names is the recipe's too (`same_content`).

    Its bytes do not depend on `num_workers` and `num_readers`, processes that tokenize and read.

    `on_progress` is called periodically. On KeyboardInterrupt the shards in progress are finished; the next call
    resumes after them, also within the tokenizer's sample. `warn` gets the reason if `gigatoken` is requested and not
    used.
    """
    forget_urls()
    clear_fetched()
    alone = int(os.environ.get("WORLD_SIZE") or 1) == 1
    if alone and recipe.execution.store is not None:
        _fetch(recipe, recipe.execution.store, on_progress)
    folder = store_folder(recipe)
    if _is_complete(folder, recipe):
        if alone:
            _record_files(recipe, folder, on_progress)
        return folder
    if not alone:
        raise UserError(
            f"The token store {folder} does not exist, and this process is one of several. "
            "Run `turbolm prepare RECIPE` first, in the same folder and with the same recipe."
        )
    folder = _stores(recipe) / store_key(recipe)[:16]  # its own, also where a record names another that was damaged
    if not (folder / MANIFEST).is_file() and (same := _same_content(recipe, on_progress)):
        return same
    try:
        make_folder(folder, "execution.cache_dir")
        with locked(folder.with_suffix(".lock"), on_progress):
            if not _is_complete(folder, recipe):
                _build(recipe, folder, Processes(num_workers or _auto_workers(recipe), num_readers), on_progress, warn)
    except OSError as error:  # errors of reading a source are UserErrors already
        raise UserError(f"The token store {folder} cannot be written: {explain_os_error(error)}") from None
    except BrokenProcessPool:
        raise UserError(
            "A worker process of prepare was killed, possibly by the out-of-memory killer. Lower "
            "execution.prepare_workers and run it again; finished shards are kept."
        ) from None
    _record_files(recipe, folder, on_progress)
    return folder


def find_store(recipe: Recipe) -> Path | None:
    """Return the folder of the recipe's token store if it has been built; `open_store` checks that it is intact."""
    folder = store_folder(recipe)
    return folder if (folder / MANIFEST).is_file() else None


def reads_same_documents(one: Recipe, other: Recipe) -> bool:
    """Return whether two recipes with one tokenizer have one store: they differ at most in the mixture or the order."""

    def documents(recipe: Recipe) -> list[Any]:
        data = recipe.data
        return [[_content(source) for source in data.sources], data.validation, data.deduplicate]

    return documents(one) == documents(other)


def finished_shards(recipe: Recipe) -> tuple[int, int]:
    """Return how many shards of the recipe's store have been written, and their bytes of text."""
    sizes = []
    for path in store_folder(recipe).glob("shard-*.json"):
        record = load_json(path)
        sizes.append(sum(record[split]["text_bytes"] for split in SPLITS))
    return len(sizes), sum(sizes)


def store_folder(recipe: Recipe) -> Path:
    """Return the folder of the recipe's token store, whether it exists or not."""
    return _folder_of(recipe, store_key(recipe))


def _folder_of(recipe: Recipe, key: str) -> Path:
    stores = _stores(recipe)
    folder = stores / key[:16]
    return folder if (folder / MANIFEST).is_file() else find_recorded(stores, key) or folder


def _stores(recipe: Recipe) -> Path:
    return cache_folder(recipe) / "stores"


def store_key(recipe: Recipe) -> str:
    """Return a SHA-256 of everything that determines the content of a store.

    Where files behind URLs cannot be listed, the last listing serves if its store is complete; else raises UserError.
    """
    identity = _tokenizer_identity(recipe)
    if url := recipe.execution.store:
        return known_key(cache_folder(recipe), url, _settings(recipe, identity))
    try:
        return _key(recipe, identity)
    except StorageError as error:
        key = _key(recipe, identity, recorded=True)
        if not (_folder_of(recipe, key) / MANIFEST).is_file():
            raise
        tell_once(f"{error}. The token store of the files as they were last listed is used")
        return key


def store_settings(recipe: Recipe) -> dict[str, Any]:
    """Return everything that determines the content of a store but the listing of its sources."""
    return _settings(recipe, _tokenizer_identity(recipe))


def check_place(recipe: Recipe, url: str) -> None:
    """Raise UserError if another store is where the recipe's is to be copied to, as far as that can be told now."""
    there, stores = key_at(url), _stores(recipe)
    if there is None or recipe.execution.store is not None or there == store_key(recipe):
        return
    if not may_be_same(stores, _key(recipe, _tokenizer_identity(recipe), by_content=True), stores / there[:16]):
        raise another_store(url)


def _tokenizer_identity(recipe: Recipe) -> list[str | int]:
    """Return fingerprint, bos and eos of the tokenizer; empty if it is trained."""
    if recipe.tokenizer.path is None:
        return []
    path = tokenizer_path(recipe.tokenizer)
    tokenizer = load_tokenizer(path)
    return [tokenizer_fingerprint(tokenizer), *special_ids(path, tokenizer)]


def _key(recipe: Recipe, tokenizer: list[str | int], *, by_content: bool = False, recorded: bool = False) -> str:
    """Return the key for this identity of the tokenizer.

    `by_content`: without times, and names that do not matter; `recorded`: with the last listing of files behind URLs.
    """
    if by_content:
        sources = [without_times(source, _content(source)) for source in recipe.data.sources]
        return sha256_json(_settings(recipe, tokenizer) | {"sources": sources})
    return sha256_json(_built_from(recipe, tokenizer, recorded=recorded))


def _built_from(recipe: Recipe, tokenizer: list[str | int], *, recorded: bool = False) -> dict[str, Any]:
    """Return everything that determines the content of a store."""
    files = [listing_of(recipe, source, recorded=recorded) for source in recipe.data.sources]
    return _settings(recipe, tokenizer) | {"files": files}


def _settings(recipe: Recipe, tokenizer: list[str | int]) -> dict[str, Any]:
    """Return the same without the listing of the sources."""
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "shard_text_bytes": SHARD_TEXT_BYTES,
        "sources": [_content(source) for source in recipe.data.sources],
        "validation": recipe.data.validation,
        "deduplicate": recipe.data.deduplicate,
    }
    content["tokenizer"] = comparable_section(recipe.tokenizer) if recipe.tokenizer.path is None else tokenizer
    if recipe.tokenizer.special_tokens_in_text != "split":
        content["special_tokens_in_text"] = recipe.tokenizer.special_tokens_in_text
    return content


def _content(source: Any) -> dict[str, Any]:
    """Return a source's settings without those of the mixture: other weights do not need another store."""
    return {key: value for key, value in comparable_section(source).items() if key not in ("label", "weight")}


def _is_complete(folder: Path, recipe: Recipe) -> bool:
    """Return whether the store exists and is intact. Raises UserError if it can never be trained on."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        store = open_store(folder)
    except UserError:
        return False  # corrupt or of an older format: build the bad parts again
    if not str(store.manifest["key"]).startswith(folder.name):
        return False  # another recipe's
    check_held_out(store.num_documents("validation"), store.manifest["validation"])
    check_left_out(store.manifest, recipe.data.on_bad_document)
    return True


def _fetch(recipe: Recipe, url: str, on_progress: OnProgress) -> None:
    """Fetch the store of `execution.store` unless it is here; without the service, the one that is here serves.

    Raises UserError.
    """
    cache, settings = cache_folder(recipe), store_settings(recipe)
    try:
        found = look_up(url, settings)
    except StorageError as error:
        folder = _stores(recipe) / known_key(cache, url, settings)[:16]
        if not _is_complete(folder, recipe):
            raise UserError(f"execution.store: {error}; check the network and the credentials") from None
        tell_once(f"execution.store: {error}. The token store as it was last fetched is used")
        return
    folder = _stores(recipe) / found.key[:16]
    try:
        if not _is_complete(folder, recipe):  # a complete one may be where nothing can be written
            make_folder(folder.parent, "execution.cache_dir")
            with locked(folder.with_suffix(".lock"), on_progress) as is_locked:
                if not _is_complete(folder, recipe):
                    fetch(found, folder, is_locked=is_locked)
        note_key(cache, url, settings, found.key)
    except OSError as error:
        raise UserError(f"The token store cannot be kept in {cache}: {explain_os_error(error)}") from None


def _same_content(recipe: Recipe, on_progress: OnProgress) -> Path | None:
    """Return an intact store of the same documents, and record it as the recipe's, or None. Raises UserError."""
    sources, stores, identity = recipe.data.sources, _stores(recipe), _tokenizer_identity(recipe)
    keys = _key(recipe, identity), _key(recipe, identity, by_content=True)
    for store, files in find_same(stores, keys[1], sources, on_progress):
        if not _is_complete(store, recipe) or _key(recipe, identity) != keys[0]:
            continue
        try:
            save_record(stores, keys, store, files)
        except OSError as error:
            raise cannot_record(stores, store, error) from None
        return store
    return None


def _record_files(recipe: Recipe, folder: Path, on_progress: OnProgress) -> None:
    """Record the content of the source files of a complete store, once and if its folder can be written."""
    if recipe.execution.store is not None:
        return
    sources, stores, identity = recipe.data.sources, folder.parent, _tokenizer_identity(recipe)
    key = store_key(recipe)
    if key.startswith(folder.name) and not (folder / BUILT_FROM).exists():
        note_built_from(folder, _built_from(recipe, identity, recorded=True))
    if not key.startswith(folder.name) or has_record(stores, key, folder):
        return  # the files have changed since, or it is there
    if not can_be_compared(sources) or not os.access(stores, os.W_OK):
        return
    with suppress(OSError, UserError):  # the store is complete without
        files = hash_files(stores, sources, on_progress)
        if _key(recipe, identity) == key:  # they did not change meanwhile
            save_record(stores, (key, _key(recipe, identity, by_content=True)), folder, files)


def _auto_workers(recipe: Recipe) -> int:
    workers = recipe.execution.prepare_workers
    return min(len(os.sched_getaffinity(0)), _MAX_AUTO_WORKERS) if workers == "auto" else workers


# ------------------------------------------------------------------------------------------------------- building


def _build(
    recipe: Recipe, folder: Path, processes: Processes, on_progress: OnProgress, warn: Callable[[str], None]
) -> None:
    if empty := empty_files(recipe.data.sources):
        warn(f"{len(empty)} files of data.sources have 0 bytes and hold no documents, such as {empty[0]}")
    (folder / MANIFEST).unlink(missing_ok=True)
    for leftover in folder.glob("*.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
    tokenizer_files = _put_tokenizer(recipe, folder, processes, on_progress)
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    bos_id, eos_id = special_ids(folder / TOKENIZER_FOLDER, tokenizer)
    vocab_size = vocabulary_size(tokenizer)
    special_tokens = recipe.tokenizer.special_tokens_in_text
    dtype, engine = "<u2" if vocab_size <= 2**16 else "<u4", _engine(recipe, folder, warn)
    layout = Layout(str(folder), dtype, bos_id, eos_id, engine, special_tokens)
    try:
        shards, dropped = _write_all(recipe, layout, processes, on_progress)
    except EngineMismatch as problem:
        warn(f"{layout.engine} is not used after all: {problem}; tokenizing everything again with tokenizers")
        _remove_shards(folder)
        layout = replace(layout, engine="tokenizers")
        shards, dropped = _write_all(recipe, layout, processes, on_progress)
    totals = {
        split: {name: sum(shard[split][name] for shard in shards) for name in ("documents", "tokens", "text_bytes")}
        for split in SPLITS
    }
    short = short_documents(recipe, shards)
    check_counts(recipe, totals["train"]["documents"], totals["validation"]["documents"], dropped)
    check_held_out(totals["validation"]["documents"], recipe.data.validation)
    fingerprint = tokenizer_fingerprint(tokenizer)
    forget_urls()
    key = _key(recipe, [fingerprint, bos_id, eos_id])
    if not key.startswith(folder.name):
        raise UserError(
            "The files of data.sources or the tokenizer changed while they were read. "
            "Run `turbolm prepare RECIPE` again."
        )
    if spelled := sum((Counter(shard.get("spelled", {})) for shard in shards), Counter()):
        warn(spelled_out(spelled, special_tokens))
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "dtype": layout.dtype,
        "vocab_size": vocab_size,
        "tokenizer_fingerprint": fingerprint,
        "tokenizer_files": tokenizer_files,
        "bos_id": bos_id,
        "eos_id": eos_id,
        "validation": recipe.data.validation,
        "sources": [_content(source) for source in recipe.data.sources],
        "empty_documents": dropped.empty,
        "duplicate_documents": dropped.duplicates,
        "text_loss": {name: sum(shard.get(name, 0) for shard in shards) for name in ("sampled_bytes", "lost_bytes")},
        **dropped.bad.record(),
        **({SHORT_KEY: short} if any(source.min_tokens for source in recipe.data.sources) else {}),
        "totals": totals,
        "shards": [{name: shard[name] for name in _SHARD} for shard in shards],
    }
    write_json(folder / MANIFEST, manifest | {"manifest_sha256": manifest_sha256(manifest)}, durable=True)


def _engine(recipe: Recipe, folder: Path, warn: Callable[[str], None]) -> EngineName:
    sizes, wanted = SourceSizes(recipe.data.sources), recipe.execution.tokenizer_engine
    if wanted != "gigatoken" and sizes.known and sizes.num_bytes < _ENGINE_BYTES:
        return "tokenizers"
    return choose_engine(wanted, folder / TOKENIZER_FOLDER, warn, recipe.tokenizer.special_tokens_in_text)


def _write_all(
    recipe: Recipe, layout: Layout, processes: Processes, on_progress: OnProgress
) -> tuple[list[dict[str, Any]], Dropped]:
    """Return every shard's record, in order, and the documents that are in no shard."""
    dropped, meter, sizes = Dropped(), Meter("tokenize", on_progress), SourceSizes(recipe.data.sources)
    num_documents, text_bytes, share_done = 0, 0, 0.0

    def on_finish(shard: Shard) -> None:
        nonlocal num_documents, text_bytes, share_done
        splits = [shard.record[split] for split in SPLITS]
        shard_bytes = sum(split["text_bytes"] for split in splits)
        num_documents += sum(split["documents"] for split in splits)
        text_bytes += shard_bytes
        share_done += shard.share
        if not shard.texts:
            meter.skip(shard_bytes, shard.share)
        meter.report(num_documents, text_bytes, share_done if sizes.known else None)

    folder = Path(layout.folder)
    num_readers = processes.readers or math.ceil(processes.workers / _WORKERS_OF_A_READER[layout.engine])
    shards = cut_shards(recipe, folder, SHARD_TEXT_BYTES, sizes, dropped, num_readers)
    with texts_in(folder), closing(shards):
        stopping = partial(on_progress, Progress("stopping"))
        return write_shards(shards, layout, processes.workers, on_finish, stopping), dropped


def _put_tokenizer(recipe: Recipe, folder: Path, processes: Processes, on_progress: OnProgress) -> list[dict[str, Any]]:
    """Train or copy the recipe's tokenizer into the store's folder, unless it exists. Returns its files."""
    target, unfinished = folder / TOKENIZER_FOLDER, folder / f"{TOKENIZER_FOLDER}.tmp"
    before = _tokenizer_files(folder)
    if before and not any(check_file(folder, part, full=True) for part in before):
        return before  # of an interrupted run; the folder's name says that the recipe is the same
    if recipe.tokenizer.train is None:
        copy_tokenizer(tokenizer_path(recipe.tokenizer), unfinished)
    else:
        settings = recipe.tokenizer.train
        sample = Sample(settings.sample_bytes)
        num_readers = processes.readers or processes.workers  # nobody tokenizes yet
        with texts_in(folder):
            read_sample(sample, recipe, folder / _SAMPLE_STATE, num_readers, on_progress)
        texts = sample.texts()
        if not texts:
            raise UserError("There are no training documents to train the tokenizer on (data.sources, data.validation)")
        save_tokenizer(train_tokenizer(texts, settings.vocab_size), unfinished)
    files = [{"file": f"{target.name}/{path.name}", **file_record(path)} for path in sorted(unfinished.iterdir())]
    if files != before:
        _remove_shards(folder)  # another version of `tokenizers` may train a different one
    if target.is_dir():
        shutil.rmtree(target)
    unfinished.rename(target)
    write_json(folder / _TOKENIZER_RECORD, {"files": files}, durable=True)
    (folder / _SAMPLE_STATE).unlink(missing_ok=True)
    return files


def _tokenizer_files(folder: Path) -> list[dict[str, Any]]:
    """Return an earlier run's records of the tokenizer's files; empty if it did not get that far."""
    try:
        return list(load_json(folder / _TOKENIZER_RECORD)["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _remove_shards(folder: Path) -> None:
    for path in folder.glob("shard-*"):
        path.unlink()
