"""Show the results of an ablation as a table, as CSV and as a page with plots. Reads what `collect_results` returns."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from turbolm.ablate.verdict import SIGNIFICANCE
from turbolm.report.charts import COLORS, Point, curve, dot_chart, line_chart
from turbolm.report.metrics import is_number
from turbolm.report.page import format_rows, format_value, render_page
from turbolm.units import align_columns, format_bytes, format_count, format_duration

Results = dict[str, Any]
Arm = dict[str, Any]

_CLOCKS = {"wall": "wall-clock time", "cpu": "processor time of rank 0's process"}
_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "final loss": ("final_loss", "{:.4f}".format),
    "tokens to target": ("target_tokens", format_count),
    "time to target": ("target_sec", format_duration),
    "tokens/s": ("tokens_per_sec", format_count),
    "MFU": ("mfu", "{:.1%}".format),
    "peak memory": ("peak_bytes", format_bytes),
}
_OTHER_AXES = {"steps": "steps", "time": "sec"}  # of evaluations, by the page's name
_RUN_COLUMNS = (
    "seed", "lr", "final_loss", "target_tokens", "target_steps", "target_sec", "tokens", "steps", "training_sec",
    "compile_sec", "whole_sec", "cpu_sec", "tokens_per_sec", "mfu", "peak_bytes", "neighbors", "path",
)  # fmt: skip


def render_table(results: Results) -> str:
    """For a terminal."""
    head, rows = _arm_table(results)
    return "\n".join([align_columns([head, *rows]), "", *_remarks(results)])


def render_csv(results: Results) -> str:
    """One line per run. Arms go by their tricks: a spreadsheet would take a name that starts with + for a formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["tricks", *_RUN_COLUMNS])
    for arm in results["arms"]:
        for run in arm["runs"]:
            writer.writerow([" ".join(arm["tricks"]) or "baseline", *(run[column] for column in _RUN_COLUMNS)])
    return text.getvalue()


def render_html(results: Results) -> str:
    """The page report.html."""
    arms, clock = [arm for arm in results["arms"] if arm["runs"]], _CLOCKS[results["clock"]]
    head, rows = _arm_table(results)
    sec = f"seconds of training (steps alone, {clock})"
    return render_page(
        "ablation.html",
        title=f"{results['name']}: ablation",
        name=results["name"],
        arm_columns=head,
        arms=rows,
        remarks=_remarks(results),
        curves=[_loss_chart(arms, results["target_loss"])],
        dot_charts=[
            _run_chart("Time to the target loss", arms, "target_sec", sec),
            _run_chart("Tokens to the target loss", arms, "target_tokens", "tokens"),
            _run_chart("Final loss", arms, "final_loss", "nats per token"),
            _run_chart("Speed", arms, "tokens_per_sec", f"tokens per second, {clock}"),
        ],
        sweep=_sweep_rows(results),
        run_columns=["arm", *(name.removesuffix("_bytes").replace("_", " ") for name in _RUN_COLUMNS)],
        runs=[
            (arm["arm"], *(format_value(key, run[key]) for key in _RUN_COLUMNS[:-1]), Path(run["path"]).name)
            for arm in arms
            for run in arm["runs"]
        ],
        environment=format_rows({"command": results["command"], **results["versions"]}),
    )


def _arm_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Column names, and a row for each arm."""
    rows = []
    for arm in results["arms"]:
        cells = [_cell(arm, key, show) for key, show in _COLUMNS.values()]
        rows.append([arm["arm"], f"{arm['lr']:g}", *cells, arm["verdict_text"]])
    return ["arm", "lr", *_COLUMNS, "verdict"], rows


def _cell(arm: Arm, key: str, show: Callable[[float], str]) -> str:
    """The mean over seeds, its spread, its ratio to the baseline's, and in how many of the runs it is known."""
    runs, is_target = arm["runs"], key.startswith("target_")
    if is_target and any(run["target_at_first_evaluation"] for run in runs):
        return "inconclusive"
    if key not in arm["mean"]:
        return "not reached" if is_target and runs else "–"
    text = show(arm["mean"][key])
    if (spread := arm["spread"].get(key)) is not None:
        text += f" ±{spread:.4f}" if key == "final_loss" else f" ±{spread / arm['mean'][key]:.0%}"
    if key in arm["versus_baseline"] and key not in ("final_loss", "mfu"):
        text += f" ({arm['versus_baseline'][key]['ratio']:.2f}x)"
    reached = sum(run[key] is not None for run in runs)
    return f"{text}, {reached} of {len(runs)} runs" if is_target and reached < len(runs) else text


def _remarks(results: Results) -> list[str]:
    lines = []
    if results["target_loss"] is not None:
        lines.append(f"target: a held-out loss of {results['target_loss']:.4f}, {results['target_source']}")
    lines.append(f"time counts training steps only: {_CLOCKS[results['clock']]}")
    seeds = results["seeds"]
    many = f"{len(seeds)} seeds ({seeds[0]} to {seeds[-1]})" if len(seeds) > 1 else f"one seed ({seeds[0]})"
    test = f"{results['test']} at {SIGNIFICANCE} on the time to the target; ± is the standard deviation over seeds"
    lines.append(
        f"{many}, {format_count(results['budget_tokens'])} tokens each; (…x) is the arm's mean over the baseline's; "
        + (test if len(seeds) > 1 else "no test and no spread with one seed")
        + f"; noise level {results['noise']['relative']:.0%} of times, {results['noise']['loss']:.1%} of losses"
    )
    if not results["complete"]:
        lines.append("not complete: some runs are not finished")
    return [*lines, *results["notes"]]


def _sweep_rows(results: Results) -> list[list[str]]:
    rows = []
    for arm in results["arms"]:
        for lr, loss in arm["sweep"] or ():
            ended = "diverged or failed" if loss is None else f"{loss:.4f}"
            stops = [rung["tokens"] for rung in arm["rungs"] if lr in [tried for tried, _ in rung["losses"]]]
            if stops and lr != arm["lr"]:
                ended += f" after {format_count(stops[-1])} tokens"
            rows.append([arm["arm"], f"{lr:g}", ended, "chosen" if lr == arm["lr"] else ""])
    return rows


def _loss_chart(arms: Sequence[Arm], target: float | None) -> dict[str, Any]:
    """Held-out loss by tokens, and by steps and the time of training if the page is asked for them."""
    curves = []
    for index, arm in enumerate(arms):
        others = {axis: [at for at, _ in _mean_curve(arm, key)] for axis, key in _OTHER_AXES.items()}
        color = COLORS[index % len(COLORS)]
        curves.append(curve(arm["arm"], color, _mean_curve(arm, "tokens"), "points", others))
    if target is not None and any(one["x"] for one in curves):
        tokens = [at for one in curves for at in one["x"]]
        others = {axis: [at for one in curves for at in one["others"][axis]] for axis in _OTHER_AXES}
        ends = [(min(tokens), target), (max(tokens), target)]
        at = {axis: (min(places), max(places)) for axis, places in others.items()}
        curves.append(curve("target", "muted", ends, "dashed", at))
    return line_chart("Held-out loss", curves, height=360, clip_spikes=True)


def _run_chart(title: str, arms: Sequence[Arm], key: str, unit: str) -> dict[str, Any]:
    return dot_chart(
        title, {arm["arm"]: [run[key] for run in arm["runs"] if is_number(run[key])] for arm in arms}, unit
    )


def _mean_curve(arm: Arm, x: str) -> list[Point]:
    """The mean over seeds at each evaluation; the first seed's alone where they differ in number."""
    curves = [[(one[x], one["loss"]) for one in run["evaluations"] if is_number(one["loss"])] for run in arm["runs"]]
    if len({len(points) for points in curves}) > 1:
        return curves[0]
    return [(fmean(at for at, _ in points), fmean(loss for _, loss in points)) for points in zip(*curves, strict=True)]
