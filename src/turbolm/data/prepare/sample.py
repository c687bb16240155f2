"""The text a tokenizer is trained on: a sample of the corpus, made in one pass; memory is that of the sample."""

from __future__ import annotations

import hashlib
import heapq
import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from turbolm.data.prepare.blocks import Block, Offset
from turbolm.data.prepare.cut import held_out
from turbolm.data.prepare.documents import Documents
from turbolm.data.prepare.progress import Meter, OnProgress
from turbolm.data.prepare.read_ahead import BlockReader
from turbolm.data.prepare.reader import SourceSizes, no_documents
from turbolm.data.prepare.texts import Texts
from turbolm.recipe.schema import Recipe

_SAVE_EVERY_SEC = 120
_REPORT_EVERY = 1000  # documents
_BLOCK_BYTES = 10**6  # of text, if one process reads


class Sample:
    """The documents with the smallest digests, up to `sample_bytes` of text: spread over the corpus and reproducible.

    Equal texts are taken once. The order of documents, and adding one twice, make no difference.
    """

    def __init__(self, sample_bytes: int):
        self._sample_bytes = sample_bytes
        # (minus the digest, bytes, text), so that the largest digest is on top
        self._heap: list[tuple[int, int, str]] = []
        self._held: set[int] = set()
        self._held_bytes = 0

    def add(self, digest: bytes, text: str) -> None:
        """Consider a document; `digest` is the SHA-256 of its text."""
        rank = -int.from_bytes(digest, "big")
        if rank in self._held or (self._held_bytes >= self._sample_bytes and rank < self._heap[0][0]):
            return
        num_bytes = len(text.encode())
        heapq.heappush(self._heap, (rank, num_bytes, text))
        self._held.add(rank)
        self._held_bytes += num_bytes
        while self._held_bytes - self._heap[0][1] >= self._sample_bytes:
            rank, num_bytes, _ = heapq.heappop(self._heap)
            self._held.remove(rank)
            self._held_bytes -= num_bytes

    @property
    def max_digest(self) -> int:
        """Return the first 8 bytes, as a number, of the largest digest that `add` may still take."""
        return 2**64 - 1 if self._held_bytes < self._sample_bytes else -self._heap[0][0] >> 192

    def texts(self) -> list[str]:
        """Return the sample, smallest digest first; the last text may be cut."""
        sample = [text for _, _, text in sorted(self._heap, reverse=True)]
        if self._held_bytes > self._sample_bytes:
            kept = self._heap[0][1] - (self._held_bytes - self._sample_bytes)
            sample[-1] = sample[-1].encode()[:kept].decode(errors="ignore")
        return sample

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """Write the sample so far and `state`, which records what it is a sample of."""
        unfinished = path.with_name(f"{path.name}.tmp")
        with unfinished.open("w", encoding="utf-8") as file:
            for line in (state, *(text for _, _, text in self._heap)):
                file.write(json.dumps(line) + "\n")
        unfinished.rename(path)

    def load(self, path: Path) -> dict[str, Any] | None:
        """Add what `save` wrote. Returns its state, or None if nothing can be read."""
        try:
            with path.open(encoding="utf-8") as file:
                state = json.loads(file.readline())
                for text in map(json.loads, file):
                    self.add(hashlib.sha256(text.encode()).digest(), text)
                return dict(state)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return None


def read_sample(sample: Sample, recipe: Recipe, state_file: Path, num_readers: int, on_progress: OnProgress) -> None:
    """Read all sources for the tokenizer's training text; progress is saved periodically and on exit."""
    sizes, meter = SourceSizes(recipe.data.sources), Meter("sample", on_progress)
    # Source, offset in it, documents and bytes of text up to which everything has been considered
    done: tuple[int, Offset, int, int] = (0, (0, 0), 0, 0)
    if state := sample.load(state_file):
        done = (state["source"], (state["place"][0], state["place"][1]), state["documents"], state["text_bytes"])
    first, start, num_documents, text_bytes = done
    meter.skip(text_bytes, sizes.share(first, start))
    saved_at, num_reported = time.monotonic(), num_documents

    def save() -> None:
        if recipe.data.sources[done[0]].files():  # the next run may find another data set on the hub
            sample.save(state_file, dict(zip(("source", "place", "documents", "text_bytes"), done, strict=True)))

    try:
        with closing(BlockReader(recipe.data.sources, state_file.parent, num_readers, sizes.num_bytes)) as reader:
            for source in range(first, len(recipe.data.sources)):
                begin: Offset = start if source == first else (0, 0)
                reader.max_digest = sample.max_digest
                documents = Documents(recipe, source, begin, reader, ahead=True)
                while (block := documents.block(_BLOCK_BYTES)) is not None:
                    _consider(sample, block, recipe.data.validation)
                    num_documents += int(np.count_nonzero(block.lengths >= 0))
                    text_bytes += int(np.maximum(block.lengths, 0).sum())
                    documents.advance(len(block))
                    done, reader.max_digest = (source, documents.offset, num_documents, text_bytes), sample.max_digest
                    if num_documents - num_reported >= _REPORT_EVERY:
                        share = sizes.share(source, documents.offset, documents.share)
                        meter.report(num_documents, text_bytes, share if sizes.known else None)
                        num_reported = num_documents
                    if time.monotonic() - saved_at > _SAVE_EVERY_SEC:
                        save()
                        saved_at = time.monotonic()
    except KeyboardInterrupt:
        save()
        raise
    if not num_documents:
        raise no_documents()


def _consider(sample: Sample, block: Block, validation: float) -> None:
    """Add the documents of a block that are not held out."""
    rows = np.flatnonzero((block.starts >= 0) & (block.lengths > 0) & ~held_out(block.digests, validation))
    texts = Texts()
    texts.add(block.file.path, block.starts[rows], block.lengths[rows])
    for row, text in zip(rows.tolist(), texts, strict=True):
        sample.add(block.digests[row].tobytes(), text.decode())
