"""What trains the runs of an ablation: one after another in this process, or side by side (`launch.side_by_side`)."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from turbolm.errors import EXIT_REQUEUE, EXIT_SIGNAL
from turbolm.recipe.schema import Recipe


@dataclass(frozen=True)
class Task:
    """One start of a run. `file` holds its recipe but for `execution.stop_after`, which is for this start alone."""

    recipe: Recipe
    file: Path

    @property
    def overrides(self) -> tuple[str, ...]:
        """What this start lays over the file."""
        after = self.recipe.execution.stop_after
        return () if after is None else (f"execution.stop_after={after}",)


@dataclass(frozen=True)
class Done:
    """How a start ended, in wall-clock seconds and in processor seconds of all its processes.

    `neighbors` is the number of runs beside it on this machine, averaged over its time.
    """

    task: Task
    exit_code: int
    whole_sec: float
    cpu_sec: float
    neighbors: float = 0.0


# Trains the tasks in their order and yields each as it ends. It takes the next task when it can start it, and none
# after one that was interrupted.
Runner = Callable[[Iterator[Task]], Iterator[Done]]


def one_by_one(train: Callable[[Task], int]) -> Runner:
    """A runner that calls `train`, which returns the run's exit code, for one task after another."""

    def run(tasks: Iterator[Task]) -> Iterator[Done]:
        for task in tasks:
            started, cpu_started = time.monotonic(), _children_cpu_sec()
            code = train(task)
            yield Done(task, code, time.monotonic() - started, _children_cpu_sec() - cpu_started)
            if is_interruption(code):
                return

    return run


def is_interruption(code: int) -> bool:
    """Whether a run ended because someone or something stopped it: the ablation stops too."""
    return code == EXIT_REQUEUE or code > EXIT_SIGNAL


def _children_cpu_sec() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
