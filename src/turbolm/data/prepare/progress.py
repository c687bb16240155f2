"""Report the progress of `prepare`, and wait for another process that prepares the same."""

from __future__ import annotations

import fcntl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from turbolm.units import format_bytes, format_count, format_duration

Stage = Literal["waiting", "compare", "sample", "tokenize", "order", "stopping"]

_DOING = {
    "compare": ("hashing the source files", "files"),
    "sample": ("reading text for the tokenizer", "documents"),
    "tokenize": ("tokenizing", "documents"),
    "order": ("planning the order of the batches", "steps"),
}


@dataclass(frozen=True)
class Progress:
    """What a stage has done so far, including earlier runs, and the speed of this run.

    The stages: `waiting` for another process that builds the same store, `compare` (hashing source files, which are
    counted instead of documents), `sample` (choosing the tokenizer's training text), `tokenize`, `order` (planning the
    batches of a run, whose steps are counted), and `stopping` (finishing the shards at work).
    """

    stage: Stage
    documents: int = 0
    text_bytes: int = 0
    share: float | None = None  # done, 0 to 1; None if the size of the sources is unknown
    bytes_per_sec: float | None = None  # of text, in this run
    eta_sec: float | None = None  # until the stage is done

    def __str__(self) -> str:
        if self.stage == "waiting":
            return "waiting for another process that prepares the same data"
        if self.stage == "stopping":
            return "stopping; finishing the shards at work"
        doing, what = _DOING[self.stage]
        parts = [doing, f"{format_count(self.documents)} {what}"]
        if self.stage != "order":
            parts.append(format_bytes(self.text_bytes))
        if self.bytes_per_sec is not None:
            parts.append(f"{self.bytes_per_sec / 1e6:.1f} MB/s")
        if self.share is not None:
            parts.append(f"{self.share:.0%}")
        if self.eta_sec is not None:
            parts.append(f"{format_duration(self.eta_sec)} left")
        return ", ".join(parts)


OnProgress = Callable[[Progress], None]


class Meter:
    """Measures a stage's speed from its start; the work of earlier runs does not count."""

    def __init__(self, stage: Stage, report: OnProgress, clock: Callable[[], float] = time.monotonic):
        self._stage, self._report, self._clock = stage, report, clock
        self._start = clock()
        self._skipped_bytes, self._skipped_share = 0, 0.0

    def skip(self, text_bytes: int, share: float) -> None:
        """Count a part that an earlier run did."""
        self._skipped_bytes += text_bytes
        self._skipped_share += share

    def report(self, documents: int, text_bytes: int, share: float | None) -> None:
        """Report the total done, including what was skipped; `share` is None if it is unknown."""
        elapsed = self._clock() - self._start
        speed = eta = None
        if elapsed > 0 and text_bytes > self._skipped_bytes:
            speed = (text_bytes - self._skipped_bytes) / elapsed
        if share is not None and share > self._skipped_share and elapsed > 0:
            eta = (1 - share) * elapsed / (share - self._skipped_share)
        self._report(Progress(self._stage, documents, text_bytes, share, speed, eta))


class ProgressLine:
    """Shows progress: one line that is rewritten on a terminal, else a line every half minute."""

    def __init__(self) -> None:
        self._shown_at, self._stage, self._open = float("-inf"), "", False

    def __call__(self, progress: Progress) -> None:
        now, terminal = time.monotonic(), sys.stdout.isatty()
        if progress.stage == self._stage and now - self._shown_at < (0.2 if terminal else 30) and progress.share != 1:
            return
        self._shown_at, self._stage, self._open = now, progress.stage, terminal
        print(f"\r\x1b[Kprepare: {progress}" if terminal else f"prepare: {progress}", end="", flush=True)
        if not terminal:
            print(flush=True)

    def end(self) -> None:
        """End the line."""
        if self._open:
            print(flush=True)
        self._open = False


@contextmanager
def locked(path: Path, on_progress: OnProgress) -> Iterator[bool]:
    """Hold an exclusive lock on a file; the system releases it when the process ends for any reason.

    Yields whether it is held: not on a file system without locks.
    """
    is_held = True
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_progress(Progress("waiting"))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            is_held = False  # two builders would write the same bytes and rename them into place
        yield is_held
