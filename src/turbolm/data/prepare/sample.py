"""The text a tokenizer is trained on: a sample of the corpus, made in one pass; memory is that of the sample."""

from __future__ import annotations

import hashlib
import heapq
import json
from pathlib import Path
from typing import Any


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
