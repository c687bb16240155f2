"""The learning rate, weight decay and momentum of a step: one function for the run and for the preview. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from turbolm.plan.plan import Plan
from turbolm.recipe.schedules import lr_ratio
from turbolm.recipe.schema import BatchRamp


@dataclass(frozen=True)
class Rates:
    """What an optimizer step uses; None if the recipe has no schedule for it and the optimizer keeps its own value."""

    lr: float
    weight_decay_factor: float | None  # factor on each parameter group's weight decay
    momentum: float | None
    lr_of_kinds: Mapping[str, float] = field(default_factory=dict)  # kinds whose decay is not the others'
    lookahead: float | None = None  # of EMA-Nesterov, in means of the weights' movement


def step_rates(plan: Plan, step: int, batch_index: int | None = None) -> Rates:
    """Return the rates of the step after `step` finished steps.

    `batch_index` is the batch it trains on if a rollback skipped some; by default batch `step`. Schedules are evaluated
    at the middle of the step's tokens, so neither the first step of a warmup nor the last of a decay to zero is wasted.
    """
    recipe, curriculum = plan.recipe, plan.curriculum
    schedule, full_batch = recipe.schedule, recipe.train.global_batch
    batch = curriculum.segment(step if batch_index is None else batch_index).global_batch_tokens
    tokens = curriculum.tokens_seen(step) + batch / 2
    factor = lr_factor(recipe.train.batch_ramp, batch, full_batch)
    ratio, *ratios = (
        lr_ratio(schedule.of_kind(kind), tokens, curriculum.whole_budgets_tokens, full_batch)
        for kind in ("", *schedule.own_decays)
    )
    weight_decay, momentum = (
        None if ramp is None else ramp.value(tokens, curriculum.budgets_tokens[0], full_batch)
        for ramp in (schedule.weight_decay, schedule.momentum)
    )
    lr_of_kinds = {
        kind: recipe.optimizer.lr * own * factor for kind, own in zip(schedule.own_decays, ratios, strict=True)
    }
    ahead, lookahead = recipe.optimizer.ema_nesterov, None
    if ahead is not None:
        start, end = (span.tokens(curriculum.budgets_tokens[0], full_batch) for span in (ahead.start, ahead.end))
        lookahead = ahead.lookahead * ratio * factor if start <= tokens < end else 0.0
    return Rates(recipe.optimizer.lr * ratio * factor, weight_decay, momentum, lr_of_kinds, lookahead)


def preview_steps(plan: Plan) -> Iterator[dict[str, Any]]:
    """Yield every step of the run itself with its rates, under the names of metrics.jsonl."""
    for step in range(plan.curriculum.first_step, plan.num_steps):
        rates = step_rates(plan, step)
        yield {
            "step": step + 1,
            "tokens_seen": plan.curriculum.tokens_seen(step + 1),
            **shown_lrs(plan, rates),
            "weight_decay_factor": rates.weight_decay_factor,
            "momentum": rates.momentum,
        }


def shown_lrs(plan: Plan, rates: Rates) -> dict[str, float]:
    """Return the learning rate under its name in metrics.jsonl, and beside it those of kinds that have another one."""
    scales = plan.recipe.optimizer.lr_scales
    of_kinds = {f"train/lr/{kind}": rates.lr_of_kinds.get(kind, rates.lr) * scale for kind, scale in scales}
    return {"train/lr": rates.lr} | {name: lr for name, lr in of_kinds.items() if lr != rates.lr}


def lr_factor(ramp: BatchRamp | None, batch_tokens: int, full_batch_tokens: int) -> float:
    """Return the factor on the learning rate while the batch is smaller than the full one.

    `sqrt` keeps the noise of Adam's update (arXiv 2205.10287), `linear` that of SGD's (arXiv 1706.02677).
    """
    power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[ramp.lr_scaling if ramp else "none"]
    return float((batch_tokens / full_batch_tokens) ** power)
