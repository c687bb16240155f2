"""Rates of one rank's device: matrix products, and memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_SEC = {"cpu": 0.3, "cuda": 1.5}  # long enough for a GPU to reach the clocks, and the heat, that it trains at
_SIDE = {"cpu": 512, "cuda": 8192}  # of the square matrices
_COPY_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}  # larger than the caches


def matmul_flops(device: torch.device) -> float:
    """FLOP/s of a square matrix product: bf16 on a GPU (fp16 before Ampere), fp32 on a CPU."""
    side = _SIDE[device.type]
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 * _calls_per_sec(lambda: torch.mm(a, b, out=out), device)


def memory_rate(device: torch.device) -> float:
    """Bytes per second that a copy within the device's memory reads and writes."""
    source = torch.zeros(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * _calls_per_sec(lambda: target.copy_(source), device)


def _calls_per_sec(call: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3):  # the first ones load kernels and fault memory in
        call()
    wait()
    count, begun = 0, time.perf_counter()
    while (spent := time.perf_counter() - begun) < _SEC[device.type]:
        for _ in range(4):
            call()
        wait()
        count += 4
    return count / spent
