"""A report as text: a table of the nodes, and what is wrong. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turbolm.doctor.compare import describe_rate
from turbolm.units import align_columns, format_bytes


def render_report(report: Mapping[str, Any]) -> str:
    """The slowest device and link of each node, then the findings, worst first."""
    rows = [("NODE", "RANKS", "MATMUL", "MEMORY", "SENDS", "RECEIVES", "CLOCK", "DISKS")]
    for node in report["nodes"]:
        ranks = node["ranks"]
        offset = node["clock_offset_sec"]
        disks = [f"{name} {_rate(disk['write_bytes_per_sec'])}" for name, disk in (node["disks"] or {}).items()]
        rows.append(
            (
                node["host"],
                str(len(ranks)),
                _slowest(ranks, "matmul_flops"),
                _slowest(ranks, "memory_bytes_per_sec"),
                _links(report, "from", "to", node["host"]),
                _links(report, "to", "from", node["host"]),
                "-" if offset is None else f"{offset * 1e3:+.1f} ms",
                ", ".join(disks) or "-",
            )
        )
    lines = [align_columns(rows)]
    lines += describe_findings(report) or ["nothing stands out"]
    return "\n".join(lines)


def describe_findings(report: Mapping[str, Any], *, only_failures: bool = False) -> list[str]:
    """One line for each finding: where, what, and what to do."""
    lines = []
    for one in sorted(report["findings"], key=lambda finding: finding["severity"] != "fail"):
        if only_failures and one["severity"] != "fail":
            continue
        where = one["host"] if one["gpu"] is None else f"{one['host']} GPU {one['gpu']}"
        lines.append(f"{one['severity'].upper()}  {where}: {one['message']}; {one['advice']}")
    return lines


def _slowest(ranks: Any, key: str) -> str:
    values = [rank[key] for rank in ranks if rank[key]]
    return describe_rate(key, min(values)) if values else "-"


def _links(report: Mapping[str, Any], end: str, other: str, host: str) -> str:
    rates = [link["bytes_per_sec"] for link in report["links"] if link[end] == host != link[other]]
    return f"{_rate(min(rates))} to {_rate(max(rates))}" if rates else "-"


def _rate(bytes_per_sec: float | None) -> str:
    return "-" if bytes_per_sec is None else f"{format_bytes(bytes_per_sec)}/s"
