"""Project a recipe to other numbers of GPUs, as a table. A model, not a measurement. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from turbolm.errors import UserError
from turbolm.plan.estimate import COMPILED, Estimate
from turbolm.plan.machine import Machine
from turbolm.plan.machine_rates import Rates
from turbolm.plan.plan import Plan, build_plan
from turbolm.plan.time import OVERLAP
from turbolm.recipe.schema import Recipe
from turbolm.units import align_columns, format_count, format_duration

MAX_GPUS = 16_384
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


def projection_lines(strong: list[Point], weak: list[Point], rates: Rates) -> Iterator[str]:
    """Yield both tables and what they assume."""
    yield f"projections: a model, not a measurement; rates {rates.source}"
    for name, points in (
        ("strong scaling: the recipe's global batch", strong),
        ("weak scaling: the batch grows", weak),
    ):
        yield name
        rows: list[tuple[str, ...]] = [("GPUs", "batch", "step", "tokens/s", "efficiency", "MFU", "exposed", "run", "")]
        first = next((one for one in points if one.estimate), None)
        for one in points:
            if one.estimate is None or first is None or first.estimate is None:
                rows.append((str(one.num_gpus), format_count(one.global_batch_tokens), *[""] * 6, one.remark))
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
                    one.remark,
                )
            )
        yield from (f"  {line}" for line in align_columns(rows).splitlines())
    yield (
        f"assumed: a non-blocking network of {rates.network.bytes_per_sec / 1e9:.4g} GB/s a ring, ring collectives of "
        f"{rates.network.message_sec * 1e6:g} us a hop between nodes, communication hidden behind {OVERLAP:.0%} of the "
        f"computation, compiled code with {COMPILED:.0%} of the memory traffic, no failures, no stragglers"
    )
