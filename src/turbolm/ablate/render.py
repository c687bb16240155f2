"""The results of an ablation as a table, as CSV and as a page with plots. They take what `collect_results` gives."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from turbolm.report.html import card, page, section, table
from turbolm.report.metrics import is_number
from turbolm.report.svg import Dots, Series, dot_chart, line_chart
from turbolm.units import format_bytes, format_count, format_duration

Results = dict[str, Any]

_CLOCKS = {"wall": "wall-clock time", "cpu": "processor time of rank 0's process"}
_STYLES = ["blue", "orange", "green", "violet", "red", "teal", "pink", "brown"]
_HEAD = (
    "arm", "lr", "final loss", "tokens to target", "time to target", "tokens/s", "MFU", "peak memory", "verdict",
)  # fmt: skip
_RUN_COLUMNS = (
    "final_loss", "target_tokens", "target_steps", "target_sec", "tokens", "steps", "training_sec", "compile_sec",
    "whole_sec", "cpu_sec", "tokens_per_sec", "mfu", "peak_bytes", "path",
)  # fmt: skip


def render_table(results: Results) -> str:
    """For a terminal."""
    rows = [_HEAD, *_rows(results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *_remarks(results)])


def render_csv(results: Results) -> str:
    """A line for each run. Arms go by their tricks: a name with a sign in front would be a formula to a spreadsheet."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["tricks", "seed", "lr", *_RUN_COLUMNS])
    for arm in results["arms"]:
        for run in arm["runs"]:
            writer.writerow(
                [
                    " ".join(arm["tricks"]) or "baseline",
                    run["seed"],
                    run["lr"],
                    *(run[column] for column in _RUN_COLUMNS),
                ]
            )
    return text.getvalue()


def render_page(results: Results) -> str:
    """One page that loads nothing."""
    arms = [arm for arm in results["arms"] if arm["runs"]]
    styles = {arm["arm"]: _style(index) for index, arm in enumerate(results["arms"])}
    target, clock = results["target_loss"], _CLOCKS[results["clock"]]
    by_tokens = [Series(arm["arm"], styles[arm["arm"]], _curve(arm, "tokens"), markers=True) for arm in arms]
    by_time = [Series(arm["arm"], styles[arm["arm"]], _curve(arm, "sec"), markers=True) for arm in arms]
    charts = [
        line_chart(title, _with_target(curves, target), x_label=label, width=1140, height=400, clip_spikes=True)
        for title, curves, label in (
            ("Held-out loss by tokens", by_tokens, "tokens seen"),
            ("Held-out loss by training time", by_time, f"seconds of training (steps alone, {clock})"),
        )
    ]
    dots = [
        dot_chart(title, [Dots(arm["arm"], styles[arm["arm"]], _values(arm, key)) for arm in arms], x_label=label)
        for title, key, label in (
            ("Time to the target loss", "target_sec", f"seconds of training, {clock}"),
            ("Tokens to the target loss", "target_tokens", "tokens"),
            ("Final loss", "final_loss", "nats per token"),
            ("Speed", "tokens_per_sec", f"tokens a second, {clock}"),
        )
    ]
    body = [
        f"<header><h1>{escape(results['name'])}: what each trick is worth</h1></header>",
        card(table(_rows(results), _HEAD)),
        f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in _remarks(results))}</ul>",
        *(f'<div class="charts">{card(chart)}</div>' for chart in charts),
        f'<div class="charts">{"".join(card(chart) for chart in dots)}</div>',
        section("Learning rates tried", _sweep_table(results)),
        section("Runs", table(_run_rows(results), ["arm", "seed", *(_heading(name) for name in _RUN_COLUMNS)])),
        section("Environment", table(_environment(results))),
    ]
    return page(f"{results['name']}: ablation", body)


def _rows(results: Results) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for arm in results["arms"]:
        mean, versus = arm["mean"], arm["versus_baseline"]

        def cell(key: str, text: str, versus: Any = versus, arm: Any = arm) -> str:
            spread = arm["spread"].get(key)
            share = f" ±{spread / arm['mean'][key]:.0%}" if spread is not None and key != "final_loss" else ""
            share = f" ±{spread:.4f}" if spread is not None and key == "final_loss" else share
            ratio = f" ({versus[key]['ratio']:.2f}x)" if key in versus and key not in ("final_loss", "mfu") else ""
            return f"{text}{share}{ratio}"

        def number(key: str, form: Any, mean: Any = mean, cell: Any = cell) -> str:
            return cell(key, form(mean[key])) if key in mean else "–"

        reached = sum(run["target_sec"] is not None for run in arm["runs"])
        partly = f", {reached} of {len(arm['runs'])} runs" if 0 < reached < len(arm["runs"]) else ""
        missed = "not reached" if arm["runs"] and not reached else None
        rows.append(
            (
                arm["arm"],
                f"{arm['lr']:g}",
                number("final_loss", "{:.4f}".format),
                missed or number("target_tokens", format_count) + partly,
                missed or number("target_sec", format_duration) + partly,
                number("tokens_per_sec", format_count),
                number("mfu", "{:.1%}".format),
                number("peak_bytes", format_bytes),
                arm["verdict_text"],
            )
        )
    return rows


def _remarks(results: Results) -> list[str]:
    lines = []
    if results["target_loss"] is not None:
        lines.append(f"target: a held-out loss of {results['target_loss']:.4f}, {results['target_source']}")
    lines.append(f"time is that of the training steps: {_CLOCKS[results['clock']]}")
    seeds = results["seeds"]
    many = f"{len(seeds)} seeds ({seeds[0]} to {seeds[-1]})" if len(seeds) > 1 else f"one seed ({seeds[0]})"
    test = "Welch's t-test at 0.05 on the time to the target, spread is the standard deviation over seeds"
    lines.append(
        f"{many}, {format_count(results['budget_tokens'])} tokens each; (…x) is the arm's mean over the baseline's; "
        + (test if len(seeds) > 1 else "no spread is known")
        + f"; noise level {results['noise']['relative']:.0%} of times, {results['noise']['loss']:.1%} of losses"
    )
    if not results["complete"]:
        lines.append("not complete: some runs are not finished")
    return [*lines, *results["notes"]]


def _run_rows(results: Results) -> list[list[str]]:
    return [
        [arm["arm"], str(run["seed"]), *(_text(column, run[column]) for column in _RUN_COLUMNS)]
        for arm in results["arms"]
        for run in arm["runs"]
    ]


def _heading(key: str) -> str:
    """`tokens_per_sec` as `tokens/sec`, `target_sec` as `target sec`."""
    return key.removesuffix("_bytes").replace("_per_", "/").replace("_", " ")


def _text(key: str, value: object) -> str:
    if value is None:
        return "–"
    if key == "path":
        return Path(str(value)).name
    if not is_number(value):
        return str(value)
    if key.endswith("_bytes"):
        return format_bytes(value)
    if key == "mfu":
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _environment(results: Results) -> list[list[str]]:
    rows = {"command": results["command"], **results["versions"]}
    return [[key, str(value)] for key, value in rows.items() if value not in (None, "")]


def _sweep_table(results: Results) -> str:
    rows = [
        [
            arm["arm"],
            f"{rate:g}",
            "diverged or failed" if loss is None else f"{loss:.4f}",
            "chosen" if rate == arm["lr"] else "",
        ]
        for arm in results["arms"]
        for rate, loss in arm["sweep"] or ()
    ]
    return table(rows, ["arm", "learning rate", "final loss", ""]) if rows else ""


def _style(index: int) -> str:
    return _STYLES[index % len(_STYLES)] + (" dashed" if index // len(_STYLES) % 2 else "")


def _curve(arm: dict[str, Any], x: str) -> list[tuple[float, float]]:
    """The mean over seeds at each evaluation; the first seed's alone where they differ in number."""
    curves = [[(one[x], one["loss"]) for one in run["evaluations"] if is_number(one["loss"])] for run in arm["runs"]]
    if len({len(curve) for curve in curves}) > 1:
        return curves[0]
    return [
        (sum(at for at, _ in points) / len(points), sum(loss for _, loss in points) / len(points))
        for points in zip(*curves, strict=True)
    ]


def _with_target(curves: Sequence[Series], target: float | None) -> list[Series]:
    ends = [point[0] for curve in curves for point in curve.points]
    if target is None or not ends:
        return list(curves)
    return [*curves, Series("target", "muted dashed", [(min(ends), target), (max(ends), target)])]


def _values(arm: dict[str, Any], key: str) -> list[float]:
    return [run[key] for run in arm["runs"] if is_number(run[key])]
