"""Build the arms of an ablation and check that each differs from the baseline by its tricks only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from turbolm.ablate.tricks import Trick
from turbolm.errors import UserError
from turbolm.plan.count import check_model
from turbolm.plan.machine import Machine, check_machine
from turbolm.plan.plan import build_plan
from turbolm.recipe.contract import changed_keys, contract_of
from turbolm.recipe.load import load_recipe
from turbolm.recipe.schema import Recipe

# What all arms must share: otherwise their losses cannot be compared with the baseline's.
_COMMON = {
    "name": "is the run's name",
    "tokenizer": "decides what a token is",
    "data.sources": "is the training data",
    "data.validation": "is the evaluation data",
    "data.deduplicate": "is the training data",
    "data.seq_len": "is the context the evaluation gives; a schedule of lengths is data.length_schedule",
    "train.budget": "is what each arm is given",
    "train.seed": "is chosen by --seeds",
    "evaluation": "is how each arm is measured",
    "execution.runs_dir": "is where the runs of the arms are",
    "execution.cache_dir": "is where the data is",
}
_MAX_NAME = 70


@dataclass(frozen=True)
class Arm:
    """The recipe with some of the tricks, as planned on this machine. `name` is its name in tables."""

    name: str
    tricks: tuple[Trick, ...]
    recipe: Recipe

    @property
    def run_name(self) -> str:
        """The prefix of its run names: the same tricks give the same name, whatever else is measured."""
        names = sorted(trick.name for trick in self.tricks)
        name = "-".join(["with", *names]) if names else "baseline"
        if len(name) > _MAX_NAME:
            name = f"with-{len(names)}-tricks-{hashlib.sha256(','.join(names).encode()).hexdigest()[:10]}"
        return name

    @property
    def changes_lr(self) -> bool:
        """Whether its best learning rate may differ from the baseline's."""
        sections = ("optimizer", "schedule", "train.batch_ramp", "train.global_batch")
        return any(_overlap(key, section) for trick in self.tricks for key in trick.keys for section in sections)


def design(
    recipe_file: str, overrides: Sequence[str], tricks: Sequence[Trick], machine: Machine, *, alone: bool = False
) -> list[Arm]:
    """The baseline, each trick alone, all together, and all but one. Each set of tricks appears once.

    `alone` skips the combinations. Raises UserError with every reason why the arms cannot be compared: tricks that do
    not work here, change nothing, change more than they say, change what all arms must share, or contradict each other.
    """
    problems = [] if alone else _contradictions(tricks)
    for trick in tricks:
        for key in trick.keys:
            for common, reason in _COMMON.items():
                if _overlap(key, common):
                    problems.append(f"{trick.name}: sets {key}, but {common} {reason}; it must be the same in all arms")
    baseline = _arm("baseline", recipe_file, overrides, (), machine)
    arms = [baseline]
    if not baseline.recipe.data.validation:
        problems.append("data.validation: 0 leaves no held-out loss to compare the arms by; set data.validation=1%")

    def add(name: str, group: tuple[Trick, ...]) -> None:
        try:
            arm = _arm(name, recipe_file, overrides, group, machine)
            problems.extend(_excess(arm, baseline))
            arms.append(arm)
        except UserError as error:
            problems.extend(f"{name.removeprefix('+')}: {line}" for line in str(error).splitlines())

    for trick in tricks:
        add("+" + trick.name, (trick,))
    if problems:
        raise UserError("\n".join(problems))
    for name, group in ({} if alone else _combinations(tricks)).items():
        add(name, group)
    if problems:
        raise UserError("\n".join([*problems, "measure them separately, or with --alone"]))
    if len({arm.run_name for arm in arms}) < len(arms):
        raise UserError("--tricks: names such as a-b beside a and b give two arms the same name; rename one of them")
    return arms


def _arm(name: str, recipe_file: str, overrides: Sequence[str], group: tuple[Trick, ...], machine: Machine) -> Arm:
    layers = [override for trick in group for override in trick.overrides]
    if layers:  # keep the baseline's learning rate, not another optimizer's default
        layers.insert(0, f"optimizer.lr={load_recipe(recipe_file, overrides).optimizer.lr!r}")
    recipe = load_recipe(recipe_file, [*overrides, *layers])
    check_machine(recipe, machine)
    check_model(recipe, recipe_file)
    return Arm(name, group, build_plan(recipe, machine).recipe)


def _combinations(tricks: Sequence[Trick]) -> dict[str, tuple[Trick, ...]]:
    """All together and all but one, by name, unless they are arms already."""
    if len(tricks) < 2:
        return {}
    groups = {"all": tuple(tricks)}
    if len(tricks) > 2:
        for left_out in tricks:
            groups[f"all -{left_out.name}"] = tuple(trick for trick in tricks if trick is not left_out)
    return groups


def _contradictions(tricks: Sequence[Trick]) -> list[str]:
    problems = []
    for one, other in combinations(tricks, 2):
        shared = [key for key in one.keys if any(_overlap(key, theirs) for theirs in other.keys)]
        if shared:
            problems.append(
                f"{one.name} and {other.name} both set {', '.join(shared)}, so they cannot be combined; leave one out, "
                "or measure each one against the baseline only, with --alone"
            )
    return problems


def _excess(arm: Arm, baseline: Arm) -> list[str]:
    """Differences from the baseline that the arm's tricks do not name, or a note that there is no difference."""
    said = [key for trick in arm.tricks for key in trick.keys]
    # Another optimizer or schedule has other settings too.
    named = ("optimizer.name", "schedule.name", "data.length_schedule.name")
    said += [key.removesuffix(".name") for key in said if key in named]
    name = arm.name.removeprefix("+")
    problems = [
        f"{name}: would also change {key} from {_shown(before)} to {_shown(after)}, so it would not be measured alone; "
        f"give all arms one value, such as {key}={_shown(after)} on the command line"
        for key, before, after in changed_keys(contract_of(baseline.recipe), contract_of(arm.recipe))
        if not any(_overlap(key, own) for own in said)
    ]
    if arm.recipe == baseline.recipe:
        problems.append(f"{name}: changes nothing; the recipe, as planned on this machine, already says that")
    return problems


def _overlap(one: str, other: str) -> bool:
    """Whether two dotted keys are equal or one contains the other."""
    return one == other or one.startswith(other + ".") or other.startswith(one + ".")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def describe_arms(arms: Sequence[Arm]) -> str:
    """One line per arm: its tricks, or what its only trick sets."""
    width = max(len(arm.name) for arm in arms)
    lines = []
    for arm in arms:
        if len(arm.tricks) == 1:
            values = arm.recipe.model_dump(mode="json")
            said = " ".join(f"{key}={_shown(_value(values, key))}" for key in arm.tricks[0].keys)
        else:
            said = ", ".join(trick.name for trick in arm.tricks) or "the recipe as it is"
        lines.append(f"{arm.name.ljust(width)}  {said}")
    return "\n".join(lines)


def _value(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values
