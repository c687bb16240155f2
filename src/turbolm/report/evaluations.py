"""Evaluations with lm-evaluation-harness, as results.json has them under `evaluations`. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turbolm.files import read_json

COLUMNS = ("model", "task", "metric", "value", "standard error", "examples", "few-shot", "version")
HEADING = "## Evaluation"  # of the part of a model card


def evaluation_rows(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a row of `COLUMNS` for each task and metric."""
    return [
        [
            str(record["model"]),
            name,
            metric,
            _number(found["value"]),
            "" if found["stderr"] is None else f"± {_number(found['stderr'])}",
            "" if task["examples"] is None else f"{task['examples']:,} of {task['of']:,}",
            "" if task["num_fewshot"] is None else f"{task['num_fewshot']}-shot",
            f"version {task['version']}",
        ]
        for record in records
        for name, task in record["tasks"].items()
        for metric, found in task["metrics"].items()
    ]


def read_evaluations(run_dir: Path) -> list[Any]:
    """Return the evaluations of a run as its files have them, also damaged ones, in the order they were made."""
    found = (evaluations_in(read_json(run_dir / name) or {}) for name in ("results.json", "evaluation.json"))
    return next(filter(None, found), [])


def evaluations_in(results: Mapping[str, Any]) -> list[Any]:
    """Return the evaluations in the contents of a file."""
    given = results.get("evaluations") or []
    return given if isinstance(given, list) else [given]


def whole(records: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the records that can be shown: a file may have been edited, or come from another version."""
    return [one for one in records if _is_whole(one)]


def _is_whole(record: Any) -> bool:
    try:
        return bool(card_section([record]))
    except (LookupError, TypeError, ValueError, AttributeError):
        return False


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def card_section(records: Sequence[dict[str, Any]]) -> str:
    """Return the part of a model card about evaluations; empty without any."""
    if not records:
        return ""
    table = [f"| {' | '.join(COLUMNS[1:])} |", "|" + " --- |" * (len(COLUMNS) - 1)]
    table += [f"| {' | '.join(row[1:])} |" for row in evaluation_rows(records)]
    commands = [f"- lm-evaluation-harness {one['lm_eval']}: `{one['command']}`" for one in records]
    return "\n".join([HEADING, "", *table, "", *dict.fromkeys(commands), ""])
