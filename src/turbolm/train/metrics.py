"""Report a run: one line of metrics.jsonl per step, and progress on the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist

from turbolm.data.batch.loader import GlobalBatch
from turbolm.models.compile import compilations
from turbolm.plan.curriculum import Curriculum
from turbolm.train.evaluation import EvaluationResult
from turbolm.train.pace import Pace
from turbolm.train.step import StepResult
from turbolm.train.trackers import Trackers
from turbolm.units import format_count, format_duration


@dataclass
class MetricsLog:
    """Collect the steps of a run and write them when they are due.

    Losses stay on the device until then, so that logging never stalls a step. Only rank 0 writes; `flush` is
    collective. `peak_flops` is that of all devices together, or None if unknown.
    """

    path: Path
    attempt: int
    curriculum: Curriculum
    peak_flops: float | None
    group: dist.ProcessGroup | None
    terminal: TextIO
    pace: Pace
    trackers: Trackers | None = None
    _pending: list[tuple[dict[str, Any], StepResult]] = field(default_factory=list)
    _last_time: float = field(default_factory=time.perf_counter)
    _last_cpu_time: float = field(default_factory=time.process_time)
    _tokens_per_sec: float | None = None
    _unwritten: list[str] = field(default_factory=list)
    _is_told: bool = False

    def add_step(
        self, step: int, lrs: Mapping[str, float], batch: GlobalBatch, result: StepResult, flops: float
    ) -> None:
        """Record a finished step. `lrs`: by name; `flops` is the training work of its global batch."""
        now = time.perf_counter()
        seconds, self._last_time = now - self._last_time, now
        cpu_now = time.process_time()
        cpu_seconds, self._last_cpu_time = cpu_now - self._last_cpu_time, cpu_now
        tokens = len(batch.sequences) * batch.sequences.seq_len
        line = {
            "step": step,
            "attempt": self.attempt,
            "tokens_seen": self.curriculum.tokens_seen(step),
            "train/targets": batch.num_targets,
            **lrs,
            "perf/tokens_per_sec": tokens / seconds,
            "perf/cpu_sec": cpu_seconds,  # of this process and all its threads
            "perf/mfu": flops / seconds / self.peak_flops if self.peak_flops else None,
            "data/batch": batch.index,
            "data/seq_len": batch.sequences.seq_len,
            "data/batch_tokens": tokens,
            "data/padding_fraction": batch.padding_fraction,
            "data/imbalance": batch.imbalance,
            "data/mean_length": batch.num_targets / len(batch.sequences.length),
            "data/samples": batch.samples_digest,
        }
        num_graphs, compile_seconds = compilations.take_new()
        if compile_seconds:
            line["perf/compile_sec"] = compile_seconds
            counts = f"{num_graphs} graphs in {compile_seconds:.0f} s, {compilations.count} so far"
            self.say(f"step {step}: torch.compile made {counts}")
        self._pending.append((line, result))
        self.pace.add_step(result.forward, seconds)

    def reset_clock(self) -> None:
        """Keep evaluation and saving out of the next step's time."""
        self._last_time, self._last_cpu_time = time.perf_counter(), time.process_time()

    def flush(self, *, show: bool = False) -> None:
        """Write the pending steps and, if asked, show the last of them as progress. Collective."""
        if not self._pending:
            return
        sums = torch.stack([_sums(result) for _, result in self._pending]).double().cpu()
        summed = torch.cat([sums.flatten(), self.pace.take()])
        dist.all_reduce(summed, group=self.group)
        losses, times = summed.tensor_split([sums.numel()])
        peak = torch.tensor(peak_memory_bytes(self._pending[0][1].loss_sum.device))
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=self.group)
        lines = []
        for (line, result), global_sums in zip(self._pending, losses.view_as(sums).numpy(), strict=True):
            norm = None if result.grad_norm is None else float(result.grad_norm)
            line["memory/peak_bytes"] = int(peak)
            line |= _values(result, global_sums, line["train/targets"])
            lines.append({**line, "train/grad_norm": norm})
        self._pending.clear()
        slowest, message = self.pace.report(times)
        lines[-1] |= slowest
        if message:
            self.say(f"step {lines[-1]['step']}  {message}")
        if dist.get_rank() == 0:
            self._append(lines)
            if show:
                self._show(lines)

    def add_evaluation(self, step: int, result: EvaluationResult) -> None:
        """Write and show an evaluation."""
        self.add_event(step, result.metrics)
        self._say_evaluation(f"step {step}", result)
        if result.average is not None:
            self._say_evaluation(f"step {step}  averaged weights", result.average)

    def _say_evaluation(self, begin: str, result: EvaluationResult) -> None:
        losses = [("eval loss", result.loss), ("bits per byte", result.bits_per_byte)]
        losses += [(name, one.loss) for name, one in result.losses.items()]
        shown = [f"{name} {value:.4f}" for name, value in losses if value is not None]
        if shown:
            self.say("  ".join([begin, *shown]))
        for name, score in result.tasks.items():
            self.say(f"{begin}  {name}: {score}")

    def add_event(self, step: int, values: dict[str, Any]) -> None:
        """Write a line about something that happened at `step`."""
        if dist.get_rank() == 0:
            tokens_seen = self.curriculum.tokens_seen(step)
            self._append([{"step": step, "attempt": self.attempt, "tokens_seen": tokens_seen, **values}])

    def say(self, text: str) -> None:
        """Print a permanent line on the terminal and in the log. Rank 0 only."""
        if dist.get_rank() == 0:
            if self.terminal.isatty():
                self.terminal.write("\r\x1b[K")
            self.terminal.write(text + "\n")
            self.terminal.flush()
            _log(text)

    def close(self) -> None:
        """Give the trackers time to send their data, once nothing more will be logged."""
        if self.trackers is not None:
            self.trackers.close()

    def _append(self, lines: list[dict[str, Any]]) -> None:
        """Append to metrics.jsonl; what cannot be written now (a full disk) is kept for a later call."""
        if self.trackers is not None:
            self.trackers.log([_finite(line) for line in lines])
        self._unwritten += [json.dumps(_finite(line)) + "\n" for line in lines]
        try:
            with self.path.open("ab", buffering=0) as file:
                end, content = file.tell(), "".join(self._unwritten).encode()
                if file.write(content) != len(content):  # one write, so that a kill tears one line at most
                    file.truncate(end)
                    raise OSError(f"{self.path} takes no more")
        except OSError as error:
            if not self._is_told:
                self._is_told = True
                self.say(f"cannot write metrics: {error}; training continues, and they are written once it works again")
            return
        self._unwritten.clear()
        self._is_told = False

    def _show(self, lines: list[dict[str, Any]]) -> None:
        last = lines[-1]
        tokens = sum(line["data/batch_tokens"] for line in lines)
        rate = tokens / sum(line["data/batch_tokens"] / line["perf/tokens_per_sec"] for line in lines)
        before = self._tokens_per_sec
        self._tokens_per_sec = rate if before is None else 0.7 * before + 0.3 * rate
        num_steps = self.curriculum.num_steps
        tokens_left = self.curriculum.tokens_seen(num_steps) - last["tokens_seen"]
        mfu = [line["perf/mfu"] for line in lines if line["perf/mfu"] is not None]
        norm = last["train/grad_norm"]
        parts = [
            f"step {last['step']}/{num_steps}",
            f"{100 * last['step'] / num_steps:.0f}%",
            f"loss {last['train/loss']:.4f}",
            *([f"router loss {last['train/router_loss']:.4f}"] if "train/router_loss" in last else []),
            f"norm {norm:.3f}" if norm is not None else "norm skipped",
            f"lr {last['train/lr']:.2e}",
            f"{format_count(last['tokens_seen'])} tokens",
            f"{format_count(rate)} tokens/s",
        ]
        if mfu:
            parts.append(f"MFU {100 * sum(mfu) / len(mfu):.0f}%")
        parts.append(f"ETA {format_duration(tokens_left / self._tokens_per_sec)}")
        text = "  ".join(parts)
        _log(text)
        if self.terminal.isatty():
            self.terminal.write("\r\x1b[K" + text)
        else:
            self.terminal.write(text + "\n")
        self.terminal.flush()


def _sums(result: StepResult) -> torch.Tensor:
    """Return per-rank values of a step to sum over ranks, 1-D: its loss, then `_values` of the routers."""
    parts = (result.loss_sum, result.router_loss_sum, result.expert_load)
    return torch.cat([part.flatten() for part in parts if part is not None])


def _values(result: StepResult, sums: np.ndarray, num_targets: int) -> dict[str, Any]:
    """Return a step's metrics from its `_sums` over all ranks; shares of the busiest and idlest expert by layer."""
    values: dict[str, Any] = {"train/loss": float(sums[0]) / num_targets}
    if result.router_loss_sum is not None:
        values["train/router_loss"] = float(sums[1]) / num_targets
    if result.expert_load is not None:
        load = sums[-result.expert_load.numel() :].reshape(result.expert_load.shape)
        share = load / np.nansum(load, axis=1, keepdims=True)
        values["experts/max_share"] = np.nanmax(share, axis=1).round(4).tolist()
        values["experts/min_share"] = np.nanmin(share, axis=1).round(4).tolist()
    return values


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process so far: tensors on a GPU, else its whole resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this process's device, best of a few: what MFU is measured against where no
    data sheet is known. On a CPU every process measures at once, as they will compute at once."""
    size = 1024
    left, right = torch.randn(size, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _log(text: str) -> None:
    """Print to the rank's log file; the disk may be full."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stdout, flush=True)


def _finite(line: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN or infinity: write them as text."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }
