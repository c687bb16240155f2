"""Batch size and learning rate that a published scaling law would choose: suggestions, never applied. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from turbolm.errors import UserError
from turbolm.plan.machine import Machine
from turbolm.plan.plan import build_plan
from turbolm.plan.spans import check_spans
from turbolm.recipe.checks import check_recipe
from turbolm.recipe.schema import Recipe

STEP_LAW = "Step Law (arXiv 2503.04715)"
_FITTED_PARAMETERS = (60e6, 1e9)  # what the law was fitted on, section 4 there
_FITTED_TOKENS = (2e9, 100e9)


@dataclass(frozen=True)
class Suggestion:
    """What the law gives for AdamW, and whether this run lies within what it was fitted on."""

    source: str
    lr: float
    global_batch_tokens: int
    is_extrapolated: bool


def suggest(num_parameters: int, budget_tokens: int) -> Suggestion:
    """The best peak learning rate 1.79 N^-0.713 D^0.307 and batch 0.58 D^0.571 tokens of the Step Law.

    `num_parameters` N are those without embeddings and head; D is the token budget.
    """
    size, tokens = max(num_parameters, 1), budget_tokens
    inside = _FITTED_PARAMETERS[0] <= size <= _FITTED_PARAMETERS[1] and _FITTED_TOKENS[0] <= tokens <= _FITTED_TOKENS[1]
    return Suggestion(STEP_LAW, 1.79 * size**-0.713 * tokens**0.307, round(0.58 * tokens**0.571), not inside)


def is_accepted(recipe: Recipe, machine: Machine | None = None, **sections: Any) -> bool:
    """Whether a recipe with other sections would load, and with `machine` also plan there."""
    changed = recipe.model_copy(update=sections)
    if check_recipe(changed):
        return False
    try:
        check_spans(changed)
        if machine is not None:
            build_plan(changed, machine)
    except UserError:
        return False
    return True


def nearest_batch(recipe: Recipe, machine: Machine, wanted: int) -> int | None:
    """The batch closest to `wanted` tokens of whole sequences, at least one for every process; None where the rest of
    the recipe (a ramp, a micro-batch) goes with none near it."""
    plan = build_plan(recipe, machine)
    unit = math.lcm(*plan.curriculum.seq_lens)
    least = -(-plan.batch.num_groups * recipe.data.seq_len // unit)
    near = {max(least, count) for count in (wanted // unit, wanted // unit + 1)}
    for count in sorted(near, key=lambda count: abs(count * unit - wanted)):
        train = recipe.train.model_copy(update={"global_batch": count * unit})
        if is_accepted(recipe, machine, train=train):
            return count * unit
    return None
