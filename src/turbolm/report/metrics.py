"""Read metrics.jsonl: one line per step or evaluation, appended by one attempt after another. Torch-free."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard

Line = dict[str, Any]

SEC = "time/sec"  # seconds of training until then, that `add_times` adds to lines
STEP_SEC = "time/step_sec"
AXES = {"tokens": "tokens_seen", "steps": "step", "time": SEC}
_CHUNK_BYTES = 8 * 2**20  # read at once of a file that grows; a longer line is damaged


def read_metrics(path: Path) -> list[Line]:
    """The lines of the run's history (`history`) in the file."""
    return history(read_lines(path))


def history(lines: Sequence[Line]) -> list[Line]:
    """The lines of the run's history, by step; a step's training line comes before its evaluation.

    An attempt that resumes from a checkpoint repeats the steps since then, so the last attempt wins: from its first
    step on, the lines of earlier attempts are dropped. So are those of steps that a rollback took back. Anomalies are
    events, not part of this history.
    """
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
            if isinstance(back_to, int):
                kept = {key: one for key, one in kept.items() if key[0] <= back_to}
        elif not redone:
            kept[line["step"], "train/loss" not in line] = line
    return [kept[key] for key in sorted(kept)]


def read_lines(path: Path) -> list[Line]:
    """Every readable line in file order, each with its `step` and `attempt`.

    A process killed while writing leaves a torn line, which is skipped. The next attempt may have appended to the same
    line; what it wrote is read.
    """
    try:
        with path.open("rb") as file:
            return list(_lines(file, 1))
    except FileNotFoundError:
        return []


def read_new(path: Path, offset: int, attempt: int, limit: int = _CHUNK_BYTES) -> tuple[list[Line], int]:
    """The complete lines from the byte `offset` on, of `limit` bytes at most, and the offset behind them.

    `attempt` is that of the last line before. Raises OSError, but for a file that is not there yet.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(limit)
    except FileNotFoundError:
        return [], offset
    end = content.rfind(b"\n") + 1 or (len(content) if len(content) == limit else 0)
    return list(_lines(content[:end].split(b"\n"), attempt)), offset + end


def _lines(raws: Iterable[bytes], attempt: int) -> Iterator[Line]:
    for raw in raws:
        text = raw.decode(errors="replace")
        line = _parse(text) or _parse(text[max(0, text.rfind('{"step"')) :])
        if isinstance(line, dict) and _is_whole(line):
            attempt = line.get("attempt", attempt)
            # A long run has millions of keys, and json makes each one anew.
            yield {sys.intern(key): value for key, value in line.items()} | {"attempt": attempt}


def _is_whole(line: Line) -> bool:
    """Whether everything that readers rely on is there; a damaged line may still be JSON."""
    is_measured = "train/loss" in line or "eval/loss" in line
    counts = (line.get("step"), line.get("attempt", 1), line.get("tokens_seen") if is_measured else 0)
    return all(type(count) is int and 0 <= count < 2**63 for count in counts)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def add_times(metrics: Sequence[Line], start_sec: float = 0.0) -> float:
    """Add to each line the seconds its step took, and those of training until then; returns the latter of the last.

    Only steps count, each once: neither start-up, evaluations and checkpoints, nor steps that an attempt repeated.
    """
    sec = start_sec
    for line in metrics:
        own = step_seconds(line)
        if own is not None:
            line[STEP_SEC] = own
            sec += own
        line[SEC] = sec
    return sec


def step_seconds(line: Line) -> float | None:
    """The seconds of a step from its line, None where it does not tell."""
    tokens, rate = line.get("data/batch_tokens"), line.get("perf/tokens_per_sec")
    if "train/loss" in line and is_number(tokens) and is_number(rate) and tokens > 0 and rate > 0:
        return tokens / rate
    return None


def values(metrics: Sequence[Line], key: str, x: str = "tokens_seen") -> list[tuple[float, float]]:
    """(x, value) of every line that has both as finite numbers. `x` is a key, such as tokens_seen or step."""
    pairs = ((line.get(x), line.get(key)) for line in metrics)
    return [(float(at), float(value)) for at, value in pairs if is_number(at) and is_number(value)]


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether the value is a finite number, so that it can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
