"""The data of the charts, as assets/charts.js draws them. Torch-free."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Point = tuple[float, float]
Curve = dict[str, Any]
Style = Literal["line", "faint", "dashed", "points"]

COLORS = ("blue", "orange", "green", "violet", "red", "teal", "pink", "brown")  # of page.css, for both themes
MAX_POINTS = 1200  # of a curve: more than most screens have columns
_SMOOTHED_FROM = 40  # with fewer points a smoothed curve adds nothing


def line_chart(
    title: str,
    curves: Sequence[Curve],
    *,
    x_label: str = "tokens seen",
    height: int = 240,
    resumes: Sequence[float] = (),
    clip_spikes: bool = False,
    from_zero: bool = False,
    logarithmic: str = "",
) -> dict[str, Any]:
    """A chart of curves over one x axis.

    `resumes` are marked by vertical lines. `clip_spikes` keeps a few outliers from flattening the rest. `from_zero`
    starts the y axis at 0. `logarithmic` names axes, such as "x" or "xy": x doubles, y grows by powers of ten.
    """
    drawn = [one for one in curves if one["x"]]
    heights = sorted(value for one in drawn for value in one["y"])
    return {
        "title": title,
        "curves": drawn,
        "x_label": x_label,
        "height": height,
        "resumes": list(resumes),
        "clip_above": 2 * heights[int(0.97 * (len(heights) - 1))] if clip_spikes and drawn else None,
        "from_zero": from_zero,
        "logarithmic": logarithmic,
    }


def curve(name: str, color: str, points: Sequence[Point], style: Style = "line") -> Curve:
    """One curve. Its points are thinned."""
    kept = thin(points)
    return {
        "name": name,
        "color": color,
        "style": style,
        "x": [at for at, _ in kept],
        "y": [float(f"{value:.5g}") for _, value in kept],
    }


def noisy_curves(name: str, color: str, points: Sequence[Point]) -> list[Curve]:
    """The value of each step, and a smoothed curve over it where there are enough steps."""
    if len(points) < _SMOOTHED_FROM:
        return [curve(name, color, points)]
    return [curve(f"{name}, each step", color, points, "faint"), curve(f"{name}, smoothed", color, smooth(points))]


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about `limit` points: the lowest and the highest of each stretch, so that spikes stay."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept = {points[0], points[-1]}
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept |= {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
    return sorted(kept)


def smooth(points: Sequence[Point], share: float = 0.03) -> list[Point]:
    """The mean of the middle half of a window around each point: it neither lags nor follows single spikes."""
    reach = round(len(points) * share / 2)
    result = []
    for index in range(0, len(points), max(1, len(points) // MAX_POINTS)):  # no more than are drawn
        near = min(reach, index, len(points) - 1 - index)  # symmetric at the ends too, where the curve is steep
        window = sorted(value for _, value in points[index - near : index + near + 1])
        quarter = len(window) // 4
        result.append((points[index][0], statistics.fmean(window[quarter : len(window) - quarter])))
    return result


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
