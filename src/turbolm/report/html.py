"""report.html, one page about a run: curves, results, recipe, environment, attempts. Torch-free."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from turbolm.files import read_json, write_atomic
from turbolm.report.charts import curve, line_chart, noisy_curves
from turbolm.report.metrics import Line, is_number, read_lines, read_metrics, values
from turbolm.report.page import format_rows, format_value, render_page
from turbolm.report.planned import compare
from turbolm.units import format_count


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html from what the run directory holds so far."""
    lines, metrics = read_lines(run_dir / "metrics.jsonl"), read_metrics(run_dir / "metrics.jsonl")
    attempts = _attempts(run_dir, lines)
    results = read_json(run_dir / "results.json") or {}
    results.pop("planned", None)  # as it was when the run finished
    rows, notes = compare(run_dir, lines)
    recipe = run_dir / "recipe.yaml"
    text = render_page(
        "run.html",
        title=run_dir.resolve().name,
        tiles=[*_tiles(metrics), ("attempts", str(len(attempts)))],
        loss=_loss_chart(metrics, results.get("unigram_entropy")),
        charts=_small_charts(metrics),
        planned=[[row.label, *row.texts] for row in rows],
        planned_notes=notes,
        results=format_rows(results),
        anomalies=[_anomaly(line) for line in lines if "anomaly" in line],
        attempts=attempts,
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else "",
        environment=_environment(run_dir),
    )
    path = run_dir / "report.html"
    write_atomic(path, text)
    return path


def _loss_chart(metrics: Sequence[Line], unigram_entropy: object) -> dict[str, Any]:
    train = values(metrics, "train/loss")
    curves = noisy_curves("train", "blue", train)
    curves.append(curve("held out", "orange", values(metrics, "eval/loss"), "points"))
    if is_number(unigram_entropy) and train:
        # The loss of a model that knows how often each token occurs, and nothing else.
        ends = [(train[0][0], float(unigram_entropy)), (train[-1][0], float(unigram_entropy))]
        curves.append(curve("unigram entropy", "muted", ends, "dashed"))
    return line_chart("Loss", curves, resumes=_resumes(metrics), height=340)


def _small_charts(metrics: Sequence[Line]) -> list[dict[str, Any]]:
    resumes = _resumes(metrics)
    lr = curve("learning rate", "violet", values(metrics, "train/lr"))
    charts = [line_chart("Learning rate", [lr], resumes=resumes, from_zero=True)]
    noisy = [
        ("Gradient norm", "train/grad_norm", "orange"),
        ("Tokens per second", "perf/tokens_per_sec", "green"),
        ("Model FLOPs utilization (MFU)", "perf/mfu", "green"),
        ("Padding, share of all positions", "data/padding_fraction", "blue"),
    ]
    for title, key, color in noisy:
        points = values(metrics, key)
        if points or key == "train/grad_norm":
            curves = noisy_curves(key.partition("/")[2].replace("_", " "), color, points)
            charts.append(line_chart(title, curves, resumes=resumes, from_zero=True, clip_spikes=True))
    return charts


def _resumes(metrics: Sequence[Line]) -> list[float]:
    """Return where an attempt resumed an earlier one, in tokens."""
    trained = [line for line in metrics if "train/loss" in line]
    pairs = zip(trained, trained[1:], strict=False)
    return [float(after["tokens_seen"]) for before, after in pairs if before["attempt"] != after["attempt"]]


def _tiles(metrics: Sequence[Line]) -> list[tuple[str, str]]:
    tiles = []
    for name, key, show in (
        ("training loss", "train/loss", "{:.4g}".format),
        ("held-out loss", "eval/loss", "{:.4g}".format),
        ("bits per byte", "eval/bits_per_byte", "{:.4g}".format),
        ("tokens seen", "tokens_seen", format_count),
        ("steps", "step", "{:,.0f}".format),
        ("tokens/s, median", "perf/tokens_per_sec", format_count),
        ("MFU, median", "perf/mfu", "{:.1%}".format),
    ):
        found = [value for _, value in values(metrics, key)]
        if found:
            tiles.append((name, show(statistics.median(found) if name.endswith("median") else found[-1])))
    return tiles


def _attempts(run_dir: Path, lines: Sequence[Line]) -> list[tuple[str, str, str]]:
    """Number, first and last logged step of every attempt."""
    folder = run_dir / "attempts"
    steps: dict[int, list[int]] = {int(path.name): [] for path in folder.glob("*") if path.name.isdigit()}
    for line in lines:
        if "train/loss" in line:
            steps.setdefault(line["attempt"], []).append(line["step"])
    return [
        (str(attempt), f"{min(logged):,}", f"{max(logged):,}")
        if logged
        else (str(attempt), "none logged", "none logged")
        for attempt, logged in sorted(steps.items())
    ]


def _anomaly(line: Line) -> list[str]:
    """The row of an anomaly. Those of steps that a rollback took back are shown too."""
    keys = ("anomaly", "anomaly/loss", "anomaly/grad_norm", "anomaly/limit", "anomaly/decision")
    match line.get("anomaly/skipped_batches"):
        case [int(first), int(end)]:
            left_out = f"{first:,} to {end - 1:,}"
        case _:
            left_out = "–"
    return [f"{line['step']:,}", str(line["attempt"]), *(format_value(key, line.get(key)) for key in keys), left_out]


def _environment(run_dir: Path) -> list[tuple[str, str]]:
    folders = [path for path in (run_dir / "attempts").glob("*") if path.name.isdigit()]
    for folder in sorted(folders, key=lambda path: -int(path.name)):
        if environment := read_json(folder / "environment.json"):
            return format_rows(environment)
    return []
