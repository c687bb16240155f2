"""Stable sorts of integers in linear time: NumPy sorts 16 bits by radix, so wider keys go 16 bits at a time."""

from __future__ import annotations

import numpy as np

from turbolm.data import native

_BLOCK = 2**16  # keys that fit in a core's cache


def argsort_integers(keys: np.ndarray, bound: int) -> np.ndarray:
    """Stable argsort, int64, of integer keys from 0 to `bound`, 16 bits at a time."""
    order = np.argsort(keys.astype(np.uint16), kind="stable")  # the cast keeps the lowest 16 bits
    shift = 16
    while bound >> shift:
        digits = (keys[order] >> shift).astype(np.uint16)
        order = order[np.argsort(digits, kind="stable")]
        shift += 16
    return order


def stable_argsort(keys: np.ndarray, bound: int) -> np.ndarray:
    """Stable argsort, int64, of integer keys from 0 to a small `bound`: block by block, each in a core's cache."""
    if len(keys) <= _BLOCK:
        return argsort_integers(keys, bound)
    order = np.empty(len(keys), dtype=np.int64)
    next_place = _starts(np.bincount(keys, minlength=bound + 1))  # of each key
    for first in range(0, len(keys), _BLOCK):
        block = keys[first : first + _BLOCK]
        counts = np.bincount(block, minlength=bound + 1)
        place = np.repeat(next_place - _starts(counts), counts)
        place += np.arange(len(block))
        order[place] = argsort_integers(block, bound) + first
        next_place += counts
    return order


def argsort_random(raw: np.ndarray) -> np.ndarray:
    """Stable argsort, int64, of random uint64: 48 of the bits decide, nearly always."""
    if native.library():
        return native.argsort_random(raw)
    order = argsort_integers(raw >> 16, 2**48 - 1)
    upper = raw[order] >> 16
    return argsort_integers(raw, 2**64 - 1) if np.any(upper[1:] == upper[:-1]) else order


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts) - counts
