"""Cut the text of the sources into shards, and have worker processes tokenize and write them.

A shard is consecutive documents of one source, tokenized and written by one worker and renamed into place, its record
(`.json`) last. The record says which part of the source it holds, so a later run need not even read that again.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from turbolm.data.prepare.bad import LeftOut, check_left_out
from turbolm.data.prepare.digests import DIGEST_BYTES, DigestSet
from turbolm.data.prepare.engines import Engine, EngineName, Plain, check_sample, load_engine
from turbolm.data.prepare.round_trip import measure_loss
from turbolm.data.prepare.special_tokens import Finder, SpecialTokens
from turbolm.data.store.token_store import SPLITS, TOKENIZER_FOLDER, check_file, file_record
from turbolm.files import load_json, sync, temporary, write_bytes, write_json

if TYPE_CHECKING:
    from io import BufferedWriter

    from turbolm.data.prepare.sources import Place, Reader, SourceSizes
    from turbolm.recipe.schema import Recipe

_PIECE_BYTES = 4 * 2**20  # longer texts are tokenized in pieces: a tokenizer needs some 100 bytes of memory for each
_CHUNK_BYTES = 2**18  # tokenized at a time


@dataclass(frozen=True)
class Layout:
    """What a worker has to know of the store."""

    folder: str
    dtype: str  # NumPy's name, little-endian
    bos_id: int
    eos_id: int
    engine: EngineName
    special_tokens: SpecialTokens = "split"


class Texts:
    """UTF-8 texts, one after the other in a file of their own: memory holds only where each of them ends.

    A worker gets the file's name. Through a pipe each text in flight would be in memory several times.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ends = array("q")  # in bytes
        self._file: BufferedWriter | None = None

    def append(self, text: bytes) -> None:
        if self._file is None:
            self._file = self.path.open("wb")
        self._file.write(text)
        self.ends.append(len(text) + (self.ends[-1] if self.ends else 0))

    def close(self) -> None:
        """Nothing is appended any more."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Remove the file, if there is one."""
        self.close()
        self.path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> bytes:
        start = self.ends[number - 1] if number else 0
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(self.ends[number] - start)

    def __iter__(self) -> Iterator[bytes]:
        if not self.ends:
            return
        start = 0
        with self.path.open("rb") as file:
            for end in self.ends:
                yield file.read(end - start)
                start = end


@dataclass
class Shard:
    """Consecutive documents of one source on their way to a worker."""

    number: int
    source: int  # its place in data.sources
    start: Place
    end: Place
    texts: dict[str, Texts]  # by split
    text_bytes: int = 0
    empty: int = 0  # documents without text, which are left out
    duplicates: int = 0  # documents that came before, which are left out
    bad: LeftOut = field(default_factory=LeftOut)  # documents that cannot be used
    digests: bytearray = field(default_factory=bytearray)  # of each document, where duplicates are left out
    digest: Any = field(default_factory=hashlib.sha256)  # over the documents' own digests

    @property
    def num_documents(self) -> int:
        return sum(map(len, self.texts.values()))

    def record(self) -> dict[str, Any]:
        """What the shard holds and where it comes from."""
        return {
            "source": self.source,
            "start": list(self.start),
            "end": list(self.end),
            "empty": self.empty,
            "duplicates": self.duplicates,
            "text_sha256": self.digest.hexdigest(),
            **self.bad.record(),
        }

    def remove_texts(self) -> None:
        """Remove the files of its texts."""
        for texts in self.texts.values():
            texts.remove()


@dataclass
class Finished:
    """A shard that an earlier run wrote."""

    number: int
    record: dict[str, Any]


@dataclass
class Dropped:
    """Documents that no shard holds."""

    empty: int = 0
    duplicates: int = 0
    bad: LeftOut = field(default_factory=LeftOut)


def is_validation(text_digest: bytes, share: float) -> bool:
    """Whether the document whose text has this SHA-256 is held out: equal texts are always on the same side."""
    return int.from_bytes(text_digest[:8], "big") / 2**64 < share


# -------------------------------------------------------------------------------------------------------- cutting


def cut_shards(
    recipe: Recipe, folder: Path, shard_text_bytes: int, sizes: SourceSizes, dropped: Dropped
) -> Iterator[tuple[Shard | Finished, float]]:
    """The shards in order, each with its share of all sources' bytes; counts in `dropped` what they leave out.

    What an earlier run finished is not read again, only the hashes of its files are checked: that its text is the same
    follows from the folder's name, which covers size and time of every source file. A data set from the hub has no such
    files, so its text is read and compared.
    """
    from turbolm.data.prepare.sources import Reader, list_files

    seen = DigestSet() if recipe.data.deduplicate == "exact" else None
    number, share = 0, 0.0
    for source, settings in enumerate(recipe.data.sources):
        known = bool(list_files(settings))
        start: Place = (0, 0)
        reader = documents = None
        while True:
            part = _find(folder, number, {"source": source, "start": list(start)}, seen) if known else None
            if part is not None:
                reader = documents = None
            else:
                if reader is None or documents is None:
                    reader = Reader(settings, start, recipe.data.on_bad_document)
                    documents = iter(reader)
                paths = {split: temporary(folder / f"{_name(number)}.{split}.text") for split in SPLITS}
                shard = Shard(number, source, start, start, {split: Texts(path) for split, path in paths.items()})
                _fill(shard, reader, documents, seen, recipe.data.validation, _limit(number, shard_text_bytes))
                part = _find(folder, number, shard.record(), None) if not known and shard.num_documents else None
                if part:
                    shard.remove_texts()
            rest = part.record if part else shard.record()
            check_left_out(rest, recipe.data.on_bad_document)  # a run that left them out may have written the part
            dropped.empty += rest["empty"]
            dropped.duplicates += rest["duplicates"]
            dropped.bad.extend(rest)
            if not part and not shard.num_documents:
                break
            start = (rest["end"][0], rest["end"][1])
            before, share = share, max(share, sizes.share(source, start, reader.share_of_file if reader else 0.0))
            yield part or shard, share - before
            number += 1


def _limit(number: int, shard_text_bytes: int) -> int:
    """Shards grow from a sixteenth of the size, so that a small corpus has work for several processes as well."""
    return shard_text_bytes >> max(0, 4 - number // 8)


def _fill(
    shard: Shard, reader: Reader, documents: Iterator[str], seen: DigestSet | None, validation: float, limit: int
) -> None:
    for text in documents:
        shard.end = reader.place
        if not text:
            shard.empty += 1
            continue
        content = text.encode()
        digest = hashlib.sha256(content).digest()
        if seen is not None:
            if not seen.add(digest[:DIGEST_BYTES]):
                shard.duplicates += 1
                continue
            shard.digests += digest[:DIGEST_BYTES]
        shard.texts["validation" if is_validation(digest, validation) else "train"].append(content)
        shard.text_bytes += len(content)
        shard.digest.update(digest)
        if shard.text_bytes >= limit:
            break
    shard.end = reader.place  # behind bad documents at the end of the source
    shard.bad, reader.left_out = reader.left_out, LeftOut()
    for texts in shard.texts.values():
        texts.close()


def _find(folder: Path, number: int, expected: dict[str, Any], seen: DigestSet | None) -> Finished | None:
    """A shard that was written before, is still sound, and holds what is expected; its digests are added to `seen`."""
    try:
        record = load_json(folder / f"{_name(number)}.json")
        parts = ["tokens", "index"] + ["digests"] * (seen is not None)
        if any(record[name] != value for name, value in expected.items()):
            return None
        if any(record[part]["file"] != f"{_name(number)}.{part}" for part in parts):
            return None
        if any(check_file(folder, record[part], full=True) for part in parts):
            return None
        if seen is not None:
            digests = (folder / record["digests"]["file"]).read_bytes()
            for at in range(0, len(digests), DIGEST_BYTES):
                seen.add(digests[at : at + DIGEST_BYTES])
        return Finished(number, dict(record))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


# -------------------------------------------------------------------------------------------------------- writing


def write_shards(
    shards: Iterator[tuple[Shard | Finished, float]],
    layout: Layout,
    num_workers: int,
    on_finish: Callable[[dict[str, Any], bool, float], None],
    on_stop: Callable[[], None],
) -> list[dict[str, Any]]:
    """Write the shards that are not there yet; the records of all of them, in order.

    `on_finish(record, is_new, share)` is called after each, `share` being what came with it. On KeyboardInterrupt
    `on_stop` is called and the shards at work are finished. Raises EngineMismatch where the layout's engine gives other
    ids than `tokenizers`.
    """
    records: dict[int, dict[str, Any]] = {}
    running: dict[Future[dict[str, Any]], tuple[int, float]] = {}

    def finish(job: Future[dict[str, Any]]) -> None:
        number, share = running.pop(job)
        records[number] = job.result()
        on_finish(records[number], True, share)

    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), initializer=_start_worker)
    try:
        for shard, share in shards:
            if isinstance(shard, Finished):
                records[shard.number] = shard.record
                on_finish(shard.record, False, share)
                continue
            texts = (shard.texts[split] for split in SPLITS)
            job = pool.submit(_write_shard, layout, shard.number, shard.record(), bytes(shard.digests), *texts)
            running[job] = (shard.number, share)
            if len(running) > num_workers:  # one waits, so that no worker does; more would only fill the memory
                for job in wait(running, return_when=FIRST_COMPLETED).done:
                    finish(job)
        for job in list(running):
            finish(job)
    except KeyboardInterrupt:
        on_stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [records[number] for number in sorted(records)]


def _start_worker() -> None:
    for stop in (signal.SIGINT, signal.SIGTERM):  # the parent stops and waits for the shards at work
        signal.signal(stop, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, and they would wait for work forever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@cache
def _engines(layout: Layout) -> tuple[Engine, Plain]:
    """The engine to use and the reference, once in each worker."""
    plain = Plain(Path(layout.folder) / TOKENIZER_FOLDER, layout.special_tokens)
    return load_engine(layout.engine, plain), plain


@cache
def _finder(layout: Layout) -> Finder:
    return Finder(_engines(layout)[1].added_tokens())


def _write_shard(
    layout: Layout,
    number: int,
    record: dict[str, Any],
    digests: bytes,
    train: Texts,
    validation: Texts,
) -> dict[str, Any]:
    """Tokenize the texts, write the files of one shard and remove the texts; `record` with its files and counts."""
    folder, name = Path(layout.folder), _name(number)
    engine, plain = _engines(layout)
    if layout.engine != "tokenizers":
        for texts in (train, validation):
            check_sample(engine, plain, texts)
    ends = [np.zeros(1, np.int64)]
    parts = {part: temporary(folder / f"{name}.{part}") for part in ("tokens", "index") + ("digests",) * bool(digests)}
    with parts["tokens"].open("wb") as file:
        for ids, lengths in tokenize(engine, chain(train, validation)):
            tokens, chunk_ends = _with_ends(ids, lengths, layout)
            file.write(tokens.tobytes())
            ends.append(chunk_ends + ends[-1][-1])
        sync(file)
    text_bytes = [np.diff(np.array(texts.ends, np.int64), prepend=0) for texts in (train, validation)]
    index = np.stack([np.concatenate(ends)[1:], np.concatenate(text_bytes)], axis=1).astype("<i8")
    write_bytes(parts["index"], index.tobytes(), durable=True)
    if digests:
        write_bytes(parts["digests"], digests, durable=True)
    sampled, lost = zip(*(measure_loss(plain, texts, number) for texts in (train, validation)), strict=True)
    found = Counter(filter(None, map(_finder(layout).find, chain(train, validation))))
    record = record | {"sampled_bytes": sum(sampled), "lost_bytes": sum(lost), "spelled": dict(found)}
    for part, path in parts.items():
        record[part] = {"file": f"{name}.{part}", **file_record(path)}
        path.rename(folder / f"{name}.{part}")
    train_tokens, all_tokens = (int(index[count - 1, 0]) if count else 0 for count in (len(train), len(index)))
    for split, rows, num_tokens in (
        ("train", index[: len(train)], train_tokens),
        ("validation", index[len(train) :], all_tokens - train_tokens),
    ):
        record[split] = {"documents": len(rows), "tokens": num_tokens, "text_bytes": int(rows[:, 1].sum())}
    write_json(folder / f"{name}.json", record, durable=True)
    for texts in (train, validation):
        texts.remove()
    return record


def _with_ends(ids: np.ndarray, lengths: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of documents with bos and eos around each, and where each ends."""
    ends = np.cumsum(lengths + 2)
    tokens = np.empty(len(ids) + 2 * len(lengths), layout.dtype)
    inside = np.ones(len(tokens), bool)
    tokens[ends - lengths - 2], tokens[ends - 1] = layout.bos_id, layout.eos_id
    inside[ends - lengths - 2] = inside[ends - 1] = False
    tokens[inside] = ids
    return tokens, ends


def tokenize(engine: Engine, texts: Iterable[bytes]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids and lengths of the texts, a few texts at a time."""
    chunk: list[bytes] = []
    num_bytes = 0
    for text in texts:
        if chunk and num_bytes + len(text) > min(_CHUNK_BYTES, _PIECE_BYTES):
            yield engine.encode(chunk)
            chunk, num_bytes = [], 0
        if len(text) > _PIECE_BYTES:
            ids = np.concatenate([engine.encode([piece])[0] for piece in _pieces(text)])
            yield ids, np.array([len(ids)])
        else:
            chunk.append(text)
            num_bytes += len(text)
    if chunk:
        yield engine.encode(chunk)


def _pieces(text: bytes) -> Iterator[bytes]:
    """A long text in pieces that end at a line's end where there is one, and never inside a character."""
    start = 0
    while start < len(text):
        end = start + _PIECE_BYTES
        if end < len(text):
            while text[end] & 0xC0 == 0x80:
                end -= 1
            end = text.rfind(b"\n", start + 1, end) + 1 or end
        yield text[start:end]
        start = end


def _name(number: int) -> str:
    return f"shard-{number:05d}"
