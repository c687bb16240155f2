"""Profile a few steps of a run (`logging.profile`): a trace per rank, a summary, and on GPUs a memory snapshot.

Each attempt profiles once: from `at` on, or, if it resumes later than that, from its second step. Nothing here is
collective, and what fails costs a line: the steps compute the same either way. The profiled steps are slower.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from turbolm.data.batch.loader import GlobalBatch
from turbolm.files import write_json
from turbolm.reliability import heartbeat
from turbolm.train.session import Session
from turbolm.train.trace import WAIT, read_trace, summarize

_MEMORY_EVENTS = 100_000  # allocations and frees kept: some tens of MB with their Python stacks


def profiled(session: Session, batches: Iterator[GlobalBatch]) -> Iterator[GlobalBatch]:
    """Yield `batches`, and profile what happens between some of them as the recipe says."""
    settings = session.plan.recipe.logging.profile
    if settings is None:
        yield from batches
        return
    profile = _Profile(session, settings.steps)
    try:
        for batch in batches:  # a step begins before its batch is read, so the end of one begins the next
            yield batch
            profile.after_step()
    finally:
        profile.close()


class _Profile:
    """The profiler of one attempt. Its steps: one to warm up, `num_steps` traced, on a GPU one for the memory."""

    def __init__(self, session: Session, num_steps: int):
        plan, settings = session.plan, session.plan.recipe.logging.profile
        assert settings is not None
        tokens = settings.at.tokens(plan.recipe.train.budget, plan.recipe.train.global_batch)
        self._session, self._num_steps = session, num_steps
        self._first = max(plan.curriculum.steps_for(round(tokens)), session.step + 1)
        self._folder = session.context.run.attempt(session.context.attempt) / "profile"
        self._profiler: Any = None
        self._cleanup = contextlib.ExitStack()
        self._next: Callable[[], None] | None = self._start  # what is due once `_due` steps are done
        self._due = self._first - 1
        last = self._first + num_steps
        if last > plan.num_steps:
            self._say(f"does not run: it would end with step {last}, and the run has {plan.num_steps}")
            self._next = None
        elif session.step >= self._due:
            self.after_step()

    def after_step(self) -> None:
        """Start, go on or end, as is due; a failure ends it with a line."""
        if self._next is None or self._session.step < self._due:
            return
        try:
            self._next()
        except Exception as error:  # it must not end the run
            self._next = None
            self._say(f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}; training continues")
            self._release()
        heartbeat.advance()
        self._session.log.reset_clock()

    def close(self) -> None:
        """Give up what has not ended."""
        if self._next is not None and self._profiler is not None:
            self._say("has not ended: the run stopped before")
        self._next = None
        self._release()

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._session.engine.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        schedule = torch.profiler.schedule(wait=0, warmup=1, active=self._num_steps, repeat=1)
        self._profiler = torch.profiler.profile(activities=activities, schedule=schedule)
        self._profiler.start()
        self._cleanup.callback(self._profiler.stop)
        self._cleanup.enter_context(_recorded_waits())
        self._num_left = self._num_steps + 1
        self._next, self._due = self._step, 0

    def _step(self) -> None:
        self._profiler.step()
        self._num_left -= 1
        if self._num_left:
            return
        self._cleanup.close()
        self._folder.mkdir(exist_ok=True)
        trace = self._file("trace.json.gz")
        self._profiler.export_chrome_trace(str(trace))
        self._next = None
        last = self._session.step
        summary = summarize(read_trace(trace))
        write_json(self._file("summary.json"), asdict(summary))
        self._say(f"{summary}{self._beside(last)}; {trace}")
        if self._session.engine.device.type == "cuda":
            _record_memory()
            self._cleanup.callback(_stop_recording_memory)
            self._next = self._end_memory

    def _end_memory(self) -> None:
        self._next = None
        snapshot = self._file("memory.pickle")
        torch.cuda.memory._dump_snapshot(str(snapshot))
        self._release()
        self._say(f"memory of one step: {snapshot}, for https://pytorch.org/memory_viz")

    def _beside(self, last: int) -> str:
        """Return what else the profiled steps did than train."""
        plan = self._session.plan
        every = {"an evaluation": plan.evaluate_every_steps, "a checkpoint": plan.checkpoint_every_steps}
        steps = range(last - self._num_steps + 1, last + 1)
        found = [what for what, interval in every.items() if any(step % interval == 0 for step in steps)]
        return f", with {' and '.join(found)}" if found else ""

    def _file(self, name: str) -> Path:
        return self._folder / f"rank{dist.get_rank()}.{name}"

    def _release(self) -> None:
        with contextlib.suppress(Exception):
            self._cleanup.close()

    def _say(self, text: str) -> None:
        """Say it on the terminal for rank 0, else in the rank's log."""
        if dist.get_rank() == 0:
            self._session.log.say(f"profile: {text}")
        else:
            print(f"profile: {text}", flush=True)


@contextlib.contextmanager
def _recorded_waits() -> Iterator[None]:
    """Record the host's waits for collectives. torch itself does not: they would count as the host's own work."""
    wait = dist.Work.wait

    def recorded(work: dist.Work, *arguments: Any, **keywords: Any) -> bool:
        with torch.profiler.record_function(WAIT):
            return wait(work, *arguments, **keywords)

    dist.Work.wait = recorded
    try:
        yield
    finally:
        dist.Work.wait = wait


def _record_memory() -> None:
    """Record allocations from now on, with Python stacks: a private function of torch, which a test calls as here."""
    torch.cuda.memory._record_memory_history("all", stacks="python", max_entries=_MEMORY_EVENTS)


def _stop_recording_memory() -> None:
    torch.cuda.memory._record_memory_history(None)
