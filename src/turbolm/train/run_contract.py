"""Compare a run's contract.json with its recipe. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from turbolm.errors import UserError
from turbolm.files import read_json, write_json
from turbolm.hub import fetch, find_origins
from turbolm.plan.spans import check_spans
from turbolm.recipe.contract import changed_keys, comparable, contract_of, fingerprint, pin_to
from turbolm.recipe.schema import Recipe
from turbolm.train.run_directory import RunDirectory, is_finished, run_directory


def has_learned(run: RunDirectory) -> bool:
    """Return whether any step was trained: a start that ended before its first step leaves nothing to keep."""
    try:
        logged = run.metrics.stat().st_size > 0
    except OSError:
        logged = False
    folders = (run.checkpoints, run.random_restarts)
    return logged or any(folder.is_dir() and any(folder.iterdir()) for folder in folders)


def as_started(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Return the recipe with the defaults and commits that its run started with, and a line for each default that has
    changed since.

    Raises UserError for a damaged contract.json, and where a new run would have a span shorter than one step; an old
    run keeps what it has.
    """
    run = run_directory(recipe)
    if not run.contract.exists() or not has_learned(run):
        check_spans(recipe)
        return recipe, []
    return as_recorded(with_commits(recipe), _read_contract(run)["contract"])


def as_recorded(recipe: Recipe, contract: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
    """Return the recipe with the defaults and commits of a contract, and a line for each default that has changed."""
    recipe, pinned = pin_to(recipe, contract)
    recorded = {}
    for section, key in (("model", "pretrained"), ("tokenizer", "path")):
        if isinstance(old := contract.get(section), dict):
            recorded[section] = _record(old.get(key), None, old.get("revision"))
    return _with_commits(recipe, recorded), pinned


def with_commits(recipe: Recipe) -> Recipe:
    """Return the recipe with the commits that `settle_commits` recorded as its revisions."""
    return _with_commits(recipe, read_json(run_directory(recipe).hub) or {})


def settle_commits(recipe: Recipe) -> Recipe:
    """Download what the recipe uses from the hub, and record the commits of its names and branches for this run.

    For one process, before any rank starts; the ranks read the record (`with_commits`). Returns the recipe with the
    commits as its revisions. Raises UserError.
    """
    run = run_directory(recipe)
    known = read_json(run.hub) or {}
    recorded: dict[str, Any] = {}
    for origin in find_origins(recipe):
        if not origin.is_on_hub and origin.revision is None:
            continue
        commit = fetch(origin)
        before = known.get(origin.section) or {}
        if commit != origin.revision:
            recorded[origin.section] = _record(origin.value, origin.revision, commit)
        elif (before.get("name"), before.get("commit")) == (origin.value, commit):
            recorded[origin.section] = before  # settled at an earlier start
    if recorded and recorded != known:
        run.path.mkdir(parents=True, exist_ok=True)
        write_json(run.hub, recorded)
    return _with_commits(recipe, recorded)


def _record(name: Any, asked: str | None, commit: Any) -> dict[str, Any]:
    """Return an entry of hub.json: what the recipe says, and its commit."""
    return {"name": name, "asked": asked, "commit": commit}


def _with_commits(recipe: Recipe, recorded: dict[str, Any]) -> Recipe:
    update: dict[str, Any] = {}
    for origin in find_origins(recipe):
        entry = recorded.get(origin.section) or {}
        if entry.get("commit") and (entry.get("name"), entry.get("asked")) == (origin.value, origin.revision):
            section = getattr(recipe, origin.section)
            update[origin.section] = section.model_copy(update={"revision": entry["commit"]})
    return recipe.model_copy(update=update)


def settle_contract(run: RunDirectory, recipe: Recipe, store_fingerprint: str) -> list[int]:
    """Compare the recipe with this run's contract, and record it if nothing was trained yet.

    Returns the token budgets of the run, oldest first: one, or several once a finished run was extended. Raises
    UserError with every changed key if the contract differs in more than a larger budget of a finished run, or
    `anomalies`, which apply from now on.
    """
    contract = contract_of(recipe)
    recorded: dict[str, Any] = {
        "fingerprint": fingerprint(contract),
        "contract": contract,
        "store_fingerprint": store_fingerprint,
        "budgets_tokens": [recipe.train.budget],
    }
    if not run.contract.exists() or not has_learned(run):
        _check_begins(run, recipe)
        write_json(run.contract, recorded)
        return [recipe.train.budget]
    changes = check_contract(run, recipe, store_fingerprint)
    old = _read_contract(run)
    budgets = [int(budget) for budget in old["budgets_tokens"]]
    if "train.budget" in changes:
        budgets.append(recipe.train.budget)
    if not old["store_fingerprint"]:  # the first start of a fork with its own data
        write_json(run.contract, {**old, "store_fingerprint": store_fingerprint})
        old = _read_contract(run)
    if changes:
        recorded["former_fingerprints"] = [*old.get("former_fingerprints", ()), old["fingerprint"]]
        write_json(run.contract, {**old, **recorded, "budgets_tokens": budgets})
    return budgets


def budgets_of(run: RunDirectory, recipe: Recipe) -> list[int]:
    """Return the token budgets of the run's next start, oldest first, as `settle_contract` will; checks nothing."""
    if not run.contract.exists() or not has_learned(run):
        return [recipe.train.budget]
    budgets = [int(budget) for budget in _read_contract(run)["budgets_tokens"]]
    return budgets if recipe.train.budget <= budgets[-1] else [*budgets, recipe.train.budget]


def check_contract(run: RunDirectory, recipe: Recipe, store_fingerprint: str | None) -> list[str]:
    """Return the changed keys that a run may resume with: a larger budget of a finished run, or `anomalies`.

    Without `store_fingerprint` (the data is not prepared yet) the token store is not compared. Raises UserError with
    every changed key that it may not resume with.
    """
    if not run.contract.exists() or not has_learned(run):
        _check_begins(run, recipe)
        return []
    old = _read_contract(run)
    changes = changed_keys(comparable(old["contract"]), comparable(contract_of(recipe)))
    # The training machine decides the precision of `auto`, and the submitting machine may be another one.
    changes = [change for change in changes if change[0] != "train.precision" or change[2] != "auto"]
    keys = [key for key, *_ in changes]
    same_store = store_fingerprint is None or old["store_fingerprint"] in ("", store_fingerprint)
    if same_store and keys == ["train.budget"] and recipe.train.budget > old["budgets_tokens"][-1]:
        _check_extension(run, recipe)
        return keys
    if same_store and all(key.partition(".")[0] == "anomalies" for key in keys):
        return keys
    lines = [f"  {key}: {_shown(before)} -> {_shown(after)}" for key, before, after in changes]
    if not same_store:
        lines.append("  the token store: its documents or its tokenizer are not those this run was started with")
    if (
        recipe.train.budget > old["budgets_tokens"][-1] and len(keys) > 1
    ):  # such as what `scale` derives from the budget
        lines.append(
            f"To train it further with the other values as they were: turbolm train {run.path / 'recipe.yaml'} "
            f"train.budget={recipe.train.budget}"
        )
    raise UserError(
        f"{run.path} was started with another learning contract; changed:\n" + "\n".join(lines) + "\n"
        "Restore these values, give the new run a `name` of its own, or start over with --fresh, which moves this run "
        "aside."
    )


def _check_begins(run: RunDirectory, recipe: Recipe) -> None:
    """Raise UserError for the recipe of a fork without its run, whose first checkpoint `fork` wrote."""
    if recipe.data.starts_at is not None:
        raise UserError(
            f"data.starts_at: {run.path} has no checkpoint of step {recipe.data.starts_at.step} to start from; make "
            "the run with `turbolm fork CHECKPOINT --recipe`, which writes this key"
        )


def known_fingerprints(run: RunDirectory, recipe: Recipe, budgets: Sequence[int]) -> list[str]:
    """Return the fingerprints under which this run has saved checkpoints: of each budget, and recorded ones.

    A recorded one may differ from its contract's today: it may include settings that the schedule never used.
    """
    record = read_json(run.contract) or {}
    return [
        *([record["fingerprint"]] if "fingerprint" in record else []),
        *(fingerprint(contract_of(with_budget(recipe, budget))) for budget in budgets),
        *record.get("former_fingerprints", ()),
    ]


def with_budget(recipe: Recipe, budget_tokens: int) -> Recipe:
    """Return the recipe with another budget, such as that of a run before it was extended."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"budget": budget_tokens})})


def _read_contract(run: RunDirectory) -> dict[str, Any]:
    """Return what `settle_contract` recorded. Raises UserError if it is damaged."""
    record = read_json(run.contract) or {}
    kinds = {"fingerprint": str, "contract": dict, "store_fingerprint": str, "budgets_tokens": list}
    whole = all(isinstance(record.get(key), kind) for key, kind in kinds.items())
    if not whole or not record["budgets_tokens"] or not all(isinstance(b, int) for b in record["budgets_tokens"]):
        raise UserError(
            f"{run.contract} is damaged, so what this run has learned cannot be compared with the recipe; restore the "
            "file from a copy, or give the run a new `name`"
        )
    return record


def _check_extension(run: RunDirectory, recipe: Recipe) -> None:
    old_budget = _read_contract(run)["budgets_tokens"][-1]
    if recipe.schedule.on_extend == "refuse":
        raise UserError(f"train.budget: schedule.on_extend is `refuse`, and {run.path} has a budget of {old_budget}")
    if not is_finished(run, old_budget):
        raise UserError(
            f"train.budget: {run.path} has not finished its budget of {old_budget} tokens; only a finished run can be "
            "extended, because the learning-rate schedule of the first budget is under way"
        )


def _shown(value: object) -> str:
    return "(not set)" if value is None else json.dumps(value)
