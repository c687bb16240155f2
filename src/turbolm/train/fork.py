"""Start a new run from a checkpoint of another run with a changed contract: a decay from a plateau. Torch-free."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turbolm.checkpoint.manifest import MANIFEST, read_manifest
from turbolm.checkpoint.verify import verify_checkpoint
from turbolm.errors import UserError
from turbolm.files import read_json, write_json
from turbolm.plan.curriculum import build_curriculum
from turbolm.recipe.contract import comparable, contract_of, fingerprint, pin_to
from turbolm.recipe.fields import Section
from turbolm.recipe.load import dump_recipe, load_recipe
from turbolm.recipe.schedules import Wsd
from turbolm.recipe.schema import Recipe
from turbolm.train.run_directory import RunDirectory
from turbolm.units import Span

_LEARNED = ("data", "train", "optimizer", "schedule")  # sections whose shares of the budget must not move


def fork(checkpoint: Path, decay: Span, name: str | None = None, changes: Mapping[str, Any] | None = None) -> Path:
    """Branch a decay from `checkpoint`, on a plateau of the learning rate; return the new run's folder.

    The new run has the plan of a run that warms up like the old one, stays at the peak up to the checkpoint and decays
    over `decay`. A share is one of the new run: a decay of 10% follows the finished 90%. It starts from the
    checkpoint's weights, optimizer state and data position, and records where it came from. `changes` replace keys of
    its schedule, such as `decay_shape`. Raises UserError.
    """
    checkpoint = Path(os.path.abspath(checkpoint))
    origin = RunDirectory(checkpoint.parent.parent)
    record = read_json(origin.contract)
    if record is None:
        raise UserError(f"{checkpoint}: expected a checkpoint inside a run directory; {origin.contract} cannot be read")
    problems = verify_checkpoint(checkpoint, {record["fingerprint"], *record.get("former_fingerprints", ())})
    if problems:
        raise UserError("\n".join(f"{checkpoint}: {problem}" for problem in problems))
    manifest = read_manifest(checkpoint)
    old, _ = pin_to(load_recipe(origin.path / "recipe.yaml"), record["contract"])
    if len(record["budgets_tokens"]) > 1 or comparable(contract_of(old)) != comparable(record["contract"]):
        raise UserError(f"{origin.path} was extended, or its recipe.yaml changed; only a run as planned can be forked")
    branch_tokens = int(manifest["tokens_seen"])
    _check_plateau(old, branch_tokens)
    new = _decaying(old, branch_tokens, decay, dict(changes or {}))
    _check_same_past(old, new, int(manifest["step"]))
    new = new.model_copy(
        update={
            "name": name or f"{old.name}-decay-{manifest['step']}",
            "execution": new.execution.model_copy(update={"runs_dir": str(origin.path.parent)}),
        }
    )
    new = Recipe.model_validate(new.model_dump(mode="json"))  # an invalid name or shape
    run = RunDirectory(origin.path.parent / new.name)
    if run.path.exists():
        raise UserError(f"{run.path} exists; choose another --name")
    contract = contract_of(new)
    came_from = {"run": origin.path.name, "checkpoint": checkpoint.name, "fingerprint": record["fingerprint"]}
    temporary = run.path.with_name(f".{run.path.name}.{os.getpid()}")
    try:
        _write(temporary, checkpoint, new, {**manifest, "contract": fingerprint(contract)})
        write_json(
            temporary / "contract.json",
            {
                "fingerprint": fingerprint(contract),
                "contract": contract,
                "store_fingerprint": record["store_fingerprint"],
                "budgets_tokens": [new.train.budget],
                "origin": {**came_from, "step": manifest["step"], "tokens_seen": branch_tokens},
            },
            durable=True,
        )
        temporary.rename(run.path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return run.path


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
    sections = {name: _in_tokens(getattr(old, name), old.train.budget) for name in _LEARNED}
    sections["train"] = sections["train"].model_copy(update={"budget": branch_tokens + num_steps * batch})
    schedule = {name: value for name, value in sections["schedule"] if name in Wsd.model_fields}
    schedule |= {"name": "wsd", "decay": Span(num_steps * batch, "tokens"), **changes}
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


def _write(folder: Path, checkpoint: Path, recipe: Recipe, manifest: dict[str, Any]) -> None:
    """Write the new run's recipe and first checkpoint; large files are hard links to the old run's if possible."""
    target = folder / "checkpoints" / checkpoint.name
    target.mkdir(parents=True)
    for name in manifest["files"]:  # only the verified files
        try:
            os.link(checkpoint / name, target / name)
        except OSError:  # another file system, or one without hard links
            shutil.copy2(checkpoint / name, target / name)
    write_json(target / MANIFEST, manifest, durable=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
