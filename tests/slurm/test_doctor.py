"""`turbolm doctor` on a real Slurm of three nodes: a slow link and a full disk, in an allocation and before a job."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.harness import make_recipe
from turbolm.recipe.load import dump_recipe

from .cluster import SlurmCluster

COMMAND = f"{sys.executable} -m turbolm.cli"


@pytest.mark.slow
def test_the_slow_link_and_the_full_disk_are_named(cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    recipe = make_recipe(
        tmp_path,
        execution={"cache_dir": str(tmp_path / "cache"), "runs_dir": "runs"},
        cluster={"device": "cpu", "processes_per_node": 1},
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    _, second, third = cluster.nodes
    script = f"#!/bin/bash\n{COMMAND} doctor recipe.yaml --json >report.json 2>progress\necho code $?\n"
    with cluster.slow_link(second, 10), cluster.full_disk(third, tmp_path / "cache"):
        job_id = cluster.sbatch("--nodes=3", "--ntasks-per-node=1", script=script, cwd=tmp_path)
        cluster.wait(job_id, timeout_sec=300)

    progress = (tmp_path / "progress").read_text()
    assert cluster.output(job_id).strip() == "code 2", progress
    report = json.loads((tmp_path / "report.json").read_text())
    failed = {(one["check"], one["host"]) for one in report["findings"] if one["severity"] == "fail"}
    assert failed == {("link", second.name), ("disk", third.name)}, report["findings"]
    rates = {(link["from"], link["to"]): link["bytes_per_sec"] * 8 / 1e6 for link in report["links"]}
    assert len(rates) == 6  # every pair in each direction
    for ends, mbit in rates.items():  # as tc limits them; bursts go beyond, protocols and a busy machine stay below
        assert 5 < mbit < 15 if second.name in ends else 100 < mbit < 1300, rates
    assert "3 of 3 nodes answer" in progress
    assert "round 3 of 3" in progress


@pytest.mark.slow
def test_a_failing_preflight_ends_the_job_with_its_reason_in_status(cluster: SlurmCluster, tmp_path: Path) -> None:
    recipe = make_recipe(
        tmp_path,
        execution={"cache_dir": "cache", "runs_dir": "runs", "threads_per_process": 1, "prepare_workers": 1},
        cluster={"device": "cpu", "processes_per_node": 1, "num_nodes": 2, "slurm": {"requeue": False}},
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (tmp_path / "cache").mkdir()

    def turbolm(*words: str) -> str:
        command = [sys.executable, "-m", "turbolm.cli", *words]
        done = subprocess.run(command, cwd=tmp_path, env=cluster.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    turbolm("prepare", "recipe.yaml")
    _, second, _ = cluster.nodes
    asked = f"cluster.slurm.nodelist={cluster.nodes[0].name},{second.name}"
    with cluster.full_disk(second, tmp_path / "cache"):
        job_id = int(turbolm("submit", "recipe.yaml", asked).split()[2].rstrip(":"))
        cluster.wait(job_id, timeout_sec=300, until=("FAILED",))
    (run,) = (tmp_path / "runs").iterdir()
    status = turbolm("status", str(run))
    assert "refused" in status
    assert f"FAIL  {second.name}: cache folder" in status, status
    assert not (run / "attempts/1/log.rank0.txt").exists(), "no rank has trained"
