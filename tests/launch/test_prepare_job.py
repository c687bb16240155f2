"""The job that prepares before a training job: when there is one, what it asks for, and what becomes of its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.train.harness import make_recipe
from turbolm.cli import app
from turbolm.data.store.token_store import open_store
from turbolm.errors import UserError
from turbolm.files import read_json, write_json
from turbolm.launch.job import settle_prepare
from turbolm.launch.prepare_job import divide_dependency, is_prepared, is_wanted
from turbolm.launch.slurm import Submission, submit
from turbolm.launch.status import read_status
from turbolm.launch.store import prepare_order, prepare_store
from turbolm.recipe.load import RecipeError, dump_recipe, load_recipe
from turbolm.reliability.outcome import Outcome, read_outcome, write_outcome

from .harness import make_programs, read_directives, render, run_script

NODES = {"num_nodes": 2, "slurm": {}}
PREPARE = ["-m", "turbolm.cli", "prepare"]


def program(folder: Path, name: str, body: str) -> None:
    """A program on PATH that appends how it was called to `asked`, and does what `body` (sh) says."""
    path = folder / "bin" / name
    path.write_text(f'#!/bin/sh\necho {name} "$@" >>asked\n{body}\n')
    path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an sbatch that counts jobs from 41, and a scancel."""
    make_programs(tmp_path)
    program(tmp_path, "sbatch", "echo $((40 + $(grep -c ^sbatch asked)))")
    program(tmp_path, "scancel", "")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path


# ------------------------------------------------------------------------------------------------- when there is one


def test_a_recipe_is_prepared_with_store_and_table_and_then_starts_at_once(
    slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(slurm)
    recipe = make_recipe(slurm, cluster={"device": "cpu", "processes_per_node": 1, **NODES})
    (slurm / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert not is_prepared(recipe)
    store = open_store(prepare_store(recipe))
    assert not is_prepared(recipe), "the table is missing"
    prepare_order(recipe, store)
    assert is_prepared(recipe)
    assert not is_prepared(load_recipe(slurm / "recipe.yaml", ["train.seed=4"])), "another order"
    done = CliRunner().invoke(app, ["submit", str(slurm / "recipe.yaml")])
    assert done.stdout.splitlines()[0] == f"submitted job 41: {slurm / 'runs/cell/submissions/1/submit.slurm'}"
    assert "prepares the data" not in done.output
    (slurm / "corpus.jsonl").write_text('{"text": "other"}\n')
    assert not is_prepared(recipe), "other sources"


@pytest.mark.parametrize(
    ("cluster", "wanted"),
    [
        ({"slurm": {}}, False),
        (NODES, True),
        ({"gpus_per_node": 8, "gpu": "H100-80GB", "slurm": {}}, True),
        ({"num_nodes": 2, "slurm": {"prepare": {"separate": False}}}, False),
    ],
)
def test_gpus_and_nodes_do_not_wait(
    cluster: dict[str, Any], wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submission = render(tmp_path, monkeypatch, cluster=cluster)
    assert is_wanted(load_recipe(tmp_path / "recipe.yaml")) == wanted == (submission.prepare is not None)


# --------------------------------------------------------------------------------------------------- what it asks for


def test_the_training_job_waits_and_its_script_is_as_ever(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = {"num_nodes": 2, "slurm": {"dependency": "afterok:12:13,singleton"}}
    submission = render(slurm, monkeypatch, cluster=cluster)
    assert submission.prepare is not None
    assert read_directives(submission.text)["dependency"] == "afterok:12:13,singleton", "for sbatch by hand"
    assert read_directives(submission.prepare.script.read_text())["dependency"] == "afterok:12:13"
    submitted = submit(submission)
    assert (submitted.prepare_id, submitted.job_id) == ("41", "42")
    assert (slurm / "asked").read_text().splitlines() == [
        f"sbatch --parsable {submission.prepare.script}",
        f"sbatch --parsable --dependency=afterok:41,singleton --kill-on-invalid-dep=yes {submission.script}",
    ]
    log = f"{submission.runs[0].path}/slurm-41-prepare.out"
    assert read_json(submission.folders[0] / "job.json") == {"job_id": "42", "prepare": {"job_id": "41", "log": log}}


def test_a_training_job_that_is_refused_takes_its_prepare_job_along(
    slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(slurm, "sbatch", 'case "$*" in *afterok*) echo "Invalid qos" >&2; exit 1;; esac; echo 41')
    with pytest.raises(UserError, match="Invalid qos"):
        submit(render(slurm, monkeypatch, cluster=NODES))
    assert (slurm / "asked").read_text().splitlines()[-1] == "scancel 41"


def test_a_prepare_job_that_is_refused_names_the_keys(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(slurm, "sbatch", 'echo "this partition needs GPUs" >&2; exit 1')
    with pytest.raises(UserError, match=r"needs GPUs\n.*cluster.slurm.prepare.separate=false"):
        submit(render(slurm, monkeypatch, cluster=NODES))
    assert len((slurm / "asked").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("dependency", "moves", "stays"),
    [
        (None, None, []),
        ("afterok:1:2,after:3+5", "afterok:1:2,after:3+5", []),
        ("singleton", None, ["singleton"]),
        ("aftercorr:4,AfterAny:5,Singleton", "AfterAny:5", ["aftercorr:4", "Singleton"]),
        ("afterok:1?afterok:2", "afterok:1?afterok:2", []),
    ],
)
def test_a_dependency_is_divided(dependency: str | None, moves: str | None, stays: list[str]) -> None:
    assert divide_dependency(dependency) == (moves, stays)


def test_a_dependency_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(UserError, match="prepare.separate=false"):
        divide_dependency("afterok:1?singleton")


def test_what_only_the_training_nodes_have_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm: dict[str, Any] = {
        "partition": "gpu",
        "time": "2d",
        "mem": "900G",
        "exclusive": True,
        "constraint": "[rack1*1&rack2*1]",
        "nodelist": "a1,a2",
    }
    gpus = {"num_nodes": 2, "gpus_per_node": 8, "gpu": "H100-80GB"}
    submission = render(tmp_path, monkeypatch, cluster=gpus | {"slurm": slurm})
    assert submission.prepare is not None
    text = submission.prepare.script.read_text()
    options = read_directives(text)
    assert (options["nodes"], options["partition"], options["mem"]) == ("1", "gpu", "900G")
    assert not {"nodelist", "constraint", "gres"} & options.keys() and "exclusive" in options
    own = {"partition": "cpu", "time": "6h", "mem": "64G", "cpus_per_task": 32}
    rest = {"constraint": "ib", "reservation": "course", "prepare": own}
    submission = render(tmp_path, monkeypatch, cluster=gpus | {"slurm": slurm | rest})
    assert submission.prepare is not None
    options = read_directives(submission.prepare.script.read_text())
    assert (options["partition"], options["mem"], options["cpus-per-task"]) == ("cpu", "64G", "32")
    assert options["time"] == "0-06:00:00"
    assert not {"constraint", "reservation", "exclusive", "gres"} & options.keys()
    with pytest.raises(RecipeError, match="prepare.time.*longer than `stop_grace`"):
        render(tmp_path, monkeypatch, cluster=gpus | {"slurm": {"prepare": {"time": "2m"}}})


# ------------------------------------------------------------------------------------------------------- how it ends


@pytest.fixture
def submission(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> Submission:
    made = render(slurm, monkeypatch, cluster={"num_nodes": 2, "slurm": {"seeds": [1, 2]}})
    submit(made)
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    return made


def settle(made: Submission, code: int, at: int = 0) -> Outcome:
    files = [folder / "recipe.yaml" for folder in made.folders]
    return settle_prepare(load_recipe(files[at]), files[at], code, files)


def test_one_job_prepares_every_seed_and_tells_all_of_them_why_it_failed(submission: Submission, slurm: Path) -> None:
    assert submission.prepare is not None
    recipes = [str(folder / "recipe.yaml") for folder in submission.folders]
    done = run_script(submission.prepare.script, slurm)
    assert done.code == 0 and done.of("python") == [[*PREPARE, recipe] for recipe in recipes]
    done = run_script(submission.prepare.script, slurm, prepare=2, settle=2)
    told = ["-m", "turbolm.launch.job", "unprepared", "--recipe", recipes[0], "--code", "2", *recipes]
    assert done.code == 2 and done.of("python") == [[*PREPARE, recipes[0]], told]
    write_outcome(submission.folders[0], Outcome("refused", 2, "data.sources[0]: no such file"))
    settle(submission, 2)
    for run in submission.runs:
        status = read_status(run.path)
        assert status.state == "refused" and status.waiting_jobs == []
        assert str(status.job_trouble).startswith(
            "job 42 refused before it started: prepare job 41: data.sources[0]: no such file\n  log: "
        )


def test_a_run_that_was_stopped_leaves_the_others_of_an_array(submission: Submission, slurm: Path) -> None:
    assert submission.prepare is not None
    done = run_script(submission.prepare.script, slurm, prepare=130, settle=130)
    assert done.code == 130 and len(done.of("python")) == 3, "both were tried, and neither is prepared"


def test_a_job_that_slurm_stops_requeues_itself(submission: Submission, slurm: Path) -> None:
    assert submission.prepare is not None
    done = run_script(submission.prepare.script, slurm, signal_while_preparing=12, settle=75)
    assert done.code == 75 and done.of("scontrol")[-1] == ["requeue", "7"]


def test_a_killed_prepare_says_what_to_change(submission: Submission) -> None:
    outcome = settle(submission, 137)
    assert outcome.exit_code == 137 and "signal 9" in outcome.message and "prepare.mem" in outcome.message
    assert read_outcome(submission.folders[1]) == outcome


def test_starts_that_get_no_further_end(submission: Submission) -> None:
    codes = [settle(submission, 75).exit_code for _ in range(4)]
    assert codes == [75, 75, 75, 1]
    assert "giving up" in str(read_status(submission.runs[0].path).job_trouble)


# ----------------------------------------------------------------------------------------------------- what Slurm says


@pytest.mark.parametrize(
    ("squeue", "waiting", "trouble"),
    [
        ("echo 41 RUNNING; echo 42 PENDING", "job 42 (after prepare job 41, RUNNING)", None),
        ("echo 41 COMPLETED; echo 42 PENDING; echo 42 PENDING", "job 42", None),
        ("echo 41 TIMEOUT; echo 42 CANCELLED", None, "job 42 will not start: prepare job 41 ended as TIMEOUT"),
        ("echo 41 NODE_FAIL; echo 42 PENDING", None, "job 42 will not start: prepare job 41 ended as NODE_FAIL"),
        ("echo 42 CANCELLED", None, "job 42 ended as CANCELLED, and did not start to train"),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", None,
         "job 42 is not known to Slurm any more, and neither is prepare job 41"),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "job 42 (after prepare job 41)", None),
    ],
)  # fmt: skip
def test_slurm_is_asked_what_became_of_the_jobs(
    squeue: str, waiting: str | None, trouble: str | None, submission: Submission, slurm: Path
) -> None:
    program(slurm, "squeue", squeue)
    assert submission.prepare is not None
    log = Path(submission.prepare.log_of("41"))
    log.write_text(
        "tokens\nslurmstepd-n1: error: *** JOB 41 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***\n"
    )
    status = read_status(submission.runs[1].path)
    assert status.waiting_jobs == ([waiting] if waiting else [])
    assert (status.job_trouble or "").startswith(trouble or "") and (status.job_trouble is None) == (trouble is None)
    assert trouble is None or "DUE TO TIME LIMIT ***\n  log: " in str(status.job_trouble)
    asked = (slurm / "asked").read_text().splitlines()[-1]
    assert asked == "squeue --noheader --states=all --format=%F %T --jobs=41,42"


def test_slurm_is_not_asked_about_jobs_that_started_or_ended(submission: Submission, slurm: Path) -> None:
    program(slurm, "squeue", "")
    write_json(submission.folders[0] / "started.json", {"attempt": 1})
    write_outcome(submission.folders[1], Outcome("refused", 2, "no"))
    for run in submission.runs:
        assert read_status(run.path).waiting_jobs == []
    assert "squeue" not in (slurm / "asked").read_text()


# ---------------------------------------------------------------------------------------------------------- the memory


@pytest.mark.slow  # its model is traced
def test_submit_says_what_plan_says_about_memory(slurm: Path) -> None:
    gpus = {"num_nodes": 2, "gpus_per_node": 8, "gpu": "H100-80GB", "slurm": {"cpus_per_task": 64, "mem": "4G"}}
    recipe = make_recipe(slurm, cluster={"device": "auto", **gpus}, train={"global_batch": 1024, "budget": 10240})
    (slurm / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    plan = json.loads(CliRunner().invoke(app, ["plan", "--json", str(slurm / "recipe.yaml")]).stdout)
    (note,) = [note for note in plan["notes"] if note.startswith("cluster.slurm.mem")]
    done = CliRunner().invoke(app, ["submit", "--dry-run", str(slurm / "recipe.yaml")])
    assert f"turbolm: {note}\n" in done.stderr
