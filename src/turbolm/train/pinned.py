"""Page-locked ("pinned") host memory for micro-batches, which a GPU reads while the host runs ahead.

A copy from pageable memory waits for the device: `non_blocking` acts on pinned memory only. Whoever asks for such a
copy must keep the memory until the device has read it. torch does so for its own tensors, which it recognises by their
address; the arrays of micro-batches are parts of one block, so `held_until_read` does it for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from turbolm.engine.device import use_device

Batch = TypeVar("Batch")


def pinned_memory(device: torch.device) -> PinnedMemory | None:
    """Return the memory to read batches for `device` into, or None for the process's own."""
    return PinnedMemory(device) if device.type == "cuda" else None


@dataclass(frozen=True)
class PinnedMemory:
    """Allocates arrays in pinned memory for one GPU."""

    device: torch.device
    _read: deque[tuple[torch.cuda.Event, Any]] = field(default_factory=deque)

    def start_thread(self) -> None:
        """Prepare the calling thread for `empty`."""
        use_device(self.device)

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return an int64 array without values; torch reuses the memory once nothing refers to it."""
        array: np.ndarray = torch.empty(shape, dtype=torch.int64, pin_memory=True).numpy()
        return array

    def held_until_read(self, batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
        """Yield `batches`; each stays in memory until the device has done what was queued before the next was taken."""
        with closing(batches):
            for batch in batches:
                try:
                    yield batch
                finally:  # also where the rest is not wanted, as after a rollback
                    event = torch.cuda.Event()
                    event.record()
                    self._read.append((event, batch))
                while self._read and self._read[0][0].query():
                    self._read.popleft()
