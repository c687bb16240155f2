"""The page of `turbolm plan --project --html`: strong and weak scaling, drawn. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from turbolm.errors import UserError
from turbolm.files import write_atomic
from turbolm.plan.projection import HEAD, SCALINGS, table_row
from turbolm.report.charts import curve, line_chart
from turbolm.report.page import render_page

Value = Callable[[Mapping[str, Any]], float | None]

_COLORS = {"strong": "blue", "weak": "orange"}
_DAY_SEC = 86_400


def write_projection(found: Mapping[str, Any], path: Path) -> None:
    """Draw `projections`, with the recipe's name and its GPU, to `path`. Raises UserError if it cannot be written."""
    text = render_page(
        "projection.html",
        title=f"{found['recipe']} on {found['gpu']}: projections",
        note=str(found["note"]).capitalize(),
        rates=found["rates"],
        assumptions=found["assumptions"],
        charts=[
            _chart("Tokens per second of each GPU", found, lambda one: one["tokens_per_sec"] / one["num_gpus"]),
            _chart("Model FLOPs utilization (MFU)", found, lambda one: one["mfu"]),
            _chart("Exposed communication, share of a step", found, lambda one: one["exposed_share"]),
            _chart("Days of training", found, lambda one: one["run_sec"] / _DAY_SEC, logarithmic="xy"),
        ],
        head=HEAD,
        tables=[(title.capitalize(), [_cells(one) for one in found[kind]]) for kind, title in SCALINGS.items()],
    )
    try:
        write_atomic(path, text)
    except OSError as error:
        raise UserError(f"--html: {path} cannot be written: {error.strerror or error}") from None


def _cells(one: Mapping[str, Any]) -> list[str]:
    """Return a row whose figures are not broken; the remark may be."""
    *figures, remark = table_row(one)
    return [*(text.replace(" ", "\N{NO-BREAK SPACE}") for text in figures), remark]


def _chart(title: str, found: Mapping[str, Any], value: Value, logarithmic: str = "x") -> dict[str, Any]:
    curves = [curve(f"{kind} scaling", color, _points(found[kind], value)) for kind, color in _COLORS.items()]
    is_linear = logarithmic == "x"
    return line_chart(title, curves, x_label="GPUs", from_zero=is_linear, logarithmic=logarithmic)


def _points(points: Sequence[Mapping[str, Any]], value: Value) -> list[tuple[float, float]]:
    """Return what is drawn: the numbers of GPUs on which the recipe runs and fits."""
    runs = (one for one in points if one["step_sec"] is not None and one["remark"] != "DOES NOT FIT")
    return [(float(one["num_gpus"]), float(y)) for one in runs if (y := value(one)) is not None]
