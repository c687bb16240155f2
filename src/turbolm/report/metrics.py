"""Read metrics.jsonl: one line per step or evaluation, appended by one attempt after another. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

Line = dict[str, Any]


def read_metrics(path: Path) -> list[Line]:
    """The lines of the run's history, by step; a step's training line comes before its evaluation.

    An attempt that resumes from a checkpoint repeats the steps since then, so the last attempt wins: from its first
    step on, the lines of earlier attempts are dropped. So are those of steps that a rollback took back. Anomalies are
    events, not part of this history.
    """
    lines = read_lines(path)
    first_steps: dict[int, int] = {}
    for line in lines:
        if "train/loss" in line:
            first = first_steps.setdefault(line["attempt"], line["step"])
            first_steps[line["attempt"]] = min(first, line["step"])
    kept: dict[tuple[int, bool], Line] = {}
    for line in lines:
        redone = any(attempt > line["attempt"] and step <= line["step"] for attempt, step in first_steps.items())
        if "anomaly" in line:
            back_to = line.get("anomaly/to_step")
            kept = {key: one for key, one in kept.items() if not isinstance(back_to, int) or key[0] <= back_to}
        elif not redone:
            kept[line["step"], "train/loss" not in line] = line
    return [kept[key] for key in sorted(kept)]


def read_lines(path: Path) -> list[Line]:
    """Every readable line in file order, each with its `step` and `attempt`.

    A process killed while writing leaves a torn line, which is skipped. The next attempt may have appended to the same
    line; what it wrote is read.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines: list[Line] = []
    attempt = 1
    for raw in text.splitlines():
        line = _parse(raw) or _parse(raw[max(0, raw.rfind('{"step"')) :])
        if isinstance(line, dict) and _is_whole(line):
            attempt = line.get("attempt", attempt)
            lines.append({**line, "attempt": attempt})
    return lines


def _is_whole(line: Line) -> bool:
    """Whether everything that readers rely on is there; a damaged line may still be JSON."""
    is_measured = "train/loss" in line or "eval/loss" in line
    counts = (line.get("step"), line.get("attempt", 1), line.get("tokens_seen") if is_measured else 0)
    return all(type(count) is int and 0 <= count < 2**63 for count in counts)


def _parse(raw: str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def values(metrics: Sequence[Line], key: str, x: str = "tokens_seen") -> list[tuple[float, float]]:
    """(x, value) of every line that has both as finite numbers. `x` is a key, such as tokens_seen or step."""
    pairs = ((line.get(x), line.get(key)) for line in metrics)
    return [(float(at), float(value)) for at, value in pairs if is_number(at) and is_number(value)]


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether the value is a finite number, so that it can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
