"""The `turbolm` command. Starts without torch; each command imports what it needs."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Option

from turbolm import __version__
from turbolm.errors import EXIT_FAILED, EXIT_OK, UserError, exit_code_of
from turbolm.evaluate.command import evaluate
from turbolm.report.commands import compare, report
from turbolm.shipped import find_recipe, recipes_by_name, shipped

app = typer.Typer(name="turbolm", no_args_is_help=True, pretty_exceptions_enable=False)

RecipeFile = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="a recipe file, or the name of a shipped recipe, such as quickstart",
        callback=find_recipe,
        autocompletion=lambda: list(recipes_by_name()),
    ),
]
AnyRecipe = Annotated[
    str | None,
    typer.Argument(
        metavar="[RECIPE]", help="whose processes, folders and model to take", callback=lambda v: v and find_recipe(v)
    ),
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="recipe values to override")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, such as runs/quickstart")]
CheckpointFolder = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="such as runs/quickstart/checkpoints/step-00000120")
]
Fresh = Annotated[bool, Option("--fresh", help="move an existing run of this name aside, and start over")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"turbolm {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[bool, Option("--version", help="show the version", callback=_show_version)] = False,
) -> None:
    """Pretrain language models fast, on Accelerate and DeepSpeed, from one recipe."""


@app.command()
def prepare(
    recipe: RecipeFile,
    overrides: Overrides = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="URL", help="copy the store there, for `execution.store: URL` on other machines"),
    ] = None,
) -> None:
    """Tokenize the recipe's sources into a token store and plan its batches; does nothing that is done already."""
    from turbolm.data.prepare.build import check_place, store_settings
    from turbolm.data.prepare.remote_store import check_target, copy_to
    from turbolm.data.store.token_store import open_store
    from turbolm.environment import drop_foreign
    from turbolm.launch.attempt import stoppable
    from turbolm.launch.job import is_of_job, seen_by, told_to_job
    from turbolm.launch.store import prepare_order, prepare_profile, prepare_store
    from turbolm.recipe.load import load_recipe
    from turbolm.train.run_contract import as_started, settle_commits
    from turbolm.train.run_directory import run_directory
    from turbolm.units import format_bytes, format_count

    if to is not None:
        check_target(to)
    drop_foreign(in_own_step=is_of_job(Path(recipe)))
    started, _ = as_started(load_recipe(recipe, overrides or ()))
    run = run_directory(started)
    with told_to_job(recipe), stoppable(run, seen_by(recipe, run)):
        settled = settle_commits(started)
        if to is not None:
            check_place(settled, to)
        store = open_store(prepare_store(settled))
        prepare_order(settled, store)
        prepare_profile(settled, recipe, store)
    manifest = store.manifest
    for split, total in manifest["totals"].items():
        documents, tokens = format_count(total["documents"]), format_count(total["tokens"])
        print(f"{split}: {documents} documents, {tokens} tokens, {format_bytes(total['text_bytes'])} of text")
    for what in ("empty", "duplicate"):
        if count := manifest[f"{what}_documents"]:
            print(f"skipped: {format_count(count)} {what} documents")
    for note in store.notes:
        print(f"turbolm: {note}", file=sys.stderr)
    print(f"token store: {store.folder}")
    if to is not None:
        copy_to(store.folder, to, store_settings(settled))


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, Option("--json", help="one JSON object with stable keys")] = False,
    verbose: Annotated[bool, Option("--verbose", help="everything that follows from the recipe")] = False,
    steps: Annotated[bool, Option("--steps", help="one JSON object per step, with its learning rate")] = False,
    search: Annotated[bool, Option("--search", help="rank other execution plans for the same contract")] = False,
    gpus: Annotated[int | None, Option(min=1, help="with --search: GPUs to use; default: the recipe's")] = None,
    deadline: Annotated[str | None, Option(help="with --search: such as 3d; the cheapest run in time is best")] = None,
    budget_usd: Annotated[float | None, Option(min=0, help="with --search: the most a run may cost")] = None,
    project: Annotated[bool, Option("--project", help="strong and weak scaling from a node to 16,384 GPUs")] = False,
    html: Annotated[Path | None, Option(help="with --project: the page to write, with plots")] = None,
) -> None:
    """Show what a recipe will run, for the machines it describes or for this one: a page, or all details."""
    from turbolm.launch.local import accelerate_config
    from turbolm.launch.store import store_size
    from turbolm.plan.explore import Asked, explore
    from turbolm.plan.overview import render_overview
    from turbolm.plan.rates import preview_steps
    from turbolm.plan.summary import collect_summary
    from turbolm.plan.text import render_summary
    from turbolm.recipe.load import load_scaled

    (loaded, scaling), changes = load_scaled(recipe, overrides or ()), overrides or ()
    asked = Asked(search, gpus, deadline, budget_usd, project, html, as_json, steps)
    if not asked.is_plain:
        from turbolm.report.projection import write_projection

        print("\n".join(explore(loaded, recipe, changes, asked, write_projection)))
        return
    store = store_size(loaded)
    summary = collect_summary(loaded, recipe, changes, accelerate_config, store, scaling=scaling, may_trace=True)
    if steps:
        for step in preview_steps(summary.plan):
            print(json.dumps(step))
    elif as_json:
        print(json.dumps(summary.as_dict(), indent=2))
    else:
        print(render_summary(summary) if verbose else render_overview(summary))


@app.command()
def adapt(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="a folder, a config.json, a model type, or owner/name on the hub")
    ],
    task: Annotated[Literal["pretrain", "continue"], Option(help="new weights, or the model's")] = "pretrain",
    cluster: Annotated[
        str | None, Option(help="a file of recipes/_clusters, such as h100x8, or 8xH100-80GB; default: this machine")
    ] = None,
    seq_len: Annotated[str | None, Option(help="tokens per sequence")] = None,
    budget: Annotated[str | None, Option(help="tokens to train on, such as 20B")] = None,
    out: Annotated[Path | None, Option(help="the recipe to write; default: MODEL-TASK.yaml")] = None,
) -> None:
    """Write a recipe for another model, after trying a small copy of it."""
    from turbolm.adapt.run import adapt as write_recipe

    print(write_recipe(model, task, cluster=cluster, seq_len=seq_len, budget=budget, out=out))


@app.command()
def recipes(write: Annotated[bool, Option("--write", help="write recipes/README.md")] = False) -> None:
    """Show the table of recipes."""
    from turbolm.plan.recipe_table import render_readme

    _print_or_write(render_readme(), shipped("recipes", "README.md") if write else None)


@app.command()
def schema(write: Annotated[bool, Option("--write", help="write recipes/schema.json")] = False) -> None:
    """Print the JSON schema of recipe files."""
    from turbolm.recipe.json_schema import recipe_json_schema

    text = json.dumps(recipe_json_schema(), indent=1, ensure_ascii=False) + "\n"
    _print_or_write(text, shipped("recipes", "schema.json") if write else None)


@app.command()
def models(
    types: Annotated[list[str] | None, typer.Argument(metavar="[TYPE]...", help="model types to try here")] = None,
    write: Annotated[bool, Option("--write", help="try all types, and update the table")] = False,
) -> None:
    """Show how each model type is trained: packed, one document per sequence, or refused."""
    from turbolm.models.table import show_or_try

    if not show_or_try(types or [], write):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    fresh: Fresh = False,
    profile: Annotated[
        bool, Option("--profile", help="trace 3 steps after step 20, unless logging.profile says otherwise")
    ] = False,
) -> None:
    """Prepare the data if needed, then train on this machine. Resumes an unfinished run."""
    from turbolm.launch.train import train_here
    from turbolm.plan.count import check_model
    from turbolm.recipe.load import load_recipe
    from turbolm.train.fresh import start_fresh

    loaded = load_recipe(recipe, overrides or ())
    for note in check_model(loaded, recipe):
        print(note)
    if fresh:
        start_fresh(loaded)
    if profile and loaded.logging.profile is None:
        overrides = [*(overrides or ()), "logging.profile={}"]
        loaded = load_recipe(recipe, overrides)
    raise typer.Exit(train_here(loaded, recipe, overrides or ()))


@app.command()
def submit(
    recipe: RecipeFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, Option("--dry-run", help="write and print the script without submitting it")] = False,
    fresh: Fresh = False,
) -> None:
    """Train on a Slurm cluster: write the job script into the run directory and submit it.

    Data that are not prepared yet are prepared first, by a job of one node without GPUs; the training job waits for it.
    """
    from turbolm.launch.slurm import submit as submit_script
    from turbolm.launch.slurm import write_submission

    submission = write_submission(recipe, overrides or (), fresh=fresh and not dry_run, fetch=not dry_run)
    if dry_run:
        print(submission.text, end="")
        if submission.prepare is not None:
            print(submission.prepare.describe(submission), file=sys.stderr)
        return
    submitted = submit_script(submission)
    print(f"submitted job {submitted.job_id}: {submission.script}")
    if submission.prepare is not None and submitted.prepare_id is not None:
        log = submission.prepare.log_of(submitted.prepare_id)
        print(f"job {submitted.prepare_id} prepares the data first, on one node without GPUs: {log}")
    print("watch it with: turbolm status " + " ".join(shlex.quote(str(run.path)) for run in submission.runs))


@app.command()
def status(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="[RUN]...", help="default: all in --runs")] = None,
    runs_dir: Annotated[Path, Option("--runs", help="the folder that contains run directories")] = Path("runs"),
    as_json: Annotated[bool, Option("--json", help="for programs")] = False,
) -> None:
    """List runs, their attempts, progress and remaining time; of a named run also its forks, compared."""
    from turbolm.launch.forks import tell_runs
    from turbolm.launch.status import find_runs

    print(tell_runs(runs or find_runs(runs_dir), detailed=bool(runs), as_json=as_json))


@app.command()
def doctor(
    recipe: AnyRecipe = None,
    overrides: Overrides = None,
    timeout: Annotated[float, Option(min=1, help="seconds after which a node that has not come is named")] = 60,
    as_json: Annotated[bool, Option("--json", help="one JSON object with stable keys; progress on stderr")] = False,
) -> None:
    """Measure this machine, or every node of the allocation, and name what stands out."""
    from turbolm.launch.doctor import doctor as examine_nodes

    raise typer.Exit(examine_nodes(recipe, overrides or (), timeout, as_json=as_json))


@app.command()
def calibrate(
    recipe: AnyRecipe = None,
    overrides: Overrides = None,
    seconds: Annotated[float, Option(min=1, help="how long to measure, after everything is built")] = 45,
    clock: Annotated[Literal["wall", "cpu"], Option(help="cpu: measure processor time, for a shared machine")] = "wall",
) -> None:
    """Measure how fast this node computes, and keep it for the times that `turbolm plan` shows."""
    from turbolm.launch import calibrate as node

    print("\n".join(node.calibration_lines(node.calibrate(recipe, overrides or (), seconds, clock))))


@app.command()
def stop(run: RunFolder) -> None:
    """Ask a run to save and stop, whatever it does now; a Slurm job that waits in the queue will not train it."""
    from turbolm.launch.status import stop_run

    print(stop_run(run))


@app.command()
def verify(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="a checkpoint, a token store, or a recipe (for its token store)")
    ],
    overrides: Overrides = None,
) -> None:
    """Check every file of a checkpoint or of a token store against its manifest."""
    from turbolm.launch.verify import verify_path

    print(verify_path(path, overrides or ()))


@app.command()
def export(
    checkpoint: CheckpointFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the folder to write; an earlier export is replaced")],
    averaged: Annotated[
        bool, Option("--average", help="the mean of the weights that evaluation.weight_average keeps")
    ] = False,
) -> None:
    """Write a checkpoint in the Hugging Face layout."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which Transformers imports, need not look for GPUs
    from turbolm.checkpoint.export import export_from_run

    print(f"exported to {export_from_run(checkpoint, out, averaged=averaged)}")


@app.command()
def average(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="CHECKPOINT... OUT", help="checkpoints of one run, and the folder to write, a new one"),
    ],
    last: Annotated[int | None, Option(min=2, help="give one RUN instead: its newest N checkpoints")] = None,
    weights: Annotated[
        str | None, Option(help="of the checkpoints in their order, such as 1,2,4; default: equal")
    ] = None,
) -> None:
    """Write the mean of several checkpoints' weights in the Hugging Face layout."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from turbolm.checkpoint.average import average_command

    print(f"exported to {average_command(paths, last, weights)}")


@app.command()
def push(
    export_or_run: Annotated[Path, typer.Argument(metavar="EXPORT", help="the folder of an export, or a run's folder")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hugging Face hub")],
    private: Annotated[bool, Option("--private", help="make the repository private; refuse a public one")] = False,
) -> None:
    """Upload an export to the Hugging Face hub, in one commit."""
    from turbolm.checkpoint.push import push_export

    nested = export_or_run / "export"
    folder = nested if (export_or_run / "recipe.yaml").is_file() and nested.is_dir() else export_or_run
    print(f"pushed to {push_export(folder, repository, private=private)}")


@app.command()
def fork(
    checkpoint: CheckpointFolder,
    decay: Annotated[str, Option(help="length of the decay: 10% (of the new run), 2M (tokens) or 200 steps")],
    recipe: Annotated[
        str | None,
        Option(metavar="RECIPE", help="decay on the data of this recipe, from their first batch on, run as it says"),
    ] = None,
    name: Annotated[
        str | None, Option(help="name of the new run; default: that of --recipe if another, else RUN-decay-STEP")
    ] = None,
    decay_shape: Annotated[str | None, Option(help="linear, sqrt or cosine")] = None,
    min_lr_ratio: Annotated[float | None, Option(help="final learning rate, as a share of the peak")] = None,
) -> None:
    """Branch a learning-rate decay from a checkpoint on the plateau, as a separate run; `status RUN` compares them."""
    from pydantic import ValidationError

    from turbolm.recipe.load import load_recipe
    from turbolm.train.fork import fork as fork_run
    from turbolm.units import Span

    changes = {"decay_shape": decay_shape, "min_lr_ratio": min_lr_ratio}
    other = load_recipe(find_recipe(recipe)) if recipe is not None else None
    try:
        path = fork_run(checkpoint, Span.parse(decay), name, {k: v for k, v in changes.items() if v is not None}, other)
    except ValidationError as error:
        raise UserError("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())) from None
    except ValueError as error:
        raise UserError(f"--decay: {error}") from None
    print(f"{path}: a new run from {checkpoint}")
    print(f"train it with: turbolm train {shlex.quote(str(path / 'recipe.yaml'))}")


@app.command()
def ablate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    tricks: Annotated[
        list[str] | None, Option(help="names from recipes/_tricks, paths of such files, or NAME:KEY=VALUE+KEY=VALUE")
    ] = None,
    seeds: Annotated[int, Option(min=1, max=100, help="runs per arm, with different seeds")] = 1,
    target_loss: Annotated[
        float | None, Option(help="held-out loss to reach; default: 0.5% above the baseline's final loss")
    ] = None,
    sweep_lr: Annotated[
        str | None, Option(help="lo,hi,n: first find the learning rate of each arm that may need its own")
    ] = None,
    halving: Annotated[
        bool, Option("--halving", help="with --sweep-lr: drop the worse half of the rates early, twice and more")
    ] = False,
    jobs: Annotated[int, Option(min=1, max=1000, help="runs side by side, each on its share of cores or GPUs")] = 1,
    alone: Annotated[bool, Option("--alone", help="test each trick separately, without combinations")] = False,
    noise: Annotated[str, Option(help="differences below this are treated as noise")] = "5%",
    clock: Annotated[Literal["wall", "cpu"], Option(help="cpu: measure processor time, for a shared machine")] = "wall",
    name: Annotated[str | None, Option(help="name of the results folder; default: the recipe's name")] = None,
    transfer: Annotated[
        str | None,
        Option(metavar="WIDTHS|RECIPE", help="check instead that learning rates transfer to such widths, or a recipe"),
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="check and list the arms; train nothing")] = False,
    as_json: Annotated[bool, Option("--json", help="results as one JSON object; progress on stderr")] = False,
) -> None:
    """Measure the effect of each trick by training with and without it. Resumes unfinished runs."""
    from turbolm.ablate.command import ablate as measure_tricks
    from turbolm.ablate.command import check_transfer
    from turbolm.ablate.settings import Options, Sweep

    options = Options(
        num_seeds=seeds,
        target_loss=target_loss,
        sweep=Sweep.parse(sweep_lr) if sweep_lr else None,
        halving=halving,
        alone=alone,
        noise=noise,
        num_jobs=jobs,
        clock=clock,
        name=name,
        command=shlex.join(["turbolm", *sys.argv[1:]]),
    )
    asked = (recipe, overrides or (), tricks or (), options)
    if transfer is not None:
        raise typer.Exit(check_transfer(*asked, transfer, dry_run=dry_run, as_json=as_json))
    code = measure_tricks(*asked, dry_run=dry_run, as_json=as_json)
    raise typer.Exit(code)


app.command()(report)
app.command()(compare)
app.command()(evaluate)


def _print_or_write(text: str, path: Path | None) -> None:
    if path is None:
        print(text, end="")
    else:
        path.write_text(text, encoding="utf-8")
        print(path)


def _exit_code(end: SystemExit) -> int | str | None:
    """Return the exit code of a command; a closed pipe (`| head -1`) is not an error."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    output = select.poll()
    output.register(1, 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return end.code
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for Python's flush at exit
    # Typer turns a broken pipe into exit code 1. An interrupted `train` stays an error, whoever reads its output.
    caused = isinstance(end.__context__, BrokenPipeError) and sys.argv[1:2] not in (["train"], ["ablate"])
    return EXIT_OK if caused else end.code


def main() -> None:
    """Run a command; a user error is one message and exit code 2."""
    from turbolm.reliability.open_files import raise_open_files

    raise_open_files()
    try:
        sys.exit(exit_code_of(app))  # Typer itself ends by SystemExit
    except SystemExit as end:
        sys.exit(_exit_code(end))
    except Exception:  # a bug; its message must not leak secrets
        import traceback

        from turbolm.redaction import redact

        print(redact(traceback.format_exc()), file=sys.stderr, end="")
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
