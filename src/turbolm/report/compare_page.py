"""Show a comparison of runs as a table for a terminal and as a page. Torch-free."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from turbolm.report.attempts import HEAD
from turbolm.report.charts import COLORS, line_chart
from turbolm.report.compare import TAIL, Comparison
from turbolm.report.metrics import is_number
from turbolm.report.page import render_page
from turbolm.report.planned import LABELS, Row
from turbolm.report.run_charts import SMALL, axis_curve, evaluation_charts
from turbolm.units import align_columns, format_bytes, format_count, format_duration, format_step

Cells = list[str]
_WIDEST = 46  # characters of a value in a terminal
_NONE = "–"


def _loss(value: float) -> str:
    return f"{value:.4f}"


_FIGURES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("state", "state", str),
    ("attempts", "attempts", str),
    ("hosts", "hosts", ", ".join),
    ("steps", "steps", "{:,}".format),
    ("tokens", "tokens", format_count),
    ("training time, steps alone", "training_sec", format_duration),
    (f"training loss, last {TAIL:.0%} of the tokens", "train_loss", _loss),
    ("held-out loss", "eval_loss", _loss),
    ("bits per byte", "bits_per_byte", _loss),
)
_SPEEDS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("tokens/s, median", "tokens_per_sec", format_count),
    ("step, median", "step_sec", format_step),
    ("MFU, median", "mfu", "{:.1%}".format),
    ("peak memory of a process", "peak_bytes", format_bytes),
)


def table_rows(found: Comparison) -> list[Cells]:
    """A row for each figure that some run has: its name, then a cell for each run."""
    rows = [_row(label, [one[key] for one in found.figures], show) for label, key, show in _FIGURES]
    for name in sorted({name for one in found.figures for name in one["eval_losses"]}):
        rows.append(_row(f"held-out loss of {name}", [one["eval_losses"].get(name) for one in found.figures], _loss))
    at = {"tokens": "{} tokens", "steps": "step {}", "time": "{} of training"}
    show_place = {"tokens": format_count, "steps": "{:,}".format, "time": format_duration}
    for key, what in (("train_loss_at", "training loss"), ("eval_loss_at", "held-out loss")):
        for axis, place in found.common.items():
            label = f"{what} at {at[axis].format(show_place[axis](place))}"
            rows.append(_row(label, [one[key].get(axis) for one in found.figures], _loss))
    rows += [_row(label, [one[key] for one in found.figures], show) for label, key, show in _SPEEDS]
    for figure, name in LABELS.items():
        cells = [_planned(figure, one["planned"].get(figure)) for one in found.figures]
        rows.append([f"planned / measured: {name}", *cells])
    return [row for row in rows if any(cell != _NONE for cell in row[1:])]


def render_table(found: Comparison) -> str:
    """For a terminal: figures, what differs in the configuration, and notes."""
    rows = [["", *found.labels], *table_rows(found)]
    section = ""
    for one in found.differences:
        if one.section != section:
            section = one.section
            rows += [[""] * len(rows[0]), [f"{section}, where it differs", *[""] * len(found.labels)]]
        rows.append([f"  {one.key}", *_clipped([_text(value) for value in one.values])])
    return "\n".join([align_columns(rows), *(["", *found.notes] if found.notes else [])])


def render_html(found: Comparison) -> str:
    """The page."""
    columns = ["", *found.labels]
    return render_page(
        "compare.html",
        title=", ".join(found.labels),
        columns=columns,
        figures=table_rows(found),
        notes=found.notes,
        loss=[_chart(found, "Training loss", "train/loss", height=340), _held_out(found)],
        charts=_charts(found),
        difference_columns=["", "key", *found.labels],
        differences=[[one.section, one.key, *map(_text, one.values)] for one in found.differences],
        planned_notes=_planned_notes(found),
        attempt_columns=["run", *HEAD],
        attempts=[
            [label, *attempt.row()]
            for label, run in zip(found.labels, found.runs, strict=True)
            for attempt in run.attempts
        ],
    )


def _charts(found: Comparison) -> list[dict[str, Any]]:
    runs = {label: run.metrics for label, run in zip(found.labels, found.runs, strict=True)}
    small = [_chart(found, title, key, divisor=divisor, from_zero=True) for title, key, _, divisor in SMALL]
    lr = _chart(found, "Learning rate", "train/lr", style="line", from_zero=True)
    return [one for one in [*evaluation_charts(runs), lr, *small] if one["curves"]]


def _chart(
    found: Comparison,
    title: str,
    key: str,
    *,
    style: Any = "noisy",
    divisor: float = 1,
    height: int = 240,
    from_zero: bool = False,
) -> dict[str, Any]:
    named = enumerate(zip(found.labels, found.runs, strict=True))
    curves = [
        axis_curve(label, COLORS[index % len(COLORS)], run.metrics, key, style, divisor)
        for index, (label, run) in named
    ]
    return line_chart(title, curves, height=height, clip_spikes=style == "noisy", from_zero=from_zero)


def _held_out(found: Comparison) -> dict[str, Any]:
    return _chart(found, "Held-out loss", "eval/loss", style="points", height=280)


def _planned_notes(found: Comparison) -> list[str]:
    """What the plans say about their figures, each once."""
    named = zip(found.labels, found.runs, strict=True)
    by_note: dict[str, list[str]] = {}
    for label, run in named:
        for note in run.planned_notes:
            by_note.setdefault(note, []).append(label)
    return [f"{', '.join(labels)}: {note}" for note, labels in by_note.items()]


def _row(label: str, values: Sequence[object], show: Callable[[Any], str]) -> Cells:
    is_shown = (value not in (None, []) and (not isinstance(value, float) or is_number(value)) for value in values)
    return [label, *(show(value) if known else _NONE for value, known in zip(values, is_shown, strict=True))]


def _planned(figure: str, values: Mapping[str, float | None] | None) -> str:
    if values is None or values["planned"] is None:
        return _NONE
    planned, measured, difference = Row(figure, "", values["planned"], values["measured"]).texts
    return f"{planned} / {measured}" + (f" ({difference})" if difference != _NONE else "")


def _text(value: Any) -> str:
    if value is None:
        return _NONE
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _clipped(texts: Cells) -> Cells:
    """Short texts that still differ: where long ones begin alike, what follows is shown."""
    texts = [" ".join(text.split()) for text in texts]
    known = {text for text in texts if text != _NONE}
    alike = len(os.path.commonprefix(list(known))) if len(known) > 1 and max(map(len, known)) > _WIDEST else 0
    start = alike - 8 if alike > _WIDEST // 2 else 0
    cut = [("…" + text[start:] if start and text != _NONE else text) for text in texts]
    return [text if len(text) <= _WIDEST else text[: _WIDEST - 1] + "…" for text in cut]
