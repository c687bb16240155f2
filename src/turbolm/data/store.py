"""The token store: tokenized documents in memory-mapped shards, and the manifest that vouches for them.

A document is stored as bos, its tokens, eos: T tokens, hence T - 1 positions whose inputs are tokens[:-1] and whose
targets are tokens[1:]. A shard is two files: `.tokens`, the tokens of its training documents and then of its validation
documents, little-endian; and `.index`, two little-endian int64 a document in the same order: tokens and text bytes.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from turbolm.data.packing import IntArray
from turbolm.errors import UserError

FORMAT_VERSION = 1  # part of every store's key: raise it when the files change
MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")
_MAX_OPEN_SHARDS = 4096  # memory maps a process may hold are limited (65,530 on Linux)


class TokenStore:
    """A store that is open for reading; documents are numbered within their split. Picklable, safe in threads."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self._maps: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest, "_maps": {}}

    @property
    def tokenizer_dir(self) -> Path:
        """The tokenizer's folder in the Hugging Face layout."""
        return self.folder / TOKENIZER_FOLDER

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id there can be."""
        return int(self.manifest["vocab_size"])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what decides the tokens: not over paths, times or the machine."""
        names = ("format_version", "dtype", "vocab_size", "bos_id", "eos_id", "tokenizer_fingerprint")
        content: dict[str, Any] = {name: self.manifest[name] for name in names}
        content["shards"] = [
            [shard["tokens"]["sha256"], shard["index"]["sha256"], shard["train"]["documents"]]
            for shard in self.manifest["shards"]
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def lengths(self, split: Split) -> IntArray:
        """Positions (inputs that have a target) of each document, int64 [num_documents]."""
        return self._documents[split][0]

    def text_bytes(self, split: Split) -> IntArray:
        """UTF-8 bytes of each document's text, int64 [num_documents]."""
        return self._documents[split][1]

    def read(self, split: Split, document: int, start: int, length: int) -> np.ndarray:
        """The `length` inputs from position `start` on, and the target of the last: a view of length + 1 tokens."""
        lengths, _, first_token, first_document = self._documents[split]
        assert start >= 0 and length > 0 and start + length <= lengths[document]
        shard = int(np.searchsorted(first_document, document, side="right")) - 1
        begin = int(first_token[document]) + start
        return self._tokens(shard)[begin : begin + length + 1]

    def token_counts(self, split: Split, max_tokens: int | None = None) -> IntArray:
        """How often each token is a target, int64 [vocab_size], over the first documents of the split.

        With `max_tokens`, whole documents are counted until at least so many targets have been seen.
        """
        lengths, _, first_token, first_document = self._documents[split]
        num_documents = len(lengths)
        if max_tokens is not None:
            reached = int(np.searchsorted(np.cumsum(lengths), max_tokens)) + 1
            num_documents = min(num_documents, reached)
        counts = np.zeros(self.vocab_size, np.int64)
        for shard in range(len(self.manifest["shards"])):
            first, end = int(first_document[shard]), min(int(first_document[shard + 1]), num_documents)
            if first >= end:
                continue
            tokens = self._tokens(shard)
            begin, stop = int(first_token[first]), int(first_token[end - 1] + lengths[end - 1] + 1)
            for chunk in range(begin, stop, 1 << 22):  # bincount makes an int64 copy
                counts += np.bincount(tokens[chunk : min(chunk + (1 << 22), stop)], minlength=self.vocab_size)
            counts -= np.bincount(tokens[first_token[first:end]], minlength=self.vocab_size)  # bos is no target
        return counts

    @cached_property
    def _documents(self) -> dict[Split, tuple[IntArray, IntArray, IntArray, IntArray]]:
        """Of each split: positions, text bytes and first token in its shard by document; first document by shard."""
        parts: dict[Split, list[tuple[IntArray, IntArray, IntArray]]] = {split: [] for split in SPLITS}
        for shard in self.manifest["shards"]:
            index = np.fromfile(self.folder / shard["index"]["file"], dtype="<i8").reshape(-1, 2).astype(np.int64)
            first_token = np.cumsum(index[:, 0]) - index[:, 0]
            num_train = shard["train"]["documents"]
            parts["train"].append((index[:num_train, 0] - 1, index[:num_train, 1], first_token[:num_train]))
            parts["validation"].append((index[num_train:, 0] - 1, index[num_train:, 1], first_token[num_train:]))
        documents: dict[Split, tuple[IntArray, IntArray, IntArray, IntArray]] = {}
        for split in SPLITS:
            lengths, text_bytes, first_token = (np.concatenate(column) for column in zip(*parts[split], strict=True))
            first_document = np.cumsum([0] + [len(part[0]) for part in parts[split]])
            documents[split] = (lengths, text_bytes, first_token, first_document)
        return documents

    def _tokens(self, shard: int) -> np.ndarray:
        tokens = self._maps.get(shard)
        if tokens is None:
            path = self.folder / self.manifest["shards"][shard]["tokens"]["file"]
            # A plain array over the map: slicing a np.memmap costs ten times as much.
            tokens = np.asarray(np.memmap(path, dtype=self.manifest["dtype"], mode="r"))
            if len(self._maps) >= _MAX_OPEN_SHARDS:
                self._maps = {}
            self._maps[shard] = tokens
        return tokens


def open_store(folder: str | Path, *, verify: Literal["quick", "full"] = "quick") -> TokenStore:
    """Open a complete store. `quick` compares every file's size with the manifest, `full` its SHA-256 as well."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no complete token store (no {MANIFEST}); run `turbolm prepare` first"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: {error}") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{folder} is a token store of format {version}, not {FORMAT_VERSION}; run `turbolm prepare`")
    for number, shard in enumerate(manifest["shards"]):
        for part in (shard["tokens"], shard["index"]):
            problem = check_file(folder, part, full=verify == "full")
            if problem:
                raise UserError(
                    f"Shard {number} of the token store {folder} is damaged: {problem}. "
                    f"Delete {part['file']} there and run `turbolm prepare RECIPE` again; it rebuilds that shard."
                )
    return TokenStore(folder, manifest)


def check_file(folder: Path, part: dict[str, Any], *, full: bool) -> str | None:
    """What is wrong with a file of a shard (`file`, `bytes`, `sha256`), or None."""
    path = folder / part["file"]
    try:
        num_bytes = path.stat().st_size
        if num_bytes != part["bytes"]:
            return f"{part['file']} has {num_bytes} bytes where the manifest says {part['bytes']}"
        if full:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != part["sha256"]:
                    return f"{part['file']} has changed since it was written (SHA-256 differs)"
    except FileNotFoundError:
        return f"{part['file']} is missing"
    except OSError as error:
        return f"{part['file']} cannot be read: {error.strerror}"
    return None


def check_tokenizer(store: TokenStore, folder: str | Path) -> None:
    """Raise UserError unless the tokenizer in `folder` is the one the store was written with."""
    from turbolm.data.tokenizer import tokenizer_fingerprint

    # The store's own copy is hashed again: the manifest's value may come from another version of `tokenizers`.
    if tokenizer_fingerprint(folder) != tokenizer_fingerprint(store.tokenizer_dir):
        raise UserError(
            f"The tokenizer in {folder} differs from the one the token store {store.folder} was written with. "
            "Use the store's tokenizer, or run `turbolm prepare` with a recipe that names this one."
        )


def unigram_entropy(counts: IntArray) -> float:
    """Entropy of the distribution that `counts` estimates, in nats: the loss of a model that knows no context."""
    seen = counts[counts > 0].astype(np.float64)
    if not len(seen):
        return 0.0
    share = seen / seen.sum()
    return float(-(share * np.log(share)).sum())
