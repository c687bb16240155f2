"""The data of the charts, as assets/charts.js draws them. Torch-free."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Point = tuple[float, float]
Curve = dict[str, Any]
Style = Literal["line", "noisy", "dashed", "points", "marks"]
Axes = Mapping[str, Sequence[float]]

COLORS = ("blue", "orange", "green", "violet", "red", "teal", "pink", "brown")  # of page.css, for both themes
MAX_POINTS = 800  # of a curve: about as many as a chart has columns
_CLIP_SHARE = 0.97  # of the values: twice the one that so many do not exceed is the top of a chart that clips spikes


def line_chart(
    title: str,
    curves: Sequence[Curve],
    *,
    x_label: str = "tokens seen",
    height: int = 240,
    resumes: Curve | None = None,
    clip_spikes: bool = False,
    from_zero: bool = False,
    logarithmic: str = "",
) -> dict[str, Any]:
    """A chart of curves over one x axis, or over one of several that the page lets choose.

    `resumes` are marked by vertical lines. `clip_spikes` keeps a few outliers from flattening the rest: what is above
    the chart is marked at its upper edge. `from_zero` starts the y axis at 0. `logarithmic` names axes, such as "x" or
    "xy": x doubles, y grows by powers of ten.
    """
    drawn = [one for one in curves if one["x"]]
    heights = sorted(value for one in drawn if one["style"] != "marks" for value in one["y"])
    return {
        "title": title,
        "curves": drawn,
        "x_label": x_label,
        "height": height,
        "resumes": resumes or curve("resumes", "muted", []),
        "clip_above": 2 * heights[int(_CLIP_SHARE * (len(heights) - 1))] if clip_spikes and heights else None,
        "from_zero": from_zero,
        "logarithmic": logarithmic,
    }


def curve(
    name: str,
    color: str,
    points: Sequence[Point],
    style: Style = "line",
    others: Axes | None = None,
    texts: Sequence[str] = (),
) -> Curve:
    """One curve, thinned to what a screen shows; x ascends.

    `others` are the places of the points on other axes that the page lets choose (`steps`, `time`), `texts` what stands
    at each of the `marks`. The page smooths `noisy` curves; where one is thinned, the means of equal stretches of its
    points are smoothed, not the lowest and highest values that are left of it.
    """
    kept = range(len(points)) if style == "marks" else kept_indices([value for _, value in points])
    others = {axis: places for axis, places in (others or {}).items() if len(places) == len(points)}
    found = {
        "name": name,
        "color": color,
        "style": style,
        "x": [points[index][0] for index in kept],
        "y": [_short(points[index][1], 5) for index in kept],
        "others": {axis: [_short(places[index], 8) for index in kept] for axis, places in others.items()},
    }
    if texts:
        found["texts"] = list(texts)
    if style == "noisy" and len(kept) < len(points):
        found["mean"] = _means(points, others)
    return found


def kept_indices(values: Sequence[float], limit: int = MAX_POINTS) -> list[int]:
    """At most about `limit` indices: ends, and the lowest and highest value of each stretch, so that spikes stay."""
    if len(values) <= limit:
        return list(range(len(values)))
    size = math.ceil(2 * len(values) / limit)
    kept = {0, len(values) - 1}
    for start in range(0, len(values), size):
        stretch = range(start, min(start + size, len(values)))
        kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return sorted(kept)


def _means(points: Sequence[Point], others: Axes) -> Curve:
    """The mean of each stretch of `size` points, at its last one."""
    size = math.ceil(len(points) / MAX_POINTS)
    starts = range(0, len(points), size)
    ends = [min(start + size, len(points)) - 1 for start in starts]
    return {
        "size": size,
        "x": [points[end][0] for end in ends],
        "y": [_short(statistics.fmean(value for _, value in points[start : start + size]), 5) for start in starts],
        "others": {axis: [_short(places[end], 8) for end in ends] for axis, places in others.items()},
    }


def _short(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def dot_chart(title: str, rows: Mapping[str, Sequence[float]], unit: str) -> dict[str, Any]:
    """A chart with a row of dots for each name, as macros.html draws it."""
    every = [value for values in rows.values() for value in values]
    return {
        "title": title,
        "rows": dict(rows),
        "colors": COLORS,
        "unit": unit,
        "low": min(every, default=0),
        "high": max(every, default=0),
    }
