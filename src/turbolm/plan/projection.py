"""Project a recipe to other numbers of GPUs, as a table. A model, not a measurement. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from turbolm.errors import UserError
from turbolm.plan.estimate import COMPILED, Estimate
from turbolm.plan.machine import Machine
from turbolm.plan.machine_rates import MESSAGE_SEC, NETWORK_GBIT_PER_GPU, Rates
from turbolm.plan.plan import Plan, build_plan
from turbolm.plan.time import OVERLAP
from turbolm.recipe.schema import Recipe
from turbolm.units import align_columns, format_count, format_duration

MAX_GPUS = 16_384
Estimator = Callable[[Plan], Estimate | None]


@dataclass(frozen=True)
class Point:
    """The estimate on a number of GPUs; None, with the reason, where the recipe cannot run on so many."""

    num_gpus: int
    global_batch_tokens: int
    estimate: Estimate | None
    reason: str = ""


def project(recipe: Recipe, machine: Machine, estimator: Estimator, *, weak: bool) -> list[Point]:
    """Return points from one node to MAX_GPUS, doubling.

    Strong scaling keeps the global batch; weak scaling keeps each process's share of it, which is another contract.
    """
    per_node = build_plan(recipe, machine).processes_per_node
    nodes, points = 1, []
    while nodes * per_node <= MAX_GPUS:
        points.append(_point(recipe, machine, estimator, nodes, nodes * per_node, weak=weak))
        nodes *= 2
    return points


def _point(recipe: Recipe, machine: Machine, estimator: Estimator, nodes: int, gpus: int, *, weak: bool) -> Point:
    batch = recipe.train.global_batch
    if weak:
        batch = max(1, batch * nodes // (recipe.cluster.num_nodes * recipe.data.seq_len)) * recipe.data.seq_len
    changed = recipe.model_copy(
        update={
            "cluster": recipe.cluster.model_copy(update={"num_nodes": nodes}),
            "train": recipe.train.model_copy(update={"global_batch": batch}),
        }
    )
    try:
        return Point(gpus, batch, estimator(build_plan(changed, machine)))
    except UserError as error:
        return Point(gpus, batch, None, str(error).splitlines()[0])


def projection_lines(strong: list[Point], weak: list[Point], rates: Rates) -> Iterator[str]:
    """Yield both tables and what they assume."""
    yield f"projections: a model, not a measurement; rates {rates.source}"
    for name, points in (
        ("strong scaling: the recipe's global batch", strong),
        ("weak scaling: the batch grows", weak),
    ):
        yield name
        rows: list[tuple[str, ...]] = [("GPUs", "batch", "step", "tokens/s", "efficiency", "MFU", "exposed", "run")]
        first = next((one for one in points if one.estimate), None)
        for one in points:
            if one.estimate is None or first is None or first.estimate is None:
                rows.append((str(one.num_gpus), format_count(one.global_batch_tokens), one.reason[:60], *[""] * 5))
                continue
            made, base = one.estimate.bill, first.estimate.bill
            efficiency = made.tokens_per_sec / one.num_gpus / (base.tokens_per_sec / first.num_gpus)
            rows.append(
                (
                    str(one.num_gpus),
                    format_count(one.global_batch_tokens),
                    f"{made.step.total:.3g} s",
                    format_count(made.tokens_per_sec),
                    f"{efficiency:.0%}",
                    f"{made.mfu:.0%}" if made.mfu is not None else "",
                    f"{made.step.communication / made.step.total:.0%}",
                    format_duration(made.run_sec),
                )
            )
        yield from (f"  {line}" for line in align_columns(rows).splitlines())
    speeds = ", ".join(f"{gbit} Gbit/s" for gbit in NETWORK_GBIT_PER_GPU.values())
    yield (
        f"assumed: a non-blocking network ({speeds} for each GPU up to Ampere, and later), ring collectives of "
        f"{MESSAGE_SEC['network'] * 1e6:g} us a hop between nodes, communication hidden behind {OVERLAP:.0%} of the "
        f"computation, compiled code with {COMPILED:.0%} of the memory traffic, no failures, no stragglers"
    )
