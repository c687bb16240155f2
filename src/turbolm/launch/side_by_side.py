"""Train several runs of an ablation side by side on this machine, each in its own share of it. Torch-free.

Each run is a `turbolm train` of its own process, bound to its share of the cores and seeing its share of the GPUs, so
that it detects the machine as its share. Its lines are passed on with the run's name in front.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from signal import SIGTERM

from turbolm.ablate.runner import Done, Task, is_interruption
from turbolm.environment import drop_foreign
from turbolm.errors import EXIT_REQUEUE, EXIT_SIGNAL
from turbolm.launch.network import PORTS_PART
from turbolm.launch.store import prepare_store
from turbolm.launch.train import refuse_several_nodes
from turbolm.plan.shares import Share
from turbolm.reliability.orphans import end_with_parent
from turbolm.reliability.stop import SignalRequests
from turbolm.train.run_contract import settle_commits

_POLL_SEC = 0.2
_CHUNK_BYTES = 2**16


@dataclass
class _Job:
    task: Task
    share: int
    process: subprocess.Popen[bytes]
    started_sec: float
    neighbor_sec: float = 0.0
    line: bytes = b""  # the beginning of one


@dataclass
class SideBySide:
    """A runner (`ablate.runner.Runner`) that trains as many tasks at a time as there are shares of the machine.

    The first stop signal asks every run to save and stop, the next one ends them at once; an interrupted run stops the
    others too. `say` gets the lines of the runs. `prepare` is called once, before the first of them.
    """

    shares: Sequence[Share]
    say: Callable[[str], None]
    command: Callable[[Task], Sequence[str]]
    prepare: Callable[[Task], None]
    _running: dict[int, _Job] = field(default_factory=dict)  # by process
    _counted_sec: float = 0.0  # until when the neighbors are counted
    _stopping: bool = False
    _prepared: bool = False

    def __call__(self, tasks: Iterator[Task]) -> Iterator[Done]:
        """Train the tasks. No child outlives the iteration."""
        with SignalRequests(self._ask, self._ask), selectors.DefaultSelector() as outputs:
            try:
                while True:
                    self._fill(tasks, outputs)
                    if not self._running:
                        return
                    yield from self._wait(outputs)
            finally:
                if self._running:  # the consumer raised
                    self._ask()
                while self._running:
                    list(self._wait(outputs))

    def _ask(self, _: int = 0) -> None:
        """TERM and not INT: Python makes a traceback of an INT that comes before `train` listens."""
        self._stopping = True
        for pid in self._running:
            with suppress(ProcessLookupError):
                os.kill(pid, SIGTERM)

    def _ask_late(self, job: _Job) -> None:
        """Ask a run that was starting when the others were asked."""
        if self._stopping:
            os.kill(job.process.pid, SIGTERM)

    def _fill(self, tasks: Iterator[Task], outputs: selectors.BaseSelector) -> None:
        for share in range(len(self.shares)):
            if self._stopping or share in {job.share for job in self._running.values()}:
                continue
            task = next(tasks, None)
            if task is None:
                return
            if not self._prepared:
                self.prepare(task)
                self._prepared = True
            self._count_neighbors()
            job = self._start(task, share)
            self._running[job.process.pid] = job
            self._ask_late(job)
            assert job.process.stdout is not None
            os.set_blocking(job.process.stdout.fileno(), False)
            outputs.register(job.process.stdout, selectors.EVENT_READ, job)

    def _start(self, task: Task, number: int) -> _Job:
        share, parent = self.shares[number], os.getpid()
        environment = {**os.environ, PORTS_PART: f"{number}/{len(self.shares)}"}
        if share.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(share.gpus)

        def before_exec() -> None:
            end_with_parent(parent)
            with suppress(OSError):  # some sandboxes forbid it: slower, but right
                os.sched_setaffinity(0, share.cpus)

        process = subprocess.Popen(
            self.command(task),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which asks the runs to stop
            preexec_fn=before_exec,  # this process has no threads, for which that would be unsafe
        )
        return _Job(task, number, process, time.monotonic())

    def _wait(self, outputs: selectors.BaseSelector) -> Iterator[Done]:
        """Pass on lines for a moment; yields what has ended."""
        for key, _ in outputs.select(_POLL_SEC):
            if not self._pass_on(key.data):
                outputs.unregister(key.fileobj)
        if not outputs.get_map():  # a run that has closed its output is about to end
            time.sleep(_POLL_SEC)
        self._count_neighbors()
        for pid, job in list(self._running.items()):
            ended, status, used = os.wait4(pid, os.WNOHANG)
            if not ended:
                continue
            del self._running[pid]
            code = os.waitstatus_to_exitcode(status)
            job.process.returncode = code  # subprocess must not wait for it again
            assert job.process.stdout is not None
            if job.process.stdout.fileno() in outputs.get_map():
                self._pass_on(job, to_end=True)
                outputs.unregister(job.process.stdout)
            job.process.stdout.close()
            whole_sec = time.monotonic() - job.started_sec
            if self._stopping and code == -SIGTERM:  # it did not listen yet, and had trained nothing
                code = EXIT_REQUEUE
            code = EXIT_SIGNAL - code if code < 0 else code
            if is_interruption(code) and not self._stopping:
                self._ask()
            neighbors = job.neighbor_sec / whole_sec if whole_sec else 0.0
            yield Done(job.task, code, whole_sec, used.ru_utime + used.ru_stime, neighbors)

    def _count_neighbors(self) -> None:
        now = time.monotonic()
        for job in self._running.values():
            job.neighbor_sec += (len(self._running) - 1) * (now - self._counted_sec)
        self._counted_sec = now

    def _pass_on(self, job: _Job, *, to_end: bool = False) -> bool:
        """Say the complete lines that a run has written, at its end the rest; False once it has closed its output."""
        assert job.process.stdout is not None
        chunk = b"-"
        with suppress(BlockingIOError):
            while chunk := os.read(job.process.stdout.fileno(), _CHUNK_BYTES):
                *lines, job.line = (job.line + chunk).split(b"\n")
                for line in lines:
                    self._say_line(job, line)
        if (to_end or not chunk) and job.line:
            self._say_line(job, job.line)
            job.line = b""
        return bool(chunk)

    def _say_line(self, job: _Job, line: bytes) -> None:
        self.say(f"{job.task.recipe.name}  {line.decode('utf-8', errors='replace')}")


def train_command(task: Task) -> list[str]:
    """The command that trains a task."""
    return [sys.executable, "-m", "turbolm.cli", "train", str(task.file), *task.overrides]


def prepare_for_all(task: Task) -> None:
    """Prepare what the runs of an ablation have in common, the token store, with all the cores. Raises UserError.

    Each run plans the order of its batches itself; the runs that share one wait for the first.
    """
    drop_foreign()
    refuse_several_nodes(task.recipe, str(task.file), ())
    prepare_store(settle_commits(task.recipe))
