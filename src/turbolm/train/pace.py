"""Measure each rank's own work, without its waits for other ranks.

Own work is the forward passes of a step, and how late a rank arrives at the agreement of all ranks at the start of the
next step: reading data and other host work. The backward pass is excluded: in it, ranks wait for each other's
gradients. So are, at ZeRO-3, the forward passes on a GPU, where each layer waits for the weights that others hold; on a
CPU there, the processor time of the forward passes is taken, which does not grow by waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from turbolm.engine.engine import Engine
from turbolm.reliability.stragglers import StragglerWatch, find_slowest

_MIN_STEPS = 10  # per report, so that noise evens out


class ForwardTime:
    """Measures the forward passes of one step: `with forward_time: ...` for each. `seconds` waits for the device."""

    def __init__(self, engine: Engine):
        is_sharded = engine.zero_stage == 3
        self._on_gpu = engine.device.type == "cuda"
        self._is_unknown = self._on_gpu and is_sharded
        self._clock: Callable[[], float] = time.thread_time if is_sharded else time.perf_counter
        self._pairs: list[list[Any]] = []

    def __enter__(self) -> None:
        self._pairs.append([self._now()])

    def __exit__(self, *_: object) -> None:
        self._pairs[-1].append(self._now())

    def seconds(self) -> float:
        """Return their sum; 0 if they cannot be separated from waiting."""
        if self._is_unknown:
            return 0.0
        return sum(start.elapsed_time(end) / 1e3 if self._on_gpu else end - start for start, end in self._pairs)

    def _now(self) -> Any:
        if not self._on_gpu:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Pace:
    """Collect this rank's own times, and compare all ranks whenever a sum over ranks is computed anyway."""

    def __init__(self, hosts: Sequence[str]):
        self._world_size = len(hosts)
        self._watch = StragglerWatch(hosts)
        self._forwards: list[ForwardTime] = []
        self._waited_sec = self._stretch_sec = 0.0
        self._is_first = True

    def add_wait(self, seconds: float) -> None:
        """Record how long this rank waited for the others to reach the agreement."""
        self._waited_sec += seconds

    def add_step(self, forward: ForwardTime, step_sec: float) -> None:
        """Record a finished step. A single rank has nothing to compare with and records nothing."""
        if self._world_size > 1:
            self._forwards.append(forward)
            self._stretch_sec += step_sec

    def take(self) -> torch.Tensor:
        """Return this rank's times in its slot, to be summed over all ranks; empty if it is too early for a report.

        (2 * world_size,): seconds of the forward passes by rank, then seconds waited.
        """
        if len(self._forwards) < _MIN_STEPS:
            return torch.zeros(0, dtype=torch.float64)
        times = torch.zeros(2, self._world_size, dtype=torch.float64)
        times[0, dist.get_rank()] = sum(forward.seconds() for forward in self._forwards)
        times[1, dist.get_rank()] = self._waited_sec
        return times.view(-1)

    def report(self, times: torch.Tensor) -> tuple[dict[str, float], str | None]:
        """Return metrics and log line from all ranks' times, the sum of what `take` returned; then reset.

        The first steps are excluded: they load kernels and compile.
        """
        stretch_sec, is_first = self._stretch_sec, self._is_first
        if len(times) == 0:
            return {}, None
        self._forwards.clear()
        self._waited_sec = self._stretch_sec = 0.0
        self._is_first = False
        if is_first:
            return {}, None
        forward, waited = times.view(2, -1)
        slowest = find_slowest((forward + waited.max() - waited).tolist(), stretch_sec)
        values = {"perf/slowest_rank": slowest.rank, "perf/slowest_factor": slowest.factor}
        return {**values, "perf/slowest_cost": slowest.cost}, self._watch.observe(slowest)
