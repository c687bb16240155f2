"""Read a profiler's Chrome trace: what share of the steps' time each kind of work takes. Torch-free.

On a GPU the time is the device's: kernels of different kinds overlap, so each moment counts once, for the first kind in
the order of `KINDS` that runs then. Communication therefore shows only where nothing else hides it. On a CPU the time
is the main thread's. The shares add up to one.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAIT = "turbolm: wait for other ranks"  # the range in which the host waits for a collective
OPTIMIZER, ATTENTION, MATRIX, COMMUNICATION, OTHER, COPIES = KINDS = (
    "optimizer", "attention", "matrix products", "communication", "other operators", "copies",
)  # fmt: skip
IDLE, HOST = "idle", "host"

# The first that matches counts. Names of operators on the host (aten::mm) and of kernels on GPUs. Foreach kernels are
# an optimizer's, or of the gradient norm; other optimizers are found by the range that torch.optim records.
NAMES = (
    (COMMUNICATION, r"^nccl|ncclDev|ncclKernel|^c10d::|^gloo:|nvshmem|^_?c10d_functional|" + re.escape(WAIT)),
    (OPTIMIZER, r"^Optimizer\.step#|multi_tensor_apply|_fused_adam"),
    (ATTENTION, r"scaled_dot_product|_sdpa_|flash|fmha|flex_attention|varlen_attn|mem_eff"),
    (
        MATRIX,
        r"^aten::(mm|addmm|bmm|baddbmm|matmul|linear|_scaled_mm|_grouped_mm)$|gemm|gemv|nvjet|splitKreduce|"
        r"triton_tem_\w*mm|cutlass|^mkl(dnn)?_",
    ),
)
_TABLE = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in NAMES)
_HOST_WAITS = re.compile(r"^cu(da)?\w*Synchronize")
_OWN_STEP = "ProfilerStep#"  # how torch.profiler names a step

Interval = tuple[float, float]


@dataclass(frozen=True)
class Summary:
    """Shares of the profiled steps' time, by kind in the order of `KINDS` and then "idle" (GPU) or "host" (CPU).

    On a GPU, `communication` counts hidden communication as well, and `host_waits` the share of the time in which the
    host waits for the device or for other ranks.
    """

    num_steps: int
    step_sec: float
    shares: dict[str, float]
    on_gpu: bool
    communication: float
    host_waits: float

    def __str__(self) -> str:
        parts = [f"{name} {share:.1%}" for name, share in self.shares.items() if share >= 0.0005]
        if self.on_gpu:
            hidden = self.communication - self.shares[COMMUNICATION]
            parts += [f"(hidden communication {hidden:.1%}; the host waits {self.host_waits:.1%} of the time)"]
        where = "GPU" if self.on_gpu else "CPU, main thread"
        return f"{self.num_steps} steps of {self.step_sec:.3g} s, {where}: " + ", ".join(parts)


def classify(name: str) -> str:
    """Return the kind of an operator or kernel by its name."""
    return next((kind for kind, pattern in _TABLE if pattern.search(name)), OTHER)


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Return the events of a Chrome trace, compressed by gzip."""
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def summarize(events: Iterable[Mapping[str, Any]]) -> Summary:
    """Return where the time of the profiled steps went. Raises ValueError if the trace has no step."""
    spans = [event for event in events if event.get("ph") == "X"]
    steps = [event for event in spans if _is_step(event) and event["cat"] == "user_annotation"]
    if not steps:
        raise ValueError("the trace has no step")
    main = steps[0]["tid"]
    window = (min(_span(step)[0] for step in steps), max(_span(step)[1] for step in steps))
    on_host = [event for event in spans if event["tid"] == main and not _is_step(event)]
    kernels = [event for event in spans if event["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
    by_kind = _kernels_by_kind(kernels, spans) if kernels else _operators_by_kind(on_host)
    by_kind = {kind: _clipped(_union(by_kind[kind]), window) for kind in KINDS}
    waits = [_span(event) for event in on_host if event["name"] == WAIT or _HOST_WAITS.match(event["name"])]
    total, taken, shares = window[1] - window[0], list[Interval](), dict[str, float]()
    for kind, intervals in by_kind.items():
        together = _union([*taken, *intervals])
        shares[kind] = (_length(together) - _length(taken)) / total
        taken = together
    shares[IDLE if kernels else HOST] = 1 - _length(taken) / total
    return Summary(
        num_steps=len(steps),
        step_sec=total / len(steps) / 1e6,
        shares=shares,
        on_gpu=bool(kernels),
        communication=_length(by_kind[COMMUNICATION]) / total,
        host_waits=_length(_clipped(_union(waits), window)) / total,
    )


def _operators_by_kind(on_host: list[Mapping[str, Any]]) -> dict[str, list[Interval]]:
    """All that is recorded on the main thread: "other" also covers operators within operators, and counts last."""
    found = defaultdict[str, list[Interval]](list)
    for event in on_host:
        if event["cat"] in ("cpu_op", "user_annotation"):
            found[classify(event["name"])].append(_span(event))
    return found


def _kernels_by_kind(kernels: list[Mapping[str, Any]], spans: list[Mapping[str, Any]]) -> dict[str, list[Interval]]:
    """What ran on the device; a kernel that was launched within an optimizer's step belongs to the optimizer."""
    steps = _union([_span(event) for event in spans if event["name"].startswith("Optimizer.step#")])
    launched_at = {
        event["args"]["correlation"]: event["ts"]
        for event in spans
        if event["cat"] in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    found = defaultdict[str, list[Interval]](list)
    for event in kernels:
        kind = classify(event["name"]) if event["cat"] == "kernel" else COPIES
        at = launched_at.get(event.get("args", {}).get("correlation"))
        if at is not None and kind != COMMUNICATION and any(start <= at < end for start, end in steps):
            kind = OPTIMIZER
        found[kind].append(_span(event))
    return found


def _is_step(event: Mapping[str, Any]) -> bool:
    return str(event["name"]).startswith(_OWN_STEP)


def _span(event: Mapping[str, Any]) -> Interval:
    """Return start and end in microseconds."""
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the same time as intervals that neither touch nor overlap, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def _clipped(intervals: Iterable[Interval], window: Interval) -> list[Interval]:
    first, last = window
    return [(max(start, first), min(end, last)) for start, end in intervals if end > first and start < last]


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)
