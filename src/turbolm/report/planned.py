"""Compare what was planned of a run with what happened: memory, time and messages of a step. Torch-free.

The plan is that of the last attempt that trained (`planned` of its plan.json). Its steps of the longest sequences and
the largest batch are measured in metrics.jsonl, and once in its measured.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbolm.files import read_json
from turbolm.report.metrics import Line, is_number, read_lines
from turbolm.report.page import format_value
from turbolm.units import format_step

_FIRST_STEPS = 2  # of an attempt, which load kernels and compile, and are left out where there are more
LABELS = {"step_sec": "step", "tokens_per_sec": "tokens/s", "mfu": "MFU", "peak_bytes": "peak memory"}
LABELS |= {"resident_bytes": "rise of resident memory", "collective_bytes": "collectives"}
_LEAST_RESIDENT = 300e6  # bytes planned; below, libraries and the allocator outweigh the tensors of a model
_MEMORY = {
    "peak_bytes": "peak of a GPU's tensors (torch.cuda.max_memory_allocated)",
    "resident_bytes": "tensors of a process / rise of its resident memory, libraries and file pages included",
}


@dataclass(frozen=True)
class Row:
    """A figure as planned and as measured; None where it is not known."""

    figure: str  # such as peak_bytes
    label: str
    planned: float | None
    measured: float | None

    @property
    def texts(self) -> tuple[str, str, str]:
        """Return planned, measured, and the difference in percent of what was planned."""
        values = (_text(self.figure, value) for value in (self.planned, self.measured))
        return (*values, _difference(self.figure, self.planned, self.measured) or "–")  # type: ignore[return-value]


def compare(run_dir: Path, lines: Sequence[Line] | None = None) -> tuple[list[Row], list[str]]:
    """Return the rows, and what to know about them; nothing for runs of versions that did not keep the plan.

    `lines` are those of metrics.jsonl, if they are read already.
    """
    lines = read_lines(run_dir / "metrics.jsonl") if lines is None else lines
    trained: dict[int, list[Line]] = {}
    for line in lines:
        if "train/loss" in line:
            trained.setdefault(line["attempt"], []).append(line)
    for attempt in sorted(trained, reverse=True):
        folder = run_dir / "attempts" / str(attempt)
        planned = (read_json(folder / "plan.json") or {}).get("planned")
        if isinstance(planned, dict):
            return _compare(planned, read_json(folder / "measured.json") or {}, trained[attempt])
    return [], []


def _compare(planned: Mapping[str, Any], once: Mapping[str, Any], lines: Sequence[Line]) -> tuple[list[Row], list[str]]:
    shape = planned.get("seq_len"), planned.get("batch_tokens")
    steps = [line for line in lines if (line.get("data/seq_len"), line.get("data/batch_tokens")) == shape]
    steps = steps[_FIRST_STEPS:] if len(steps) > _FIRST_STEPS else steps
    rate, mfu = (_median(steps, key) for key in ("perf/tokens_per_sec", "perf/mfu"))
    on_gpu = planned.get("device") == "cuda"
    peaks = [line["memory/peak_bytes"] for line in lines if is_number(line.get("memory/peak_bytes"))]
    before = 0 if on_gpu else _number(once.get("memory_before_bytes"))
    memory = "peak_bytes" if on_gpu else "resident_bytes"
    measured = {
        "step_sec": shape[1] / rate if rate and is_number(shape[1]) else None,
        "tokens_per_sec": rate,
        "mfu": mfu if on_gpu else None,  # elsewhere of a measured peak, which no plan knows
        memory: max(peaks) - before if peaks and before is not None else None,
        "collective_bytes": _number(once.get("collective_bytes")),
    }
    labels = {
        "step_sec": f"time, median of {len(steps)} steps",
        "tokens_per_sec": "tokens per second, median",
        "mfu": "MFU, median",
        memory: _MEMORY[memory],
        "collective_bytes": f"collectives of rank 0, counted in step {once.get('step', '–')}",
    }
    expected = {**planned, memory: planned.get("peak_bytes")}
    rows = [Row(figure, labels[figure], _number(expected.get(figure)), measured[figure]) for figure in labels]
    notes = [str(note) for note in planned.get("notes", ())]
    if planned.get("collective_bytes") is not None and measured["collective_bytes"] is None:
        notes.append("collectives were not counted: no third step of this kind, or torch's flight recorder lost some")
    return [row for row in rows if row.planned or row.measured], notes  # one process sends nothing


def planned_line(found: Mapping[str, Any]) -> str:
    """Return the line at the end of a run: what can be compared. `found` is `planned` of results.json."""
    parts = []
    for figure, name in LABELS.items():
        values = found.get(figure)
        planned, measured = (
            (values.get("planned"), values.get("measured")) if isinstance(values, dict) else (None, None)
        )
        difference = _difference(figure, planned, measured)
        if difference is not None:
            parts.append(f"{name} {_text(figure, planned)} / {_text(figure, measured)} ({difference})")
    return "; ".join(filter(None, [", ".join(parts), *found.get("notes", ())]))


def _difference(figure: str, planned: float | None, measured: float | None) -> str | None:
    """Return the difference in percent, None where nothing can be compared."""
    if not planned or measured is None or (figure == "resident_bytes" and planned < _LEAST_RESIDENT):
        return None
    return f"{measured / planned - 1:+.1%}"


def _text(figure: str, value: float | None) -> str:
    if value is not None and figure == "step_sec":
        return format_step(value)
    return format_value(figure, value)


def _median(lines: Sequence[Line], key: str) -> float | None:
    found = [line[key] for line in lines if is_number(line.get(key))]
    return statistics.median(found) if found else None


def _number(value: object) -> float | None:
    return value if is_number(value) else None
