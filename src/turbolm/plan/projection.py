"""Project a recipe to other numbers of GPUs. A model, not a measurement. Torch-free.

`report/projection.py` draws it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from turbolm.errors import UserError
from turbolm.plan.estimate import COMPILED, Estimate
from turbolm.plan.machine import Machine
from turbolm.plan.machine_rates import Rates
from turbolm.plan.plan import Plan, build_plan
from turbolm.plan.time import OVERLAP
from turbolm.recipe.schema import Recipe
from turbolm.units import align_columns, format_count, format_duration

MAX_GPUS = 16_384
HEAD = ("GPUs", "batch", "step", "tokens/s", "efficiency", "MFU", "exposed", "run", "")
SCALINGS = {"strong": "strong scaling: the recipe's global batch", "weak": "weak scaling: the batch grows"}
Estimator = Callable[[Plan], Estimate | None]
Verdict = Callable[[Plan], str]  # whether it fits the GPUs


@dataclass(frozen=True)
class Point:
    """The estimate on a number of GPUs; None, with the reason, where the recipe cannot run on so many."""

    num_gpus: int
    global_batch_tokens: int
    estimate: Estimate | None
    remark: str = ""  # why not, or whether it fits


def project(recipe: Recipe, machine: Machine, estimator: Estimator, verdict: Verdict, *, weak: bool) -> list[Point]:
    """Return points from one node to MAX_GPUS, doubling.

    Strong scaling keeps the global batch; weak scaling keeps each process's share of it, which is another contract.
    """
    per_node = build_plan(recipe, machine).processes_per_node
    points = []
    for nodes in (2**power for power in range(MAX_GPUS.bit_length()) if 2**power * per_node <= MAX_GPUS):
        changed = _on_nodes(recipe, nodes, weak=weak)
        num_gpus, batch = nodes * per_node, changed.train.global_batch
        try:
            plan = build_plan(changed, machine)
            points.append(Point(num_gpus, batch, estimator(plan), verdict(plan)))
        except UserError as error:
            points.append(Point(num_gpus, batch, None, str(error).splitlines()[0]))
    return points


def _on_nodes(recipe: Recipe, nodes: int, *, weak: bool) -> Recipe:
    batch, seq_len = recipe.train.global_batch, recipe.data.seq_len
    if weak:
        batch = max(1, batch * nodes // (recipe.cluster.num_nodes * seq_len)) * seq_len
    cluster = recipe.cluster.model_copy(update={"num_nodes": nodes})
    return recipe.model_copy(
        update={"cluster": cluster, "train": recipe.train.model_copy(update={"global_batch": batch})}
    )


def projections(strong: list[Point], weak: list[Point], rates: Rates) -> dict[str, Any]:
    """Return both as plain JSON types: what `--project --json` prints and the page draws."""
    return {
        "note": "a model, not a measurement",
        "rates": rates.source,
        "assumptions": _assumptions(rates),
        "strong": [_as_dict(one, strong) for one in strong],
        "weak": [_as_dict(one, weak) for one in weak],
    }


def _as_dict(one: Point, points: list[Point]) -> dict[str, Any]:
    """Return a point; its efficiency is the rate of a GPU relative to that of the first point with an estimate."""
    found: dict[str, Any] = {"num_gpus": one.num_gpus, "global_batch_tokens": one.global_batch_tokens}
    found |= dict.fromkeys(("step_sec", "tokens_per_sec", "efficiency", "mfu", "exposed_share", "run_sec"))
    first = next((point for point in points if point.estimate), None)
    if one.estimate is not None and first is not None and first.estimate is not None:
        made, base = one.estimate.bill, first.estimate.bill
        found |= {
            "step_sec": made.step.total,
            "tokens_per_sec": made.tokens_per_sec,
            "efficiency": made.tokens_per_sec / one.num_gpus / (base.tokens_per_sec / first.num_gpus),
            "mfu": made.mfu,
            "exposed_share": made.step.communication / made.step.total,
            "run_sec": made.run_sec,
        }
    return {**found, "remark": one.remark}


def _assumptions(rates: Rates) -> list[str]:
    return [
        f"a non-blocking network of {rates.network.bytes_per_sec / 1e9:.4g} GB/s a ring",
        f"ring collectives of {rates.network.message_sec * 1e6:g} us a hop between nodes",
        f"communication hidden behind {OVERLAP:.0%} of the computation",
        f"compiled code with {COMPILED:.0%} of the memory traffic",
        "no failures, no stragglers",
    ]


def table_row(one: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of a point of `projections`, under HEAD."""
    start = (str(one["num_gpus"]), format_count(one["global_batch_tokens"]))
    if one["step_sec"] is None:
        return (*start, *[""] * 6, one["remark"])
    return (
        *start,
        f"{one['step_sec']:.3g} s",
        format_count(one["tokens_per_sec"]),
        f"{one['efficiency']:.0%}",
        f"{one['mfu']:.0%}" if one["mfu"] is not None else "",
        f"{one['exposed_share']:.0%}",
        format_duration(one["run_sec"]),
        one["remark"],
    )


def projection_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield both tables of `projections` and what they assume."""
    yield f"projections: {found['note']}; rates {found['rates']}"
    for kind, title in SCALINGS.items():
        yield title
        yield from (f"  {line}" for line in align_columns([HEAD, *map(table_row, found[kind])]).splitlines())
    yield f"assumed: {', '.join(found['assumptions'])}"
