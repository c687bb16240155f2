"""`turbolm submit` on a real Slurm: a job of one node prepares first, and the training job waits for it."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.harness import make_recipe
from turbolm.data.prepare.build import store_folder
from turbolm.launch.prepare_job import is_prepared
from turbolm.launch.queue import ask_slurm
from turbolm.recipe.load import dump_recipe, load_recipe

from .cluster import SlurmCluster


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    recipe = make_recipe(
        tmp_path,
        execution={
            "cache_dir": "cache",
            "runs_dir": "runs",
            "zero_stage": 1,
            "threads_per_process": 1,
            "prepare_workers": 1,
        },
        cluster={"device": "cpu", "processes_per_node": 1, "num_nodes": 2, "slurm": {"preflight": False}},
        logging={"sample_tokens": 0},
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def turbolm(cluster: SlurmCluster, *words: str) -> str:
    command = [sys.executable, "-m", "turbolm.cli", *words]
    done = subprocess.run(command, env=cluster.env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def submit(cluster: SlurmCluster, *overrides: str) -> tuple[int, int | None]:
    """The numbers of the training job and of its prepare job."""
    lines = turbolm(cluster, "submit", "recipe.yaml", *overrides).splitlines()
    prepare = [int(line.split()[1]) for line in lines if "prepares the data first" in line]
    return int(lines[0].split()[2].rstrip(":")), prepare[0] if prepare else None


def orders() -> list[Path]:
    """The files of plan tables."""
    return [path for path in Path("cache/orders").glob("*/*") if path.is_file()]


def wait_until(condition: Callable[[], object], what: str, timeout_sec: float = 300) -> None:
    deadline = time.monotonic() + timeout_sec
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_sec} s for {what}"
        time.sleep(0.2)


@pytest.mark.slow
def test_training_waits_for_its_prepare_job_and_starts_with_store_and_table(cluster: SlurmCluster, work: Path) -> None:
    """The prepare job meets its time limit first, and goes on in another start."""
    recipe = load_recipe("recipe.yaml")
    blocker = cluster.sbatch(f"--job-name={recipe.name}", "--begin=now+1hour", script="#!/bin/bash\ntrue\n")
    lock = store_folder(recipe).with_suffix(".lock")
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as long as another process builds the store, prepare waits
        train, prepare = submit(cluster, f"cluster.slurm.dependency=afterany:{blocker},singleton")
        assert prepare is not None
        jobs = {name: cluster.job(number) for name, number in (("train", train), ("prepare", prepare))}
        assert jobs["prepare"]["JobName"] == f"{recipe.name}-prepare"
        assert jobs["prepare"]["Dependency"].startswith(f"afterany:{blocker}")
        assert f"afterok:{prepare}" in jobs["train"]["Dependency"] and "singleton" in jobs["train"]["Dependency"]
        assert str(blocker) not in jobs["train"]["Dependency"], "the user's dependency moves to the first job"
        assert f"job {train} (after prepare job {prepare}, PENDING) waits" in turbolm(cluster, "status", "runs/cell")
        cluster.run("scancel", str(blocker))
        cluster.wait(prepare, timeout_sec=300, until={"RUNNING"})
        log = Path(cluster.job(prepare)["StdOut"])
        wait_until(lambda: log.exists() and "another process" in log.read_text(), "prepare to meet the lock")
        assert cluster.job(train)["JobState"] == "PENDING"
        cluster.run("scancel", "--signal=USR2", "--batch", str(prepare))  # Slurm's warning before the time limit
        number = prepare
        wait_until(lambda: cluster.job(number)["Restarts"] == "1", "the prepare job to be requeued")
        assert cluster.job(train)["JobState"] == "PENDING"
        assert f"job {train} (after prepare job {prepare}, PENDING) waits" in turbolm(cluster, "status", "runs/cell")
    cluster.wait(prepare, timeout_sec=300)
    assert is_prepared(recipe)
    assert cluster.job(prepare)["NumNodes"] == "1"
    made = {path: path.stat().st_mtime_ns for path in [store_folder(recipe) / "manifest.json", *orders()]}
    nodes = [Path(f"runs/cell/attempts/1/nodes/{node}.json") for node in (0, 1)]
    wait_until(lambda: all(path.exists() for path in nodes), "both nodes of the training job to start")
    assert cluster.job(prepare)["EndTime"] <= cluster.job(train)["StartTime"]
    assert made == {path: path.stat().st_mtime_ns for path in made} and len(made) > 1, "nothing is made again"
    cluster.run("scancel", str(train))
    train, prepare = submit(cluster, "name=again", "cluster.slurm.dependency=singleton")
    assert prepare is None, "store and table are there"
    cluster.run("scancel", str(train))


@pytest.mark.slow
def test_a_prepare_job_that_fails_ends_the_training_job_with_its_reason(
    cluster: SlurmCluster, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source without documents; then a job that Slurm ends before anything of turbolm runs."""
    Path("empty.jsonl").write_text('{"text": ""}\n')
    gpus = ("cluster.device=auto", "cluster.gpus_per_node=8", "cluster.gpu=H100-80GB")
    source = 'data.sources=[{"type": "jsonl", "path": "empty.jsonl"}]'
    train, prepare = submit(cluster, "name=bad", source, "cluster.slurm.seeds=[1, 2]", *gpus)
    assert prepare is not None
    assert "gres:gpu:8" in cluster.run("scontrol", "show", "job", str(train))
    assert "gpu" not in cluster.job(prepare).get("TresPerNode", "")
    cluster.wait(prepare, timeout_sec=300, until={"FAILED"})
    assert cluster.job(prepare)["ExitCode"] == "2:0"
    cluster.wait(train, timeout_sec=300, until={"CANCELLED"})
    for seed in (1, 2):
        status = turbolm(cluster, "status", f"runs/bad-seed{seed}")
        assert f"job {train} refused before it started: prepare job {prepare}:" in status
        assert "documents" in status, status
        assert "waits in the queue" not in status
        assert "log: " in status and "prepare-slurm" in status

    train, prepare = submit(cluster, "name=killed", 'cluster.slurm.setup=["echo set up", "sleep 60"]')
    assert prepare is not None
    log = Path(f"runs/killed/slurm-{prepare}-prepare.out")
    wait_until(lambda: log.exists() and "set up" in log.read_text(), "the prepare job to start")
    cluster.run("scancel", str(prepare))
    cluster.wait(train, timeout_sec=300, until={"CANCELLED"})
    status = turbolm(cluster, "status", "runs/killed")
    assert f"job {train} will not start: prepare job {prepare} ended as CANCELLED" in status
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    assert ask_slurm([str(prepare), "999999"]) == {str(prepare): "CANCELLED", "999999": "GONE"}
    assert ask_slurm(["999999"]) == {"999999": "GONE"}
    assert "CANCELLED AT" in status and "slurm-" in status, "and what Slurm wrote into its log"
    assert "waits in the queue" not in status
