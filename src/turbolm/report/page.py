"""Render a page as one file that works offline: style, scripts and data inside. Torch-free.

Names and texts come from recipes, which anyone may have written. Jinja escapes every value, and the page's
Content-Security-Policy lets the browser run the page's own script only and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from turbolm.report.metrics import is_number
from turbolm.units import format_bytes, format_duration


def render_page(template: str, **values: Any) -> str:
    """The HTML text of a template of report/assets with these values."""
    style = _read("uPlot.min.css") + _read("page.css")
    script = f"/*! uPlot:\n{_read('uPlot.LICENSE')}\n*/\n{_read('uPlot.iife.min.js')}\n{_read('charts.js')}"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=PackageLoader("turbolm.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assets = {"style": Markup(style), "script": Markup(script), "script_digest": digest}
    return environment.get_template(template).render(**assets, **values)


def _read(asset: str) -> str:
    return (files("turbolm.report") / "assets" / asset).read_text(encoding="utf-8")


def format_value(key: str, value: object) -> str:
    """A value in the unit that its name ends with."""
    if value is None:
        return "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    if not is_number(value):
        return str(value)
    if key.endswith("_bytes"):
        return format_bytes(value)
    if key.endswith("_sec") and not key.endswith("per_sec"):
        return format_duration(value)
    if key.endswith("mfu"):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def format_rows(mapping: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and formatted values of a mapping, nested ones under dotted names."""
    rows: list[tuple[str, str]] = []
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            rows += format_rows(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", format_value(str(key), value)))
    return rows
