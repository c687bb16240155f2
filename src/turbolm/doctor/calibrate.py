"""Measure how fast this node computes what training computes, for `plan`: started by `turbolm.launch.calibrate`.

Each case is a small piece of a training step with its amounts (`turbolm.plan.work`). The cases take turns until the
time is up, so that a machine that drifts is the same for all; `fit_rates` finds the seconds per unit that explain their
medians best. All ranks measure at once, as they train at once.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from turbolm.doctor.pieces import Case, model_cases, weight_cases
from turbolm.doctor.steps import step_cases
from turbolm.engine.device import DTYPES
from turbolm.models.flash import start_kernels
from turbolm.plan.work import Unit
from turbolm.reliability.orphans import end_with_parent

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
_SWEEPS = 5000
_MESSAGES = {"cpu": (2**14, 2**22), "cuda": (2**16, 2**28)}  # bytes of the two all-reduces
_MESSAGE_TURNS = 10
_GROUP_SEC = 60
_READY_SEC = 180  # for models to be built


@dataclass(frozen=True)
class Order:
    """What to measure on this node."""

    device: str  # cpu or cuda
    precision: str
    num_ranks: int
    threads: int  # of each rank
    port: int
    subjects: tuple[dict[str, Any], ...]  # of `pieces.Subject`
    steps: tuple[dict[str, Any], ...]  # the same, for whole steps
    ds_config: dict[str, Any]  # of those steps
    budget_sec: float
    clock: str  # a name in CLOCKS; cpu: processor time, for a machine that others use


@dataclass(frozen=True)
class Sample:
    """A case's time: the median of its turns, and their spread (median absolute deviation over median)."""

    name: str
    amounts: Mapping[Unit, float]
    sec: float
    spread: float
    weight: float = 1.0  # in the fit


def take_turns(cases: Sequence[Case], budget_sec: float, device: torch.device, clock: Clock) -> list[Sample]:
    """Run all cases in turn until `budget_sec` is spent, at least three times after one that does not count."""

    def timed(case: Case) -> float:
        begun = clock()
        case.run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - begun

    for case in cases:
        timed(case)
    times: list[list[float]] = [[] for _ in cases]
    end = time.monotonic() + budget_sec
    while len(times[0]) < 3 or time.monotonic() < end:
        for case, taken in zip(cases, times, strict=True):
            taken.append(timed(case))
    found = []
    for case, taken in zip(cases, times, strict=True):
        middle = statistics.median(taken)
        spread = statistics.median(abs(one - middle) for one in taken) / middle
        found.append(Sample(case.name, case.amounts, middle, spread, case.weight))
    return found


def fit_rates(samples: Sequence[Sample]) -> dict[Unit, float]:
    """Return non-negative seconds per unit with the least squared relative errors, by coordinate descent."""
    units: list[Unit] = sorted({unit for one in samples for unit, amount in one.amounts.items() if amount})
    rows = np.array([[one.weight * one.amounts.get(unit, 0.0) / one.sec for unit in units] for one in samples])
    sizes = np.linalg.norm(rows, axis=0)
    rows /= sizes
    found, left = np.zeros(len(units)), np.array([one.weight for one in samples])
    for _ in range(_SWEEPS):
        for number in range(len(units)):
            new = max(0.0, found[number] + rows[:, number] @ left)
            left -= (new - found[number]) * rows[:, number]
            found[number] = new
    return {unit: float(value) for unit, value in zip(units, found / sizes, strict=True)}


def measure(order: Order, rank: int, together: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Measure as one rank: samples, and the seconds of all-reduces by bytes. `together` waits for the others."""
    torch.set_num_threads(order.threads)
    device = torch.device("cuda", rank) if order.device == "cuda" else torch.device("cpu")
    for attention in {values["attention"] for values in order.subjects}:
        print(start_kernels(attention, device), file=sys.stderr)
    cases = [one for values in order.subjects for one in model_cases(values, device, order.precision)]
    unique = {case.name: case for case in [*cases, *weight_cases(device, DTYPES[order.precision])]}
    steps = step_cases(order.steps, order.ds_config, device, order.precision) if order.steps else ()
    unique |= {case.name: case for case in steps}
    together()
    samples = take_turns(list(unique.values()), order.budget_sec, device, CLOCKS[order.clock])
    if dist.is_initialized():
        dist.destroy_process_group()
    if order.num_ranks > 1:
        _join(order, rank, device)
    messages = _all_reduces(order, device) if order.num_ranks > 1 else {}
    return {"samples": [asdict(one) for one in samples], "messages": messages}


def _join(order: Order, rank: int, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    address = f"tcp://127.0.0.1:{order.port}"
    backend = "nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=_GROUP_SEC + 3 * order.budget_sec)
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=order.num_ranks, timeout=limit)


def _all_reduces(order: Order, device: torch.device) -> dict[str, float]:
    """Return the median seconds of an all-reduce, by bytes."""
    found = {}
    for num_bytes in _MESSAGES[device.type]:
        tensor, taken = torch.zeros(num_bytes // 4, device=device), []
        for _ in range(_MESSAGE_TURNS):
            dist.barrier()
            begun = time.perf_counter()
            dist.all_reduce(tensor)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - begun)
        found[str(num_bytes)] = statistics.median(taken)
    return found


def _rank(rank: int, order: Order, parent: int, results: Any, ready: Any) -> None:
    end_with_parent(parent)
    results.put((rank, measure(order, rank, ready.wait)))
    results.close()
    results.join_thread()
    os._exit(0)  # process groups whose peers are gone would wait


def main() -> int:
    """Carry out the order in the first argument; the result is one line of JSON on standard output."""
    values = json.loads(sys.argv[1])
    order = Order(**{**values, "subjects": tuple(values["subjects"]), "steps": tuple(values["steps"])})
    context = multiprocessing.get_context("fork" if order.device == "cpu" else "spawn")
    results, ready = context.Queue(), context.Barrier(order.num_ranks, timeout=_READY_SEC)
    arguments = (order, os.getpid(), results, ready)
    ranks = [context.Process(target=_rank, args=(k, *arguments)) for k in range(order.num_ranks)]
    for rank in ranks:
        rank.start()
    found: dict[int, Any] = {}
    while len(found) < len(ranks):
        try:
            number, result = results.get(timeout=1)
            found[number] = result
        except Exception:  # empty: look whether a rank has died
            if any(not one.is_alive() and number not in found for number, one in enumerate(ranks)):
                return 1
    print(json.dumps(_joined([found[number] for number in sorted(found)])))
    return 0


def _joined(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the samples of all ranks as one: the mean of their times, and the fit."""
    samples = [
        Sample(**{**rows[0], "sec": statistics.mean(one["sec"] for one in rows)})
        for rows in zip(*(one["samples"] for one in found), strict=True)
    ]
    rates = fit_rates(samples)
    errors = [abs(sum(rates.get(u, 0.0) * x for u, x in one.amounts.items()) / one.sec - 1) for one in samples]
    return {
        "sec_per": rates,
        "errors": [statistics.median(errors), max(errors)],
        "messages": found[0]["messages"],
        "samples": [asdict(one) | {"error": error} for one, error in zip(samples, errors, strict=True)],
    }


if __name__ == "__main__":
    sys.exit(main())
