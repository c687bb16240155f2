"""Find the store of files that hold the same bytes under other times or names, and record what makes that possible.

Beside each store, `KEY.sources.json` records the SHA-256 of every source file, under its path, size and time. A store's
key covers these three, so a `touch`, a copy or a restore gives another key; then the content decides, and the record
of the new key names the old store. Stores of versions that wrote no record get one when they are next opened by
`prepare`, while their files still are what the key says.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from turbolm.data.prepare.progress import Meter, OnProgress
from turbolm.data.store.token_store import MANIFEST
from turbolm.errors import UserError, explain_os_error
from turbolm.files import read_json, write_json
from turbolm.recipe.sources import Source
from turbolm.recipe.sources.base import FileSource
from turbolm.recipe.sources.stdlib import StdlibSource

_RECORD = ".sources.json"
_MAX_THREADS = 16
_CHUNK_BYTES = 1 << 20
_REPORT_SEC = 0.5

Files = list[list[Any]]  # of all sources in order: absolute path, size, time (ns), SHA-256


def without_times(source: Source, settings: dict[str, Any]) -> list[Any]:
    """Return what of a source's settings and listing determines its documents, given the content of its files."""
    if isinstance(source, FileSource) and not source.has_urls:
        kept = {name: value for name, value in settings.items() if name != "path"}
        return [kept, [size for _, size, _ in source.listing()]]
    return [settings, source.listing() if source.has_urls else [[name, size] for name, size, _ in source.listing()]]


def find_recorded(stores: Path, key: str) -> Path | None:
    """Return the complete store that the record of a key names, or None."""
    record = read_json(_record_path(stores, key)) or {}
    name = str(record.get("store"))
    if record.get("key") != key or not re.fullmatch("[0-9a-f]{16}", name):
        return None
    return stores / name if (stores / name / MANIFEST).is_file() else None


def find_same(
    stores: Path, content_key: str, sources: Sequence[Source], on_progress: OnProgress
) -> Iterator[tuple[Path, Files]]:
    """Yield the stores whose source files hold the same bytes, and these files.

    Files are read only if all sizes and settings match. Raises UserError for one that cannot be read.
    """
    records = [record for record in _records(stores) if record.get("content_key") == content_key]
    if not records:
        return
    files = hash_files(stores, sources, on_progress)
    digests = [file[3] for file in files]
    for name in sorted({str(r["store"]) for r in records if [file[3] for file in r["files"]] == digests}):
        if re.fullmatch("[0-9a-f]{16}", name) and (stores / name / MANIFEST).is_file():
            yield stores / name, files


def may_be_same(stores: Path, content_key: str, store: Path) -> bool:
    """Return whether `find_same` may yield a store: all but the bytes of the files is known to be the same."""
    wanted = content_key, store.name
    return any((record.get("content_key"), record.get("store")) == wanted for record in _records(stores))


def has_record(stores: Path, key: str, store: Path) -> bool:
    """Return whether the record of the key names the store."""
    record = read_json(_record_path(stores, key)) or {}
    return record.get("key") == key and record.get("store") == store.name


def save_record(stores: Path, keys: tuple[str, str], store: Path, files: Files) -> None:
    """Record that a store holds the documents of these files; `keys` are its key and its key by content.

    Raises OSError.
    """
    record = {"key": keys[0], "content_key": keys[1], "store": store.name, "files": files}
    write_json(_record_path(stores, keys[0]), record, durable=True)


def cannot_record(stores: Path, store: Path, error: OSError) -> UserError:
    """Return the error for a store that fits by content where that cannot be recorded for the ranks."""
    return UserError(
        f"The files of data.sources have other times or names than when the token store {store} was built, and the "
        f"same content, which cannot be noted in {stores}: {explain_os_error(error)}. Run `turbolm prepare RECIPE` "
        "once where execution.cache_dir can be written, or give the files their old names and times back."
    )


def hash_files(stores: Path, sources: Sequence[Source], on_progress: OnProgress) -> Files:
    """Return the files with their SHA-256, hashed in parallel; recorded ones of the same path, size and time are not.

    Raises UserError for a file that cannot be read.
    """
    known = {tuple(file[:3]): file[3] for record in _records(stores) for file in record["files"]}
    found = [
        (os.path.abspath(path), status.st_size, status.st_mtime_ns)
        for source in _of_files(sources)
        for path, status in source.stats()
    ]
    missing = [file for file in dict.fromkeys(found) if file not in known]
    known |= zip(missing, _hash_all(missing, on_progress), strict=True)
    return [[*file, known[file]] for file in found]


def can_be_compared(sources: Sequence[Source]) -> bool:
    """Return whether the key of these sources covers the time of any file."""
    return any(source.files() for source in _of_files(sources))


def _of_files(sources: Sequence[Source]) -> list[Source]:
    """Return the sources whose listing has times, all of files on this machine."""
    return [source for source in sources if not isinstance(source, StdlibSource) and not source.has_urls]


def _record_path(stores: Path, key: str) -> Path:
    return stores / f"{key[:16]}{_RECORD}"


def _records(stores: Path) -> Iterator[dict[str, Any]]:
    """Yield the intact records."""
    for path in sorted(stores.glob(f"*{_RECORD}")):
        record = read_json(path) or {}
        files = record.get("files")
        if isinstance(files, list) and all(
            isinstance(file, list) and list(map(type, file)) == [str, int, int, str] for file in files
        ):
            yield record


def _hash_all(files: Sequence[tuple[str, int, int]], on_progress: OnProgress) -> list[str]:
    """Return the SHA-256 of each file; reports after each half second."""
    done, stop, lock = [0, 0], threading.Event(), threading.Lock()

    def digest(path: str) -> str:
        sha256 = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            while (chunk := file.read(_CHUNK_BYTES)) and not stop.is_set():
                sha256.update(chunk)
                with lock:
                    done[1] += len(chunk)
        with lock:
            done[0] += 1
        return sha256.hexdigest()

    meter, total = Meter("compare", on_progress), sum(size for _, size, _ in files)
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), _MAX_THREADS)) as pool:
        jobs = [pool.submit(digest, path) for path, _, _ in files]
        try:
            while wait(jobs, timeout=_REPORT_SEC).not_done:
                meter.report(done[0], done[1], min(1.0, done[1] / total) if total else None)
            return [job.result() for job in jobs]
        except OSError as error:
            raise UserError(f"data.sources: {error.filename} cannot be read: {error.strerror}") from None
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
