"""Read all that a run directory says about a run, whoever wrote it and wherever. Torch-free.

Only the folder itself is read: neither the token store nor other paths that its files name need be there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from turbolm.errors import UserError, explain_os_error
from turbolm.files import read_json
from turbolm.plan.footprint import PARTS
from turbolm.plan.time import STEP_PARTS
from turbolm.recipe.document import MAX_FILE_BYTES, Problem, parse_document
from turbolm.report.attempts import Attempt, read_attempts
from turbolm.report.evaluations import read_evaluations
from turbolm.report.metrics import Line, add_times, history, is_number, read_lines
from turbolm.report.planned import Row, compare
from turbolm.report.run_charts import GIB, Level

_SIGNS = ("attempts", "submissions", "contract.json", "metrics.jsonl")  # any of them makes a folder a run


@dataclass(frozen=True)
class RunData:
    """What the files of a run say; empty where one is missing, damaged or of an earlier version."""

    path: Path
    metrics: list[Line]  # the history, with times
    anomalies: list[Line]
    attempts: list[Attempt]
    results: dict[str, Any]
    evaluations: list[Any]  # those of lm-evaluation-harness, also damaged ones
    recipe_text: str
    recipe: dict[str, Any]
    contract: dict[str, Any]  # contract.json
    plan: dict[str, Any]  # plan.json of the last attempt that trained
    planned: list[Row]
    planned_notes: list[str]

    @property
    def name(self) -> str:
        """Return the folder's name."""
        return self.path.resolve().name

    @property
    def environment(self) -> dict[str, Any]:
        """Return the environment of the last attempt that recorded it."""
        return next((one.environment for one in reversed(self.attempts) if one.environment), {})

    @property
    def levels(self) -> dict[str, Level]:
        """Return the dashed lines of its charts, by title."""
        found: dict[str, Level] = {}
        if is_number(entropy := self.results.get("unigram_entropy")):
            found["Loss"] = ("unigram entropy", float(entropy))  # of a model that knows how often each token occurs
        train, expected = self.recipe.get("train"), self.plan.get("planned")
        limit = train.get("max_grad_norm") if isinstance(train, dict) else None
        if is_number(limit):
            found["Gradient norm"] = ("clipped above", float(limit))
        expected = expected if isinstance(expected, dict) else {}
        if expected.get("device") == "cuda" and is_number(peak := expected.get("peak_bytes")):
            found["Peak memory of a process, GiB"] = ("planned tensors", peak / GIB)
        if is_number(step_sec := expected.get("step_sec")):
            found["Seconds per step"] = ("planned, of the longest sequences", float(step_sec))
        return found


def check_runs(folders: list[Path]) -> None:
    """Raises UserError that names every folder that is not a run, or that is named twice."""
    problems = [problem for path in folders if (problem := _why_no_run(path))]
    resolved = [path.resolve() for path in folders]
    problems += [f"{path}: named twice" for path in sorted({p for p in resolved if resolved.count(p) > 1})]
    if problems:
        raise UserError("\n".join(problems))


def is_run(path: Path) -> bool:
    """Whether the folder is a run directory. Raises OSError where that cannot be seen."""
    return any((path / sign).exists() for sign in _SIGNS)


def _why_no_run(path: Path) -> str:
    try:
        if not path.exists():
            return f"{path}: there is no such folder"
        if (path / "ablation.json").is_file():
            return f"{path}: an ablation, not a run; its report.html and ablation.json compare its runs"
        if not is_run(path):
            return f"{path}: not a run directory: it has none of {', '.join(_SIGNS)}"
    except OSError as error:
        return f"{path}: {explain_os_error(error)}"
    return ""


def read_run(path: Path, lines: list[Line] | None = None) -> RunData:
    """What the folder says about its run; a folder without any of it is an empty run. Raises OSError.

    `lines` are those of its metrics.jsonl, if they are read already.
    """
    lines = read_lines(path / "metrics.jsonl") if lines is None else lines
    metrics = history(lines)
    add_times(metrics)
    results = read_json(path / "results.json") or {}
    results.pop("planned", None)  # as it was when the run finished
    planned, notes = compare(path, lines)
    text = _text(path / "recipe.yaml")
    attempts = read_attempts(path, lines)
    trained = [one.number for one in attempts if one.first_step is not None]
    return RunData(
        path=path,
        metrics=metrics,
        anomalies=[line for line in lines if "anomaly" in line],
        attempts=attempts,
        results=results,
        evaluations=read_evaluations(path),
        recipe_text=text,
        recipe=_parse(text),
        contract=read_json(path / "contract.json") or {},
        plan=(read_json(path / "attempts" / str(trained[-1]) / "plan.json") or {}) if trained else {},
        planned=planned,
        planned_notes=notes,
    )


@dataclass(frozen=True)
class Parts:
    """What the memory or the time of something goes to, by name."""

    title: str
    unit: Literal["bytes", "sec"]
    values: dict[str, float]


def step_parts(run: RunData) -> list[Parts]:
    """What memory and time go to: of a step as planned and as the last profile found, and of the last start-up.

    Only what is known, and only what is above 0.
    """
    expected = run.plan.get("planned")
    expected = expected if isinstance(expected, dict) else {}
    found = [
        Parts("Planned memory at the worst moment of a step", "bytes", _numbers(expected.get("peak_parts"), PARTS)),
        Parts("Planned time of a step", "sec", _numbers(expected.get("step_parts"), STEP_PARTS)),
    ]
    for attempt in reversed(run.attempts):
        profile = read_json(run.path / "attempts" / str(attempt.number) / "profile" / "rank0.summary.json") or {}
        shares, step_sec = _numbers(profile.get("shares")), profile.get("step_sec")
        if shares and is_number(step_sec):
            seconds = {kind: share * step_sec for kind, share in shares.items()}
            found.append(Parts(f"Time of a step in the profile of attempt {attempt.number}, rank 0", "sec", seconds))
            break
    for attempt in run.attempts[-1:]:
        started = read_json(run.path / "attempts" / str(attempt.number) / "start-up.json") or {}
        found.append(Parts(f"Start-up of attempt {attempt.number}", "sec", _numbers(started.get("seconds"))))
    return [one for one in found if one.values]


def _numbers(parts: object, names: Mapping[str, str] = MappingProxyType({})) -> dict[str, float]:
    known = parts.items() if isinstance(parts, dict) else ()
    return {names.get(part, part): float(value) for part, value in known if is_number(value) and value > 0}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _parse(text: str) -> dict[str, Any]:
    """What recipe.yaml says, as recipes are read; empty where it is damaged."""
    problems: list[Problem] = []
    tree = parse_document(text, "recipe.yaml", problems) if len(text) <= MAX_FILE_BYTES else None
    found = tree.plain() if tree is not None and not problems else None
    return found if isinstance(found, dict) else {}
