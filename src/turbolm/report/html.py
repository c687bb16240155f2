"""report.html, one page about a run: curves, results, recipe, environment, attempts. Torch-free."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from turbolm.files import write_atomic
from turbolm.report.attempts import HEAD
from turbolm.report.evaluations import COLUMNS, evaluation_rows, whole
from turbolm.report.metrics import Line, is_number, values
from turbolm.report.page import format_rows, format_value, render_page
from turbolm.report.run_charts import run_charts
from turbolm.report.runs import Parts, RunData, read_run, step_parts
from turbolm.units import format_bytes, format_count, format_step

_TILES = (
    ("training loss", "train/loss", "{:.4g}".format),
    ("held-out loss", "eval/loss", "{:.4g}".format),
    ("bits per byte", "eval/bits_per_byte", "{:.4g}".format),
    ("held-out loss of averaged weights", "eval/average_loss", "{:.4g}".format),
    ("tokens seen", "tokens_seen", format_count),
    ("steps", "step", "{:,.0f}".format),
    ("tokens/s, median", "perf/tokens_per_sec", format_count),
    ("MFU, median", "perf/mfu", "{:.1%}".format),
)


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write `run_dir`/report.html, or `out`, from what the run directory holds so far."""
    path = out or run_dir / "report.html"
    write_atomic(path, render_report(read_run(run_dir)))
    return path


def render_report(run: RunData, live: dict[str, Any] | None = None) -> str:
    """The page of a run. `live` is where a page that a server keeps up to date goes on from."""
    loss, *charts = run_charts(run.metrics, run.anomalies, run.levels)
    environment, evaluations = run.environment, whole(run.evaluations)
    attempts = [attempt.row() for attempt in run.attempts]
    tiles = last_tiles(run.metrics) if live else [*last_tiles(run.metrics), *_median_tiles(run.metrics)]
    return render_page(
        "run.html",
        title=run.name,
        live=live,
        tiles=[*tiles, ("attempts", str(len(attempts)))],
        loss=loss,
        charts=charts,
        planned=[[row.label, *row.texts] for row in run.planned],
        planned_notes=run.planned_notes,
        parts=[(parts.title, _bars(parts)) for parts in step_parts(run)],
        results=format_rows({key: value for key, value in run.results.items() if key != "evaluations"}),
        evaluations=evaluation_rows(evaluations),
        num_damaged_evaluations=len(run.evaluations) - len(evaluations),
        evaluation_columns=COLUMNS,
        anomalies=[_anomaly(line) for line in run.anomalies],
        attempt_columns=HEAD,
        attempts=attempts,
        recipe=run.recipe_text,
        environment=format_rows(environment),
    )


def last_tiles(metrics: Sequence[Line]) -> list[tuple[str, str]]:
    """Name and text of the figures whose last value counts."""
    shown = ((name, show, _last(metrics, key)) for name, key, show in _TILES if not name.endswith("median"))
    return [(name, show(last)) for name, show, last in shown if last is not None]


def _last(metrics: Sequence[Line], key: str) -> float | None:
    return next((line[key] for line in reversed(metrics) if is_number(line.get(key))), None)


def _median_tiles(metrics: Sequence[Line]) -> list[tuple[str, str]]:
    shown = ((name, show, values(metrics, key)) for name, key, show in _TILES if name.endswith("median"))
    return [(name, show(statistics.median(value for _, value in found))) for name, show, found in shown if found]


def _bars(parts: Parts) -> list[tuple[str, str, float]]:
    """Name, text and share in percent of each part, largest first."""
    show = format_bytes if parts.unit == "bytes" else format_step
    total = sum(parts.values.values())
    ordered = sorted(parts.values.items(), key=lambda part: -part[1])
    return [(name, f"{show(value)}, {value / total:.1%}", 100 * value / total) for name, value in ordered]


def _anomaly(line: Line) -> list[str]:
    """The row of an anomaly. Those of steps that a rollback took back are shown too."""
    keys = ("anomaly", "anomaly/loss", "anomaly/grad_norm", "anomaly/limit", "anomaly/decision")
    match line.get("anomaly/skipped_batches"):
        case [int(first), int(end)]:
            left_out = f"{first:,} to {end - 1:,}"
        case _:
            left_out = "–"
    return [f"{line['step']:,}", str(line["attempt"]), *(format_value(key, line.get(key)) for key in keys), left_out]
