"""Compare the runs that were forked from one: from which step, on which data, how long, with what loss. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbolm.files import read_json
from turbolm.launch.status import find_runs, format_status, read_status
from turbolm.plan.curriculum import build_curriculum
from turbolm.plan.preview import source_uses
from turbolm.recipe.load import load_recipe
from turbolm.recipe.schedules import Wsd
from turbolm.report.held_out import LOSS, EvaluatedData, evaluated_data, is_same_data
from turbolm.train.run_directory import RunDirectory
from turbolm.units import align_columns, format_count

_NO_LOSS = float("inf")


@dataclass(frozen=True)
class ForkStatus:
    """A fork. `eval_loss` is that of the finished run, in nats per token; forks whose `held_out` differs were evaluated
    on other text."""

    name: str
    state: str
    from_step: int
    shares: dict[str, float]  # of the tokens of the decay, by source
    decay: str  # its shape and end
    decay_tokens: int
    eval_loss: float | None
    held_out: list[Any]


def tell_runs(paths: Sequence[Path], *, detailed: bool, as_json: bool) -> str:
    """The status of these runs as a table or as JSON; with `detailed` also of their attempts and forks.

    Raises UserError for a folder that is not a run.
    """
    runs = [read_status(path) for path in paths]
    forks = [read_forks(path) if detailed else [] for path in paths]
    if as_json:
        told = zip(runs, forks, strict=True)
        return json.dumps([{**vars(run), "forks": [vars(fork) for fork in its]} for run, its in told], indent=1)
    lines = [line for run, its in zip(runs, forks, strict=True) for line in format_forks(run.name, its)]
    return "\n".join([format_status(runs, detailed=detailed), *lines])


def read_forks(origin: Path) -> list[ForkStatus]:
    """Return the forks of the run in `origin` beside it, best loss first. Raises UserError for a damaged recipe."""
    record = read_json(RunDirectory(origin).contract) or {}
    known = {record.get("fingerprint"), *record.get("former_fingerprints", ())}
    found = []
    for path in find_runs(origin.resolve().parent):
        run = read_json(RunDirectory(path).contract) or {}
        came_from = run.get("origin") or {}
        if came_from.get("run") == origin.resolve().name and came_from.get("fingerprint") in known:
            found.append(_read_fork(path, came_from, run))
    return sorted(found, key=lambda one: (_NO_LOSS if one.eval_loss is None else one.eval_loss, one.name))


def _read_fork(path: Path, came_from: dict[str, int], record: dict[str, Any]) -> ForkStatus:
    recipe, results = load_recipe(path / "recipe.yaml"), read_json(RunDirectory(path).results) or {}
    uses, schedule = source_uses(recipe, build_curriculum(recipe), None), recipe.schedule
    total = sum(use.planned_tokens for use in uses)
    shape = schedule.decay_shape if isinstance(schedule, Wsd) else schedule.name
    return ForkStatus(
        name=path.name,
        state=read_status(path).state,
        from_step=came_from["step"],
        shares={use.label: use.planned_tokens / total for use in uses},
        decay=f"{shape} to {schedule.min_lr_ratio:g}",
        decay_tokens=recipe.train.budget - came_from["tokens_seen"],
        eval_loss=results.get("eval_loss"),
        held_out=evaluated_data(LOSS, path, record, recipe.model_dump(mode="json"), results).settings,
    )


def format_forks(name: str, forks: Sequence[ForkStatus]) -> list[str]:
    """The lines of a table of the forks of the run `name`; none without forks."""
    if not forks:
        return []
    rows = [("FORK", "STATE", "FROM STEP", "MIXTURE", "DECAY", "TOKENS", "EVAL LOSS")]
    for fork in forks:
        rows.append(
            (
                fork.name,
                fork.state,
                str(fork.from_step),
                " ".join(f"{label} {share:.0%}" for label, share in fork.shares.items()),
                fork.decay,
                format_count(fork.decay_tokens),
                "-" if fork.eval_loss is None else f"{fork.eval_loss:.4f}",
            )
        )
    lines = [f"forks of {name}:", align_columns(rows)]
    if not is_same_data([EvaluatedData(fork.held_out) for fork in forks if fork.eval_loss is not None]):
        lines.append(
            "their losses are of different held-out text and do not compare; forks with one list of data.sources, "
            "some of weight 0, hold out the same"
        )
    return lines
