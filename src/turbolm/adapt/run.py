"""Adapt a recipe to a model: read it, try a small copy, choose the numbers, write the recipe and plan it."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from turbolm.adapt.compose import Case, compose
from turbolm.adapt.findings import describe, examine, tokenizer_size
from turbolm.adapt.render import render_recipe
from turbolm.adapt.settings import MAX_SEQ_LEN
from turbolm.adapt.subject import Task, find_subject
from turbolm.adapt.target import find_target
from turbolm.errors import UserError
from turbolm.plan.summary import Summary, collect_summary
from turbolm.recipe.load import load_recipe
from turbolm.units import format_count, parse_count


def adapt(
    given: str,
    task: Task = "pretrain",
    *,
    cluster: str | None = None,
    seq_len: str | None = None,
    budget: str | None = None,
    out: Path | None = None,
) -> str:
    """Write a recipe for the model `given` after planning it once; returns what to print about it.

    Raises UserError for a model that cannot be trained, or does not fit, and where a file would be overwritten.
    """
    num_tokens, num_budget_tokens = _parse("--seq-len", seq_len), _parse("--budget", budget)
    target = find_target(cluster)
    subject = find_subject(given, task)
    out = out or Path(f"{subject.name}-{task}.yaml")
    copied = out.with_name(f"{out.stem}.config.json") if subject.revision and task == "pretrain" else None
    files = [out, *([copied] if copied else [])]
    for file in files:
        if os.path.lexists(file):
            raise UserError(f"--out: {file} exists and is not overwritten; remove it, or name another --out")
    found = examine(subject, num_tokens or MAX_SEQ_LEN[target.device])
    tokenizer = tokenizer_size(subject)
    findings = describe(found, tokenizer)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if copied is not None and subject.config_file is not None:
            shutil.copyfile(subject.config_file, copied)
            subject = replace(subject, config_file=copied)
        entries = compose(Case(subject, task, target, found, tokenizer), num_tokens, num_budget_tokens)
        command = f"turbolm {'submit' if 'slurm' in target.cluster else 'train'} {shlex.quote(str(out))}"
        doing = {"pretrain": "Pretrains", "continue": "Goes on training"}[task]
        title = f"{doing} {found['class_name']} ({found['model_type']}) on {target.words}."
        out.write_text(render_recipe(title, command, findings, entries), encoding="utf-8")
        summary = collect_summary(load_recipe(out), str(out), (), lambda *_: {})
    except BaseException as error:
        for file in files:
            file.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"--out: {out} cannot be written: {error}") from None
        raise
    return "\n".join(_report(out, findings, summary, command))


def _parse(option: str, text: str | None) -> int | None:
    try:
        count = None if text is None else parse_count(text)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from None
    if count == 0:
        raise UserError(f"{option}: expected more than 0")
    return count


def _report(out: Path, findings: Mapping[str, str], summary: Summary, command: str) -> list[str]:
    """Return the lines to print once the recipe is written."""
    width = max(map(len, findings))
    size, plan, train = summary.size, summary.plan, summary.recipe.train
    assert size is not None
    return [
        *(f"{name:<{width}}  {text}" for name, text in findings.items()),
        "",
        f"{format_count(size.total)} parameters, {format_count(train.budget)} tokens, {plan.num_steps} steps of "
        f"{train.global_batch} tokens on {plan.world_size} processes ({plan.device}, {plan.precision}, "
        f"ZeRO-{summary.recipe.execution.zero_stage})",
        f"{out}: written. Read it, put your own text under data.sources, then:",
        f"  turbolm plan {shlex.quote(str(out))}",
        f"  {command}",
    ]
