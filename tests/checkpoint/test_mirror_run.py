"""A run that is killed, and whose disk is lost, resumes from its mirror with the losses it would have had."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.mirror_places import content_below
from tests.train.harness import BINS_PER_BATCH, SEQ_LEN, make_recipe
from turbolm.recipe.load import dump_recipe

ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY = 60, 5


SLOW_UPLOADS = """
import os, sys, time
if "turbolm.checkpoint.mirror_upload" in sys.orig_argv:
    from turbolm.reliability.processes import command_of, descendants, parent_of
    from turbolm.storage import Remote
    upload = Remote.upload
    def slow(self, path, size):
        if path.name == "manifest.json":
            time.sleep(3)
            ranks = [pid for pid in descendants({parent_of(os.getppid())}) if "turbolm.train" in command_of(pid)]
            with open(os.environ["RANKS_THEN"], "w") as file:
                file.write(str(len(ranks)))
        upload(self, path, size)
    Remote.upload = slow
"""


def start(folder: Path, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "turbolm.cli", "train", str(folder / "recipe.yaml"), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def learned(metrics: Path) -> dict[int, tuple[Any, ...]]:
    """What each step did, by its last line."""
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    steps = [json.loads(line) for line in lines if line.endswith("}")]
    return {
        line["step"]: (line["train/loss"], line["train/grad_norm"], line["data/samples"])
        for line in steps
        if "train/loss" in line
    }


@pytest.mark.slow
def test_a_run_whose_disk_is_lost_resumes_from_its_mirror(tmp_path: Path) -> None:
    recipe = make_recipe(
        tmp_path,
        train={"budget": STEPS * BINS_PER_BATCH * SEQ_LEN},
        logging={"every_steps": 1, "sample_tokens": 0},
        checkpoint={"every": f"{SAVE_EVERY} steps", "mirror": f"file://{tmp_path}/far"},
        evaluation={"every": "100%"},
        cluster={"processes_per_node": 1},
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    run, far = tmp_path / "runs" / "cell", tmp_path / "far" / "cell"
    process = start(tmp_path)
    while not list(far.glob("*/step-*/mirror.json")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # its ranks end with it
    process.communicate()
    rank_0 = json.loads((run / "lock.json").read_text())["pid"]
    while Path(f"/proc/{rank_0}/cmdline").exists() and Path(f"/proc/{rank_0}/cmdline").read_bytes():
        time.sleep(0.01)
    before = learned(run / "metrics.jsonl")
    mirrored = max(int(path.parent.name[5:]) for path in far.glob("*/step-*/mirror.json"))
    assert len(before) == max(before) >= mirrored >= SAVE_EVERY
    shutil.rmtree(run)
    process = start(tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert f"checkpoint.mirror: fetching file://{far}" in output and "resumed from" in output
    after = learned(run / "metrics.jsonl")
    assert sorted(after) == list(range(1, STEPS + 1)), "the steps before are there too"
    assert {step: after[step] for step in before} == before
    assert (run / "attempts" / "2" / "outcome.json").exists()
    (last,) = far.glob(f"*/step-{STEPS:08d}")
    assert (last / "mirror.json").exists(), "the last copy is complete when the command ends"
    here = content_below(run / "checkpoints" / last.name)
    assert here.items() <= content_below(last).items()


@pytest.mark.slow
def test_a_run_of_two_ranks_that_is_stopped_waits_for_its_last_copy(tmp_path: Path) -> None:
    recipe = make_recipe(
        tmp_path,
        train={"budget": 2000 * BINS_PER_BATCH * SEQ_LEN},
        logging={"every_steps": 1, "sample_tokens": 0},
        checkpoint={"every": "100%", "mirror": f"file://{tmp_path}/far"},
        evaluation={"every": "100%"},
        cluster={"processes_per_node": 2},
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(SLOW_UPLOADS)
    ranks_then = tmp_path / "ranks"
    python_path = os.pathsep.join([str(tmp_path / "slow"), os.environ.get("PYTHONPATH", "")])
    process = start(tmp_path, PYTHONPATH=python_path, RANKS_THEN=str(ranks_then))
    while not learned(tmp_path / "runs" / "cell" / "metrics.jsonl"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "was not copied" not in output, output
    (last,) = (tmp_path / "runs" / "cell" / "checkpoints").glob("step-*")
    (copy,) = (tmp_path / "far" / "cell").glob("*/step-*/mirror.json")
    assert copy.parent.name == last.name
    assert ranks_then.read_text() == "2", "30 s after one has ended, torchelastic kills the other"
