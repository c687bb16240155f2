"""The run directory: a documented contract between the trainer, the command line and the user. Torch-free.

runs/<name>/
  recipe.yaml     as resolved          contract.json   fingerprint and canonical form
  hub.json        the commits of the recipe's hub names
  model/          Hugging Face configuration and tokenizer of the run
  tokenizer/      of a fork that reads other documents: the forked run's tokenizer, which its recipe names
  attempts/<n>/   start.json (which process started it, and when), plan.json, ds_config.json, accelerate.yaml,
                  environment.json, log.rank<k>.txt, outcome.json, hung/ (ranks and their stacks, of an attempt that
                  hung),
                  start-up.json (where the time until the first step went), measured.json (what one step sent, and the
                  memory before it, for the comparison with plan.json), nccl_trace.rank<k> (torch's flight recorder,
                  where NCCL timed out),
                  profile/ (of each rank: trace, summary, and memory on a GPU; logging.profile),
                  stop (asks this attempt alone to save and stop)
  metrics.jsonl   one line a step      checkpoints/    results.json, report.html, export/
  evaluation.json what `turbolm evaluate` found before there were results
  mirror.json     the id under which `checkpoint.mirror` holds the run
  restarts/       the candidates of train.random_restarts and the steps of those not chosen
  trackers/       data of TensorBoard, W&B and others, and how a later attempt continues it
  stop            asks every start of the run that began before it was written to save and stop; it stays
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turbolm.errors import UserError
from turbolm.files import read_json, write_json
from turbolm.plan.machine import Machine
from turbolm.plan.plan import Plan
from turbolm.recipe.load import dump_recipe
from turbolm.recipe.paths import use_path
from turbolm.recipe.schema import Recipe
from turbolm.reliability.run_lock import Holder
from turbolm.reliability.stop import Seen, look
from turbolm.report.attempts import attempt_numbers

START = "start.json"  # of an attempt
_VERSIONED = ("turbolm", "torch", "accelerate", "deepspeed", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run."""

    path: Path

    @property
    def contract(self) -> Path:
        return self.path / "contract.json"

    @property
    def hub(self) -> Path:
        return self.path / "hub.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def random_restarts(self) -> Path:
        return self.path / "restarts"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def evaluation(self) -> Path:
        """Evaluations of checkpoints before there are results."""
        return self.path / "evaluation.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def stop_file(self) -> Path:
        return self.path / "stop"

    def attempt_stop_file(self, number: int) -> Path:
        """Asks one attempt to stop, and no other start of the run."""
        return self.attempt(number) / "stop"

    def attempt(self, number: int) -> Path:
        """The folder of one start of the run."""
        return self.path / "attempts" / str(number)


def run_of(checkpoint: Path) -> tuple[RunDirectory, dict[str, Any]]:
    """Return the run that a checkpoint lies in, and what its contract.json records. Raises UserError."""
    run = RunDirectory(Path(os.path.abspath(checkpoint)).parent.parent)
    record = read_json(run.contract)
    if record is None or not isinstance(record.get("fingerprint"), str) or not isinstance(record.get("contract"), dict):
        raise UserError(f"{checkpoint}: expected a checkpoint inside a run directory; {run.contract} cannot be read")
    return run, record


def precision_of(run: RunDirectory, record: dict[str, Any]) -> str:
    """Return the precision that a run was trained in, of what its contract.json records. Raises UserError."""
    train = record["contract"].get("train")
    precision = train.get("precision") if isinstance(train, dict) else None
    if precision not in ("fp32", "bf16", "fp16"):
        raise UserError(f"{run.contract}: contract.train.precision: expected fp32, bf16 or fp16, got {precision!r}")
    return str(precision)


def run_directory(recipe: Recipe) -> RunDirectory:
    """Where the recipe's run lives."""
    return RunDirectory(use_path(recipe.execution.runs_dir, "execution.runs_dir") / recipe.name)


def open_attempt(run: RunDirectory, seen: Seen | None = None, starter: Holder | None = None) -> int:
    """Create the folder of a new attempt and return its number, counted from 1.

    `seen` is what the stop file was when this start began, by default now: what comes later counts. `starter` is the
    process that lives as long as the attempt, where there is one.
    """
    run.attempt(0).parent.mkdir(parents=True, exist_ok=True)
    number = max(attempt_numbers(run.path), default=0) + 1
    while True:
        try:
            run.attempt(number).mkdir()
            break
        except FileExistsError:  # another start was quicker
            number += 1
    record = {"stop_seen": asdict(seen or look(run.stop_file)), "starter": starter and asdict(starter)}
    write_json(run.attempt(number) / START, {**record, "unix_time": time.time()})
    return number


def stop_seen(attempt_folder: Path) -> Seen:
    """What the run's stop file was when the start of this attempt began."""
    found = (read_json(attempt_folder / START) or {}).get("stop_seen")
    try:
        return Seen(**found) if isinstance(found, dict) else Seen()
    except TypeError:
        return Seen()


def starter_of(attempt_folder: Path) -> Holder | None:
    """The process that lives as long as the attempt, if it is recorded."""
    found = (read_json(attempt_folder / START) or {}).get("starter")
    try:
        return Holder(**found) if isinstance(found, dict) else None
    except TypeError:
        return None


def refuse_links_out(run: RunDirectory) -> None:
    """Raises UserError where a link of the run directory leads out of it: what is behind it would be written to.

    The run directory itself may be a link. A checkpoint that is one is passed over when a run resumes.
    """
    inside = run.path.resolve()
    for folder in (run.path, run.attempt(0).parent, run.model, run.random_restarts, run.export):
        for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
            if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(inside):
                raise UserError(
                    f"{entry} is a link that leads out of the run directory; move what it leads to into its place, or "
                    "link the whole run directory instead"
                )


def write_attempt(
    run: RunDirectory, number: int, plan: Plan, machine: Machine, planned: Mapping[str, Any] | None = None
) -> None:
    """Record what this attempt runs with, and what it is expected to take (`planned_figures`)."""
    folder = run.attempt(number)
    described = {key: value for key, value in asdict(plan).items() if key not in ("recipe", "ds_config")}
    tokens = plan.curriculum.tokens_seen(plan.num_steps)
    expected = {"planned": dict(planned)} if planned else {}
    write_json(folder / "plan.json", {"num_steps": plan.num_steps, "num_tokens": tokens, **expected, **described})
    write_json(folder / "ds_config.json", plan.ds_config)
    versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
    system = {"python": platform.python_version(), "platform": platform.platform(), "host": platform.node()}
    write_json(folder / "environment.json", {**system, **versions, "git_commit": git_commit(), **asdict(machine)})
    (run.path / "recipe.yaml").write_text(dump_recipe(plan.recipe), encoding="utf-8")


def git_commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of the checkout that this code runs from, with `-dirty` where it is changed; None outside of one.

    A package installed below somebody's checkout is not of it: git must know this file.
    """

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "run_directory.py")
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None
    except (OSError, subprocess.SubprocessError):
        return None


def is_finished(run: RunDirectory, budget_tokens: int) -> bool:
    """Whether the run has trained its whole budget and left its results."""
    results = read_json(run.results)
    return results is not None and results.get("budget_tokens") == budget_tokens


def lacks_export(run: RunDirectory) -> bool:
    """Whether a finished run has yet to be exported: the export failed or was interrupted."""
    return (read_json(run.results) or {}).get("export", "") is None
