"""Line charts as SVG, written by hand so that a report needs no library and no network. Torch-free."""

from __future__ import annotations

import json
import math
import statistics
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from turbolm.units import format_count

Point = tuple[float, float]

MAX_POINTS = 1200  # more than a screen has columns

# Colours by role, for both themes; the report's page uses them too.
THEME_CSS = """
{root} { --ink: #1c2128; --muted: #667080; --grid: #e4e7ec; --page: #f6f7f9; --card: #ffffff; --line: #dfe3e8;
  --blue: #2563eb; --orange: #d9730d; --green: #0d8a5f; --violet: #7c3aed;
  --red: #d1293d; --teal: #0891b2; --pink: #c2268f; --brown: #8a5a2b; }
@media (prefers-color-scheme: dark) {
  {root} { --ink: #e6e9ee; --muted: #98a2b0; --grid: #2b313a; --page: #14171c; --card: #1c2027; --line: #2f353f;
    --blue: #6ea0ff; --orange: #f0a04b; --green: #4cc79a; --violet: #b191ff;
    --red: #ff7b86; --teal: #4fc3dc; --pink: #f58ad0; --brown: #cfa377; }
}
"""
CHART_CSS = """
.chart { display: block; width: 100%; height: auto; font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; }
.chart text { fill: var(--muted); font-variant-numeric: tabular-nums; }
.chart .title { fill: var(--ink); font-size: 14px; font-weight: 600; }
.chart .grid { stroke: var(--grid); }
.chart .axis { stroke: var(--muted); stroke-opacity: .6; }
.chart .restart { stroke: var(--muted); stroke-dasharray: 2 4; stroke-opacity: .8; }
.chart .cursor { stroke: var(--muted); visibility: hidden; }
.chart path, .chart .key { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.chart .blue { stroke: var(--blue); } .chart .orange { stroke: var(--orange); }
.chart .green { stroke: var(--green); } .chart .violet { stroke: var(--violet); }
.chart .red { stroke: var(--red); } .chart .teal { stroke: var(--teal); }
.chart .pink { stroke: var(--pink); } .chart .brown { stroke: var(--brown); }
.chart .muted { stroke: var(--muted); }
.chart .faint { stroke-opacity: .3; stroke-width: 1.1; } .chart .dashed { stroke-dasharray: 6 4; stroke-width: 1.3; }
.chart .key.faint { stroke-opacity: .45; }
.chart circle { fill: var(--card); stroke-width: 1.8; }
.chart circle.dashed { stroke-dasharray: none; }
"""


@dataclass(frozen=True)
class Series:
    """One curve. `style` holds class names of `CHART_CSS`: a colour, and `faint` or `dashed`."""

    name: str
    style: str
    points: Sequence[Point]
    markers: bool = False


@dataclass(frozen=True)
class Dots:
    """One row of a dot chart: a value for each run."""

    name: str
    style: str
    values: Sequence[float]


@dataclass(frozen=True)
class _Frame:
    """Where values come to lie, in the units of the view box."""

    x: tuple[float, float]
    y: tuple[float, float]
    left: float
    top: float
    right: float
    bottom: float

    def place(self, point: Point) -> Point:
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        up = (point[1] - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str = "tokens",
    restarts: Sequence[float] = (),
    width: int = 760,
    height: int = 300,
    clip_spikes: bool = False,
    from_zero: bool = False,
    standalone: bool = False,
) -> str:
    """The curves over a common x axis.

    `restarts` are marked by vertical lines. `clip_spikes` keeps a few outliers from flattening the rest; `from_zero`
    starts the y axis at 0. `standalone` makes a complete picture with its own colours and without hover data.
    """
    drawn = [Series(one.name, one.style, thin(one.points), one.markers) for one in series if one.points]
    body = [f'<text class="title" x="16" y="24">{escape(title)}</text>']
    if not drawn:
        body.append(f'<text x="{width / 2}" y="{height / 2}" text-anchor="middle">nothing logged yet</text>')
        return _document(title, body, width, height, standalone, None)
    y_ticks = _ticks(*_y_range(drawn, clip_spikes, from_zero), 5)
    labels = tick_labels(y_ticks)
    left = 26 + 7 * max(len(label) for label in labels)
    legend_width = sum(_legend_width(one) for one in drawn) if len(drawn) > 1 else 0
    beside_title = 16 + 8.2 * len(title) + legend_width < width
    legend = _legend_lines(drawn, width - 36)
    top = 46 if beside_title else 50 + 18 * len(legend)
    frame = _Frame(_x_range(drawn), (y_ticks[0], y_ticks[-1]), left, top, width - 20, height - 42)
    body += _axes(frame, y_ticks, labels, x_label)
    if legend_width and beside_title:
        body += _legend(drawn, width - 20 - legend_width, top - 22)
    elif legend_width:
        for index, line in enumerate(legend):
            body += _legend(line, 16, 46 + 18 * index)
    identity = f"clip-{zlib.crc32(title.encode()):08x}"  # the charts of one page have different titles
    body.append(
        f'<clipPath id="{identity}"><rect x="{frame.left:.1f}" y="{frame.top - 3}" '
        f'width="{frame.right - frame.left + 5:.1f}" height="{frame.bottom - frame.top + 6}"/></clipPath>'
    )
    body.append(f'<g clip-path="url(#{identity})">')
    for at in restarts:
        across = frame.place((at, frame.y[0]))[0]
        body.append(
            f'<line class="restart" x1="{across:.1f}" x2="{across:.1f}" y1="{frame.top}" y2="{frame.bottom}">'
            "<title>resumed from a checkpoint</title></line>"
        )
    for one in drawn:
        body += _curve(one, frame)
    body.append("</g>")
    return _document(title, body, width, height, standalone, None if standalone else _hover_data(drawn, frame, x_label))


def dot_chart(title: str, rows: Sequence[Dots], *, x_label: str, width: int = 560) -> str:
    """A row of dots for each name with a bar at their mean, and a line down from the first row's mean."""
    height, left = 92 + 26 * len(rows), 30 + 7 * max((len(row.name) for row in rows), default=0)
    body = [f'<text class="title" x="16" y="24">{escape(title)}</text>']
    every = [value for row in rows for value in row.values]
    if not every:
        body.append(f'<text x="{width / 2}" y="{height / 2}" text-anchor="middle">no run got there yet</text>')
        return _document(title, body, width, height, False, None)
    low, high = min(every), max(every)
    margin = (high - low) * 0.08 or abs(low) * 0.05 or 1
    ticks = _ticks(low - margin, high + margin, 4)
    frame = _Frame((ticks[0], ticks[-1]), (0, len(rows)), left, 40, width - 24, height - 46)
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        across = frame.place((tick, 0))[0]
        body.append(
            f'<line class="grid" x1="{across:.1f}" x2="{across:.1f}" y1="{frame.top}" y2="{frame.bottom}"/>'
            f'<text x="{across:.1f}" y="{frame.bottom + 17:.1f}" text-anchor="middle">{label}</text>'
        )
    if rows[0].values:
        across = frame.place((statistics.fmean(rows[0].values), 0))[0]
        body.append(f'<line class="restart" x1="{across:.1f}" x2="{across:.1f}" y1="{frame.top}" y2="{frame.bottom}"/>')
    for index, row in enumerate(rows):
        level = frame.place((0, len(rows) - index - 0.5))[1]
        style = row.style.replace("dashed", "")  # a dot is too small for it, and has its name beside it
        body.append(f'<text x="{left - 12}" y="{level + 4:.1f}" text-anchor="end">{escape(row.name)}</text>')
        if row.values:
            mean = frame.place((statistics.fmean(row.values), 0))[0]
            ends = f'x1="{mean:.1f}" x2="{mean:.1f}" y1="{level - 9:.1f}" y2="{level + 9:.1f}"'
            body.append(f'<line class="key {style}" {ends}/>')
        for value in row.values:
            body.append(
                f'<circle class="{style}" cx="{frame.place((value, 0))[0]:.1f}" cy="{level:.1f}" r="4">'
                f"<title>{escape(row.name)} {value:.5g}</title></circle>"
            )
    middle = (frame.left + frame.right) / 2
    body.append(f'<text x="{middle:.1f}" y="{frame.bottom + 36}" text-anchor="middle">{escape(x_label)}</text>')
    return _document(title, body, width, height, False, None)


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about `limit` points: of every stretch the lowest and the highest, so that spikes stay."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        low, high = min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])
        kept += sorted({low, high})
    return [points[0], *(point for point in kept if point not in (points[0], points[-1])), points[-1]]


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


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Ticks of one axis with the same number of decimals."""
    largest = max(abs(tick) for tick in ticks)
    step = ticks[1] - ticks[0]
    if largest >= 10_000:
        return [format_count(tick) for tick in ticks]
    if largest < 0.001:
        return [f"{tick:.{_mantissa_decimals(step, tick)}e}".replace("e-0", "e-") if tick else "0" for tick in ticks]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if not float(step * 10**decimals).is_integer() and round(step * 10**decimals, 6) % 1:
        decimals += 1
    return [f"{tick:.{decimals}f}" for tick in ticks]


def _mantissa_decimals(step: float, tick: float) -> int:
    return max(0, math.floor(math.log10(abs(tick)) + 1e-9) - math.floor(math.log10(step) + 1e-9))


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers that enclose the range, about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]  # 0.3, not 0.30000000000000004


def _x_range(series: Sequence[Series]) -> Point:
    low = min(one.points[0][0] for one in series)
    high = max(one.points[-1][0] for one in series)
    low = 0 if low < 0.1 * high else low
    return (low, high) if high > low else (low - 1, low + 1)


def _y_range(series: Sequence[Series], clip_spikes: bool, from_zero: bool) -> Point:
    heights = sorted(value for one in series for _, value in one.points)
    low, high = 0 if from_zero else heights[0], heights[-1]
    if clip_spikes:
        high = min(high, 2 * heights[int(0.97 * (len(heights) - 1))])
    if high <= low:
        margin = abs(low) * 0.1 or 1
        return low if from_zero else low - margin, low + margin
    return low, high


def _axes(frame: _Frame, y_ticks: Sequence[float], labels: Sequence[str], x_label: str) -> list[str]:
    parts = []
    for tick, label in zip(y_ticks, labels, strict=True):
        level = frame.place((frame.x[0], tick))[1]
        parts.append(
            f'<line class="grid" x1="{frame.left:.1f}" x2="{frame.right}" y1="{level:.1f}" y2="{level:.1f}"/>'
            f'<text x="{frame.left - 8:.1f}" y="{level + 4:.1f}" text-anchor="end">{label}</text>'
        )
    x_ticks = [tick for tick in _ticks(*frame.x, 6) if frame.x[0] <= tick <= frame.x[1]]
    for tick in x_ticks:
        across = frame.place((tick, frame.y[0]))[0]
        anchor = "end" if across > frame.right - 12 else "middle"
        parts.append(
            f'<line class="axis" x1="{across:.1f}" x2="{across:.1f}" y1="{frame.bottom}" y2="{frame.bottom + 5}"/>'
            f'<text x="{across:.1f}" y="{frame.bottom + 19}" text-anchor="{anchor}">{format_count(tick)}</text>'
        )
    parts.append(
        f'<line class="axis" x1="{frame.left:.1f}" x2="{frame.right}" y1="{frame.bottom}" y2="{frame.bottom}"/>'
    )
    middle = (frame.left + frame.right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{frame.bottom + 36}" text-anchor="middle">{escape(x_label)}</text>')
    return parts


def _legend(series: Sequence[Series], start: float, level: float) -> list[str]:
    parts = []
    for one in series:
        line = f'x1="{start + 2:.1f}" x2="{start + 21:.1f}" y1="{level - 4}" y2="{level - 4}"'
        parts.append(
            f'<line class="key {one.style}" {line}/><text x="{start + 28:.1f}" y="{level}">{escape(one.name)}</text>'
        )
        start += _legend_width(one)
    return parts


def _legend_lines(series: Sequence[Series], width: float) -> list[list[Series]]:
    """As many in a line as there is room for."""
    lines: list[list[Series]] = [[]]
    for one in series:
        if lines[-1] and sum(map(_legend_width, [*lines[-1], one])) > width:
            lines.append([])
        lines[-1].append(one)
    return lines


def _legend_width(one: Series) -> float:
    return 44 + 7 * len(one.name)  # the mean width of a letter at this size; there is nothing to measure it with


def _curve(one: Series, frame: _Frame) -> list[str]:
    placed = [frame.place(point) for point in one.points]
    lines = " ".join(f"{across:.1f},{level:.1f}" for across, level in placed)
    parts = [f'<path class="{one.style}" d="M{lines}"/>']
    if one.markers or len(placed) == 1:
        for (across, level), (at, value) in zip(placed, one.points, strict=True):
            parts.append(
                f'<circle class="{one.style}" cx="{across:.1f}" cy="{level:.1f}" r="3">'
                f"<title>{escape(one.name)} {value:.4g} at {format_count(at)}</title></circle>"
            )
    return parts


def _hover_data(series: Sequence[Series], frame: _Frame, x_label: str) -> str:
    data = {
        "x": frame.x,
        "y": frame.y,
        "box": [round(frame.left, 1), frame.top, frame.right, frame.bottom],
        "label": x_label,
        "series": [
            {"name": one.name, "style": one.style, "points": [(at, float(f"{value:.5g}")) for at, value in one.points]}
            for one in series
        ],
    }
    # Inside a script element only "</" could end it early.
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _document(title: str, body: list[str], width: int, height: int, standalone: bool, hover: str | None) -> str:
    size = f'viewBox="0 0 {width} {height}"'
    if standalone:
        size += f' width="{width}" height="{height}"'
        style = THEME_CSS.replace("{root}", "svg") + CHART_CSS
        body = [f"<style>{style}</style>", f'<rect width="{width}" height="{height}" fill="var(--card)"/>', *body]
    svg = (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(title)}" {size}>'
        + "".join(body)
    )
    if hover is not None:
        svg += '<line class="cursor"/>'
    svg += "</svg>"
    return svg if hover is None else f'{svg}<script type="application/json">{hover}</script>'
