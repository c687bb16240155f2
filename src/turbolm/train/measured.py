"""Measure once in an attempt what metrics.jsonl does not have, for the comparison with the plan.

`measured.json` of the attempt: the bytes of the collectives of one step on rank 0, and on a CPU the memory that the
process had before the model was built.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from turbolm.data.batch.loader import GlobalBatch
from turbolm.files import write_json
from turbolm.plan.plan import Plan
from turbolm.reliability.collectives import bytes_since, last_records

MEASURED = "measured.json"  # of an attempt
_STEP = 3  # of its kind in the attempt: in the first two ZeRO-3 compares the order of its modules over the ranks


class StepMeasure:
    """Measures the third step of an attempt that has the longest sequences and the largest batch. Rank 0 only."""

    def __init__(self, plan: Plan) -> None:
        """Note the memory of this process before it builds the model."""
        self._shape = plan.batch.seq_len, plan.batch.global_batch_tokens
        self._on_gpu = plan.device == "cuda"
        self._resident, self._peak = _resident_bytes(), _peak_bytes()
        self._left: int | None = _STEP

    @contextmanager
    def step(self, batch: GlobalBatch, number: int, attempt_folder: Path) -> Iterator[None]:
        """Measure the block, which trains `batch` as the step `number`, if it is the one to measure."""
        seq_len = batch.sequences.seq_len
        if self._left is None or (seq_len, len(batch.sequences) * seq_len) != self._shape:
            yield
            return
        self._left -= 1
        if self._left:
            yield
            return
        before = last_records()
        yield
        self._left = None
        found = {"step": number, "collective_bytes": bytes_since(before), "memory_before_bytes": self._before()}
        with contextlib.suppress(OSError):  # a full disk: training goes on
            write_json(attempt_folder / MEASURED, found)

    def _before(self) -> int | None:
        """Return the resident memory before the model, if training took more than the start had taken already."""
        return None if self._on_gpu or _peak_bytes() <= self._peak else self._resident


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
