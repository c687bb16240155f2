"""Measure a finished run: its loss over tokens, steps and training time, and what it cost."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal

from turbolm.errors import UserError
from turbolm.files import load_json
from turbolm.report.metrics import Line, is_number, read_metrics

Clock = Literal["wall", "cpu"]  # wall-clock time, or the processor time of rank 0's process
TIMING = "timing.json"  # in a run directory: what each start of the run took, measured from outside


@dataclass(frozen=True)
class Evaluation:
    """An evaluation and what training had used by then. `sec` counts training steps only, by the chosen clock."""

    tokens: float
    steps: float
    sec: float
    loss: float


@dataclass(frozen=True)
class RunMeasures:
    """One finished run.

    `training_sec` is the time of its steps by the chosen clock, `compile_sec` the wall-clock time they compiled.
    `whole_sec` is the wall-clock time of the whole command with startup, evaluation, checkpoints and export, and
    `cpu_sec` the processor time of all its processes. `neighbors` is the number of runs beside it, averaged over
    `whole_sec`. `tokens_per_sec` excludes steps that compiled something. `mfu` is weighted by time. `peak_bytes` is the
    peak memory of one process. The tokens and time of the candidates that random restarts dropped count as if they came
    first; steps are those of the run.
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
    neighbors: float
    evaluations: tuple[Evaluation, ...]

    def to_target(self, target_loss: float) -> Evaluation | None:
        """Tokens, steps and time at which the loss was first at or below the target, or None.

        Interpolates linearly between two evaluations. Where the first evaluation is at or below the target, that
        evaluation is returned, and the target was met there or earlier.
        """
        before = None
        for after in self.evaluations:
            if after.loss <= target_loss:
                if before is None or not math.isfinite(before.loss):
                    return after
                share = (before.loss - target_loss) / (before.loss - after.loss)
                pairs = zip(astuple(before), astuple(after), strict=True)
                return Evaluation(*(old + share * (new - old) for old, new in pairs))
            before = after
        return None


def measure_run(path: Path, *, seed: int, lr: float, clock: Clock = "wall") -> RunMeasures:
    """Measure the run directory of a finished run. Raises UserError when it has no times by this clock."""
    metrics = read_metrics(path / "metrics.jsonl")
    metrics = [line for line in metrics if "train/loss" not in line or _is_timed(line)]
    steps = [line for line in metrics if "train/loss" in line]
    files = sorted((path / "restarts").glob("*.jsonl"))
    dropped = [line for file in files for line in read_metrics(file) if _is_timed(line)]
    dropped_tokens = sum(line["data/batch_tokens"] for line in dropped)
    sec = sum(_step_sec(line, clock, path) for line in dropped)
    evaluations: list[Evaluation] = []
    for line in metrics:
        if "train/loss" in line:
            sec += _step_sec(line, clock, path)
        elif "eval/loss" in line:
            loss = line["eval/loss"]
            loss = float(loss) if is_number(loss) else math.inf  # logged as text where it is not finite
            evaluations.append(Evaluation(line["tokens_seen"] + dropped_tokens, line["step"], sec, loss))
    if not steps or not evaluations:
        raise UserError(f"{path / 'metrics.jsonl'} holds no {'evaluation' if steps else 'step'} that can be read")
    timed = [line for line in steps if not line.get("perf/compile_sec")] or steps
    mfu = [(line["perf/mfu"], _step_sec(line, "wall", path)) for line in steps if is_number(line.get("perf/mfu"))]
    peaks = [line["memory/peak_bytes"] for line in steps if is_number(line.get("memory/peak_bytes"))]
    timing = read_timing(path)
    return RunMeasures(
        seed=seed,
        lr=lr,
        path=str(path),
        final_loss=evaluations[-1].loss,
        tokens=steps[-1]["tokens_seen"] + dropped_tokens,
        steps=steps[-1]["step"],
        training_sec=sec,
        compile_sec=sum(one for line in steps if is_number(one := line.get("perf/compile_sec"))),
        tokens_per_sec=sum(line["data/batch_tokens"] for line in timed)
        / sum(_step_sec(line, clock, path) for line in timed),
        mfu=sum(value * step_sec for value, step_sec in mfu) / sum(step_sec for _, step_sec in mfu) if mfu else None,
        peak_bytes=max(peaks, default=None),
        whole_sec=sum(one["whole_sec"] for one in timing) if timing else None,
        cpu_sec=sum(one["cpu_sec"] for one in timing) if timing else None,
        neighbors=_neighbors(timing),
        evaluations=tuple(evaluations),
    )


def loss_at(path: Path, tokens: float, missing: float = math.inf) -> float:
    """The held-out loss of a run at its first evaluation after `tokens`, inf where it is not finite; `missing` where
    the run has not come that far.
    """
    for line in read_metrics(path / "metrics.jsonl"):
        if "eval/loss" in line and line["tokens_seen"] >= tokens:
            loss = line["eval/loss"]
            return float(loss) if is_number(loss) else math.inf
    return missing


def read_timing(path: Path) -> list[dict[str, float]]:
    """What each start of a run took, oldest first."""
    try:
        found = load_json(path / TIMING)
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def _neighbors(timing: list[dict[str, float]]) -> float:
    whole_sec = sum(one["whole_sec"] for one in timing)
    return sum(one.get("neighbors", 0.0) * one["whole_sec"] for one in timing) / whole_sec if whole_sec else 0.0


def _is_timed(line: Line) -> bool:
    """Whether a step's line has what its time follows from; a damaged one does not."""
    sizes = (line.get("data/batch_tokens"), line.get("perf/tokens_per_sec"))
    return all(is_number(size) and size > 0 for size in sizes) and is_number(line.get("perf/cpu_sec", 0.0))


def _step_sec(line: Line, clock: Clock, path: Path) -> float:
    if clock == "wall":
        return float(line["data/batch_tokens"] / line["perf/tokens_per_sec"])
    if "perf/cpu_sec" not in line:
        raise UserError(f"{path} was trained before processor time was recorded; use --clock wall")
    return float(line["perf/cpu_sec"])
