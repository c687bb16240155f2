"""The command itself, on a tiny model."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.harness import make_recipe
from turbolm.recipe.load import dump_recipe

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def ablate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "turbolm.cli", "ablate", "recipe.yaml", *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=600, check=False, env=ENVIRONMENT
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    recipe = make_recipe(
        tmp_path,
        evaluation={"every": "20%"},
        cluster={"device": "cpu", "processes_per_node": 1},  # a rank costs its imports
        execution={"zero_stage": 1, "runs_dir": "runs"},
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return tmp_path


def test_it_refuses_before_anything_is_trained(folder: Path) -> None:
    done = ablate(folder, "--tricks", "wsd,zeropp")
    assert done.returncode == 2
    assert "zeropp: " in done.stderr and "Traceback" not in done.stderr
    done = ablate(folder, "--tricks", "wsd,zero2", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[1].split()[:2] == ["+wsd", "schedule.name=wsd"]
    assert not (folder / "runs").exists()


@pytest.mark.slow
def test_two_tricks_are_measured(folder: Path) -> None:
    """ZeRO 2 gives what ZeRO 1 does; a rate of nearly zero learns nothing; the second time nothing is trained."""
    tricks = ("--tricks", "zero2,still:optimizer.lr=1e-9", "--json")
    done = ablate(folder, *tricks)
    assert done.returncode == 0, done.stderr
    assert "[4/4] with-still-zero2-seed3" in done.stderr
    results = json.loads(done.stdout)
    assert results == json.loads((folder / "runs/ablations/cell/ablation.json").read_text())
    arms = {arm["arm"]: arm for arm in results["arms"]}
    assert list(arms) == ["baseline", "+zero2", "+still", "all"]
    losses = {name: arm["mean"]["final_loss"] for name, arm in arms.items()}
    assert losses["+zero2"] == pytest.approx(losses["baseline"], abs=1e-4)
    assert losses["+still"] == pytest.approx(math.log(300), abs=0.2) and losses["baseline"] < losses["+still"] - 0.1
    assert arms["+still"]["verdict"] == arms["all"]["verdict"] == "loss"
    for arm in arms.values():
        (run,) = arm["runs"]
        assert len(run["evaluations"]) == 5
        assert 50e6 < run["peak_bytes"] < 20e9  # of a process that has imported torch
        assert 0 < run["training_sec"] < run["whole_sec"] and run["cpu_sec"] > 1
    assert (folder / "runs/ablations/cell/report.html").is_file()
    again = ablate(folder, *tricks)
    assert again.returncode == 0 and "[1/4]" not in again.stderr
    assert json.loads(again.stdout)["arms"] == results["arms"]
    by_processor = json.loads(ablate(folder, *tricks, "--clock", "cpu").stdout)["arms"][0]["runs"][0]
    assert 0 < by_processor["training_sec"] < arms["baseline"]["runs"][0]["cpu_sec"]


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two runs side by side need two cores")
def test_halving_side_by_side_is_interrupted_and_goes_on(folder: Path) -> None:
    """Two rates until step 6, the better one to step 10; Ctrl-C amid the first round costs no step."""
    options = ("--tricks", "zero2", "--sweep-lr", "1e-6,3e-3,2", "--halving", "--jobs", "2")
    command = [sys.executable, "-m", "turbolm.cli", "ablate", "recipe.yaml", *options]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        seen = []
        for line in process.stdout:
            seen.append(line)
            if line.startswith("baseline-lr0.003-seed3  ") and "processes on cpu" in line:
                process.send_signal(signal.SIGINT)
        text = "".join(seen)
        assert process.wait(300) == 75, text
    assert "stopped; the same command resumes" in text and "Traceback" not in text
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=600, check=False, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kept: 0.003" in done.stdout and "the same command" not in done.stderr
    results = json.loads((folder / "runs/ablations/cell/ablation.json").read_text())
    baseline, zero2 = results["arms"]
    assert [lr for lr, _ in baseline["rungs"][0]["losses"]] == [1e-6, 0.003] and results["jobs"] == 2
    assert baseline["lr"] == zero2["lr"] == 0.003
    assert zero2["mean"]["final_loss"] == pytest.approx(baseline["mean"]["final_loss"], abs=1e-4)
    for name, last in (("baseline-lr1e-06", 6), ("baseline-lr0.003", 10), ("with-zero2-lr0.003", 10)):
        lines = (folder / f"runs/ablations/cell/{name}-seed3/metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines if "train/loss" in line]
        assert steps == list(range(1, last + 1)), name  # each once, over all starts
