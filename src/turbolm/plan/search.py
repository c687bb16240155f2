"""Search the execution plan of a recipe for the fastest or cheapest way to run it. The contract stays. Torch-free."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from turbolm.errors import UserError
from turbolm.plan.estimate import Estimate
from turbolm.plan.footprint import Footprint, estimate_footprint
from turbolm.plan.machine import Machine
from turbolm.plan.plan import Plan, build_plan
from turbolm.plan.profile import ModelProfile
from turbolm.plan.suggestions import is_accepted
from turbolm.plan.time import shares
from turbolm.recipe.schema import Recipe
from turbolm.units import format_bytes, format_count, format_duration

NODE_FACTORS = (0.25, 0.5, 1, 2, 4, 8)  # of the recipe's nodes, where a deadline or a budget asks for a choice
_SHOWN = 5
_FEWEST_MICRO_BATCHES = 4  # sizes of a micro-batch that are tried: the whole share, and down to an eighth of it
_MAX_MICRO_TOKENS = 64 * 1024

Estimator = Callable[[Plan], Estimate | None]


@dataclass(frozen=True)
class Goal:
    """What is asked of a run. Without either, the fastest run on the given nodes is the best."""

    deadline_sec: float | None = None
    budget_usd: float | None = None

    @property
    def is_free(self) -> bool:
        """Return whether the number of nodes may be chosen."""
        return self.deadline_sec is not None or self.budget_usd is not None

    def problem(self, found: Candidate) -> str | None:
        """Return why a candidate misses the goal, or None."""
        made = found.estimate.bill if found.estimate else None
        if found.verdict != "FITS" or made is None:
            return f"{found.verdict}: {format_bytes(found.footprint.total_bytes)} on each GPU"
        if self.deadline_sec is not None and made.run_sec > self.deadline_sec:
            return f"takes {format_duration(made.run_sec)}"
        if self.budget_usd is not None and (made.price_usd or 0) > self.budget_usd:
            return f"costs {made.price_usd:,.0f} USD"
        return None

    def rank(self, found: Candidate) -> tuple[float, ...]:
        """Return the order of candidates that meet the goal: with a deadline the cheapest first, else the fastest."""
        assert found.estimate is not None
        made = found.estimate.bill
        first = made.gpu_hours or 0.0 if self.deadline_sec is not None else made.run_sec
        return (first, made.run_sec, found.footprint.total_bytes, len(found.changes))


@dataclass(frozen=True)
class Candidate:
    """One way to run the recipe. Without an estimate it does not fit."""

    changes: Mapping[str, Any]  # by dotted key, what differs from the recipe
    values: Mapping[str, Any]  # of every key that is searched
    footprint: Footprint
    verdict: str
    estimate: Estimate | None

    def command(self, recipe_file: str, overrides: Sequence[str], verb: str) -> str:
        """Return the line that starts it."""
        changed = [f"{key}={_text(value)}" for key, value in self.changes.items()]
        kept = [one for one in overrides if one.partition("=")[0] not in self.changes]
        return shlex.join(["turbolm", verb, recipe_file, *kept, *changed])


def search(
    recipe: Recipe,
    machine: Machine,
    profile: ModelProfile,
    gpu_bytes: int,
    estimator: Estimator,
    goal: Goal,
    groups: Sequence[int] = (),
    most_changes: int | None = None,
) -> list[Candidate]:
    """Return every accepted way to run `recipe` on machines like `machine`: those that meet the goal first, best first.

    `groups`: values of execution.sequence_parallel that go with the model, by default the recipe's. Combinations that
    the recipe's rules, the plan or DeepSpeed refuse are left out, and with `most_changes` those that differ from the
    recipe in more keys.
    """
    found = [
        one
        for nodes in _nodes(recipe, goal)
        for shared_by in groups or (recipe.execution.sequence_parallel,)
        for values in _values(recipe, machine, nodes, shared_by)
        if most_changes is None or len(_changes(recipe, values)) <= most_changes
        if (one := _try(recipe, machine, profile, gpu_bytes, estimator, values)) is not None
    ]
    good = [one for one in found if goal.problem(one) is None]
    bad = [one for one in found if goal.problem(one) is not None]
    return [*sorted(good, key=goal.rank), *sorted(bad, key=lambda one: one.footprint.total_bytes)]


def _nodes(recipe: Recipe, goal: Goal) -> list[int]:
    nodes = recipe.cluster.num_nodes
    if not goal.is_free:
        return [nodes]
    return sorted({int(nodes * factor) for factor in NODE_FACTORS if nodes * factor >= 1})


def _values(recipe: Recipe, machine: Machine, nodes: int, shared_by: int) -> Iterator[dict[str, Any]]:
    """Yield the values of all keys that are searched."""
    cluster = recipe.cluster.model_copy(update={"num_nodes": nodes})
    execution = recipe.execution.model_copy(update={"sequence_parallel": shared_by})
    try:
        base = build_plan(recipe.model_copy(update={"cluster": cluster, "execution": execution}), machine)
    except UserError:
        return
    seq_len = base.batch.seq_len
    share = -(-base.batch.bins_per_batch // base.batch.num_groups)  # sequences of a process, or of a group
    most = min(share, max(1, _MAX_MICRO_TOKENS * shared_by // seq_len))
    sizes = {max(1, most >> halvings) for halvings in range(_FEWEST_MICRO_BATCHES)} | {1}
    if shared_by > 1:  # as many sequences as processes, or more, are as large without an exchange: whole ones each
        sizes = {size for size in (1, 2, 4, 8, 16, 32) if size < shared_by and size <= most}
    replicas = [None, base.processes_per_node] if nodes > 1 and base.processes_per_node > 1 else [None]
    now = recipe.execution.activation_checkpointing
    modes = dict.fromkeys(["none", "selective", "full", now])
    for bins, stage, mode, offload, group in itertools.product(sizes, (0, 1, 2, 3), modes, (False, True), replicas):
        if (group and stage < 3) or (offload and stage == 0):
            continue
        yield {
            "execution.micro_batch": bins * seq_len,
            "execution.zero_stage": stage,
            "execution.activation_checkpointing": mode,
            "execution.offload_optimizer": offload,
            "execution.offload_parameters": False,
            "execution.hierarchical_partition": group,
            "execution.sequence_parallel": shared_by,
            "cluster.num_nodes": nodes,
        }


def _try(
    recipe: Recipe,
    machine: Machine,
    profile: ModelProfile,
    gpu_bytes: int,
    estimator: Estimator,
    values: Mapping[str, Any],
) -> Candidate | None:
    """Return the candidate with these values; None where it is refused."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    updated = {name: getattr(recipe, name).model_copy(update=new) for name, new in sections.items()}
    if not is_accepted(recipe, **updated):
        return None
    try:
        plan = build_plan(recipe.model_copy(update=updated), machine)
        footprint = estimate_footprint(plan, profile)
        verdict = footprint.verdict(gpu_bytes)
        made = estimator(plan) if verdict == "FITS" else None
    except (UserError, KeyError):
        return None
    return Candidate(_changes(recipe, values), values, footprint, verdict, made)


def _changes(recipe: Recipe, values: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        if getattr(getattr(recipe, section), name) != value:
            found[key] = value
    return found


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def search_lines(
    found: Sequence[Candidate], goal: Goal, recipe_file: str, overrides: Sequence[str], verb: str
) -> Iterator[str]:
    """Yield the best ways to run, each with a line that starts it, and why the others lose."""
    good = [one for one in found if goal.problem(one) is None]
    yield f"{len(found)} accepted ways to run with the same contract; {len(good)} of them meet the goal"
    if not good:
        for one in found[:_SHOWN]:
            yield f"  {describe(one)}: {goal.problem(one)}"
        return
    assert good[0].estimate is not None
    yield f"a model, not a measurement; rates {good[0].estimate.rates.source}"
    for number, one in enumerate(good[:_SHOWN], 1):
        yield f"{number}. {describe(one)}"
        yield f"   {_figures(one)}"
        yield f"   {one.command(recipe_file, overrides, verb)}"
    yield "why others lose, each with the best of what is left:"
    yield from (f"  {line}" for line in _losers(found, good[0], goal))


def describe(one: Candidate) -> str:
    """Return a candidate in words."""
    values = one.values
    parts = [
        f"{values['cluster.num_nodes']} nodes",
        f"ZeRO-{values['execution.zero_stage']}",
        f"micro-batch {values['execution.micro_batch']}",
        f"recomputation {values['execution.activation_checkpointing']}",
    ]
    if values["execution.offload_optimizer"]:
        parts.append("optimizer offloaded")
    if values["execution.hierarchical_partition"]:
        parts.append("hpZ")
    if values["execution.sequence_parallel"] > 1:
        parts.append(f"sequences shared by {values['execution.sequence_parallel']}")
    return ", ".join(parts)


def _figures(one: Candidate) -> str:
    assert one.estimate is not None
    made = one.estimate.bill
    parts = [f"{format_bytes(one.footprint.total_bytes)} of each GPU", format_duration(made.run_sec)]
    parts += [f"MFU {made.mfu:.0%}"] if made.mfu is not None else []
    parts += [f"{format_count(made.gpu_hours)} GPU-hours"] if made.gpu_hours is not None else []
    parts += [f"{made.price_usd:,.0f} USD"] if made.price_usd is not None else []
    return ", ".join(parts)


def _losers(found: Sequence[Candidate], best: Candidate, goal: Goal) -> Iterator[str]:
    """Yield, for each value that the best does not have, the best candidate with it and what it loses by."""
    for key, chosen in best.values.items():
        for value in dict.fromkeys(one.values[key] for one in found):
            if value == chosen:
                continue
            rival = next(one for one in found if one.values[key] == value)  # good ones come first, best first
            yield f"{key}={_text(value)}: {_why(rival, best, goal)}"


def _why(rival: Candidate, best: Candidate, goal: Goal) -> str:
    problem = goal.problem(rival)
    if problem is not None:
        return f"{problem} at the least ({describe(rival)})"
    assert rival.estimate is not None and best.estimate is not None
    mine, its = best.estimate.bill, rival.estimate.bill
    part, more = max(
        (
            (name, share * its.step.total - dict(shares(mine.step))[name] * mine.step.total)
            for name, share in shares(its.step)
        ),
        key=lambda item: item[1],
    )
    slower = its.run_sec / mine.run_sec - 1
    if goal.deadline_sec is not None and its.gpu_hours and mine.gpu_hours:
        return f"{its.gpu_hours / mine.gpu_hours - 1:+.1%} GPU-hours, {slower:+.1%} time"
    if slower < 5e-4:
        return f"as fast, with {format_bytes(rival.footprint.total_bytes)} of each GPU"
    return f"{slower:+.1%} time, most of it {part} ({more / mine.step.total:+.1%})"
