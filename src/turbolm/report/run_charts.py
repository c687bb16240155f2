"""The charts of a run, from the lines of its metrics. Torch-free."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from turbolm.report.charts import COLORS, Curve, Style, curve, line_chart
from turbolm.report.metrics import AXES, SEC, STEP_SEC, Line, is_number

Chart = dict[str, Any]
Value = Callable[[Line], object]
Level = tuple[str, float]  # the name and height of a dashed line

GIB = 2**30
_LR_OF_KIND = "train/lr/"  # before a kind of parameter that has a learning rate of its own
_SETS = {"eval/loss/": "", "eval/average_loss/": ", averaged weights"}  # before and after a validation set's name
_TASK_FIGURES = {"bits_per_byte": "Bits per byte of the right answers", "accuracy": "Accuracy"}  # eval/TASK/FIGURE
SMALL: tuple[tuple[str, str, str, float], ...] = (  # title, key, color, divisor
    ("Gradient norm", "train/grad_norm", "orange", 1),
    ("Router loss", "train/router_loss", "violet", 1),
    ("Tokens per second", "perf/tokens_per_sec", "green", 1),
    ("Seconds per step", STEP_SEC, "teal", 1),
    ("Model FLOPs utilization (MFU)", "perf/mfu", "green", 1),
    ("Peak memory of a process, GiB", "memory/peak_bytes", "brown", GIB),
    ("Padding, share of all positions", "data/padding_fraction", "blue", 1),
    ("Wait for the slowest rank, share of a step", "perf/slowest_cost", "red", 1),
)
_BESIDE: dict[str, tuple[tuple[str, str, str, Style], ...]] = {  # more curves of a chart, where they are known
    "Seconds per step": (
        ("processor time of rank 0", "perf/cpu_sec", "brown", "line"),
        ("compile", "perf/compile_sec", "red", "points"),
    ),
}


def run_charts(metrics: Sequence[Line], anomalies: Sequence[Line], levels: Mapping[str, Level]) -> list[Chart]:
    """The charts of a run's history, that of the loss first, or of some lines that are new in it.

    `metrics` have their times (`add_times`). `anomalies` are marked on the loss. `levels` are dashed lines by the title
    of their chart.
    """
    resumes = _resumes(metrics)
    some = metrics[:: max(1, len(metrics) // 1000)]
    kinds = dict.fromkeys(key for line in some for key in line if key.startswith(_LR_OF_KIND))
    lrs = [axis_curve("learning rate", "violet", metrics, "train/lr")]
    colors = dict(zip(kinds, COLORS, strict=False))
    lrs += [axis_curve(f"of {key.removeprefix(_LR_OF_KIND)}", color, metrics, key) for key, color in colors.items()]
    charts = [
        loss_chart(metrics, anomalies, levels.get("Loss"), resumes),
        *evaluation_charts({"": metrics}),
        line_chart("Learning rate", lrs, resumes=resumes, from_zero=True),
    ]
    for title, key, color, divisor in SMALL:
        name = title[0].lower() + title[1:].partition(",")[0]
        curves = [axis_curve(name, color, metrics, key, "noisy", divisor)]
        curves += [axis_curve(name, color, metrics, key, style) for name, key, color, style in _BESIDE.get(title, ())]
        if curves[0]["x"] or title == "Gradient norm":
            curves += _level(levels.get(title), metrics)
            charts.append(line_chart(title, curves, resumes=resumes, from_zero=True, clip_spikes=True))
    return [*charts, *_expert_charts(metrics, resumes)]


def loss_chart(metrics: Sequence[Line], anomalies: Sequence[Line], level: Level | None, resumes: Curve | None) -> Chart:
    """Training loss of each step, held-out loss, and the steps that were not applied."""
    curves = [axis_curve("train", "blue", metrics, "train/loss", "noisy")]
    curves.append(axis_curve("held out", "orange", metrics, "eval/loss", "points"))
    curves.append(axis_curve("held out, averaged weights", "green", metrics, "eval/average_loss", "points"))
    curves += _level(level, metrics)
    curves.append(_anomaly_marks(metrics, anomalies))
    return line_chart("Loss", curves, resumes=resumes, height=340, clip_spikes=True)


def evaluation_charts(runs: Mapping[str, Sequence[Line]]) -> list[Chart]:
    """The losses of validation sets (`eval/loss/NAME`) and the scores of tasks (`eval/NAME/FIGURE`) of a run, also
    those of averaged weights (`eval/average_loss/NAME`, `eval/average/NAME/FIGURE`).

    One run: a chart with all sets, and one for each figure of tasks. Several, by name: a chart for each set or task.
    """
    keys = dict.fromkeys(
        key for metrics in runs.values() for line in metrics if "train/loss" not in line for key in line
    )
    charts: dict[str, list[Curve]] = {}
    for key in keys:
        what, name = _evaluated(key)
        for run, metrics in runs.items() if name else ():
            is_one = len(runs) == 1
            curves = charts.setdefault(what if is_one else f"{what}: {name}", [])
            color = COLORS[len(curves) % len(COLORS)]
            curves.append(axis_curve(name if is_one else run, color, metrics, key, "points"))
    made = [line_chart(title, curves) for title, curves in charts.items()]
    return [one for one in made if one["curves"]]


def _evaluated(key: str) -> tuple[str, str]:
    """What a key of metrics.jsonl measures, and of which set or task; no name where it is of none."""
    for before, after in _SETS.items():
        if key.startswith(before):
            return "Held-out loss by set", key.removeprefix(before) + after
    name, _, figure = key.removeprefix("eval/").rpartition("/")
    if name.startswith("average/"):
        name = f"{name.removeprefix('average/')}, averaged weights"
    return (_TASK_FIGURES[figure], name) if key.startswith("eval/") and figure in _TASK_FIGURES else ("", "")


def axis_curve(
    name: str, color: str, metrics: Sequence[Line], key: str | Value, style: Style = "line", divisor: float = 1
) -> Curve:
    """The curve of a key, or of what a function finds in a line, by tokens, steps and the time of training."""
    value = key if callable(key) else lambda line: line.get(key)
    rows = [(line, found / divisor) for line in metrics if is_number(found := value(line)) and _has_place(line)]
    axes = ["steps", "time"] if any(line.get(SEC) for line, _ in rows) else ["steps"]
    others = {axis: [float(line[AXES[axis]]) for line, _ in rows] for axis in axes}
    return curve(name, color, [(float(line["tokens_seen"]), found) for line, found in rows], style, others)


def _has_place(line: Line) -> bool:
    return is_number(line.get("tokens_seen"))


def _level(level: Level | None, metrics: Sequence[Line]) -> list[Curve]:
    trained = [line for line in metrics if "train/loss" in line]
    if level is None or not trained:
        return []
    name, height = level
    return [axis_curve(name, "muted", [trained[0], trained[-1]], lambda _: height, "dashed")]


def _resumes(metrics: Sequence[Line]) -> Curve:
    """Where an attempt resumed an earlier one."""
    trained = [line for line in metrics if "train/loss" in line]
    pairs = zip(trained, trained[1:], strict=False)
    firsts = [after for before, after in pairs if before["attempt"] != after["attempt"]]
    texts = [f"attempt {line['attempt']}" for line in firsts]
    return axis_curve("resumes", "muted", firsts, lambda _: 0, "marks") | {"texts": texts}


def _anomaly_marks(metrics: Sequence[Line], anomalies: Sequence[Line]) -> Curve:
    """A mark for each step that was not applied, at its loss, or at the loss before it where its own is not finite."""
    trained = [line for line in metrics if is_number(line.get("train/loss"))]
    steps = [line["step"] for line in trained]
    places, texts = [], []
    for event in anomalies:
        before = bisect_right(steps, event["step"])
        near = trained[max(0, before - 1)] if trained else {}
        loss = event.get("anomaly/loss")
        place: Line = {"step": event["step"], "tokens_seen": event.get("tokens_seen", near.get("tokens_seen"))}
        place |= {SEC: near.get(SEC, 0.0), "loss": loss if is_number(loss) else near.get("train/loss")}
        if is_number(place["loss"]) and _has_place(place):
            places.append(place)
            texts.append(f"{event['step']} {str(event.get('anomaly/decision', ''))[:20]}")
    order = sorted(range(len(places)), key=lambda index: places[index]["tokens_seen"])
    made = axis_curve("not applied", "red", [places[index] for index in order], "loss", "marks")
    return made | {"texts": [texts[index] for index in order]}


def _expert_charts(metrics: Sequence[Line], resumes: Curve) -> list[Chart]:
    """The busiest and the idlest experts of all layers."""
    curves = [
        axis_curve("busiest of any layer", "red", metrics, lambda line: _over(line, "experts/max_share", max), "noisy"),
        axis_curve(
            "busiest, mean of layers",
            "orange",
            metrics,
            lambda line: _over(line, "experts/max_share", statistics.fmean),
            "noisy",
        ),
        axis_curve("idlest of any layer", "blue", metrics, lambda line: _over(line, "experts/min_share", min), "noisy"),
    ]
    if not curves[0]["x"]:
        return []
    return [line_chart("Expert load, share of a layer's tokens", curves, resumes=resumes, from_zero=True)]


def _over(line: Line, key: str, combine: Callable[[list[float]], float]) -> float | None:
    shares = line.get(key)
    found = [share for share in shares if is_number(share)] if isinstance(shares, list) else []
    return combine(found) if found else None
