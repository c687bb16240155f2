"""Rank 0's side of `checkpoint.mirror`: one process at a time copies the newest checkpoint beside the training.

A copy that fails is a line, and the next checkpoint tries again: training never waits for the mirror, nor stops for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from turbolm.checkpoint.mirror_upload import UploadJob, command
from turbolm.reliability import heartbeat
from turbolm.storage import one_line
from turbolm.units import format_bytes, format_duration

_POLL_SEC = 1.0
_QUIET_SEC = 3.0  # of a wait that nobody needs to be told of


class Mirroring:
    """Copies the checkpoints of a run as they are committed. `say` takes a line; it is called from a thread."""

    def __init__(self, job: UploadJob, say: Callable[[str], None]):
        """`job`: of the run; its step and parent are set for each copy."""
        self._job, self._say = job, say
        self._lock = threading.Lock()
        self._wanted: int | None = None  # the step to copy next: of several that wait, the newest
        self._back_at: int | None = None  # the step that the run went back to since the last copy that succeeded
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None
        self._is_ended = False

    def request(self, step: int, *, went_back: bool = False) -> None:
        """Copy the checkpoint of a step, after the one that is being copied. Returns at once.

        `went_back`: the run gave up its later checkpoints, whose copies are removed.
        """
        with self._lock:
            self._wanted = step
            if went_back:
                self._back_at = step if self._back_at is None else min(step, self._back_at)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="turbolm-mirror", daemon=True)
                self._thread.start()

    def finish(self, timeout_sec: float, meanwhile: Callable[[], object] = heartbeat.advance) -> None:
        """Wait until nothing is being copied, or end the copy after the time limit with a line.

        `meanwhile` is called about once a second.
        """
        start, is_told = time.monotonic(), False
        deadline = start + timeout_sec
        while (thread := self._thread) is not None and thread.is_alive() and time.monotonic() < deadline:
            thread.join(min(_POLL_SEC, max(0.0, deadline - time.monotonic())))
            meanwhile()
            if not is_told and self._thread is not None and time.monotonic() > start + _QUIET_SEC:
                is_told = True
                self._say(f"checkpoint.mirror: waiting up to {format_duration(timeout_sec)} for the last copy")
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                return
            self._is_ended, process = True, self._process
        if process is not None:
            process.kill()
        self._say(
            f"checkpoint.mirror: the last checkpoint was not copied within {format_duration(timeout_sec)} "
            "(checkpoint.mirror_wait); a later start of this run goes on with it"
        )

    def _work(self) -> None:
        while True:
            with self._lock:
                step, self._wanted = self._wanted, None
                if step is None or self._is_ended:
                    self._thread = None
                    return
                back_at, self._back_at = self._back_at, None
            with contextlib.suppress(OSError):  # a terminal that is gone, or a log on a full disk
                self._copy(step, back_at)

    def _copy(self, step: int, back_at: int | None) -> None:
        start, job = time.monotonic(), replace(self._job, step=step, parent=os.getpid(), back_at=back_at)
        told = self._run(job)
        if self._is_ended:
            return
        if "failed" in told:
            with self._lock:
                self._back_at = min((at for at in (back_at, self._back_at) if at is not None), default=None)
            self._say(
                f"checkpoint.mirror: the checkpoint of step {step} was not copied: {told['failed']}. Training goes on, "
                "and the next checkpoint tries again"
            )
            return
        self._job = replace(self._job, id=told["id"], writer=told["writer"])
        seconds, size = time.monotonic() - start, format_bytes(told["bytes"])
        print(f"mirrored {told['url']}: {size} in {seconds:.1f} s", flush=True)

    def _run(self, job: UploadJob) -> dict[str, Any]:
        """Run a job in a process; returns what it tells."""
        try:
            pipe = subprocess.PIPE
            with subprocess.Popen(
                command(job),
                stdin=subprocess.DEVNULL,
                stdout=pipe,
                stderr=pipe,
                text=True,
                start_new_session=True,  # a signal to stop that the whole process group gets is not meant for it
            ) as process:
                self._process = process
                output, errors = process.communicate()
            lines = output.splitlines()
            told = json.loads(lines[-1]) if lines else None
        except (OSError, ValueError) as error:
            return {"failed": one_line(error)}
        if isinstance(told, dict):
            return told
        last = errors.strip().splitlines()[-1:] or [f"its process ended with code {process.returncode}"]
        return {"failed": one_line(RuntimeError(last[0]))}
