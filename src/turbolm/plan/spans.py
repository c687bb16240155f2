"""Spans of training read in steps: refuse those shorter than a step, and say what the others come to. Torch-free.

A number alone is tokens, so `warmup: 500` of someone who means steps is a warmup of nothing, and `checkpoint.every:
1000` saves after every step.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from turbolm.errors import UserError
from turbolm.plan.curriculum import Curriculum, batch_changes
from turbolm.recipe.schema import Recipe
from turbolm.units import Span

_LAST = ("every", "remix_every", "keep_every", "decay", "cycle")  # counted in full batches; all others from the start


def check_spans(recipe: Recipe) -> None:
    """Raise UserError with every span in tokens that is shorter than one step; 0, where it means none, is fine."""
    budget, full = recipe.train.budget, recipe.train.global_batch
    first = batch_changes(recipe, budget)[0][1]
    problems = []
    for key, span in _spans(recipe):
        step = full if key.rpartition(".")[2] in _LAST else first
        if span.unit == "tokens" and 0 < span.amount < step:
            steps = f"{span} step{'s' * (span.amount > 1)}"
            meant = f"write `{steps}` if you mean steps, or " if span.amount * full < budget else "write "
            problems.append(f"{key}: {span} tokens are less than one step ({step} tokens); {meant}at least {step}")
    if problems:
        raise UserError("\n".join(problems))


def span_notes(recipe: Recipe, curriculum: Curriculum) -> list[str]:
    """What to say of spans that come to less than a step, or to more steps than they name while the batch grows."""
    budget, full = curriculum.budgets_tokens[0], recipe.train.global_batch
    first, notes = curriculum.segments[0].global_batch_tokens, []
    for key, span in _spans(recipe):
        name = key.rpartition(".")[2]
        tokens = span.tokens(budget, full)
        if name in ("every", "keep_every"):
            continue
        step = full if name in _LAST else first
        if 0 < tokens < step:
            notes.append(f"{key}: {span} is {tokens / step:.2g} of a step")
        elif name not in _LAST and span.unit == "steps" and 0 < tokens <= budget and not curriculum.first_step:
            num_steps = curriculum.steps_for(round(tokens))
            if num_steps != span.amount:
                notes.append(
                    f"{key}: {span} of the full batch ({full} tokens) are {num_steps} steps of this run, whose first "
                    "batches are smaller"
                )
    warmup = recipe.schedule.warmup
    if warmup.tokens(budget, full) >= budget:
        notes.append(f"schedule.warmup: {warmup} is the whole run, so the learning rate never reaches its peak")
    return notes


def _spans(value: object, key: str = "") -> Iterator[tuple[str, Span]]:
    """Every span of a recipe with its key, those among staged values included."""
    if isinstance(value, Span):
        yield key, value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _spans(getattr(value, name), f"{key}.{name}" if key else name)
    elif isinstance(value, tuple):
        for number, part in enumerate(value):
            is_staged = isinstance(part, tuple) and bool(part) and isinstance(part[0], Span)
            yield from _spans(part[0] if is_staged else part, key if is_staged else f"{key}.{number}")
