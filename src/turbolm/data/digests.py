"""A set of digests that is small enough for the documents of a large corpus."""

from __future__ import annotations

DIGEST_BYTES = 16  # two of 10^12 different texts share one with a probability of 10^-15
_EMPTY = bytes(DIGEST_BYTES)


class DigestSet:
    """Digests of 16 bytes, in 23 to 46 bytes of memory each, half as much again while it grows.

    A `set` of `bytes` needs about 110. One table with linear probing: a digest is its own hash.
    """

    def __init__(self) -> None:
        self._table = bytearray(DIGEST_BYTES << 10)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, digest: bytes) -> bool:
        """Whether the digest was not there yet; it is there now."""
        if not self._place(digest):
            return False
        self._count += 1
        if self._count * DIGEST_BYTES > 0.7 * len(self._table):
            self._grow()
        return True

    def _place(self, digest: bytes) -> bool:
        table = self._table
        at = int.from_bytes(digest[:8], "little") * DIGEST_BYTES % len(table)
        while (held := table[at : at + DIGEST_BYTES]) != _EMPTY:
            if held == digest:
                return False
            at = (at + DIGEST_BYTES) % len(table)
        table[at : at + DIGEST_BYTES] = digest
        return True

    def _grow(self) -> None:
        old, self._table = self._table, bytearray(2 * len(self._table))
        for at in range(0, len(old), DIGEST_BYTES):
            digest = bytes(old[at : at + DIGEST_BYTES])
            if digest != _EMPTY:
                self._place(digest)
