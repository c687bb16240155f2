"""How long a step and a run take, and what they cost: work against a machine's rates. Torch-free.

    step = micro-batches x (forward, backward, recomputation) + exposed communication + update

On a GPU the host starts kernels while others run: a micro-batch takes as long as the slower of both. On a CPU they
are the same processor, so their times add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from turbolm.plan.machine_rates import Link, Rates
from turbolm.plan.work import Amounts, Unit, seconds
from turbolm.units import format_count, format_duration, format_step

OVERLAP = 0.8  # of the computation that communication can hide behind: it takes cores and bandwidth of its own
_BACKWARD_SHARE = 2 / 3  # of a micro-batch's time
_MATRIX: tuple[Unit, ...] = ("matrix_flops", "matrix_bytes", "products")
_ATTENTION: tuple[Unit, ...] = ("attention_flops", "attention_pairs", "attention_rows")
_MEMORY: tuple[Unit, ...] = ("memory_bytes", "logits")
_HOST: tuple[Unit, ...] = ("layers",)

STEP_PARTS = {  # of a `StepTime`, by the name that is shown
    "matrix": "matrix products",
    "attention": "attention",
    "memory": "memory-bound operators",
    "host": "starting operators",
    "recomputation": "recomputation",
    "optimizer": "optimizer",
    "communication": "exposed communication",
}

Window = Literal["none", "forward", "backward", "both", "last backward"]


@dataclass(frozen=True)
class Exchange:
    """A collective: what a process sends for one, and what it may hide behind."""

    what: str
    sent_bytes: float  # by each process, for one of them
    calls: float  # a step
    ranks: int
    nodes: int  # that the ranks are on
    window: Window
    is_ring: bool = True  # hops grow with the ranks; else with their logarithm (trees)
    messages: float = 1  # that one of them is cut into


@dataclass(frozen=True)
class StepWork:
    """What one process does in an optimizer step."""

    device: str
    micro_batches: int
    micro_batch: Amounts  # without recomputation
    recomputed: Amounts  # of a micro-batch
    update: Amounts
    exchanges: tuple[Exchange, ...] = ()


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, by what they go to."""

    matrix: float
    attention: float
    memory: float  # operators that read and write
    host: float  # starting operators, where that takes longer than running them; on a CPU always
    recomputation: float
    optimizer: float
    communication: float  # that nothing hides
    hidden_communication: float  # not part of the total

    @property
    def total(self) -> float:
        """Return the seconds of a step."""
        return float(sum(getattr(self, part) for part in STEP_PARTS))


def step_time(work: StepWork, rates: Rates) -> StepTime:
    """Return the time of a step at a machine's rates."""
    per, number = rates.sec_per, work.micro_batches
    device = _MATRIX + _ATTENTION + _MEMORY
    plain, again = (seconds(one, per, device) for one in (work.micro_batch, work.recomputed))
    launches = seconds(work.micro_batch, per, _HOST) + seconds(work.recomputed, per, _HOST)
    if work.device == "cuda":
        host = max(0.0, launches - plain - again)
    else:
        host, again = seconds(work.micro_batch, per, _HOST), again + seconds(work.recomputed, per, _HOST)
        plain += host
    exposed, hidden = _communication(work, rates, plain, again)
    return StepTime(
        matrix=number * seconds(work.micro_batch, per, _MATRIX),
        attention=number * seconds(work.micro_batch, per, _ATTENTION),
        memory=number * seconds(work.micro_batch, per, _MEMORY),
        host=number * host,
        recomputation=number * again,
        optimizer=seconds(work.update, per),
        communication=exposed,
        hidden_communication=hidden,
    )


def _communication(work: StepWork, rates: Rates, plain: float, again: float) -> tuple[float, float]:
    """Return the seconds that nothing hides, and those that are hidden. `plain`, `again`: of a micro-batch."""
    backward, forward = plain * _BACKWARD_SHARE + again, plain * (1 - _BACKWARD_SHARE)
    room = {
        "none": 0.0,
        "forward": work.micro_batches * forward,
        "backward": work.micro_batches * backward,
        "last backward": backward,
        "both": work.micro_batches * (forward + backward),
    }
    needed: dict[str, float] = dict.fromkeys(room, 0.0)
    for one in work.exchanges:
        needed[one.window] += one.calls * exchange_sec(one, rates)
    in_backward = needed["backward"] + needed["last backward"]
    backward_room = room["backward"] if needed["backward"] else room["last backward"]
    exposed = (
        needed["none"]
        + max(0.0, needed["forward"] - OVERLAP * room["forward"])
        + max(0.0, in_backward - OVERLAP * backward_room, needed["both"] + in_backward - OVERLAP * room["both"])
    )
    return exposed, sum(needed.values()) - exposed


def exchange_sec(one: Exchange, rates: Rates) -> float:
    """Return the seconds of one collective: its bytes at the slowest link of its ring, and the latency of its hops."""
    link: Link = rates.network if one.nodes > 1 else rates.node
    inside, between = one.ranks - one.nodes, one.nodes - 1
    if not one.is_ring:
        inside, between = math.ceil(math.log2(max(1, one.ranks / one.nodes))), math.ceil(math.log2(one.nodes))
    hops = inside * rates.node.message_sec + between * rates.network.message_sec
    return one.sent_bytes / link.bytes_per_sec + one.messages * hops


@dataclass(frozen=True)
class Bill:
    """What a run takes and costs. None: unknown, or no price given."""

    step: StepTime
    tokens_per_sec: float  # of all processes
    mfu: float | None  # model FLOPs without recomputation, against the data sheet's peak
    run_sec: float  # training alone, without start, evaluations and checkpoints
    gpu_hours: float | None
    price_usd: float | None
    watts: int | None  # of each GPU: the data sheet's design power
    energy_kwh: float | None  # of the GPUs at that power, an upper bound of theirs: no host, no cooling


def bill(
    step: StepTime,
    *,
    global_batch_tokens: int,
    run_tokens: float,
    training_flops_per_token: float | None,
    peak_flops: float | None,
    num_gpus: int,
    price_per_gpu_hour: float | None = None,
    watts: int | None = None,
) -> Bill:
    """Return the bill of a run of `run_tokens`; without GPUs there are no GPU-hours, no price and no energy."""
    rate = global_batch_tokens / step.total
    run_sec = run_tokens / rate
    hours = num_gpus * run_sec / 3600 if num_gpus else None
    known = training_flops_per_token is not None and peak_flops is not None and num_gpus
    return Bill(
        step=step,
        tokens_per_sec=rate,
        mfu=training_flops_per_token * rate / (num_gpus * peak_flops) if known else None,  # type: ignore[operator]
        run_sec=run_sec,
        gpu_hours=hours,
        price_usd=hours * price_per_gpu_hour if hours is not None and price_per_gpu_hour is not None else None,
        watts=watts,
        energy_kwh=hours * watts / 1000 if hours is not None and watts is not None else None,
    )


def time_lines(one: Bill, rates: Rates) -> Iterator[str]:
    """Yield what `turbolm plan --verbose` shows of a run's time and price."""
    step = one.step
    per_gpu = f", MFU {one.mfu:.0%}" if one.mfu is not None else ""
    yield f"{format_step(step.total)} a step, {format_count(one.tokens_per_sec)} tokens/s{per_gpu} ({rates.source})"
    cost = [f"{format_duration(one.run_sec)} of training, without evaluations and checkpoints"]
    if one.gpu_hours is not None:
        cost.append(f"{format_count(one.gpu_hours)} GPU-hours")
    if one.price_usd is not None:
        cost.append(f"{one.price_usd:,.0f} USD")
    if one.energy_kwh is not None:
        cost.append(f"at most {format_count(one.energy_kwh)} kWh of the GPUs ({one.watts} W each by data sheet)")
    yield ", ".join(cost)
    parts = ", ".join(f"{name} {share:.0%}" for name, share in shares(step) if share >= 0.005)
    hidden = f"; {format_step(step.hidden_communication)} of communication hidden" if step.hidden_communication else ""
    yield f"of a step: {parts}{hidden}"


def shares(step: StepTime) -> Iterable[tuple[str, float]]:
    """Return the share of each part of a step, largest first."""
    parts = ((name, getattr(step, part) / step.total) for part, name in STEP_PARTS.items())
    return sorted(parts, key=lambda item: -item[1])
