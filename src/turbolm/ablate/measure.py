"""What one run of an arm shows: its loss by tokens, steps and training time, and what it took."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from turbolm.errors import UserError
from turbolm.report.metrics import Line, is_number, read_metrics

Clock = Literal["wall", "cpu"]  # of the world, or the processor time of rank 0's process
TIMING = "timing.json"  # in a run directory: what each start of an ablation's run took, as seen from outside


@dataclass(frozen=True)
class Evaluation:
    """An evaluation, and what training had used until then. `sec` is the time of the steps alone, by the clock asked
    for."""

    tokens: float
    steps: float
    sec: float
    loss: float


@dataclass(frozen=True)
class RunMeasures:
    """One finished run.

    `training_sec` is the time of its steps by the clock asked for, `compile_sec` that of compiling in them on the wall.
    `whole_sec` is the wall-clock time of the whole command with start, evaluation, checkpoints and export, and
    `cpu_sec` the processor time of all its processes. `tokens_per_sec` leaves steps out that compiled something. `mfu`
    is weighted by time. `peak_bytes` is the most that one process held. Tokens and time of random restarts' other
    candidates count as if they came first; steps are those of the run.
    """

    seed: int
    lr: float
    path: str
    final_loss: float
    tokens: int
    steps: int
    training_sec: float
    compile_sec: float
    tokens_per_sec: float
    mfu: float | None
    peak_bytes: int | None
    whole_sec: float | None
    cpu_sec: float | None
    evaluations: tuple[Evaluation, ...]

    def to_target(self, target_loss: float) -> Evaluation | None:
        """Tokens, steps and time at which the loss was first at or below the target, or None.

        Between two evaluations the loss is taken to fall linearly. A first evaluation below the target is taken as it
        is: it was reached there or sooner.
        """
        before = None
        for after in self.evaluations:
            if after.loss <= target_loss:
                if before is None or not math.isfinite(before.loss):
                    return after
                share = (before.loss - target_loss) / (before.loss - after.loss)
                tokens, steps, sec = (
                    old + share * (new - old)
                    for old, new in (
                        (before.tokens, after.tokens),
                        (before.steps, after.steps),
                        (before.sec, after.sec),
                    )
                )
                return Evaluation(tokens, steps, sec, target_loss)
            before = after
        return None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def measure_run(path: Path, *, seed: int, lr: float, clock: Clock = "wall") -> RunMeasures:
    """Read the run directory of a finished run. Raises UserError when it does not tell the time by this clock."""
    metrics = read_metrics(path / "metrics.jsonl")
    steps = [line for line in metrics if "train/loss" in line]
    lost = [line for file in sorted((path / "restarts").glob("*.jsonl")) for line in read_metrics(file)]
    lost_tokens = sum(line["data/batch_tokens"] for line in lost)
    sec = sum(_step_sec(line, clock, path) for line in lost)
    evaluations, weighted_mfu, timed_mfu = [], 0.0, 0.0
    for line in metrics:
        if "train/loss" in line:
            sec += _step_sec(line, clock, path)
            if is_number(line.get("perf/mfu")):
                weighted_mfu += line["perf/mfu"] * _step_sec(line, "wall", path)
                timed_mfu += _step_sec(line, "wall", path)
        elif "eval/loss" in line:
            loss = line["eval/loss"]
            loss = float(loss) if is_number(loss) else math.inf  # written as text where it is not finite
            evaluations.append(Evaluation(line["tokens_seen"] + lost_tokens, line["step"], sec, loss))
    compile_sec = sum(line.get("perf/compile_sec", 0.0) for line in steps)
    timed = [line for line in steps if not line.get("perf/compile_sec")] or steps
    tokens_per_sec = sum(line["data/batch_tokens"] for line in timed) / sum(_step_sec(o, clock, path) for o in timed)
    peaks = [line["memory/peak_bytes"] for line in steps if is_number(line.get("memory/peak_bytes"))]
    timing = read_timing(path)
    return RunMeasures(
        seed=seed,
        lr=lr,
        path=str(path),
        final_loss=evaluations[-1].loss,
        tokens=steps[-1]["tokens_seen"] + lost_tokens,
        steps=steps[-1]["step"],
        training_sec=sec,
        compile_sec=compile_sec,
        tokens_per_sec=tokens_per_sec,
        mfu=weighted_mfu / timed_mfu if timed_mfu else None,
        peak_bytes=max(peaks, default=None),
        whole_sec=sum(one["whole_sec"] for one in timing) if timing else None,
        cpu_sec=sum(one["cpu_sec"] for one in timing) if timing else None,
        evaluations=tuple(evaluations),
    )


def read_timing(path: Path) -> list[dict[str, float]]:
    """What the starts of a run took, oldest first."""
    try:
        found = json.loads((path / TIMING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def _step_sec(line: Line, clock: Clock, path: Path) -> float:
    if clock == "wall":
        return float(line["data/batch_tokens"] / line["perf/tokens_per_sec"])
    if "perf/cpu_sec" not in line:
        raise UserError(f"{path} was trained before processor time was recorded; use --clock wall")
    return float(line["perf/cpu_sec"])
