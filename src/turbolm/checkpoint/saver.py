"""Save beside the training: a step waits only until the state is copied to the host's memory.

One thread of each rank writes while training goes on. The ranks' threads agree over a process group of their own, so
that their messages and the training's never meet.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from turbolm.checkpoint.retention import Retention
from turbolm.checkpoint.save import gather_over, write_checkpoint
from turbolm.checkpoint.snapshot import HostCopy, Snapshot, take_snapshot
from turbolm.errors import RunError
from turbolm.reliability import heartbeat
from turbolm.units import format_bytes


@dataclass
class CheckpointSaver:
    """Saves the checkpoints of one run. Every method is called by all ranks, at the same step.

    `report` takes a line for the terminal and the log. A save that failed is reported, leaves earlier checkpoints as
    they were, and is what `failure` says until a later one succeeds. `before_commit` may raise on rank 0 to keep a
    checkpoint from being put in place.
    """

    folder: Path
    engine: Any
    retention: Retention
    contract_fingerprint: str
    asynchronous: bool
    group: dist.ProcessGroup | None  # used by nothing else
    report: Callable[[str], None]
    before_commit: Callable[[], None] = lambda: None
    failure: str | None = None
    waited_sec: float = 0.0  # what the last save cost the training

    def __post_init__(self) -> None:
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._is_prepared = False

    def prepare(self, *, save_is_next: bool = False) -> None:
        """After a step, when the optimizer has its state: get the memory for copies ready beside the training.

        That is done once, and again where a save follows the next step.
        Raises RunError for a state that no checkpoint can hold, rather than at the first save.
        """
        if self._is_prepared:
            if save_is_next and self.asynchronous and not (self._thread and self._thread.is_alive()):
                self._thread = threading.Thread(target=self._copy.touch, daemon=True)
                self._thread.start()
            return
        self._is_prepared = True
        try:
            num_bytes = take_snapshot(self.engine, 0, {}).num_bytes
        except RuntimeError as error:
            raise RunError(str(error)) from error
        if self.asynchronous and self._thread is None:
            self._thread = threading.Thread(target=self._copy.reserve, args=(num_bytes,), daemon=True)
            self._thread.start()

    def save(self, step: int, trainer_state: Mapping[str, Any], eval_loss: float | None = None) -> None:
        """Save the state as it is now; returns once it may change. Waits for the save before. Never raises."""
        start = time.perf_counter()
        self.wait()
        about = {"contract": self.contract_fingerprint, "eval_loss": eval_loss}
        snapshot, failure = None, None
        try:
            snapshot = take_snapshot(self.engine, step, trainer_state)
            if self.asynchronous:
                snapshot = self._copy.fill(snapshot)
        except Exception as error:  # told to the other ranks, who would wait for this one
            failure = f"{type(error).__name__}: {error}"
        waited_sec = time.perf_counter() - start
        write = threading.Thread(
            target=self._write,
            args=(step, snapshot, about, failure, waited_sec),
            name="turbolm-checkpoint",
            daemon=True,
        )
        write.start()
        self._thread = write
        if not self.asynchronous:
            self.wait()
        self.waited_sec = time.perf_counter() - start

    def wait(self, timeout_sec: float | None = None) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            heartbeat.join(self._thread, timeout_sec)
            if not self._thread.is_alive():
                self._thread = None

    def finish(self) -> None:
        """Wait for the last save. Raises RunError when it failed: then the run's newest state is not on disk."""
        self.wait()
        if self.failure is not None:
            raise RunError(self.failure)

    def _write(
        self, step: int, snapshot: Snapshot | None, about: dict[str, Any], failure: str | None, waited_sec: float
    ) -> None:
        start = time.perf_counter()
        try:
            final = write_checkpoint(
                self.folder,
                snapshot,
                about,
                self.retention,
                agree=gather_over(self.group),
                failure=failure,
                before_commit=self.before_commit,
            )
        except Exception as error:
            self.failure = (
                f"the checkpoint of step {step} was not written: {error}. Earlier checkpoints in {self.folder} "
                "are as they were"
            )
            self.report(self.failure)
            return
        self.failure = None
        assert snapshot is not None
        seconds = time.perf_counter() - start
        with contextlib.suppress(OSError):  # the log may be on the full disk that the next save will meet
            print(
                f"saved {final}: {format_bytes(snapshot.num_bytes)} of this rank in {seconds:.2f} s, for which "
                f"training waited {waited_sec:.2f} s",
                flush=True,
            )
