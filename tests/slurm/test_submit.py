"""`turbolm submit` on a real Slurm: several nodes learn what one does, whatever signals, nodes and cables do meanwhile.

Models are tiny and in fp32 on the CPU; a start costs about 15 s of imports on two cores, so each job checks a lot.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.train.harness import SEQ_LEN, make_recipe, train_in_world
from turbolm.data.prepare.build import prepare
from turbolm.recipe.load import dump_recipe, load_recipe
from turbolm.report.metrics import read_metrics

from .cluster import SlurmCluster

NUM_STEPS, BINS_PER_BATCH = 60, 19  # an odd number: the ranks have unequal shares
TURBOLM = str(Path(sys.executable).parent / "turbolm")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a recipe; its name, and that of its runs, need every quoting there is."""
    folder = tmp_path_factory.mktemp("work") / 'it\'s a "$HOME" `x` 5%j #1'
    folder.mkdir()
    recipe = make_recipe(
        folder,
        train={"budget": NUM_STEPS * BINS_PER_BATCH * SEQ_LEN, "global_batch": BINS_PER_BATCH * SEQ_LEN},
        execution={
            "cache_dir": "cache",
            "runs_dir": "all runs",
            "zero_stage": 1,
            "micro_batch": SEQ_LEN,  # many small steps, so that a job can be caught in the middle
            "threads_per_process": 1,
            "prepare_workers": 1,
            "process_group_timeout": 60,
        },
        cluster={"device": "cpu", "processes_per_node": 1, "slurm": {"preflight": False}},
        checkpoint={"every": "10 steps"},
        logging={"every_steps": 1, "sample_tokens": 0},
    )
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return folder


def turbolm(work: Path, *arguments: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [TURBOLM, *arguments], cwd=work, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def on_one_node(slurm_machine: None, work: Path) -> Callable[[int], list[tuple[Any, ...]]]:
    """The history of an uninterrupted run of a world size on one machine, trained once."""
    histories: dict[int, list[tuple[Any, ...]]] = {}

    def history_of(world_size: int) -> list[tuple[Any, ...]]:
        if world_size not in histories:
            name = f"one-node-{world_size}"
            with contextlib.chdir(work):
                recipe = load_recipe("recipe.yaml", [f"name={name}", f"cluster.processes_per_node={world_size}"])
                prepare(recipe)
                assert train_in_world(recipe, world_size) == 0
            histories[world_size] = history(work, name)
        return histories[world_size]

    return history_of


def history(work: Path, name: str) -> list[tuple[Any, ...]]:
    """(step, loss, digest of the samples) of every step, exactly as logged."""
    lines = read_metrics(work / "all runs" / name / "metrics.jsonl")
    return [(line["step"], line["train/loss"], line["data/samples"]) for line in lines if "train/loss" in line]


def submit(cluster: SlurmCluster, work: Path, name: str, *overrides: str) -> int:
    answer = turbolm(work, "submit", "recipe.yaml", f"name={name}", *overrides, environment=cluster.env)
    return int(answer.split()[2].rstrip(":"))


def log_of(work: Path, name: str) -> str:
    return "".join(path.read_text(errors="replace") for path in (work / "all runs" / name).glob("slurm-*.out"))


def wait_job(cluster: SlurmCluster, work: Path, name: str, job_id: Any, **options: Any) -> None:
    try:
        cluster.wait(job_id, **options)
    except Exception as error:
        error.add_note(log_of(work, name)[-6000:])
        raise


def wait_until(condition: Callable[[], bool], timeout_sec: float, what: str) -> None:
    deadline = time.monotonic() + timeout_sec
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_sec} s for {what}"
        time.sleep(0.1)


def wait_for_step(work: Path, name: str, attempt: int, num_steps: int, timeout_sec: float = 150) -> None:
    """Wait until this attempt has trained some steps."""
    metrics = work / "all runs" / name / "metrics.jsonl"

    def trained() -> bool:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return sum(f'"attempt": {attempt},' in line and "train/loss" in line for line in lines) >= num_steps

    try:
        wait_until(trained, timeout_sec, f"attempt {attempt} of {name} to train {num_steps} steps")
    except AssertionError as error:
        error.add_note(log_of(work, name)[-6000:])
        raise


def outcomes(work: Path, name: str) -> list[tuple[str, int] | None]:
    """How each attempt ended; None when it left no outcome."""
    folders = sorted((work / "all runs" / name / "attempts").iterdir(), key=lambda path: int(path.name))
    found = [json.loads(path.read_text()) if path.exists() else None for path in (f / "outcome.json" for f in folders)]
    return [one and (one["status"], one["exit_code"]) for one in found]


def rank_processes(work: Path, name: str) -> list[int]:
    """Process numbers of a run's ranks, without their launchers."""
    needle = str(work / "all runs" / name)
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "turbolm.train" in command and "accelerate.commands.launch" not in command and needle in " ".join(command):
            found.append(int(process.parent.name))
    return found


def ranks_left(work: Path, name: str) -> list[str]:
    """Training processes of a run that still live."""
    needle = str(work / "all runs" / name)
    commands = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if needle in command and "turbolm" in command:
            commands.append(command)
    return commands


def test_a_job_on_two_nodes_learns_what_one_node_learns(
    cluster: SlurmCluster, work: Path, on_one_node: Callable[[int], list[tuple[Any, ...]]]
) -> None:
    expected = on_one_node(2)
    assert len(expected) == NUM_STEPS
    job_id = submit(cluster, work, "two-nodes", "cluster.num_nodes=2")
    wait_job(cluster, work, "two-nodes", job_id, timeout_sec=900)
    assert history(work, "two-nodes") == expected  # bitwise in fp32
    assert outcomes(work, "two-nodes") == [("finished", 0)]
    nodes = [json.loads((work / f"all runs/two-nodes/attempts/1/nodes/{i}.json").read_text()) for i in range(2)]
    assert [node["address"] for node in nodes] == [node.address for node in cluster.nodes[:2]]
    assert re.search(r"^two-nodes +finished", turbolm(work, "status", "--runs", "all runs"), re.MULTILINE)


@pytest.mark.slow
def test_two_jobs_on_the_same_nodes_learn_what_one_node_learns(
    cluster: SlurmCluster, work: Path, on_one_node: Callable[[int], list[tuple[Any, ...]]]
) -> None:
    expected = {world_size: on_one_node(world_size) for world_size in (2, 3)}
    jobs = {size: submit(cluster, work, f"nodes-{size}", f"cluster.num_nodes={size}") for size in (2, 3)}
    for size, job_id in jobs.items():
        wait_job(cluster, work, f"nodes-{size}", job_id, timeout_sec=900)
    # Bitwise in fp32, at world size 3 as well.
    assert history(work, "nodes-2") == expected[2]
    assert history(work, "nodes-3") == expected[3]
    assert outcomes(work, "nodes-3") == [("finished", 0)]
    nodes = [json.loads((work / f"all runs/nodes-3/attempts/1/nodes/{i}.json").read_text()) for i in range(3)]
    assert [node["address"] for node in nodes] == [node.address for node in cluster.nodes]
    status = turbolm(work, "status", "--runs", "all runs")
    assert all(re.search(rf"^nodes-{size} +finished", status, re.MULTILINE) for size in jobs)


@pytest.mark.slow
def test_a_job_at_its_time_limit_saves_requeues_and_finishes(
    cluster: SlurmCluster, work: Path, on_one_node: Callable[[int], list[tuple[Any, ...]]]
) -> None:
    """Slurm's own time limit first; then TERM to the ranks, as a preemption sends it."""
    name = "limited"
    limit = ["cluster.slurm.time=30m", "cluster.slurm.stop_grace=15s", "execution.process_group_timeout=5m"]
    job_id = submit(cluster, work, name, "cluster.num_nodes=2", *limit)
    wait_for_step(work, name, attempt=1, num_steps=5)
    ranks = rank_processes(work, name)
    assert len(ranks) == 2
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)  # else it finishes before the limit
    try:
        hours, minutes, seconds = (int(part) for part in cluster.job(job_id)["RunTime"].split(":"))
        near_limit = math.ceil((3600 * hours + 60 * minutes + seconds + 30) / 60)  # Slurm's limits are whole minutes
        cluster.run("scontrol", "update", f"jobid={job_id}", f"TimeLimit={near_limit}")
        wait_until(lambda: "Slurm asks the job to stop" in log_of(work, name), 120, "the warning before the limit")
        cluster.run("scontrol", "update", f"jobid={job_id}", "TimeLimit=30")  # the next start is not to meet it again
    finally:
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)
    wait_for_step(work, name, attempt=2, num_steps=5)
    cluster.run("scancel", "--signal=TERM", str(job_id))  # every process of the step, not the batch shell
    wait_job(cluster, work, name, job_id, timeout_sec=150)
    assert outcomes(work, name) == [("stopped", 75), ("stopped", 75), ("finished", 0)]
    assert cluster.job(job_id)["Restarts"] == "2"
    assert history(work, name) == on_one_node(2)


@pytest.fixture
def patient_slurm(cluster: SlurmCluster) -> Iterator[None]:
    """A controller that takes a silent node for lost only after the process group has, as on real clusters."""

    def set_timeout(before_sec: int, after_sec: int) -> None:
        conf = cluster.root / "slurm.conf"
        before, after = f"SlurmdTimeout={before_sec}\n", f"SlurmdTimeout={after_sec}\n"
        assert before in conf.read_text()
        conf.write_text(conf.read_text().replace(before, after))
        cluster.run("scontrol", "reconfigure")

    set_timeout(10, 120)
    yield
    set_timeout(120, 10)
    for node in cluster.nodes:
        cluster.link_up(node)


@pytest.mark.slow
def test_a_job_that_loses_a_node_or_a_cable_goes_on_from_its_checkpoint(
    cluster: SlurmCluster,
    patient_slurm: None,
    work: Path,
    on_one_node: Callable[[int], list[tuple[Any, ...]]],
) -> None:
    name = "lost"
    expected = on_one_node(2)
    job_id = submit(cluster, work, name, "cluster.num_nodes=2", "execution.process_group_timeout=15s")
    wait_for_step(work, name, attempt=1, num_steps=12)
    cluster.kill_slurmd(cluster.nodes[1])
    cluster.declare_down(cluster.nodes[1])  # what the controller finds by itself, later
    wait_for_step(work, name, attempt=2, num_steps=12)
    cluster.link_down(cluster.nodes[2])
    lost = f"{cluster.nodes[2].name} ({cluster.nodes[2].address}), does not answer"
    wait_until(lambda: "requeueing" in log_of(work, name), 120, "the job to requeue itself")
    assert lost in log_of(work, name)
    wait_until(lambda: ranks_left(work, name) == [], 30, "the ranks on both sides to end")
    cluster.start_slurmd(cluster.nodes[1])
    cluster.link_up(cluster.nodes[2])
    wait_job(cluster, work, name, job_id, timeout_sec=150)
    # The ranks outlive their slurmd and save on Slurm's SIGTERM; those that lost their peer cannot.
    assert outcomes(work, name) == [("stopped", 75), ("lost", 75), ("finished", 0)]
    assert cluster.job(job_id)["Restarts"] == "2"
    assert history(work, name) == expected


@pytest.mark.slow
def test_an_array_trains_each_seed_and_a_stop_during_the_start_is_not_lost(cluster: SlurmCluster, work: Path) -> None:
    job_id = submit(cluster, work, "array", "cluster.slurm.seeds=[1, 2]")
    first = work / "all runs" / "array-seed1"
    wait_until((first / "attempts" / "1" / "nodes" / "0.json").exists, 60, "the launcher of the first run")
    turbolm(work, "stop", str(first))
    ends = []
    for index in (0, 1):
        name, task = f"array-seed{index + 1}", f"{job_id}_{index}"
        wait_job(cluster, work, name, task, timeout_sec=150, until={"COMPLETED", "FAILED"})
        ends.append(cluster.job(task))  # type: ignore[arg-type]
    # Stopped by the user, so it does not come back.
    assert [(end["JobState"], end["ExitCode"]) for end in ends] == [("FAILED", "130:0"), ("COMPLETED", "0:0")]
    assert outcomes(work, "array-seed1") == [("stopped", 75)]
    assert not (first / "metrics.jsonl").exists()
    assert outcomes(work, "array-seed2") == [("finished", 0)]
    assert len(history(work, "array-seed2")) == NUM_STEPS


def test_what_cannot_get_better_is_not_tried_again(cluster: SlurmCluster, work: Path) -> None:
    """A node without the GPUs of the recipe is an error of one line at the start, not a hang and not a requeue."""
    gpus = ("cluster.device=auto", "cluster.gpus_per_node=8", "cluster.gpu=H100-80GB", "cluster.processes_per_node=1")
    job_id = submit(cluster, work, "no-gpus", "cluster.num_nodes=2", *gpus)
    cluster.wait(job_id, timeout_sec=600, until={"FAILED"})  # a prepare job runs first
    assert cluster.job(job_id)["ExitCode"] == "2:0"
    assert "cluster.gpus_per_node is 8, but 0 GPUs are visible on this node" in log_of(work, "no-gpus")
    assert cluster.job(job_id)["Restarts"] == "0"


def test_a_job_stopped_while_queued_never_trains(cluster: SlurmCluster, work: Path) -> None:
    blocker = cluster.sbatch("--begin=now+1hour", script="#!/bin/bash\ntrue\n")
    job_id = submit(cluster, work, "queued", f"cluster.slurm.dependency=afterany:{blocker}")
    run = work / "all runs" / "queued"
    assert cluster.job(job_id)["JobState"] == "PENDING"
    assert f"job {job_id} waits in the queue" in turbolm(work, "status", str(run))
    assert f"job {job_id} will not train when Slurm starts it" in turbolm(work, "stop", str(run))
    cluster.run("scancel", str(blocker))
    wait_job(cluster, work, "queued", job_id, timeout_sec=90, until={"FAILED"})
    assert cluster.job(job_id)["ExitCode"] == "130:0"
    assert cluster.job(job_id)["Restarts"] == "0"
    assert not (run / "attempts").exists() and not (run / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_job_submitted_from_inside_a_job_runs_as_from_the_login_node(cluster: SlurmCluster, work: Path) -> None:
    """The outer job is one of an array, with a step, limits, memory, tasks and bindings of its own."""
    short = (f"train.budget={5 * BINS_PER_BATCH * SEQ_LEN}", "cluster.slurm.time=30m", "checkpoint.every=5 steps")
    outside = submit(cluster, work, "from-login", *short)
    words = shlex.join([TURBOLM, "submit", "recipe.yaml", "name=from-job", *short])
    script = f"#!/bin/bash\ncd {shlex.quote(str(work))}\nsrun --ntasks=1 --cpus-per-task=2 {words}\n"
    options = ("--array=7", "--time=5", "--cpus-per-task=2", "--mem=100", "--ntasks=1", "--comment=outer")
    exported = "--export=ALL,SBATCH_TIMELIMIT=7,SBATCH_COMMENT=leaked,MASTER_ADDR=10.0.0.9,RANK=3,WORLD_SIZE=8"
    outer = cluster.sbatch(*options, exported, script=script)
    cluster.wait(f"{outer}_7", timeout_sec=600)  # type: ignore[arg-type]
    answer = re.search(r"submitted job (\d+)", cluster.output(f"{outer}_7"))  # type: ignore[arg-type]
    assert answer is not None
    inside = int(answer[1])
    for name, job_id in (("from-login", outside), ("from-job", inside)):
        wait_job(cluster, work, name, job_id, timeout_sec=240)
        assert outcomes(work, name) == [("finished", 0)]
    same = ("TimeLimit", "NumNodes", "NumCPUs", "NumTasks", "CPUs/Task", "MinMemoryNode", "Comment", "Partition")
    jobs = [cluster.job(job_id) for job_id in (outside, inside)]
    assert [[job.get(key) for key in same] for job in jobs[:1]] == [[job.get(key) for key in same] for job in jobs[1:]]
    assert not any(key.startswith("Array") for key in jobs[1])
    assert history(work, "from-job") == history(work, "from-login")
