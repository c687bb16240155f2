"""One self-contained page about a run: curves, results, recipe, environment, attempts. Torch-free.

Names and texts come from recipes, which anyone may have written: everything is escaped, and the page's own policy
forbids loading anything.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from turbolm.report.metrics import Line, is_number, read_lines, read_metrics, values
from turbolm.report.svg import CHART_CSS, THEME_CSS, Series, line_chart, smooth
from turbolm.units import format_bytes, format_count, format_duration

Rows = Sequence[Sequence[str]]

_MANY_COLUMNS = 4  # more do not break their words, but scroll
_SMOOTHED_FROM = 40  # points below which a smoothed curve says nothing more


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html from what the run directory holds so far."""
    metrics = read_metrics(run_dir / "metrics.jsonl")
    attempts = read_attempts(run_dir)
    results = _read_json(run_dir / "results.json")
    body = [
        _header(run_dir, metrics, attempts),
        _curves(metrics, results),
        section("Results", table(_rows(results)) if results else ""),
        section("Anomalies", _anomalies(read_lines(run_dir / "metrics.jsonl"))),
        section("Attempts", _attempts_table(attempts)),
        section("Recipe", _recipe(run_dir)),
        section("Environment of the last attempt", _environment(run_dir, attempts)),
    ]
    path = run_dir / "report.html"
    unfinished = path.with_name(f".report.{os.getpid()}.html")
    unfinished.write_text(page(run_dir.resolve().name, body), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def loss_curve_svg(
    metrics: Sequence[Line],
    *,
    unigram_entropy: float | None = None,
    title: str = "Loss",
    width: int = 760,
    height: int = 340,
) -> str:
    """The loss curve as a picture that stands alone, for light and dark pages."""
    return _loss_chart(metrics, unigram_entropy, title=title, width=width, height=height, standalone=True)


def read_attempts(run_dir: Path) -> list[dict[str, int | None]]:
    """Number, first and last step of every attempt; steps are None where it logged none."""
    folders = (run_dir / "attempts").glob("*") if (run_dir / "attempts").is_dir() else iter(())
    spans: dict[int, list[int]] = {int(folder.name): [] for folder in folders if folder.name.isdigit()}
    for line in read_lines(run_dir / "metrics.jsonl"):
        if "train/loss" in line:
            spans.setdefault(line["attempt"], []).append(line["step"])
    return [
        {"attempt": attempt, "first_step": min(steps, default=None), "last_step": max(steps, default=None)}
        for attempt, steps in sorted(spans.items())
    ]


# ------------------------------------------------------------------------------------------------------------- curves


def _curves(metrics: Sequence[Line], results: dict[str, Any]) -> str:
    def small(title: str, key: str, style: str, **options: Any) -> str:
        points = values(metrics, key)
        series = [Series("each step", style, points)]
        if options.pop("smoothed", False) and len(points) >= _SMOOTHED_FROM:
            series = [Series("each step", f"{style} faint", points), Series("smoothed", style, smooth(points))]
        return card(line_chart(title, series, restarts=_restarts(metrics), width=560, height=260, **options))

    charts = [
        small("Learning rate", "train/lr", "violet", from_zero=True),
        small("Gradient norm", "train/grad_norm", "orange", smoothed=True, clip_spikes=True, from_zero=True),
        small("Tokens per second", "perf/tokens_per_sec", "green", smoothed=True, clip_spikes=True, from_zero=True),
    ]
    if values(metrics, "perf/mfu"):
        charts.append(small("Model FLOPs utilisation", "perf/mfu", "green", smoothed=True, from_zero=True))
    elif values(metrics, "data/padding_fraction"):
        charts.append(small("Padding, share of all positions", "data/padding_fraction", "blue", from_zero=True))
    loss = _loss_chart(metrics, results.get("unigram_entropy"), width=1140, height=380)
    return f'{card(loss)}<div class="charts">{"".join(charts)}</div>'


def _loss_chart(metrics: Sequence[Line], unigram_entropy: Any, *, title: str = "Loss", **options: Any) -> str:
    train = values(metrics, "train/loss")
    series = [Series("train", "blue", train)]
    if len(train) >= _SMOOTHED_FROM:
        series = [Series("train, each step", "blue faint", train), Series("train, smoothed", "blue", smooth(train))]
    series.append(Series("held out", "orange", values(metrics, "eval/loss"), markers=True))
    if is_number(unigram_entropy) and train:
        # What a model reaches that knows how often each token occurs, and nothing else.
        ends = [(train[0][0], float(unigram_entropy)), (train[-1][0], float(unigram_entropy))]
        series.append(Series("unigram entropy", "muted dashed", ends))
    return line_chart(title, series, restarts=_restarts(metrics), x_label="tokens seen", **options)


def _restarts(metrics: Sequence[Line]) -> list[float]:
    """Where one attempt took over from another."""
    trained = [line for line in metrics if "train/loss" in line]
    pairs = zip(trained, trained[1:], strict=False)
    taken_over = [after for before, after in pairs if before["attempt"] != after["attempt"]]
    return [at for at, _ in values(taken_over, "step")]


# -------------------------------------------------------------------------------------------------------------- texts


def _header(run_dir: Path, metrics: Sequence[Line], attempts: Sequence[dict[str, int | None]]) -> str:
    def last(key: str) -> float | None:
        found = values(metrics, key)
        return found[-1][1] if found else None

    def median(key: str) -> float | None:
        found = values(metrics, key)
        return statistics.median(value for _, value in found) if found else None

    tiles = [
        ("training loss", _number(last("train/loss"), "{:.4g}")),
        ("held-out loss", _number(last("eval/loss"), "{:.4g}")),
        ("bits per byte", _number(last("eval/bits_per_byte"), "{:.4g}")),
        ("tokens seen", _number(last("tokens_seen"), count=True)),
        ("steps", _number(last("step"), "{:,.0f}")),
        ("tokens/s, median", _number(median("perf/tokens_per_sec"), count=True)),
        ("MFU, median", _number(median("perf/mfu"), "{:.1%}")),
        ("attempts", str(len(attempts))),
    ]
    shown = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in tiles if text is not None
    )
    return f'<header><h1>{escape(run_dir.resolve().name)}</h1><dl class="tiles">{shown}</dl></header>'


def _number(value: float | None, form: str = "", count: bool = False) -> str | None:
    if value is None:
        return None
    return format_count(value) if count else form.format(value)


def _attempts_table(attempts: Sequence[dict[str, int | None]]) -> str:
    def text(step: int | None) -> str:
        return "none logged" if step is None else f"{step:,}"

    rows = [[str(one["attempt"]), text(one["first_step"]), text(one["last_step"])] for one in attempts]
    return table(rows, ["attempt", "first step", "last step"]) if rows else ""


def _anomalies(lines: Sequence[Line]) -> str:
    """Every anomaly there was, those of steps that a rollback took back as well."""
    keys = ("anomaly", "anomaly/loss", "anomaly/grad_norm", "anomaly/limit", "anomaly/decision")
    rows = [
        [f"{line['step']:,}", str(line["attempt"]), *(_text(key, line.get(key)) for key in keys), _left_out(line)]
        for line in lines
        if "anomaly" in line
    ]
    head = ["step", "attempt", "anomaly", "loss", "gradient norm", "limit", "decision", "batches left out"]
    return table(rows, head) if rows else ""


def _left_out(line: Line) -> str:
    window = line.get("anomaly/skipped_batches")
    if not isinstance(window, list) or len(window) != 2 or not all(isinstance(index, int) for index in window):
        return "–"
    return f"{window[0]:,} to {window[1] - 1:,}"


def _recipe(run_dir: Path) -> str:
    path = run_dir / "recipe.yaml"
    return f"<pre>{escape(path.read_text(encoding='utf-8', errors='replace'))}</pre>" if path.is_file() else ""


def _environment(run_dir: Path, attempts: Sequence[dict[str, int | None]]) -> str:
    for one in reversed(attempts):
        environment = _read_json(run_dir / "attempts" / str(one["attempt"]) / "environment.json")
        if environment:
            return table(_rows(environment))
    return ""


def _rows(mapping: dict[str, Any], prefix: str = "") -> list[list[str]]:
    """Names and values of a mapping; nested ones under dotted names."""
    rows: list[list[str]] = []
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            rows += _rows(value, f"{prefix}{key}.")
        else:
            rows.append([f"{prefix}{key}", _text(str(key), value)])
    return rows


def _text(key: str, value: object) -> str:
    """A value for people, by the unit that its name ends with."""
    if value is None:
        return "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_number(value):
        return str(value)
    if key.endswith("_bytes"):
        return format_bytes(value)
    if key.endswith("_sec") and not key.endswith("per_sec"):
        return format_duration(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


# --------------------------------------------------------------------------------------------------------------- page


def card(content: str) -> str:
    """A frame around finished markup."""
    return f'<div class="card">{content}</div>'


def section(title: str, content: str) -> str:
    """Finished markup in a frame under a heading, or nothing where there is none."""
    return f"<section><h2>{escape(title)}</h2>{card(content)}</section>" if content else ""


def table(rows: Rows, head: Sequence[str] = ()) -> str:
    """Texts, which are escaped here."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    top = f"<thead>{line(head, 'th')}</thead>" if head else ""
    kind = ' class="wide"' if len(head) > _MANY_COLUMNS else ""
    return f"<table{kind}>{top}<tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"


def page(title: str, body: Iterable[str]) -> str:
    """A whole page of finished markup, which loads nothing."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title>"
        f"<style>{THEME_CSS.replace('{root}', ':root')}{_PAGE_CSS}{CHART_CSS}</style></head><body><main>"
        + "\n".join(body)
        + f'</main><div id="tip" hidden></div><script>{_HOVER_JS}</script></body></html>\n'
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


_PAGE_CSS = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { margin: 0 0 16px; font-size: 26px; font-weight: 650; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 32px 0 10px; font-size: 16px; font-weight: 600; }
.card { position: relative; min-width: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  overflow: auto; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 16px;
  margin-top: 16px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(125px, 1fr)); gap: 1px; margin: 0 0 16px;
  background: var(--line); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
.tiles div { padding: 12px 16px; background: var(--card); }
.tiles dt { color: var(--muted); font-size: 12px; }
.tiles dd { margin: 2px 0 0; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: 7px 16px; text-align: left; vertical-align: top; border-top: 1px solid var(--grid);
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
tr:first-child > * { border-top: 0; } thead + tbody tr:first-child > * { border-top: 1px solid var(--grid); }
th { color: var(--muted); font-size: 12px; font-weight: 500; }
td { white-space: pre-wrap; } td:first-child { width: 34%; color: var(--muted); }
.wide :is(th, td) { padding: 7px 10px; overflow-wrap: normal; }
.wide td:first-child { width: auto; color: var(--ink); }
.wide td:last-child { min-width: 200px; }
pre { margin: 0; padding: 14px 16px; font: 12.5px/1.55 ui-monospace, SFMono-Regular, Menlo, monospace; }
#tip { position: fixed; z-index: 1; padding: 6px 10px; pointer-events: none; background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; box-shadow: 0 2px 8px #0003; font-size: 12px;
  font-variant-numeric: tabular-nums; white-space: pre; }
"""

# The nearest point of each curve beside the pointer. Values go in as text, never as markup.
_HOVER_JS = """
const tip = document.getElementById("tip");
const compact = Intl.NumberFormat("en", {notation: "compact", maximumFractionDigits: 2});
const short = v => Math.abs(v) >= 1e4 ? compact.format(v) : Number(v.toPrecision(4)).toString();
for (const svg of document.querySelectorAll("svg.chart")) {
  const source = svg.nextElementSibling;
  if (!source) continue;
  const {x, box, label, series} = JSON.parse(source.textContent), cursor = svg.querySelector(".cursor");
  const nearest = (points, at) => {
    let low = 0, high = points.length - 1;
    while (high - low > 1) { const middle = (low + high) >> 1; points[middle][0] < at ? low = middle : high = middle; }
    return at - points[low][0] < points[high][0] - at ? points[low] : points[high];
  };
  svg.addEventListener("pointermove", event => {
    const bounds = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / bounds.width;
    const across = Math.min(Math.max((event.clientX - bounds.left) * scale, box[0]), box[2]);
    const at = x[0] + (across - box[0]) / (box[2] - box[0]) * (x[1] - x[0]);
    for (const [name, value] of Object.entries({x1: across, x2: across, y1: box[1], y2: box[3]}))
      cursor.setAttribute(name, value);
    cursor.style.visibility = "visible";
    tip.textContent = [label + "  " + short(at),
      ...series.map(one => one.name + "  " + short(nearest(one.points, at)[1]))].join("\\n");
    tip.hidden = false;
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = event.clientY + 14 + "px";
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; cursor.style.visibility = "hidden"; });
}
"""
