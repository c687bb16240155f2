"""What a fork takes from another recipe: its data from their first batch on, and how it runs. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from turbolm.errors import UserError
from turbolm.plan.curriculum import batch_changes
from turbolm.recipe.contract import changed_keys, comparable, contract_of
from turbolm.recipe.data import DataStart
from turbolm.recipe.schedules import Wsd
from turbolm.recipe.schema import Recipe

_TAKEN = ("data", "anomalies", "cluster", "execution", "evaluation", "checkpoint", "logging")  # sections
_OF_DECAY = ("decay_shape", "min_lr_ratio")  # keys of the schedule; --decay says how long it is
_MAY_DIFFER = {"train.seed", "train.budget", "schedule.decay", *(f"schedule.{key}" for key in _OF_DECAY)}
_PAST = ("train.batch_ramp", "train.random_restarts")  # over at the fork; the other recipe may leave them out


def check_takes(old: Recipe, other: Recipe, start: DataStart) -> None:
    """Raise UserError with every learning key of `other` that a fork of `old` at `start` does not take."""
    changes = changed_keys(comparable(contract_of(old)), comparable(contract_of(other)))
    lines = [
        f"{key}: {json.dumps(before)} -> {json.dumps(after)}"
        for key, before, after in changes
        if not _may_differ(key, after, other)
    ]
    if lines:
        raise UserError(
            f"--recipe: a fork takes data, anomalies, train.seed and the shape of the decay of {other.name}, and "
            f"the rest of what is learned stays that of {old.name}; these differ: {'; '.join(lines)}"
        )
    ramped = [tokens for tokens, _ in batch_changes(old, old.train.budget) if tokens > start.tokens]
    if ramped:
        raise UserError(
            f"train.batch_ramp of {old.name} lasts until {max(ramped):.0f} tokens; fork a checkpoint after it"
        )


def _may_differ(key: str, after: Any, other: Recipe) -> bool:
    if key == "schedule.name":
        return isinstance(other.schedule, Wsd)  # of a constant rate
    if key == "train.precision":
        return other.train.precision == "auto"
    is_past = any(key == past and after is None for past in _PAST)
    return is_past or key in _MAY_DIFFER or key.partition(".")[0] in _TAKEN


def decay_of(other: Recipe) -> dict[str, Any]:
    """Return the shape and the end of the decay as far as `other` says them."""
    schedule = other.schedule
    return {key: getattr(schedule, key) for key in _OF_DECAY if key in schedule.model_fields_set}


def with_data_of(new: Recipe, other: Recipe, start: DataStart) -> Recipe:
    """Return the fork `new` with the data of `other`, whose order begins at `start`, run as `other` says."""
    update: dict[str, Any] = {name: getattr(other, name) for name in _TAKEN}
    update["data"] = other.data.model_copy(update={"starts_at": start})
    past = {"batch_ramp": None, "random_restarts": None}
    update["train"] = new.train.model_copy(update={**past, "seed": other.train.seed})
    return new.model_copy(update=update)


def state_before_data(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the trainer's state of a checkpoint before the first batch of other data.

    What it says of data is of the old ones: the order, batches left out, losses that spikes are measured against, and
    the best loss on what is held out.
    """
    return {**state, "order_digest": "", "best_eval_loss": None, "anomalies": {}}
