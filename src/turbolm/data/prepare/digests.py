"""A compact set of digests, for the documents of a large corpus."""

from __future__ import annotations

from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import numpy as np

from turbolm.data import native

DIGEST_BYTES = 16  # in files
_HELD_BYTES = 12  # in memory: two of 10^9 different texts share one with a probability of 10^-11
_TABLES = 64
_FIRST_SLOTS = 341  # a page of memory
_GROWTH = 1.4


class DigestSet:
    """Digests (their first 12 bytes) in 16 to 23 bytes of memory each. A `set` of `bytes` needs about 110.

    A digest is its own hash, in one of 64 tables with linear probing, at most three quarters full. Each table grows
    separately, so memory and time grow smoothly. It has its own memory pages, which return to the system when it grows.
    """

    def __init__(self) -> None:
        self._tables = [_new_table(_FIRST_SLOTS) for _ in range(_TABLES)]
        self._addresses = np.array([native.address(table) for table in self._tables], np.uint64)
        self._num_slots = np.full(_TABLES, _FIRST_SLOTS, np.int64)
        self._counts = np.zeros(_TABLES, np.int64)

    def __len__(self) -> int:
        return int(self._counts.sum())

    @property
    def num_bytes(self) -> int:
        """Return the bytes that the tables take."""
        return sum(map(len, self._tables))

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Add digests, uint8 [count, at least 12], in order; return for each whether it was new."""
        is_new, done = np.zeros(len(digests), bool), 0
        while done < len(digests):
            tables = self._addresses, self._num_slots, self._counts
            done += native.add_digests(*tables, digests[done:], is_new[done:])
            if done < len(digests):
                self._grow(int(digests[done, _HELD_BYTES - 1]) % _TABLES)
        return is_new

    def _grow(self, number: int) -> None:
        table = _new_table(int(self._num_slots[number] * _GROWTH))
        native.grow_digests(self._tables[number], table, _HELD_BYTES)
        self._tables[number], self._addresses[number] = table, native.address(table)
        self._num_slots[number] = len(table) // _HELD_BYTES


def _new_table(num_slots: int) -> np.ndarray:
    return np.frombuffer(mmap(-1, num_slots * _HELD_BYTES, flags=MAP_PRIVATE | MAP_ANONYMOUS), np.uint8)
