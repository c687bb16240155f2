"""Save while training continues: an update waits only until the state before it is copied to host memory.

One thread of each rank copies the state while the next step computes its gradients, and then writes it. Only the
optimizer's step changes weights and optimizer state, and it waits for an unfinished copy; CheckFreq (Mohan et al., FAST
2021) calls this a pipelined snapshot. The ranks' threads agree by tagged messages, which never mix with the training's
collective operations.
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

from turbolm.checkpoint.agreement import gather_by_messages
from turbolm.checkpoint.retention import Retention
from turbolm.checkpoint.save import write_checkpoint
from turbolm.checkpoint.snapshot import HostCopy, Snapshot, take_snapshot
from turbolm.engine.device import use_device
from turbolm.engine.engine import Engine
from turbolm.errors import RunError
from turbolm.reliability import heartbeat
from turbolm.units import format_bytes


@dataclass
class CheckpointSaver:
    """Save the checkpoints of one run. Every method is called by all ranks, at the same step.

    `report` takes a line for the terminal and the log. A failed save is reported, does not change earlier checkpoints,
    and is returned by `failure` until a later one succeeds. `before_commit` may raise on rank 0 to prevent a
    checkpoint; `on_commit` gets the step of each one that is in place there.
    """

    folder: Path
    engine: Engine
    retention: Retention
    contract_fingerprint: str
    asynchronous: bool
    group: dist.ProcessGroup | None  # a gloo group, which the main thread may use meanwhile
    report: Callable[[str], None]
    before_commit: Callable[[], None] = lambda: None
    on_commit: Callable[[int], None] = lambda step: None
    failure: str | None = None
    waited_sec: float = 0.0  # what the last save cost the training, including the wait of the next update

    def __post_init__(self) -> None:
        self._copy = HostCopy()
        self._copied = threading.Event()
        self._copied.set()
        self._thread: threading.Thread | None = None
        self._is_prepared = False
        self.engine.before_changes(lambda: self.wait_for_copy())

    def prepare(self) -> None:
        """After a step, when the optimizer has its state: prepare the memory for copies in the background, once.

        Raises RunError for a state that no checkpoint can hold, rather than at the first save.
        """
        if self._is_prepared:
            return
        self._is_prepared = True
        try:
            sizes = take_snapshot(self.engine, 0, {}).sizes
        except RuntimeError as error:
            raise RunError(str(error)) from error
        if self.asynchronous and self._thread is None:
            self._thread = threading.Thread(target=self._reserve, args=(sizes,), daemon=True)
            self._thread.start()

    def save(self, step: int, trainer_state: Mapping[str, Any], eval_loss: float | None = None) -> None:
        """Save the state as it is now, which only an optimizer's step may change. Waits for the save before.

        Never raises.
        """
        start = time.perf_counter()
        self.wait()
        about = {"contract": self.contract_fingerprint, "eval_loss": eval_loss}
        snapshot, failure = None, None
        try:
            snapshot = take_snapshot(self.engine, step, trainer_state)
            self._copy.follow()
        except Exception as error:  # reported to the other ranks, which would wait for this one
            failure = _described(error)
        self._copied.clear()
        self._thread = threading.Thread(
            target=self._copy_and_write,
            args=(step, snapshot, about, failure),
            name="turbolm-checkpoint",
            daemon=True,
        )
        self._thread.start()
        if not self.asynchronous:
            self.wait()
        self.waited_sec = time.perf_counter() - start

    def wait_for_copy(self) -> None:
        """Wait until the state that is being saved may change; every step of the optimizer starts with this."""
        start = time.perf_counter()
        self._copied.wait()
        self.waited_sec += time.perf_counter() - start

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

    def _reserve(self, sizes: list[int]) -> None:
        use_device(self.engine.device)
        self._copy.reserve(sizes)

    def _copy_and_write(self, step: int, snapshot: Snapshot | None, about: dict[str, Any], failure: str | None) -> None:
        start = time.perf_counter()
        try:
            use_device(self.engine.device)
            if snapshot is not None and self.asynchronous:
                snapshot = self._copy.fill(snapshot)
        except Exception as error:
            failure = _described(error)
        finally:
            self._copied.set()
        try:
            final = write_checkpoint(
                self.folder,
                snapshot,
                about,
                self.retention,
                agree=gather_by_messages(self.group),
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
        if snapshot.rank == 0:
            self.on_commit(step)
        seconds = time.perf_counter() - start
        with contextlib.suppress(OSError):  # the log may be on the full disk that the next save will meet
            print(
                f"saved {final}: {format_bytes(snapshot.num_bytes)} of this rank in {seconds:.2f} s, for which "
                f"training waited {self.waited_sec:.2f} s",
                flush=True,
            )


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
