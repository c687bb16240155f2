"""The `turbolm` command. Starts without torch; each command imports what it needs."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from turbolm.errors import EXIT_BAD_INPUT, UserError

app = typer.Typer(
    name="turbolm",
    help="Pretrain language models fast, on Accelerate and DeepSpeed, from one recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[
    str, typer.Argument(metavar="RECIPE", help="a recipe file, such as recipes/quickstart/config.yaml")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="values to replace")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, such as runs/quickstart")]
CheckpointFolder = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="such as runs/quickstart/checkpoints/step-00000120")
]


@app.command()
def prepare(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Tokenize the recipe's sources into a token store, once."""
    from turbolm.data.prepare import prepare as prepare_store
    from turbolm.recipe.load import load_recipe

    folder = prepare_store(load_recipe(recipe, overrides or ()), on_progress=_print_progress)
    print(f"token store: {folder}")


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object with stable keys")] = False,
) -> None:
    """Show everything that follows from a recipe, for the machines it describes or for this one."""
    import json

    from turbolm.launch.local import accelerate_config
    from turbolm.plan.summary import collect_summary
    from turbolm.plan.text import render_summary
    from turbolm.recipe.load import load_recipe

    summary = collect_summary(load_recipe(recipe, overrides or ()), recipe, overrides or (), accelerate_config)
    print(json.dumps(summary.as_dict(), indent=2) if as_json else render_summary(summary))


@app.command()
def recipes(write: Annotated[bool, typer.Option("--write", help="write recipes/README.md")] = False) -> None:
    """Show the table of recipes."""
    from turbolm.plan.recipe_table import recipes_folder, render_readme

    folder = recipes_folder()
    _print_or_write(render_readme(folder), folder / "README.md" if write else None)


@app.command()
def schema(write: Annotated[bool, typer.Option("--write", help="write recipes/schema.json")] = False) -> None:
    """Print the JSON schema of recipe files."""
    import json

    from turbolm.plan.recipe_table import recipes_folder
    from turbolm.recipe.json_schema import recipe_json_schema

    text = json.dumps(recipe_json_schema(), indent=1, ensure_ascii=False) + "\n"
    _print_or_write(text, recipes_folder() / "schema.json" if write else None)


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Prepare the data if needed, then train on this machine; resumes by itself."""
    from turbolm.data.prepare import prepare as prepare_store
    from turbolm.launch.local import launch
    from turbolm.plan.machine import check_machine, detect_machine
    from turbolm.plan.plan import build_plan
    from turbolm.recipe.load import load_recipe
    from turbolm.train.run_directory import is_finished, run_directory

    loaded = load_recipe(recipe, overrides or ())
    run = run_directory(loaded)
    machine = detect_machine()
    check_machine(loaded, machine)
    plan = build_plan(loaded, machine)
    store = prepare_store(loaded, on_progress=_print_progress)
    if is_finished(run, loaded.train.budget):
        from turbolm.data.store import open_store
        from turbolm.train.run_directory import settle_contract

        settle_contract(run, plan.recipe, open_store(store).fingerprint)
        print(f"{run.path} is complete. Results: {run.results}, report: {run.path / 'report.html'}")
        print("Raise train.budget to train on, or give a new run a `name` of its own.")
        return
    print(
        f"{loaded.name}: {plan.world_size} processes on {plan.device}, {plan.precision}, "
        f"ZeRO-{loaded.execution.zero_stage}, {plan.batch.num_steps} steps of {plan.batch.global_batch_tokens} tokens",
        flush=True,
    )
    raise typer.Exit(launch(plan, machine, run, recipe, overrides or ()))


@app.command()
def submit(
    recipe: RecipeFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="write and print the script; submit nothing")] = False,
) -> None:
    """Train on a Slurm cluster: render the job's script into the run directory and submit it."""
    from turbolm.launch.slurm import submit as submit_script
    from turbolm.launch.slurm import write_submission

    submission = write_submission(recipe, overrides or ())
    if dry_run:
        print(submission.text, end="")
        return
    job_id = submit_script(submission)
    print(f"submitted job {job_id}: {submission.script}")
    print("watch it with: turbolm status " + " ".join(shlex.quote(str(run.path)) for run in submission.runs))


@app.command()
def status(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN]...", help="default: every run below --runs")
    ] = None,
    runs_dir: Annotated[Path, typer.Option("--runs", help="the folder of run directories")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """List runs, their attempts, progress and remaining time."""
    import json

    from turbolm.launch.status import find_runs, format_status, read_status

    found = [read_status(path) for path in (runs or find_runs(runs_dir))]
    print(json.dumps([vars(one) for one in found], indent=1) if as_json else format_status(found, detailed=bool(runs)))


@app.command()
def stop(run: RunFolder) -> None:
    """Ask a run to save and stop; a Slurm job that trains it ends and does not start again."""
    from turbolm.launch.status import read_status
    from turbolm.reliability.stop import ask_to_stop
    from turbolm.train.run_directory import RunDirectory

    current = read_status(run)
    if current.state == "finished":
        raise UserError(f"{run} is finished")
    ask_to_stop(RunDirectory(run).stop_file)
    print(f"{run}: asked to stop after the current step (last seen: {current.state}, step {current.step})")


@app.command()
def verify(checkpoint: CheckpointFolder) -> None:
    """Check every file of a checkpoint against its manifest."""
    from turbolm.checkpoint.manifest import read_manifest
    from turbolm.checkpoint.verify import verify_checkpoint

    problems = verify_checkpoint(checkpoint)
    if problems:
        raise UserError("\n".join(f"{checkpoint}: {problem}" for problem in problems))
    manifest = read_manifest(checkpoint)
    print(f"{checkpoint}: whole; step {manifest['step']}, {len(manifest['files'])} files")


@app.command()
def export(
    checkpoint: CheckpointFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the folder to write; replaced if it is there")],
) -> None:
    """Write a checkpoint in the Hugging Face layout."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which Transformers imports, need not look for GPUs
    from turbolm.checkpoint.export import export_checkpoint
    from turbolm.train.run_directory import RunDirectory, read_json

    run = RunDirectory(checkpoint.resolve().parent.parent)
    contract = read_json(run.contract)
    if contract is None:
        raise UserError(f"{checkpoint}: expected a checkpoint inside a run directory; {run.contract} cannot be read")
    if out.exists() and not (out / "config.json").is_file():
        raise UserError(f"{out} exists and is not an exported model; choose another folder")
    card = f"# {run.path.name}\n\nExported from {checkpoint.name} with turbolm.\n"
    precision = contract["contract"]["train"]["precision"]
    print(f"exported to {export_checkpoint(checkpoint, run.model, out, precision=precision, card=card)}")


@app.command()
def report(run: RunFolder) -> None:
    """Write the run's report.html."""
    from turbolm.report.html import write_report

    print(write_report(run))


def _print_or_write(text: str, path: Path | None) -> None:
    if path is None:
        print(text, end="")
    else:
        path.write_text(text, encoding="utf-8")
        print(path)


def _print_progress(stage: str, documents: int, text_bytes: int) -> None:
    from turbolm.units import format_bytes, format_count

    doing = {"waiting": "waiting for another prepare", "sample": "training the tokenizer", "tokenize": "tokenizing"}
    text = f"prepare: {doing.get(stage, stage)}, {format_count(documents)} documents, {format_bytes(text_bytes)}"
    end = "\n" if not sys.stdout.isatty() else ""
    print(f"\r\x1b[K{text}" if not end else text, end=end, flush=True)


def main() -> None:
    """Run a command; a mistake of the user's is one message and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"turbolm: {error}" if "\n" not in str(error) else str(error), file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
