"""Start a new run from a checkpoint of another run with a changed contract: a decay from a plateau. Torch-free."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbolm.checkpoint.manifest import MANIFEST, TRAINER_STATE, read_manifest
from turbolm.checkpoint.verify import verify_checkpoint
from turbolm.data.prepare.build import reads_same_documents
from turbolm.data.prepare.tokenizer import copy_tokenizer
from turbolm.errors import UserError
from turbolm.files import load_json, write_json
from turbolm.plan.curriculum import build_curriculum
from turbolm.recipe.contract import comparable, contract_of, fingerprint, pin_to
from turbolm.recipe.data import DataStart
from turbolm.recipe.fields import Section
from turbolm.recipe.load import dump_recipe, load_recipe
from turbolm.recipe.schedules import Decays, Wsd
from turbolm.recipe.schema import Recipe
from turbolm.train.other_data import check_takes, decay_of, state_before_data, with_data_of
from turbolm.train.run_contract import as_recorded
from turbolm.train.run_directory import RunDirectory, run_of
from turbolm.units import Span

_LEARNED = ("data", "train", "optimizer", "schedule")  # sections whose shares of the budget must not move


@dataclass(frozen=True)
class _Plateau:
    """A verified checkpoint to branch from, and the run that saved it."""

    checkpoint: Path
    run: RunDirectory
    record: dict[str, Any]  # contract.json
    manifest: dict[str, Any]
    recipe: Recipe

    @property
    def start(self) -> DataStart:
        return DataStart(step=int(self.manifest["step"]), tokens=int(self.manifest["tokens_seen"]))


def fork(
    checkpoint: Path,
    decay: Span,
    name: str | None = None,
    changes: Mapping[str, Any] | None = None,
    other: Recipe | None = None,
) -> Path:
    """Branch a decay from `checkpoint`, on a plateau of the learning rate; return the new run's folder.

    The new run has the plan of a run that warms up like the old one, stays at the peak up to the checkpoint and decays
    over `decay`. A share is one of the new run: a decay of 10% follows the finished 90%. It starts from the
    checkpoint's weights, optimizer state and data position, and records where it came from. `changes` replace keys of
    its schedule, such as `decay_shape`. With the recipe `other` it reads that recipe's data instead, from their first
    batch on, and runs as that recipe says. Raises UserError.
    """
    plateau = _open_plateau(Path(os.path.abspath(checkpoint)))
    old, start, same_documents = plateau.recipe, plateau.start, True
    default_name = f"{old.name}-decay-{start.step}"
    if other is None:
        new = _decaying(old, start.tokens, decay, dict(changes or {}))
        _check_same_past(old, new, start.step)
    else:
        other, _ = as_recorded(other, plateau.record["contract"])
        check_takes(old, other, start)
        new = _decaying(old, start.tokens, decay, {**decay_of(other), **(changes or {})})
        new, same_documents = with_data_of(new, other, start), reads_same_documents(old, other)
        default_name = default_name if other.name == old.name else other.name
    runs_dir = plateau.run.path.parent
    execution = new.execution.model_copy(update={"runs_dir": str(runs_dir), "stop_after": None})
    new = new.model_copy(update={"name": name or default_name, "execution": execution})
    run = RunDirectory(runs_dir / new.name)
    if not same_documents:
        tokenizer = new.tokenizer.model_copy(update={"train": None, "path": str(run.tokenizer), "revision": None})
        new = new.model_copy(update={"tokenizer": tokenizer})
    new = Recipe.model_validate(new.model_dump(mode="json"))  # an invalid name or shape
    if run.path.exists():
        raise UserError(f"{run.path} exists; choose another --name")
    temporary = RunDirectory(run.path.with_name(f".{run.path.name}.{os.getpid()}"))
    try:
        _write(temporary, plateau, new, same_documents=same_documents)
        temporary.path.rename(run.path)
    finally:
        shutil.rmtree(temporary.path, ignore_errors=True)
    return run.path


def _open_plateau(checkpoint: Path) -> _Plateau:
    run, record = run_of(checkpoint)
    problems = verify_checkpoint(checkpoint, {record["fingerprint"], *record.get("former_fingerprints", ())})
    if problems:
        raise UserError("\n".join(f"{checkpoint}: {problem}" for problem in problems))
    recipe, _ = pin_to(load_recipe(run.path / "recipe.yaml"), record["contract"])
    if len(record["budgets_tokens"]) > 1 or comparable(contract_of(recipe)) != comparable(record["contract"]):
        raise UserError(f"{run.path} was extended, or its recipe.yaml changed; only a run as planned can be forked")
    plateau = _Plateau(checkpoint, run, record, read_manifest(checkpoint), recipe)
    _check_plateau(recipe, plateau.start.tokens)
    return plateau


def _check_plateau(recipe: Recipe, tokens: int) -> None:
    schedule, budget = recipe.schedule, recipe.train.budget
    plateau = schedule.plateau(budget, recipe.train.global_batch)
    if plateau is None:
        raise UserError(
            f"schedule.name is {schedule.name}, whose learning rate has no plateau to branch a decay from; train with "
            "schedule.name=wsd or constant"
        )
    start, end = plateau
    if not start <= tokens <= end or tokens >= budget:
        raise UserError(
            f"at {tokens} tokens the learning rate is off its plateau, which lasts from {start:.0f} to {end:.0f} "
            "tokens; fork a checkpoint from there"
        )


def _check_same_past(old: Recipe, new: Recipe, num_steps: int) -> None:
    """Raise UserError if the new run would have trained other steps so far: its data position would be another one."""
    past = [[s for s in build_curriculum(recipe).segments if s.first_step < num_steps] for recipe in (old, new)]
    if past[0] != past[1]:
        raise UserError(
            "data.length_schedule or train.batch_ramp follows the budget in a way that a new budget changes before the "
            "checkpoint; give their keys in tokens or steps, or use data.length_schedule.order=shuffled"
        )


def _decaying(old: Recipe, branch_tokens: int, decay: Span, changes: dict[str, Any]) -> Recipe:
    """Return the recipe of a run that decays from `branch_tokens` on."""
    batch = old.train.global_batch
    if decay.unit == "share":
        if not 0 < decay.amount < 1:
            raise UserError(f"--decay: expected more than 0% and less than 100%, got {decay}")
        decay_tokens = branch_tokens * decay.amount / (1 - decay.amount)
    else:
        decay_tokens = decay.tokens(0, batch)
    num_steps = max(1, round(decay_tokens / batch))
    own = old.data.starts_at  # a fork's data count their own budget
    budgets = {"data": old.train.budget - (own.tokens if own else 0)}
    sections = {name: _in_tokens(getattr(old, name), budgets.get(name, old.train.budget)) for name in _LEARNED}
    sections["train"] = sections["train"].model_copy(update={"budget": branch_tokens + num_steps * batch})
    schedule = {name: value for name, value in sections["schedule"] if name in Wsd.model_fields}
    schedule |= {"name": "wsd", "decay": Span(num_steps * batch, "tokens"), "decays": Decays(), **changes}
    sections["schedule"] = Wsd.model_construct(**schedule)  # `fork` checks what the changes ask for
    return old.model_copy(update=sections)


def _in_tokens(value: Any, budget_tokens: int) -> Any:
    """Convert every share of the old budget to tokens, so that finished parts of schedules do not move."""
    if isinstance(value, Span) and value.unit == "share":
        return Span(round(value.amount * budget_tokens), "tokens")
    if isinstance(value, Section):
        inner = {name: _in_tokens(getattr(value, name), budget_tokens) for name in type(value).model_fields}
        return value.model_copy(update=inner)
    if isinstance(value, tuple) and not isinstance(value, Span):
        return tuple(_in_tokens(entry, budget_tokens) for entry in value)
    return value


def _write(new: RunDirectory, plateau: _Plateau, recipe: Recipe, *, same_documents: bool) -> None:
    """Write the new run's recipe, contract and first checkpoint, and its tokenizer if it reads other documents.

    Large files are hard links to the old run's if possible.
    """
    contract, checkpoint = contract_of(recipe), plateau.checkpoint
    manifest = {**plateau.manifest, "contract": fingerprint(contract), "files": dict(plateau.manifest["files"])}
    target = new.checkpoints / checkpoint.name
    target.mkdir(parents=True)
    for name in manifest["files"]:  # only the verified files
        try:
            os.link(checkpoint / name, target / name)
        except OSError:  # another file system, or one without hard links
            shutil.copy2(checkpoint / name, target / name)
    if recipe.data.starts_at == plateau.start:
        state = state_before_data(load_json(checkpoint / TRAINER_STATE))
        manifest["files"][TRAINER_STATE] = write_json(target / TRAINER_STATE, state, durable=True)
    write_json(target / MANIFEST, manifest, durable=True)
    if not same_documents:
        copy_tokenizer(plateau.run.model, new.tokenizer)
    (new.path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    record, start = plateau.record, plateau.start
    came_from = {"run": plateau.run.path.name, "checkpoint": checkpoint.name, "fingerprint": record["fingerprint"]}
    value = {
        "fingerprint": fingerprint(contract),
        "contract": contract,
        "store_fingerprint": record["store_fingerprint"] if same_documents else "",  # the first start records it
        "budgets_tokens": [recipe.train.budget],
        "origin": {**came_from, "step": start.step, "tokens_seen": start.tokens},
    }
    write_json(new.contract, value, durable=True)
