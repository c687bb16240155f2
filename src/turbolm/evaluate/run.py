"""Evaluate a run's export, a checkpoint or an exported model, and write what was found beside it. Torch-free."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from turbolm.checkpoint.export_folder import read_origin, update_card
from turbolm.checkpoint.manifest import MANIFEST
from turbolm.errors import UserError
from turbolm.files import read_json, write_json
from turbolm.plan.machine import detect_machine
from turbolm.redaction import redact
from turbolm.report.evaluations import HEADING, card_section, evaluation_rows, evaluations_in, whole
from turbolm.report.html import write_report
from turbolm.train.run_directory import RunDirectory
from turbolm.train.run_export import exported_name

MISSING = "turbolm evaluate needs lm-evaluation-harness; install it with: pip install 'turbolm[evaluate]'"


@dataclass(frozen=True)
class Options:
    """What to evaluate, and how; `command` is what the user typed."""

    tasks: tuple[str, ...]
    include: Path | None
    limit: int | None
    num_fewshot: int | None
    batch_size: int
    command: str


@dataclass(frozen=True)
class Subject:
    """A model to evaluate: an export, or a checkpoint that has yet to be exported; `run` where it is known."""

    name: str
    export: Path | None
    checkpoint: Path | None
    run: RunDirectory | None

    @property
    def results(self) -> Path:
        """Return the file for its evaluations: results.json of a finished run, else one of its own."""
        if self.run is not None:
            return self.run.results if self.run.results.is_file() else self.run.evaluation
        assert self.export is not None
        return self.export.with_name(f"{self.export.name}.evaluation.json")


def evaluate_model(path: Path, options: Options, say: Callable[[str], None]) -> None:
    """Evaluate the model at `path` and write the results; `say` gets each line. Raises UserError.

    What was measured is said before it is written.
    """
    subject = find_subject(path)
    if not options.tasks:
        raise UserError("--tasks: expected the name of a task, such as --tasks arc_easy,hellaswag")
    if options.include is not None and not options.include.is_dir():
        raise UserError(f"--include: {options.include} is not a folder")
    _check_writable(subject)
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(MISSING)
    if not detect_machine().num_gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which Transformers imports, need not look for GPUs
    os.environ["HF_EVALUATE_OFFLINE"] = "1"  # a metric that the `evaluate` library fetches is code from the Hub
    with _exported(subject) as folder:
        from turbolm.evaluate.harness import run_tasks

        measured = run_tasks(folder, options)
    at = datetime.now(UTC).isoformat(timespec="seconds")
    record: dict[str, Any] = {"model": subject.name, "at": at, "command": redact(options.command), **measured}
    for row in evaluation_rows([record]):
        say("  ".join(filter(None, row[1:])))
    try:
        _keep(subject, record, say)
    except OSError as error:
        raise UserError(f"{error.filename}: what was measured cannot be written there: {error.strerror}") from error


def find_subject(path: Path) -> Subject:
    """Return what is at `path`: a run, a checkpoint of one, or an export. Raises UserError."""
    resolved = path.resolve()
    if (resolved / MANIFEST).is_file() and resolved.parent.name == "checkpoints":
        return Subject(resolved.name, None, resolved, RunDirectory(resolved.parent.parent))
    run = RunDirectory(resolved)
    if run.contract.is_file():
        if not (run.export / "config.json").is_file():
            raise UserError(f"{path} has no export yet; name one of the checkpoints in {run.checkpoints}")
        return Subject(_name_in_run(run), run.export, None, run)
    if (resolved / "config.json").is_file():
        run = RunDirectory(resolved.parent)
        if resolved.name == "export" and run.contract.is_file():
            return Subject(_name_in_run(run), resolved, None, run)
        origin = read_origin(resolved)
        return Subject(f"{origin.run}/{origin}" if origin else resolved.name, resolved, None, None)
    raise UserError(f"{path}: expected a run, a checkpoint of a run, or an exported model")


def _name_in_run(run: RunDirectory) -> str:
    """Return whose weights a run's export has. Raises UserError where it may be one of an earlier budget."""
    name = exported_name(run)
    if name is None:
        raise UserError(
            f"{run.export} does not say which checkpoint it is of, and the run's last one has not been exported; "
            f"export it there with `turbolm export`, or name one of the checkpoints in {run.checkpoints}"
        )
    return name


@contextlib.contextmanager
def _exported(subject: Subject) -> Iterator[Path]:
    if subject.export is not None:
        yield subject.export
        return
    assert subject.checkpoint is not None
    from turbolm.checkpoint.export import export_from_run

    with tempfile.TemporaryDirectory(prefix="turbolm-export-") as folder:
        yield export_from_run(subject.checkpoint, Path(folder) / "export")


def _check_writable(subject: Subject) -> None:
    """Raise UserError where the results could not be kept: evaluating may take hours."""
    for folder in filter(None, (subject.results.parent, subject.export)):
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"{folder}: results would be written there, which fails: {error.strerror}") from None


def _keep(subject: Subject, record: dict[str, Any], say: Callable[[str], None]) -> None:
    """Write the record to the results, the model card and the report; `say` gets a line for each. Raises OSError."""
    path = subject.results  # a run that has just finished has another file now than when it was found
    with _locked(path.parent):
        results = read_json(path) or {}
        asked = record["model"], record["command"]  # the same once more replaces what was found before
        found = evaluations_in(results)
        again = [one for one in whole(found) if (one["model"], one["command"]) == asked]
        results["evaluations"] = [*(one for one in found if one not in again), record]
        write_json(path, results)
        say(f"results: {path}")
        if subject.export is not None:
            of_this = [one for one in whole(results["evaluations"]) if one["model"] == subject.name]
            is_written = update_card(subject.export, HEADING, card_section(of_this))
            left = "" if is_written else " is not what export wrote; it is left as it is"
            say(f"model card: {subject.export / 'README.md'}{left}")
    if subject.run is not None:
        say(f"report: {write_report(subject.run.path)}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other evaluations of this folder's models from writing at the same time, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
