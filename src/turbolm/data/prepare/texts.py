"""Texts in temporary files: a worker gets their places, since a pipe would hold each text in memory several times.

Workers import this module, so it imports neither pydantic nor the recipe.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

SUFFIX = ".text.tmp"  # of the files


@contextmanager
def texts_in(folder: Path) -> Iterator[None]:
    """Remove the files that are left in a folder afterwards, when no process reads or writes them any more."""
    try:
        yield
    finally:
        for path in folder.glob(f"*{SUFFIX}"):
            path.unlink()


class TextFile:
    """A temporary file, removed when nobody uses it."""

    def __init__(self, path: Path):
        self.path = path
        self._num_users = 1

    def use(self) -> TextFile:
        """Count one more user."""
        self._num_users += 1
        return self

    def drop(self) -> None:
        """Count one user less."""
        self._num_users -= 1
        if not self._num_users:
            self.path.unlink(missing_ok=True)


class Texts:
    """UTF-8 texts in several files; only their places are in memory."""

    def __init__(self) -> None:
        self._pieces: list[tuple[Path, np.ndarray, np.ndarray]] = []  # starts and lengths in bytes, int64
        self._firsts: list[int] = []  # number of the first text of each piece
        self._count = 0

    def add(self, path: Path, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Append texts of a file, in the order in which they lie there; `starts` and `lengths` in bytes."""
        if len(starts):
            self._pieces.append((path, starts, lengths))
            self._firsts.append(self._count)
            self._count += len(starts)

    @property
    def lengths(self) -> np.ndarray:
        """Return the bytes of each text, int64."""
        return np.concatenate([np.empty(0, np.int64), *(lengths for _, _, lengths in self._pieces)])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> bytes:
        piece = bisect_right(self._firsts, number) - 1
        path, starts, lengths = self._pieces[piece]
        at = number - self._firsts[piece]
        with path.open("rb") as file:
            file.seek(int(starts[at]))
            return file.read(int(lengths[at]))

    def __iter__(self) -> Iterator[bytes]:
        for path, starts, lengths in self._pieces:
            at = 0
            with path.open("rb") as file:
                for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
                    if start != at:
                        file.seek(start)
                    yield file.read(length)
                    at = start + length
