"""What nvidia-smi says of this node's GPUs: clocks, temperature, ECC errors, why they are throttled. Torch-free."""

from __future__ import annotations

from typing import Any

from turbolm.plan.machine import nvidia_smi

_STATE = {
    "index": "index",
    "name": "name",
    "driver_version": "driver",
    "temperature.gpu": "temperature_c",
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "sm_max_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "ecc.errors.uncorrected.volatile.total": "ecc_uncorrected",
    "ecc.errors.corrected.volatile.total": "ecc_corrected",
}
_ROWS = {"remapped_rows.failure": "rows_failed", "remapped_rows.pending": "rows_pending"}  # Ampere and later
# Not sw_power_cap, which is the usual state under load, nor gpu_idle. Drivers from 535 on call them "event reasons".
_REASONS = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
_PREFIXES = ("clocks_event_reasons", "clocks_throttle_reasons")
_YES = ("active", "yes", "1")


def read_gpus() -> list[dict[str, Any]]:
    """One record for each GPU; a value that the driver does not report is None. Empty where nvidia-smi fails."""
    rows = _query(list(_STATE))
    gpus: list[dict[str, Any]] = [
        {
            key: text if key in ("name", "driver") else _number(text)
            for key, text in zip(_STATE.values(), row, strict=True)
        }
        for row in rows
    ]
    for gpu, row in _beside(gpus, _query(list(_ROWS))):
        gpu |= {key: text.lower() in _YES for key, text in zip(_ROWS.values(), row, strict=True)}
    reasons: list[list[str]] = []
    for prefix in _PREFIXES:
        reasons = reasons or _query([f"{prefix}.{reason}" for reason in _REASONS])
    for gpu in gpus:
        gpu["throttled"] = None
    for gpu, row in _beside(gpus, reasons):
        gpu["throttled"] = [reason for reason, text in zip(_REASONS, row, strict=True) if text.lower() in _YES]
    return gpus


def _query(fields: list[str]) -> list[list[str]]:
    """The values of each GPU; empty where this driver does not know one of the fields."""
    lines = nvidia_smi(f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits").splitlines()
    rows = [[value.strip() for value in line.split(",")] for line in lines]
    return [row for row in rows if len(row) == len(fields)]


def _beside(gpus: list[dict[str, Any]], rows: list[list[str]]) -> list[tuple[dict[str, Any], list[str]]]:
    return list(zip(gpus, rows, strict=True)) if len(rows) == len(gpus) else []


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A], [Not Supported]
        return None
