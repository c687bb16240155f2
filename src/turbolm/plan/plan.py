"""The plan: everything derived from a recipe for a given machine and world size. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from turbolm.errors import UserError
from turbolm.plan.batch import BatchPlan, plan_batch
from turbolm.plan.curriculum import Curriculum, build_curriculum
from turbolm.plan.deepspeed import resolve_ds_config
from turbolm.plan.machine import (
    Machine,
    check_fp8,
    check_kernels,
    resolve_device,
    resolve_precision,
    resolve_processes_per_node,
)
from turbolm.recipe.schema import Recipe
from turbolm.recipe.sequence_parallel import sequence_problems
from turbolm.units import Span


@dataclass(frozen=True)
class Plan:
    """How a recipe runs. `recipe` has its precision resolved: the contract is made from it."""

    recipe: Recipe
    device: str
    precision: str
    world_size: int
    processes_per_node: int
    threads_per_process: int
    batch: BatchPlan  # for the longest sequences and the largest batch
    curriculum: Curriculum
    evaluate_every_steps: int
    checkpoint_every_steps: int
    ds_config: dict[str, Any]

    @property
    def num_steps(self) -> int:
        """Return the optimizer steps of the run."""
        return self.curriculum.num_steps

    @property
    def random_restart_steps(self) -> int:
        """Return the steps of each candidate of train.random_restarts, or 0. The best one's are the run's first."""
        restarts, train = self.recipe.train.random_restarts, self.recipe.train
        if restarts is None:
            return 0
        tokens = restarts.over.tokens(self.curriculum.budgets_tokens[0], train.global_batch)
        return max(1, self.curriculum.steps_for(math.ceil(tokens)))

    @property
    def random_restart_tokens(self) -> int:
        """Return the tokens of the candidates that are not chosen: the cost of random restarts on top of the budget."""
        restarts = self.recipe.train.random_restarts
        return (restarts.seeds - 1) * self.curriculum.tokens_seen(self.random_restart_steps) if restarts else 0

    @property
    def stop_step(self) -> int | None:
        """Return the step after which `execution.stop_after` stops this start, or None."""
        after, train = self.recipe.execution.stop_after, self.recipe.train
        if after is None:
            return None
        return max(1, self.curriculum.steps_for(math.ceil(after.tokens(train.budget, train.global_batch))))

    @property
    def first_averaged_step(self) -> int:
        """Return the first step after which the weights count in evaluation.weight_average, or 0 without it."""
        average, train, curriculum = self.recipe.evaluation.weight_average, self.recipe.train, self.curriculum
        if average is None:
            return 0
        before = curriculum.tokens_seen(self.num_steps) - average.last.tokens(train.budget, train.global_batch)
        return max(curriculum.first_step + 1, curriculum.steps_for(math.floor(max(before, 0)) + 1))

    def with_budgets(self, budgets_tokens: Sequence[int]) -> Plan:
        """Return the plan of a run with these budgets: the first one and each extension."""
        return replace(self, curriculum=build_curriculum(self.recipe, budgets_tokens))


def build_plan(recipe: Recipe, machine: Machine, world_size: int | None = None) -> Plan:
    """Derive the plan; `world_size` overrides the recipe's cluster for a manual launch.

    Raises UserError if the recipe does not fit the machine.
    """
    device = resolve_device(recipe, machine)
    precision = resolve_precision(recipe, machine, device)
    check_fp8(recipe, machine, device, precision)
    check_kernels(recipe, machine, device, precision)
    if world_size is None:
        processes_per_node = resolve_processes_per_node(recipe, machine, device)
        world_size = processes_per_node * recipe.cluster.num_nodes
    else:
        processes_per_node = -(-world_size // recipe.cluster.num_nodes)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})
    batch = plan_batch(recipe, world_size)
    curriculum = build_curriculum(recipe)
    for segment in curriculum.segments:  # raises if a small batch has too few sequences
        plan_batch(recipe, world_size, seq_len=segment.seq_len, batch_tokens=segment.global_batch_tokens)
    for key, problem in sequence_problems(batch.sequence_parallel, curriculum.seq_lens):
        raise UserError(f"{key}: {problem}")
    threads = recipe.execution.threads_per_process
    return Plan(
        recipe=recipe,
        device=device,
        precision=precision,
        world_size=world_size,
        processes_per_node=processes_per_node,
        threads_per_process=max(1, machine.num_cpus // processes_per_node) if threads == "auto" else threads,
        batch=batch,
        curriculum=curriculum,
        evaluate_every_steps=_span_steps(recipe.evaluation.every, batch, recipe),
        checkpoint_every_steps=_span_steps(recipe.checkpoint.every, batch, recipe),
        ds_config=resolve_ds_config(recipe, batch, device, precision),
    )


def _span_steps(span: Span, batch: BatchPlan, recipe: Recipe) -> int:
    tokens = span.tokens(recipe.train.budget, batch.global_batch_tokens)
    return max(1, math.ceil(tokens / batch.global_batch_tokens))
