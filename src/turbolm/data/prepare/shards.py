"""Tokenize and write shards in worker processes.

A shard is written by one worker and renamed into place, its record (`.json`) last. Workers import this module, so it
imports neither pydantic nor the recipe.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from turbolm.data.prepare.engines import Engine, EngineName, Plain, check_sample, load_engine
from turbolm.data.prepare.round_trip import measure_loss
from turbolm.data.prepare.special_tokens import Finder, SpecialTokens
from turbolm.data.prepare.texts import TextFile, Texts
from turbolm.data.store.token_store import SPLITS, TOKENIZER_FOLDER, file_record
from turbolm.files import sync, temporary, write_bytes, write_json

_PART_BYTES = 4 * 2**20  # longer texts are tokenized in parts: a tokenizer needs some 100 bytes of memory for each byte
_CHUNK_BYTES = 2**18  # tokenized at a time


@dataclass(frozen=True)
class Layout:
    """What a worker needs to know about the store."""

    folder: str
    dtype: str  # NumPy's name, little-endian
    bos_id: int
    eos_id: int
    engine: EngineName
    special_tokens: SpecialTokens = "split"


@dataclass
class Shard:
    """Consecutive documents of one source: to be tokenized or, without `texts`, written by an earlier run."""

    number: int
    record: dict[str, Any]  # what it holds and where it comes from
    texts: dict[str, Texts] = field(default_factory=dict)  # by split
    digests: bytearray = field(default_factory=bytearray)  # of each document, if duplicates are skipped
    files: list[TextFile] = field(default_factory=list)  # that hold the texts
    share: float = 0.0  # of all sources' bytes
    min_tokens: int = 0  # shorter documents are left out

    @property
    def num_documents(self) -> int:
        """Documents that a worker will tokenize."""
        return sum(map(len, self.texts.values()))

    def drop_texts(self) -> None:
        """Remove the files of its texts that no other shard uses."""
        for file in self.files:
            file.drop()


def write_shards(
    shards: Iterator[Shard],
    layout: Layout,
    num_workers: int,
    on_finish: Callable[[Shard], None],
    on_stop: Callable[[], None],
) -> list[dict[str, Any]]:
    """Write the missing shards. Returns the records of all shards, in order.

    `on_finish` is called after each. On KeyboardInterrupt `on_stop` is called and the shards in progress are finished.
    Raises EngineMismatch if the layout's engine gives other ids than `tokenizers`.
    """
    records: dict[int, dict[str, Any]] = {}
    running: dict[Future[dict[str, Any]], Shard] = {}

    def finish(shard: Shard) -> None:
        records[shard.number] = shard.record
        on_finish(shard)

    def finish_some(jobs: Iterable[Future[dict[str, Any]]]) -> None:
        for job in jobs:
            shard = running.pop(job)
            shard.record = job.result()
            shard.drop_texts()
            finish(shard)

    pool = _pool(num_workers)
    num_workers = num_workers if isinstance(pool, ProcessPoolExecutor) else 1
    try:
        for shard in shards:
            if not shard.texts:
                finish(shard)
                continue
            running[pool.submit(_write_shard, layout, replace(shard, files=[]))] = shard
            if len(running) > num_workers:  # one shard waits, so that no worker has to; more would only fill the memory
                finish_some(wait(running, return_when=FIRST_COMPLETED).done)
        finish_some(list(running))
    except KeyboardInterrupt:
        on_stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [records[number] for number in sorted(records)]


def _pool(num_workers: int) -> Executor:
    """Return processes, or where the shared memory that these need cannot be used, a thread and a line that says so."""
    try:
        return ProcessPoolExecutor(num_workers, get_context("spawn"), initializer=start_worker)
    except (OSError, ImportError) as error:  # ImportError: a Python without semaphores
        why = error.strerror if isinstance(error, OSError) else error
        print(
            f"turbolm: prepare uses one process, because the shared memory in /dev/shm cannot be used ({why}); free "
            "some of it, or mount one (docker run --shm-size=1g)",
            file=sys.stderr,
        )
        return ThreadPoolExecutor(1)


def start_worker() -> None:
    """Prepare a process that this one ends, or that ends when this one is killed."""
    for stop in (signal.SIGINT, signal.SIGTERM):  # the parent stops and waits for the shards in progress
        signal.signal(stop, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the parallelism is in the processes
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent is killed: it would wait for work forever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@cache
def _engines(layout: Layout) -> tuple[Engine, Plain, Finder]:
    """Return the engine, the reference and the finder of special tokens; made once in each worker."""
    plain = Plain(Path(layout.folder) / TOKENIZER_FOLDER, layout.special_tokens)
    return load_engine(layout.engine, plain), plain, Finder(plain.added_tokens())


def _write_shard(layout: Layout, shard: Shard) -> dict[str, Any]:
    """Tokenize the texts and write the files of one shard. Returns its record."""
    folder, name = Path(layout.folder), shard_name(shard.number)
    engine, plain, finder = _engines(layout)
    both = [shard.texts[split] for split in SPLITS]
    if layout.engine != "tokenizers":
        for texts in both:
            check_sample(engine, plain, texts)
    ends, kept = [np.zeros(1, np.int64)], [np.zeros(0, bool)]
    names = ("tokens", "index", "digests") if shard.digests else ("tokens", "index")
    parts = {part: temporary(folder / f"{name}.{part}") for part in names}
    with parts["tokens"].open("wb") as file:
        for ids, lengths in tokenize(engine, chain(*both)):
            kept.append(lengths >= shard.min_tokens)
            if not kept[-1].all():
                ids, lengths = ids[np.repeat(kept[-1], lengths)], lengths[kept[-1]]
            file.write(_with_ends(ids, lengths, layout).tobytes())
            ends.append(np.cumsum(lengths + 2) + ends[-1][-1])
        sync(file)
    is_kept = np.concatenate(kept)
    text_bytes = np.concatenate([texts.lengths for texts in both])[is_kept]
    index = np.stack([np.concatenate(ends)[1:], text_bytes], axis=1).astype("<i8")
    write_bytes(parts["index"], index.tobytes(), durable=True)
    if shard.digests:
        write_bytes(parts["digests"], bytes(shard.digests), durable=True)
    sampled, lost = zip(*(measure_loss(plain, texts, shard.number) for texts in both), strict=True)
    found = Counter(filter(None, map(finder.find, chain(*both))))
    record = shard.record | {"sampled_bytes": sum(sampled), "lost_bytes": sum(lost), "spelled": dict(found)}
    for part, path in parts.items():
        record[part] = {"file": f"{name}.{part}", **file_record(path)}
        path.rename(folder / f"{name}.{part}")
    if shard.min_tokens:
        record["short"] = int(np.count_nonzero(~is_kept))
    first = 0
    for split, stays in zip(SPLITS, np.split(is_kept, [len(both[0])]), strict=True):
        rows = index[first : first + np.count_nonzero(stays)]
        num_tokens = int(rows[-1, 0] - (index[first - 1, 0] if first else 0)) if len(rows) else 0
        record[split] = {"documents": len(rows), "tokens": num_tokens, "text_bytes": int(rows[:, 1].sum())}
        first += len(rows)
    write_json(folder / f"{name}.json", record, durable=True)
    return record


def _with_ends(ids: np.ndarray, lengths: np.ndarray, layout: Layout) -> np.ndarray:
    """Return the tokens of documents of these lengths, with bos and eos around each."""
    boundaries = np.repeat(np.cumsum([0, *lengths]), 2)[1:-1]
    return np.insert(ids.astype(layout.dtype), boundaries, np.tile([layout.bos_id, layout.eos_id], len(lengths)))


def tokenize(engine: Engine, texts: Iterable[bytes]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids and lengths of the texts, a few texts at a time."""
    chunk: list[bytes] = []
    num_bytes = 0
    for text in texts:
        if chunk and num_bytes + len(text) > min(_CHUNK_BYTES, _PART_BYTES):
            yield engine.encode(chunk)
            chunk, num_bytes = [], 0
        if len(text) > _PART_BYTES:
            ids = np.concatenate([engine.encode([part])[0] for part in _parts(text)])
            yield ids, np.array([len(ids)])
        else:
            chunk.append(text)
            num_bytes += len(text)
    if chunk:
        yield engine.encode(chunk)


def _parts(text: bytes) -> Iterator[bytes]:
    """Split a long text at line ends where there are any, and never inside a character."""
    start = 0
    while start < len(text):
        end = start + _PART_BYTES
        if end < len(text):
            while text[end] & 0xC0 == 0x80:
                end -= 1
            end = text.rfind(b"\n", start + 1, end) + 1 or end
        yield text[start:end]
        start = end


def shard_name(number: int) -> str:
    """Return the name of a shard's files, without suffix."""
    return f"shard-{number:05d}"
