"""The token store: tokenized documents in memory-mapped shards, and their manifest.

A document is stored as bos, its tokens, eos: T tokens, hence T - 1 positions whose inputs are tokens[:-1] and whose
targets are tokens[1:]. A shard is two files: `.tokens`, the tokens of its training documents and then of its validation
documents, little-endian; and `.index`, two little-endian int64 a document in the same order: where it ends, in tokens
from the shard's beginning, and its text's bytes. A shard's documents come from one source; shards are in the order of
the sources. Both files are memory-mapped and read on demand, so a process's memory does not grow with the number of
documents.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from turbolm.data import native
from turbolm.data.native import IntArray
from turbolm.errors import UserError
from turbolm.files import load_json, sha256_json

FORMAT_VERSION = 2  # part of every store's key: increment it when the files change
MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
# Without the manifest `prepare` checks all of a store; with it, sizes and ends of files alone
REPAIR = f"Remove {MANIFEST} there and run `turbolm prepare RECIPE` again; it rebuilds what is damaged"
Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")
_MAX_OPEN_FILES = 8192  # memory maps a process may hold are limited (65,530 on Linux)
_ENDS_BYTES = 4096  # at each end of a file, for the quick check
_CHECK_THREADS = 8


class TokenStore:
    """A token store open for reading; documents are numbered within their split. Picklable and thread-safe."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self._maps: dict[tuple[int, str], np.ndarray] = {}
        self._mapped: tuple[np.ndarray, list[np.ndarray]] = np.zeros(len(manifest["shards"]), native.SHARD), []

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.folder, self.manifest)

    @property
    def tokenizer_dir(self) -> Path:
        """Return the tokenizer's folder, in the Hugging Face layout."""
        return self.folder / TOKENIZER_FOLDER

    @property
    def vocab_size(self) -> int:
        """Return the largest possible token id plus one."""
        return int(self.manifest["vocab_size"])

    @property
    def text_loss(self) -> float:
        """Return the share of a sample's bytes that the tokenizer does not reproduce; 0 if it was not measured."""
        loss = self.manifest.get("text_loss") or {"lost_bytes": 0}
        return float(loss["lost_bytes"] / max(1, loss["sampled_bytes"])) if loss["lost_bytes"] else 0.0

    @property
    def notes(self) -> list[str]:
        """Yield what a user should know about the store before training on it."""
        notes = []
        if not self.manifest["validation"]:
            notes.append("data.validation is 0: no document is held out, so there is no held-out loss")
        if self.text_loss:
            notes.append(
                f"the tokenizer does not reproduce its text: {100 * self.text_loss:.3g}% of the bytes of a sample are "
                "lost or changed (unknown or normalized characters, dropped spaces); bits per byte is not reported"
            )
        return notes

    @cached_property
    def fingerprint(self) -> str:
        """Return a SHA-256 of what determines the tokens: not of paths, times or the machine."""
        names = ("format_version", "dtype", "vocab_size", "bos_id", "eos_id", "tokenizer_fingerprint")
        content: dict[str, Any] = {name: self.manifest[name] for name in names}
        content["shards"] = [
            [shard["tokens"]["sha256"], shard["index"]["sha256"], shard["train"]["documents"], shard["source"]]
            for shard in self.manifest["shards"]
        ]
        return sha256_json(content)

    def num_documents(self, split: Split) -> int:
        """Return the number of documents of the split, over all sources."""
        return int(self._first_document[split][-1])

    def source_documents(self, split: Split = "train") -> list[tuple[int, int]]:
        """Return the documents [first, end) of each source, in the recipe's order; equal if it has none."""
        counts = self._sum_by_source(split, lambda part: int(part["documents"]))
        ends = np.cumsum(counts).tolist()
        return [(end - count, end) for count, end in zip(counts, ends, strict=True)]

    def source_positions(self, split: Split = "train") -> list[int]:
        """Return the positions of all documents of each source, in the recipe's order."""
        return self._sum_by_source(split, lambda part: int(part["tokens"] - part["documents"]))

    def lengths(self, split: Split, first: int = 0, end: int | None = None) -> IntArray:
        """Return the positions (inputs that have a target) of the documents `first` to `end` (exclusive), int64."""
        return _join(
            np.diff(_boundaries(self._index(shard), rows)) - 1 for shard, rows in self._rows(split, first, end)
        )

    def text_bytes(self, split: Split, first: int = 0, end: int | None = None) -> IntArray:
        """Return the UTF-8 bytes of the texts of the documents `first` to `end` (exclusive), int64."""
        return _join(self._index(shard)[rows, 1] for shard, rows in self._rows(split, first, end))

    def lengths_of(self, split: Split, documents: IntArray) -> IntArray:
        """Return the positions of each of these documents, int64 [len(documents)]."""
        return native.lengths(self.shards(split, documents), documents)

    def locate(self, split: Split, document: int) -> tuple[int, int, int]:
        """Return the shard of a document, and where the document begins and ends in it, in tokens."""
        (shard,) = self._shards_of(split, np.array([document])).tolist()
        row = document - int(self._first_document[split][shard]) + int(self._first_row[split][shard])
        begin, end = _boundaries(self._index(shard), slice(row, row + 1)).tolist()
        return shard, begin, end

    def shards(self, split: Split, documents: IntArray) -> native.Shards:
        """Return the shards for compiled code: those with these documents are open, others may be."""
        memory, files = self._mapped
        needed = self._shards_of(split, documents)
        if not memory["tokens"].all():
            needed = np.unique(needed)
            if len(files) + 2 * len(needed) > _MAX_OPEN_FILES:  # those that other threads use stay open
                memory, files = self._mapped = np.zeros_like(memory), []
            for shard in needed[memory["tokens"][needed] == 0].tolist():
                index, tokens = self._map(shard, "index", "<i8"), self.tokens(shard)
                files += [index, tokens]
                memory["num_tokens"][shard] = len(tokens)
                # The addresses last: other threads may be reading.
                memory["index"][shard], memory["tokens"][shard] = native.address(index), native.address(tokens)
        return native.Shards(memory, files, self._first_document[split], self._first_row[split])

    def _shards_of(self, split: Split, documents: IntArray) -> IntArray:
        """Return the shard of each document. Raises IndexError for a document that does not exist."""
        if documents.min(initial=0) < 0 or documents.max(initial=-1) >= self.num_documents(split):
            raise IndexError(f"{self.folder} has {self.num_documents(split)} documents for {split}, none beyond")
        return np.searchsorted(self._first_document[split], documents, side="right") - 1

    def tokens(self, shard: int) -> np.ndarray:
        """Return all tokens of a shard, training documents first; memory-mapped, in the store's dtype."""
        return self._map(shard, "tokens", self.manifest["dtype"])

    def read(self, split: Split, document: int, start: int, length: int) -> np.ndarray:
        """Return the `length` inputs from position `start`, and the target of the last: a view of length + 1 tokens."""
        shard, begin, end = self.locate(split, document)
        assert start >= 0 and length > 0 and start + length < end - begin
        return self.tokens(shard)[begin + start : begin + start + length + 1]

    def token_counts(
        self, split: Split, max_tokens: int | None = None, first: int = 0, end: int | None = None
    ) -> IntArray:
        """Count how often each token is a target, int64 [vocab_size], over the documents `first` to `end` (exclusive).

        With `max_tokens`, count complete documents until at least this many targets have been seen.
        """
        counts = np.zeros(self.vocab_size, np.int64)
        left = max_tokens
        for shard, rows in self._rows(split, first, end):
            boundaries = _boundaries(self._index(shard), rows)
            if left is not None:
                seen = np.cumsum(np.diff(boundaries) - 1)
                boundaries = boundaries[: int(np.searchsorted(seen, left)) + 2]
                left -= int(seen[len(boundaries) - 2])
            tokens, (begin, stop) = self.tokens(shard), boundaries[[0, -1]].tolist()
            for chunk in range(begin, stop, 1 << 22):  # bincount makes an int64 copy
                counts += np.bincount(tokens[chunk : min(chunk + (1 << 22), stop)], minlength=self.vocab_size)
            counts -= np.bincount(tokens[boundaries[:-1]], minlength=self.vocab_size)  # bos is no target
            if left is not None and left <= 0:
                break
        return counts

    def content_problem(self, shard: int) -> str | None:
        """Return what is inconsistent in a shard of the right size, or None. Reads all of it."""
        record, index, tokens = self.manifest["shards"][shard], self._index(shard), self.tokens(shard)
        counts = [record[split]["documents"] for split in SPLITS]
        ends = _boundaries(index, slice(0, sum(counts)))
        wanted = [record["train"]["tokens"], len(tokens)]
        if np.any(np.diff(ends) < 2) or [ends[counts[0]], ends[-1]] != wanted or np.any(index[:, 1] < 0):
            return f"{record['index']['file']} is not an index of the documents of {record['tokens']['file']}"
        for begin in range(0, len(tokens), 1 << 24):
            if tokens[begin : begin + (1 << 24)].max() >= self.vocab_size:
                return f"{record['tokens']['file']} holds tokens beyond the vocabulary of {self.vocab_size}"
        return None

    @cached_property
    def _first_document(self) -> dict[Split, IntArray]:
        """Return, by split, the first document of each shard and the end of the last: int64 [num_shards + 1]."""
        counts = {split: [shard[split]["documents"] for shard in self.manifest["shards"]] for split in SPLITS}
        return {split: np.cumsum([0, *counts[split]], dtype=np.int64) for split in SPLITS}

    @cached_property
    def _first_row(self) -> dict[Split, IntArray]:
        """Return, by split, the first row in each shard's index: int64 [num_shards]."""
        num_train = np.diff(self._first_document["train"])
        return {"train": np.zeros_like(num_train), "validation": num_train}

    def _sum_by_source(self, split: Split, count: Callable[[dict[str, Any]], int]) -> list[int]:
        sums = [0] * len(self.manifest["sources"])
        for shard in self.manifest["shards"]:
            sums[shard["source"]] += count(shard[split])
        return sums

    def _rows(self, split: Split, first: int, end: int | None) -> Iterator[tuple[int, slice]]:
        """Yield the shards that hold these documents, in order, and their rows in each index."""
        first_document = self._first_document[split]
        end = int(first_document[-1]) if end is None else end
        assert 0 <= first <= end <= first_document[-1]
        shard = int(np.searchsorted(first_document, first, side="right")) - 1
        while first < end:
            stop = min(end, int(first_document[shard + 1]))
            if stop > first:
                offset = int(self._first_row[split][shard] - first_document[shard])
                yield shard, slice(first + offset, stop + offset)
            first, shard = max(first, stop), shard + 1

    def _index(self, shard: int) -> np.ndarray:
        """Return each document's end in tokens and its text's bytes, little-endian int64 [num_documents, 2]."""
        return self._map(shard, "index", "<i8").reshape(-1, 2)

    def _map(self, shard: int, part: str, dtype: str) -> np.ndarray:
        mapped = self._maps.get((shard, part))
        if mapped is None:
            path = self.folder / self.manifest["shards"][shard][part]["file"]
            with path.open("rb") as file:
                # A plain array over the map: np.memmap takes twice as long to open and ten times as long to slice.
                is_empty = not self.manifest["shards"][shard][part]["bytes"]  # all its documents were too short
                content = b"" if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                mapped = np.frombuffer(content, dtype)
            if len(self._maps) >= _MAX_OPEN_FILES:
                self._maps = {}
            self._maps[shard, part] = mapped
        return mapped


def _boundaries(index: np.ndarray, rows: slice) -> IntArray:
    """Return where the documents of these rows begin, in tokens, and where the last one ends: int64 [num_rows + 1]."""
    if rows.start:
        return index[rows.start - 1 : rows.stop, 0].astype(np.int64)
    return np.concatenate([[0], index[: rows.stop, 0]])  # a shard's first document begins at 0


def _join(parts: Iterable[np.ndarray]) -> IntArray:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def open_store(folder: str | Path, *, verify: Literal["quick", "full"] = "quick") -> TokenStore:
    """Open a complete store. `quick` compares the size and both ends of every file with the manifest, `full` all of it.

    So `quick` finds missing, truncated and replaced shards, and an edited manifest; `full` finds any change.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, problem in find_damage(folder, manifest, full=verify == "full"):
        raise UserError(
            f"{name.capitalize()} of the token store {folder} is damaged: {problem}. "
            f"{REPAIR} (`turbolm verify` lists all of it)."
        )
    return TokenStore(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a complete store. Raises UserError if it is missing, of another format, or changed."""
    try:
        manifest = load_json(folder / MANIFEST)
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no complete token store (no {MANIFEST}); run `turbolm prepare` first"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: {error}") from None
    return check_manifest(manifest, str(folder / MANIFEST))


def check_manifest(manifest: Any, where: str) -> dict[str, Any]:
    """Return the manifest. Raises UserError for one of another format, and one that has changed."""
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{where} is of format {version}, not {FORMAT_VERSION}; run `turbolm prepare`")
    if manifest.get("manifest_sha256") != manifest_sha256(manifest):
        raise UserError(f"{where} has changed since it was written; run `turbolm prepare` again")
    from turbolm.data.store.manifest import manifest_problem  # pydantic: prepare's workers do without

    if problem := manifest_problem(manifest):
        raise UserError(f"{where} is not the manifest of a token store: {problem}")
    return dict(manifest)


def manifest_sha256(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest without this value itself."""
    content = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    return sha256_json(content)


def find_damage(folder: Path, manifest: dict[str, Any], *, full: bool) -> Iterator[tuple[str, str]]:
    """Yield (`shard 3` or `the tokenizer`, problem) for each file that has changed since it was written.

    With `full`, also for each shard whose content is inconsistent, although it matches the manifest.
    """
    parts = [("the tokenizer", part) for part in manifest["tokenizer_files"]]
    for number, shard in enumerate(manifest["shards"]):
        parts += [(f"shard {number}", shard[part]) for part in ("tokens", "index")]
    with ThreadPoolExecutor(_CHECK_THREADS) as pool:  # on a network file system each check waits for round trips
        problems = pool.map(lambda part: check_file(folder, part[1], full=full), parts)
        found = False
        try:
            for (name, _), problem in zip(parts, problems, strict=True):
                if problem:
                    found = True
                    yield name, problem
            if full and not found:
                store = TokenStore(folder, manifest)
                for number, problem in enumerate(pool.map(store.content_problem, range(len(manifest["shards"])))):
                    if problem:
                        yield f"shard {number}", problem
        finally:
            pool.shutdown(cancel_futures=True)


def file_record(path: Path) -> dict[str, Any]:
    """Return a file's manifest entry: `bytes`, `ends_sha256` (of its first and last 4 KiB) and `sha256`."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        num_bytes = file.tell()
        return {"bytes": num_bytes, "ends_sha256": _ends_sha256(file, num_bytes), "sha256": sha256}


def check_file(folder: Path, part: dict[str, Any], *, full: bool) -> str | None:
    """Return what is wrong with a file of a store (`file` and the fields of `file_record`), or None."""
    path = folder / part["file"]
    try:
        if path.is_symlink():
            return f"{part['file']} is a link, not a file of the store"
        with path.open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes != part["bytes"]:
                return f"{part['file']} has {num_bytes} bytes where the manifest says {part['bytes']}"
            if _ends_sha256(file, num_bytes) != part["ends_sha256"]:
                return f"{part['file']} is another file or has changed since it was written (its ends differ)"
            file.seek(0)
            if full and hashlib.file_digest(file, "sha256").hexdigest() != part["sha256"]:
                return f"{part['file']} has changed since it was written (SHA-256 differs)"
    except FileNotFoundError:
        return f"{part['file']} is missing"
    except OSError as error:
        return f"{part['file']} cannot be read: {error.strerror}"
    return None


def _ends_sha256(file: BinaryIO, num_bytes: int) -> str:
    digest = hashlib.sha256()
    for offset in (0, max(0, num_bytes - _ENDS_BYTES)):
        file.seek(offset)
        digest.update(file.read(_ENDS_BYTES))
    return digest.hexdigest()


def check_tokenizer(store: TokenStore, folder: str | Path, *, may_extend: bool = False) -> None:
    """Raise UserError unless the tokenizer in `folder` is the one the store was written with.

    With `may_extend` the store's tokenizer may have additional tokens; the other tokens must keep their ids.
    """
    from turbolm.data.prepare.tokenizer import load_tokenizer, tokenizer_fingerprint

    if may_extend:
        known, ids = load_tokenizer(folder).get_vocab(), load_tokenizer(store.tokenizer_dir).get_vocab()
        if moved := [token for token in sorted(known) if ids.get(token) != known[token]]:
            raise UserError(
                f"{len(moved)} tokens of the tokenizer in {folder}, such as {moved[0]!r}, have other ids or none in "
                f"that of the token store {store.folder}; model.resize_embeddings is for a tokenizer with more tokens"
            )
        return
    # The store's own copy is hashed again: the manifest's value may come from another version of `tokenizers`.
    if tokenizer_fingerprint(folder) != tokenizer_fingerprint(store.tokenizer_dir):
        raise UserError(
            f"The tokenizer in {folder} differs from the one the token store {store.folder} was written with. "
            "Use the store's tokenizer, or run `turbolm prepare` with a recipe that names this one; one that only has "
            "more tokens needs model.resize_embeddings: true."
        )


def check_held_out(num_documents: int, share: float) -> None:
    """Raise UserError if documents should be held out (`data.validation`) and none is."""
    if share and not num_documents:
        raise UserError(
            f"No document is held out for evaluation. Raise data.validation (it is now {share:g}), add documents to "
            "data.sources, or set data.validation: 0, which means no evaluation."
        )


def unigram_entropy(counts: IntArray) -> float:
    """Return the entropy of the distribution that `counts` estimates, in nats: the loss of a model without context."""
    seen = counts[counts > 0].astype(np.float64)
    if not len(seen):
        return 0.0
    share = seen / seen.sum()
    return float(-(share * np.log(share)).sum())
