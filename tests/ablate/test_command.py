"""The command itself, on a tiny model."""

from __future__ import annotations

import json
import math
import os
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
    recipe = make_recipe(tmp_path, evaluation={"every": "20%"}, execution={"zero_stage": 1, "runs_dir": "runs"})
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
