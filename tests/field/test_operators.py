"""Trainings as operators start and end them, through the command: other users, odd folders, signals, kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train.harness import BINS_PER_BATCH, SEQ_LEN, make_recipe
from turbolm.errors import UserError
from turbolm.launch.network import free_port
from turbolm.launch.status import read_status, stop_run
from turbolm.recipe.load import dump_recipe
from turbolm.reliability.outcome import read_outcome
from turbolm.train.run_directory import RunDirectory

from .test_paths import AS_NOBODY

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LEAKS = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "10.0.0.9", "WORLD_SIZE": "2", "RANK": "1"}
LEAKS |= {"ACCELERATE_DYNAMO_BACKEND": "inductor", "ACCELERATE_USE_FSDP": "true", "SLURM_PROCID": "3"}


def write_small_recipe(folder: Path, num_steps: int, **execution: Any) -> RunDirectory:
    """A recipe.yaml of one small process in `folder`, with every path relative to it."""
    recipe = make_recipe(
        folder,
        train={"budget": num_steps * BINS_PER_BATCH * SEQ_LEN},
        cluster={"processes_per_node": 1},
        logging={"every_steps": 1, "sample_tokens": 0},
        checkpoint={"every": "100 steps"},
        execution={"cache_dir": "a cache é", "runs_dir": "all runs ☃", "zero_stage": 1, **execution},
    )
    text = dump_recipe(recipe).replace(str(folder / "corpus.jsonl"), "corpus é b.jsonl")
    (folder / "corpus.jsonl").rename(folder / "corpus é b.jsonl")
    (folder / "my recipe é.yaml").write_text(text, encoding="utf-8")
    return RunDirectory(folder / "all runs ☃" / "cell")


def start(folder: Path, *command: str, **environment: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if name != "HOME"}
    kept |= {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        command or (sys.executable, "-m", "turbolm.cli", "train", "my recipe é.yaml"),
        cwd=folder, env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def until(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_sec: float = 150) -> None:
    deadline = time.monotonic() + timeout_sec
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_without_a_home_in_odd_folders_with_leaked_variables(tmp_path: Path) -> None:
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    folder = tmp_path / "a folder é ☃ 'q'"
    folder.mkdir()
    run = write_small_recipe(folder, num_steps=3)
    for path in (folder, *folder.iterdir()):
        os.chown(path, 54321, 54321)
    train = [sys.executable, "-m", "turbolm.cli", "train", "my recipe é.yaml"]
    process = start(folder, "sh", "-c", 'umask 077; exec "$@"', "sh", *AS_NOBODY, *train, **LEAKS)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    (line,) = [line for line in output.splitlines() if "not passed on" in line]
    assert all(name in line for name in LEAKS)
    assert read_status(run.path).state == "finished"
    written = [path for path in (folder / "all runs ☃", folder / "a cache é") for path in [path, *path.rglob("*")]]
    assert {path.stat().st_uid for path in written} == {54321}
    assert [path for path in written if path.stat().st_mode & 0o077] == []


def test_signals_and_kills_of_a_run_are_told_as_they_were(tmp_path: Path) -> None:
    run = write_small_recipe(tmp_path, num_steps=100_000)
    process = start(tmp_path)
    until(run.metrics.exists, process)
    os.killpg(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGTERM)  # as where a parent passes on what the group got already
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75, output
    assert read_status(run.path).state == "stopped"
    saved = read_status(run.path).saved_step
    assert saved == read_status(run.path).step > 0, "one request, not two: all is saved"

    process = start(tmp_path)
    until(lambda: read_status(run.path).step > saved, process)
    assert read_status(run.path).state == "running"
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while read_status(run.path).state == "running":  # until the ranks have followed
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert read_status(run.path).state == "killed"
    with pytest.raises(UserError, match="nothing to stop: .*killed"):
        stop_run(run.path)


def test_a_world_started_by_hand_is_stopped_before_its_first_step(tmp_path: Path) -> None:
    run = write_small_recipe(tmp_path, num_steps=100_000)
    run.path.mkdir(parents=True)
    run.stop_file.write_text("user\n")  # a request of an earlier day: not for this start
    recipe = "my recipe é.yaml"
    prepare = start(tmp_path, sys.executable, "-m", "turbolm.cli", "prepare", recipe)
    assert prepare.wait(120) == 0
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(ROOT / "launch/accelerate/cpu.yaml"), "--num_processes", "1"]
    launcher += ["--main_process_port", str(free_port()), "-m", "turbolm.train", "--recipe", recipe]
    process = start(tmp_path, *launcher, ACCELERATE_DYNAMO_BACKEND="inductor")
    until(lambda: run.attempt(1).is_dir() and read_status(run.path).state == "running", process)
    assert "asked to stop" in stop_run(run.path)
    process.communicate(timeout=120)
    outcome = read_outcome(run.attempt(1))
    assert outcome is not None and (outcome.status, outcome.exit_code) == ("stopped", 75)
    assert read_status(run.path).step <= 2
