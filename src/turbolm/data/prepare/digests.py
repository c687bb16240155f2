"""A compact set of digests, for the documents of a large corpus."""

from __future__ import annotations

from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import numpy as np

DIGEST_BYTES = 16  # in files
_HELD_BYTES = 12  # in memory: two of 10^9 different texts share one with a probability of 10^-11
_EMPTY = bytes(_HELD_BYTES)
_TABLES = 64
_FIRST_SLOTS = 341  # a page of memory
_FULL, _GROWTH = 0.75, 1.4


class DigestSet:
    """Digests (their first 12 bytes) in 16 to 23 bytes of memory each. A `set` of `bytes` needs about 110.

    A digest is its own hash, in one of 64 tables with linear probing. Each table grows separately, so memory and time
    grow smoothly. It has its own memory pages, which return to the system when it grows.
    """

    def __init__(self) -> None:
        self._tables = [_new_table(_FIRST_SLOTS) for _ in range(_TABLES)]
        self._counts = [0] * _TABLES

    def __len__(self) -> int:
        return sum(self._counts)

    @property
    def num_bytes(self) -> int:
        """Return the bytes that the tables take."""
        return sum(map(len, self._tables))

    def add(self, digest: bytes) -> bool:
        """Add a digest; return whether it was new."""
        held = digest[:_HELD_BYTES]
        number = held[-1] % _TABLES
        table = self._tables[number]
        if not _place(table, held):
            return False
        self._counts[number] += 1
        if self._counts[number] * _HELD_BYTES > _FULL * len(table):
            self._tables[number] = _grown(table)
        return True

    def add_all(self, digests: np.ndarray) -> np.ndarray:
        """Add digests, uint8 [count, at least 12], in order; return for each whether it was new."""
        held = digests[:, :_HELD_BYTES].tobytes()
        starts = range(0, len(held), _HELD_BYTES)
        return np.fromiter((self.add(held[at : at + _HELD_BYTES]) for at in starts), bool, len(digests))


def _new_table(slots: int) -> mmap:
    return mmap(-1, slots * _HELD_BYTES, flags=MAP_PRIVATE | MAP_ANONYMOUS)


def _place(table: mmap, digest: bytes) -> bool:
    size = len(table)
    at = int.from_bytes(digest[:7], "little") * _HELD_BYTES % size
    while (held := table[at : at + _HELD_BYTES]) != _EMPTY:
        if held == digest:
            return False
        at = (at + _HELD_BYTES) % size
    table[at : at + _HELD_BYTES] = digest
    return True


def _grown(old: mmap) -> mmap:
    table = _new_table(int(len(old) // _HELD_BYTES * _GROWTH))
    for at in range(0, len(old), _HELD_BYTES):
        digest = old[at : at + _HELD_BYTES]
        if digest != _EMPTY:
            _place(table, digest)
    old.close()
    return table
