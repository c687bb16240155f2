"""What `turbolm ablate` does, once its options are parsed."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence

from turbolm.ablate.design import describe_arms
from turbolm.ablate.render import render_table
from turbolm.ablate.results import collect_results
from turbolm.ablate.run import check_folder, run_ablation
from turbolm.ablate.runner import Runner, Task, one_by_one
from turbolm.ablate.settings import Ablation, Options
from turbolm.ablate.transfer import Transfer, render_transfer, run_transfer
from turbolm.errors import EXIT_OK, EXIT_REQUEUE
from turbolm.launch.side_by_side import SideBySide, prepare_for_all, train_command
from turbolm.launch.train import train_here
from turbolm.plan.machine import detect_machine
from turbolm.plan.shares import share_machine
from turbolm.recipe.load import load_recipe


def ablate(
    recipe_file: str,
    overrides: Sequence[str],
    tricks: Sequence[str],
    options: Options,
    *,
    dry_run: bool = False,
    as_json: bool = False,
) -> int:
    """Run the ablation and print its results; returns the exit code. Raises UserError."""
    machine, shares = share_machine(load_recipe(recipe_file, overrides), detect_machine(), options.num_jobs)
    ablation = Ablation.prepare(recipe_file, overrides, tricks, machine, options)
    check_folder(ablation)
    with _standard_output_as_error() if as_json or dry_run else contextlib.nullcontext():
        _say(describe_arms(ablation.arms))
        runner: Runner = one_by_one(_train)
        if options.num_jobs > 1:
            runner = SideBySide(shares, _say, train_command, prepare_for_all)
        code = EXIT_OK if dry_run else run_ablation(ablation, runner, _say)
    results = collect_results(ablation)
    if as_json:
        print(json.dumps(results, indent=1))
    elif not dry_run:
        print(f"\n{render_table(results)}\n{ablation.folder}: report.html, ablation.json, ablation.csv")
    return _told(code)


def check_transfer(
    recipe_file: str,
    overrides: Sequence[str],
    tricks: Sequence[str],
    options: Options,
    to: str,
    *,
    dry_run: bool = False,
    as_json: bool = False,
) -> int:
    """Check that learning rates transfer to the sizes `to` and print the losses; returns the exit code.

    Raises UserError.
    """
    transfer = Transfer.prepare(recipe_file, overrides, tricks, to, detect_machine(), options)
    with _standard_output_as_error() if as_json else contextlib.nullcontext():
        code, found = run_transfer(transfer, one_by_one(_train), _say, dry_run=dry_run)
    print(json.dumps(found, indent=1) if as_json else render_transfer(found))
    return _told(code)


def _say(text: str) -> None:
    print(text, flush=True)


def _train(task: Task) -> int:
    return train_here(task.recipe, str(task.file), task.overrides)


def _told(code: int) -> int:
    """Return the exit code; say what to do where a run was interrupted."""
    if code == EXIT_REQUEUE:
        print("stopped; the same command resumes", file=sys.stderr)
    return code


@contextlib.contextmanager
def _standard_output_as_error() -> Iterator[None]:
    """Redirect the output of this process and its children to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
