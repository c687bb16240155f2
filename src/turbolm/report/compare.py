"""Compare runs: loss at the same step, token and second, speed, memory, planned against measured, and what differs in
their configuration. Reads run directories, which may come from other machines. Torch-free."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbolm.recipe.contract import comparable
from turbolm.recipe.schema import CONTRACT_SECTIONS
from turbolm.report.held_out import LOSS, EvaluatedData, evaluated_data, evaluated_name, is_same_data
from turbolm.report.metrics import AXES, SEC, STEP_SEC, Line, values
from turbolm.report.runs import RunData, check_runs, read_run

TAIL = 0.05  # of the way to a place, over which the training loss there is averaged
_NOT_EXECUTION = {*CONTRACT_SECTIONS, "name", "extends"}
_PLANNED = ("device", "precision", "world_size", "processes_per_node", "threads_per_process", "batch")
_EVALUATED = f"{LOSS}/"


@dataclass(frozen=True)
class Difference:
    """A key whose values are not the same in all runs; None where a run does not have it."""

    section: str  # contract, execution, plan or environment
    key: str
    values: list[Any]


@dataclass(frozen=True)
class Comparison:
    """Runs and their figures, in the order they were named."""

    labels: list[str]
    runs: list[RunData]
    common: dict[str, float]  # the last place of the shortest run by axis, where losses are compared
    figures: list[dict[str, Any]]  # by run; None is unknown
    differences: list[Difference]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return it in plain JSON types. The keys are a stable interface."""
        named = zip(self.labels, self.runs, self.figures, strict=True)
        return {
            "runs": [{"name": label, "path": str(run.path), **figures} for label, run, figures in named],
            "common": self.common,
            "differences": [vars(one) for one in self.differences],
            "notes": self.notes,
        }


def compare_runs(folders: list[Path]) -> Comparison:
    """Compare the runs in these folders. Raises UserError that names each one that is no run."""
    check_runs(folders)
    runs = [read_run(path) for path in folders]
    names = [run.name for run in runs]
    labels = [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, runs, strict=True)]
    trained = [lines for run in runs if (lines := [line for line in run.metrics if "train/loss" in line])]
    common = {axis: min((lines[-1].get(key) or 0) for lines in trained) for axis, key in AXES.items() if trained}
    common = {axis: place for axis, place in common.items() if place}
    figures = [_figures(run, common) for run in runs]
    return Comparison(labels, runs, common, figures, list(_configuration(runs)), _notes(labels, runs))


def _figures(run: RunData, common: Mapping[str, float]) -> dict[str, Any]:
    trained = [line for line in run.metrics if "train/loss" in line]
    evaluated = [line for line in run.metrics if "train/loss" not in line]
    last = trained[-1] if trained else {}
    sets = {key for line in evaluated for key in line if key.startswith(_EVALUATED)}
    peaks = [value for _, value in values(trained, "memory/peak_bytes")]
    return {
        "state": _state(run),
        "attempts": len(run.attempts),
        "hosts": list(dict.fromkeys(host for attempt in run.attempts for host in attempt.hosts)),
        "steps": last.get("step"),
        "tokens": last.get("tokens_seen"),
        "training_sec": last.get(SEC) or None,
        "train_loss": _train_loss(trained, "tokens", last.get("tokens_seen", 0)),
        "eval_loss": _last(evaluated, "eval/loss"),
        "bits_per_byte": _last(evaluated, "eval/bits_per_byte"),
        "eval_losses": {key.removeprefix(_EVALUATED): _last(evaluated, key) for key in sorted(sets)},
        "train_loss_at": {axis: _train_loss(trained, axis, place) for axis, place in common.items()},
        "eval_loss_at": {axis: _eval_loss(evaluated, axis, place) for axis, place in common.items()},
        "tokens_per_sec": _median(trained, "perf/tokens_per_sec"),
        "step_sec": _median(trained, STEP_SEC),
        "mfu": _median(trained, "perf/mfu"),
        "peak_bytes": max(peaks, default=None),
        "planned": {row.figure: {"planned": row.planned, "measured": row.measured} for row in run.planned},
    }


def _state(run: RunData) -> str:
    """How the last attempt ended; a run that is still training, or was killed, has left no end."""
    last = run.attempts[-1] if run.attempts else None
    if last is not None and last.status is not None:
        return last.status
    if run.results:
        return "finished"
    return "no end recorded" if run.metrics else "nothing trained"


def _train_loss(trained: Sequence[Line], axis: str, place: float) -> float | None:
    """The mean of the training loss over the last `TAIL` of the way to `place`, or None where it did not get there."""
    key = AXES[axis]
    until = [(at, loss) for at, loss in values(trained, "train/loss", key) if at <= place]
    if not until or not place:
        return None
    tail = [loss for at, loss in until if at > (1 - TAIL) * place]
    return statistics.fmean(tail) if tail else until[-1][1]


def _eval_loss(evaluated: Sequence[Line], axis: str, place: float) -> float | None:
    """The held-out loss at `place`, interpolated between the evaluations around it; None outside of them."""
    before = None
    for at, loss in values(evaluated, "eval/loss", AXES[axis]):
        if at == place:
            return loss
        if at > place:
            if before is None:
                return None
            share = (place - before[0]) / (at - before[0])
            return before[1] + share * (loss - before[1])
        before = at, loss
    return None


def _last(lines: Sequence[Line], key: str) -> float | None:
    found = values(lines, key)
    return found[-1][1] if found else None


def _median(lines: Sequence[Line], key: str) -> float | None:
    found = [value for _, value in values(lines, key)]
    return statistics.median(found) if found else None


def _notes(labels: Sequence[str], runs: Sequence[RunData]) -> list[str]:
    """What to know of the comparison: what is missing of a run, what is the same in all, what does not compare."""
    notes = []
    for label, run in zip(labels, runs, strict=True):
        if not any("train/loss" in line for line in run.metrics):
            notes.append(f"{label}: no step in its metrics.jsonl: nothing was trained, or the file was not copied")
        if _comparable(run.contract.get("contract")) is None:
            notes.append(f"{label}: contract.json is missing or damaged, so its learning contract is not compared")
        if not run.recipe:
            notes.append(f"{label}: recipe.yaml is missing or damaged, so its execution is not compared")
    curves = [_curve(run) for run in runs]
    if len(runs) > 1 and None not in curves and len(set(curves)) == 1:
        notes.append("the runs have one learning contract, token store and history: one loss curve, up to rounding")
    return [*notes, *_incomparable(runs)]


def _curve(run: RunData) -> str | None:
    """What decides the loss curve of a run; None where its contract.json does not tell all of it."""
    record = run.contract
    budgets, former = record.get("budgets_tokens"), record.get("former_fingerprints", [])
    contract, store = record.get("fingerprint"), record.get("store_fingerprint")
    if not (contract and store and isinstance(budgets, list) and isinstance(former, list)):
        return None
    if len(former) >= len(budgets):  # `anomalies` was changed on the way, at a step that is not recorded
        return None
    return json.dumps([contract, store, budgets, former, record.get("origin")], sort_keys=True)  # origin: of a fork


def _incomparable(runs: Sequence[RunData]) -> Iterator[str]:
    """Yield a note for each evaluation that has one name in several runs, but not the same data."""
    found: dict[str, list[EvaluatedData]] = {}
    for run in runs:
        keys = dict.fromkeys(key for line in run.metrics if "train/loss" not in line for key in line)
        for key in keys:
            if evaluated_name(key) is not None:
                found.setdefault(key, []).append(evaluated_data(key, run.path, run.contract, run.recipe, run.results))
    for key, data in found.items():
        if is_same_data(data):
            continue
        if key == LOSS:
            yield "their held-out losses are of different text or other sequences, and do not compare"
        else:
            yield f"{evaluated_name(key)}: not the same files, text or sequences in all runs, so it does not compare"


def _configuration(runs: Sequence[RunData]) -> Iterator[Difference]:
    """Yield what differs in the resolved configurations."""
    contracts = [run.contract.get("contract") for run in runs]
    known = [_comparable(one) for one in contracts]
    full = [dict(_flat(one)) if isinstance(one, dict) else {} for one in contracts]
    for found in _different("contract", [None if one is None else dict(_flat(one)) for one in known]):
        # A value that means "as before this key" is left out of the comparison, not of what is shown.
        shown = [
            all_of_it.get(found.key) if value is None else value
            for value, all_of_it in zip(found.values, full, strict=True)
        ]
        yield Difference(found.section, found.key, shown)
    execution = [{key: value for key, value in run.recipe.items() if key not in _NOT_EXECUTION} for run in runs]
    yield from _different("execution", [dict(_flat(one)) if one else None for one in execution])
    plans = [{key: run.plan[key] for key in _PLANNED if key in run.plan} for run in runs]
    yield from _different("plan", [dict(_flat(one)) if one else None for one in plans])
    environments = [run.environment for run in runs]
    yield from _different("environment", [dict(_flat(one)) if one else None for one in environments])


def _comparable(contract: object) -> dict[str, Any] | None:
    if not isinstance(contract, dict) or not contract:
        return None
    sections = (contract[name] for name in CONTRACT_SECTIONS if name in contract)
    return comparable(contract) if all(isinstance(one, dict) for one in sections) else None


def _different(section: str, runs: Sequence[Mapping[str, Any] | None]) -> Iterator[Difference]:
    """Yield the keys that differ among the runs that have this section."""
    keys = dict.fromkeys(key for one in runs if one is not None for key in one)
    for key in keys:
        found = [None if one is None else one.get(key) for one in runs]
        compared = [value for value, one in zip(found, runs, strict=True) if one is not None]
        if any(not _same(value, compared[0]) for value in compared):
            yield Difference(section, key, found)


def _same(left: object, right: object) -> bool:
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and their values; entries of lists that are mappings have keys of their own. What is empty has
    none: the entries that others have tell that it differs."""
    entries: Any = None
    if isinstance(value, Mapping):
        entries = value.items()
    elif isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        entries = enumerate(value)
    if entries is None:
        yield key, value
        return
    for name, entry in entries:
        yield from _flat(entry, f"{key}.{name}" if key else str(name))
