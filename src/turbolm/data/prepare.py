"""Build the token store of a recipe: split, tokenize in parallel, write shards; all of it once.

What a store holds is decided by its key, and its bytes depend on nothing else: not on the number of workers, nor on how
often it was interrupted. A shard is up to about 32 MB of consecutive text, tokenized and written by one worker and
renamed into place; the manifest is written last, so a store with a manifest is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import heapq
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from turbolm.data.store import FORMAT_VERSION, MANIFEST, SPLITS, TOKENIZER_FOLDER, check_file, file_record, open_store
from turbolm.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from turbolm.recipe.schema import Recipe

# Shards grow up to this size from a sixteenth of it, so that a small corpus has work for several processes as well.
SHARD_TEXT_BYTES = 32 * 10**6
_PIECE_CHARS = 4 * 2**20  # longer texts are tokenized in pieces: a tokenizer needs some 100 bytes of memory a character
_CHUNK_CHARS = 2**20
_MAX_AUTO_WORKERS = 64  # one process reads for all of them
Progress = Callable[[str, int, int], None]


def prepare(recipe: Recipe, *, num_workers: int | None = None, on_progress: Progress | None = None) -> Path:
    """Build the recipe's token store unless it is there; return its folder.

    `on_progress(stage, documents, text_bytes)` is called now and then with what the stage has done so far; the stages
    are `waiting` (for another process that builds the same store), `sample` and `tokenize`.
    """
    progress = on_progress or (lambda stage, documents, text_bytes: None)
    folder = store_folder(recipe)
    if _is_complete(folder):
        return folder
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError(
            f"The token store {folder} is not there, and this process is one of several. "
            "Run `turbolm prepare RECIPE` first, in the same folder and with the same recipe."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock"), progress):
            if not _is_complete(folder):
                _build(recipe, folder, num_workers or _auto_workers(recipe), progress)
    except OSError as error:  # errors of reading a source are UserErrors by now
        raise UserError(f"The token store {folder} cannot be written: {error}") from None
    except BrokenProcessPool:
        raise UserError(
            "A worker process of prepare was killed, perhaps for want of memory. Lower execution.prepare_workers and "
            "run it again; finished shards are kept."
        ) from None
    return folder


def find_store(recipe: Recipe) -> Path | None:
    """The folder of the recipe's token store if it has been built; `open_store` checks that it is sound."""
    folder = store_folder(recipe)
    return folder if (folder / MANIFEST).is_file() else None


def store_folder(recipe: Recipe) -> Path:
    """Where the recipe's token store is or will be."""
    return Path(recipe.execution.cache_dir).expanduser() / "stores" / store_key(recipe)[:16]


def store_key(recipe: Recipe) -> str:
    """SHA-256 over everything that decides the content of a store."""
    from turbolm.data.tokenizer import special_ids, tokenizer_fingerprint

    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "shard_text_bytes": SHARD_TEXT_BYTES,
        "sources": [source.model_dump(mode="json") for source in recipe.data.sources],
        "files": [_listing(source) for source in recipe.data.sources],
        "validation": recipe.data.validation,
    }
    if recipe.tokenizer.path is not None:
        path = recipe.tokenizer.path
        content["tokenizer"] = [tokenizer_fingerprint(path), *special_ids(path)]
    else:
        content["tokenizer"] = recipe.tokenizer.model_dump(mode="json")
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_validation(text_digest: bytes, share: float) -> bool:
    """Whether the document whose text has this SHA-256 is held out: equal texts are always on the same side."""
    return int.from_bytes(text_digest[:8], "big") / 2**64 < share


def _listing(source: Any) -> list[tuple[str, int, int]]:
    """Name, size in bytes and time of change (ns) of the files of a source."""
    from turbolm.data.sources import list_files

    rows = []
    for path in list_files(source):
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        # Each node may have installed its own standard library: there, sizes must do.
        changed = 0 if source.type == "stdlib" else status.st_mtime_ns
        name = "/".join(path.parts[-2:]) if source.type == "stdlib" else str(path)
        rows.append((name, status.st_size, changed))
    return rows


def _is_complete(folder: Path) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    try:
        open_store(folder)
    except UserError:
        return False  # damaged or of an older format: build again what is not sound
    return True


def _auto_workers(recipe: Recipe) -> int:
    workers = recipe.execution.prepare_workers
    return min(len(os.sched_getaffinity(0)), _MAX_AUTO_WORKERS) if workers == "auto" else workers


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Hold an exclusive lock; the system lets go of it when the process ends, however it ends."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks; two builders would write the same bytes and rename them into place
        yield


# ------------------------------------------------------------------------------------------------------- building


def _build(recipe: Recipe, folder: Path, num_workers: int, progress: Progress) -> None:
    from turbolm.data.tokenizer import load_tokenizer, special_ids, tokenizer_fingerprint, vocabulary_size

    (folder / MANIFEST).unlink(missing_ok=True)
    for leftover in folder.glob("*.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    _place_tokenizer(recipe, folder, progress)
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    bos_id, eos_id = special_ids(folder / TOKENIZER_FOLDER)
    vocab_size = vocabulary_size(tokenizer)
    layout = Layout(str(folder), "<u2" if vocab_size <= 2**16 else "<u4", bos_id, eos_id)
    counts = _Counts()
    shards = _write_shards(_split_shards(recipe, counts), layout, num_workers, progress)
    totals = {
        split: {name: sum(shard[split][name] for shard in shards) for name in ("documents", "tokens", "text_bytes")}
        for split in SPLITS
    }
    if not counts.documents:
        raise UserError(f"None of the {counts.empty} documents of data.sources holds any text")
    if not totals["train"]["documents"]:
        raise UserError(
            f"There are no training documents: all {counts.documents} are held out. Lower data.validation "
            f"(it is {recipe.data.validation:g}) or add documents to data.sources."
        )
    key = store_key(recipe)
    if not key.startswith(folder.name):
        raise UserError("The files of data.sources changed while they were read. Run `turbolm prepare RECIPE` again.")
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "dtype": layout.dtype,
        "vocab_size": vocab_size,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "bos_id": bos_id,
        "eos_id": eos_id,
        "validation": recipe.data.validation,
        "sources": [source.model_dump(mode="json") for source in recipe.data.sources],
        "empty_documents": counts.empty,
        "totals": totals,
        "shards": [{name: value for name, value in shard.items() if name != "text_sha256"} for shard in shards],
    }
    _write_json(folder / MANIFEST, manifest)


@dataclass
class _Counts:
    documents: int = 0
    empty: int = 0


@dataclass
class _Shard:
    """Consecutive documents of one source on their way to a worker."""

    source: int  # its place in data.sources
    texts: dict[str, list[str]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    text_bytes: int = 0
    digest: Any = field(default_factory=hashlib.sha256)  # over the documents' own digests

    @property
    def num_documents(self) -> int:
        return sum(map(len, self.texts.values()))


def _split_shards(recipe: Recipe, counts: _Counts) -> Iterator[_Shard]:
    from turbolm.data.sources import iter_documents

    shard, number = _Shard(0), 0
    for source, text in iter_documents(recipe.data.sources):
        if not text:
            counts.empty += 1
            continue
        if source != shard.source:
            if shard.num_documents:
                yield shard
            shard = _Shard(source)
        content = text.encode()
        digest = hashlib.sha256(content).digest()
        held_out = is_validation(digest, recipe.data.validation)
        shard.texts["validation" if held_out else "train"].append(text)
        shard.text_bytes += len(content)
        shard.digest.update(digest)
        counts.documents += 1
        if shard.text_bytes >= SHARD_TEXT_BYTES >> max(0, 4 - number // 8):
            yield shard
            shard, number = _Shard(source), number + 1
    if shard.num_documents:
        yield shard


def _place_tokenizer(recipe: Recipe, folder: Path, progress: Progress) -> None:
    """Train the recipe's tokenizer, or copy it, into the store's folder."""
    from turbolm.data.tokenizer import copy_tokenizer, save_tokenizer, train_tokenizer

    target, unfinished = folder / TOKENIZER_FOLDER, folder / f"{TOKENIZER_FOLDER}.tmp"
    if target.is_dir():
        return  # of an interrupted run; the folder's name says that the recipe is the same
    if recipe.tokenizer.train is None:
        assert recipe.tokenizer.path is not None
        copy_tokenizer(recipe.tokenizer.path, unfinished)
    else:
        settings = recipe.tokenizer.train
        sample = sample_texts(_training_texts(recipe, progress), settings.sample_bytes)
        if not sample:
            raise UserError("There are no training documents to train the tokenizer on (data.sources, data.validation)")
        save_tokenizer(train_tokenizer(sample, settings.vocab_size), unfinished)
    unfinished.rename(target)


def _training_texts(recipe: Recipe, progress: Progress) -> Iterator[tuple[bytes, str]]:
    from turbolm.data.sources import iter_documents

    text_bytes = 0
    for number, (_, text) in enumerate(iter_documents(recipe.data.sources), start=1):
        content = text.encode()
        text_bytes += len(content)
        digest = hashlib.sha256(content).digest()
        if number % 1000 == 0:
            progress("sample", number, text_bytes)
        if text and not is_validation(digest, recipe.data.validation):
            yield digest, text


def sample_texts(texts: Iterable[tuple[bytes, str]], sample_bytes: int) -> list[str]:
    """The documents with the smallest digests, up to `sample_bytes` of text: spread over the corpus, and repeatable.

    Takes (SHA-256, text) pairs and holds no more than the sample. Equal texts are taken once; the last one may be cut.
    """
    heap: list[tuple[int, int, str]] = []  # (minus the digest, bytes, text), so that the largest digest is on top
    held: set[int] = set()
    held_bytes = 0
    for digest, text in texts:
        rank = -int.from_bytes(digest, "big")
        if rank in held or (held_bytes >= sample_bytes and rank < heap[0][0]):
            continue
        num_bytes = len(text.encode())
        heapq.heappush(heap, (rank, num_bytes, text))
        held.add(rank)
        held_bytes += num_bytes
        while held_bytes - heap[0][1] >= sample_bytes:
            rank, num_bytes, _ = heapq.heappop(heap)
            held.remove(rank)
            held_bytes -= num_bytes
    sample = [text for _, _, text in sorted(heap, reverse=True)]
    if held_bytes > sample_bytes:
        kept = heap[0][1] - (held_bytes - sample_bytes)
        sample[-1] = sample[-1].encode()[:kept].decode(errors="ignore")
    return sample


# -------------------------------------------------------------------------------------------------------- workers


@dataclass(frozen=True)
class Layout:
    """What a worker has to know of the store."""

    folder: str
    dtype: str  # NumPy's name, little-endian
    bos_id: int
    eos_id: int


def _write_shards(
    shards: Iterable[_Shard], layout: Layout, num_workers: int, progress: Progress
) -> list[dict[str, Any]]:
    """Write the shards that are not there yet; the records of all of them, in order."""
    records: dict[int, dict[str, Any]] = {}
    running: dict[Future[dict[str, Any]], tuple[int, int]] = {}
    done = [0, 0]

    def finish(number: int, source: int, record: dict[str, Any]) -> None:
        records[number] = {**record, "source": source}
        for split in SPLITS:
            done[0] += record[split]["documents"]
            done[1] += record[split]["text_bytes"]
        progress("tokenize", *done)

    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), initializer=_start_worker)
    try:
        for number, shard in enumerate(shards):
            text_sha256 = shard.digest.hexdigest()
            record = _finished(layout, number, text_sha256)
            if record:
                finish(number, shard.source, record)
                continue
            job = pool.submit(_write_shard, layout, number, text_sha256, *(shard.texts[split] for split in SPLITS))
            running[job] = (number, shard.source)
            if len(running) > num_workers:  # one waits, so that no worker does; more would only fill the memory
                for job in wait(running, return_when=FIRST_COMPLETED).done:
                    finish(*running.pop(job), job.result())
        for job in list(running):
            finish(*running.pop(job), job.result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [records[number] for number in sorted(records)]


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops and waits for the shards at work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, and they would wait for work forever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _finished(layout: Layout, number: int, text_sha256: str) -> dict[str, Any] | None:
    """The record of a shard that was written before from the same texts and is still sound."""
    folder = Path(layout.folder)
    try:
        record = json.loads((folder / f"{_shard_name(number)}.json").read_text(encoding="utf-8"))
        if record["text_sha256"] == text_sha256 and not any(
            check_file(folder, record[part], full=True) for part in ("tokens", "index")
        ):
            return dict(record)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _write_shard(
    layout: Layout, number: int, text_sha256: str, train: Sequence[str], validation: Sequence[str]
) -> dict[str, Any]:
    """Tokenize documents and write the files of one shard; its entry in the manifest."""
    from turbolm.data.tokenizer import load_tokenizer

    folder, name = Path(layout.folder), _shard_name(number)
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    texts = [*train, *validation]
    index = np.zeros((len(texts), 2), dtype="<i8")
    num_tokens = 0
    tokens_path = _unfinished(folder / f"{name}.tokens")
    with tokens_path.open("wb") as file:
        for document, ids in enumerate(_tokenize(tokenizer, texts)):
            tokens = np.empty(len(ids) + 2, dtype=layout.dtype)
            tokens[0], tokens[1:-1], tokens[-1] = layout.bos_id, ids, layout.eos_id
            file.write(tokens.tobytes())
            num_tokens += len(tokens)
            index[document] = num_tokens, len(texts[document].encode())
        _flush(file)
    index_path = _unfinished(folder / f"{name}.index")
    with index_path.open("wb") as file:
        file.write(index.tobytes())
        _flush(file)
    record: dict[str, Any] = {"text_sha256": text_sha256}
    for part, path in (("tokens", tokens_path), ("index", index_path)):
        record[part] = {"file": f"{name}.{part}", **file_record(path)}
        path.rename(folder / f"{name}.{part}")
    train_tokens = int(index[len(train) - 1, 0]) if train else 0
    for split, first, count, tokens_total in (
        ("train", 0, len(train), train_tokens),
        ("validation", len(train), len(validation), num_tokens - train_tokens),
    ):
        bytes_total = int(index[first : first + count, 1].sum())
        record[split] = {"documents": count, "tokens": tokens_total, "text_bytes": bytes_total}
    _write_json(folder / f"{name}.json", record)
    return record


def _tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    """Token ids of each text, a few texts at a time."""
    chunk: list[str] = []
    num_chars = 0
    for text in texts:
        if len(text) > _PIECE_CHARS or num_chars > _CHUNK_CHARS:
            yield from _encode(tokenizer, chunk)
            chunk, num_chars = [], 0
        if len(text) > _PIECE_CHARS:
            yield [token for piece in _pieces(text) for token in next(_encode(tokenizer, [piece]))]
        else:
            chunk.append(text)
            num_chars += len(text)
    yield from _encode(tokenizer, chunk)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[int]]:
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        yield encoding.ids


def _pieces(text: str) -> Iterator[str]:
    """A long text in pieces that end at a line's end where there is one."""
    start = 0
    while start < len(text):
        end = start + _PIECE_CHARS
        if end < len(text):
            end = text.rfind("\n", start + 1, end) + 1 or end
        yield text[start:end]
        start = end


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    unfinished = _unfinished(path)
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1, sort_keys=True) + "\n")
        _flush(file)
    unfinished.rename(path)
