"""Whatever is killed and whenever, the run that goes on is bit for bit the run that was never interrupted."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.test_resume import read_tensors
from tests.data.samples import sample_ids
from tests.train.harness import BINS_PER_BATCH, SEQ_LEN, make_recipe, train_in_world
from turbolm.data.batch.loader import BatchLoader
from turbolm.data.order.batch_order import recipe_order
from turbolm.data.prepare.build import prepare
from turbolm.data.store.token_store import open_store
from turbolm.plan.machine import detect_machine
from turbolm.plan.plan import build_plan
from turbolm.recipe.load import dump_recipe, load_recipe

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.chaos, pytest.mark.slow]
SEED = int(os.environ.get("CHAOS_SEED", "0"))
LONGER = int(os.environ.get("CHAOS_KILLS", "0"))  # `make chaos`
STEPS = 200 if LONGER else 140  # a kill takes 10 to 20 of them
SAVE_EVERY = 9


@dataclass
class Run:
    """One run directory and the command that trains in it."""

    folder: Path
    name: str
    overrides: tuple[str, ...] = ()
    killed: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.folder / "runs" / self.name

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "turbolm.cli", "train", str(self.folder / "recipe.yaml"), f"name={self.name}"]
        return subprocess.Popen(
            [*command, *self.overrides], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip

    def finish(self) -> None:
        process = self.start()
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output

    def finish_on_ranks(self) -> None:
        """To the end without the command and its imports, where a test is not about them."""
        recipe = load_recipe(self.folder / "recipe.yaml", [f"name={self.name}", *self.overrides])
        prepare(recipe)
        assert train_in_world(recipe) == 0

    def lines(self) -> list[dict[str, Any]]:
        """The steps in the order they were trained, those trained again included."""
        path = self.path / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        found = []
        for line in text.splitlines():
            try:
                found.append(json.loads(line[line.rfind('{"step"') :]))
            except ValueError:
                continue  # torn by a kill; the step is trained again
        return [line for line in found if "train/loss" in line]

    def learned(self) -> dict[int, tuple[Any, ...]]:
        """By step what training did; asserts that a step trained again did the same."""
        steps: dict[int, tuple[Any, ...]] = {}
        for line in self.lines():
            values = (line["train/loss"], line["train/grad_norm"], line["train/lr"], line["data/samples"])
            assert steps.setdefault(line["step"], values) == values, f"step {line['step']} differs when done again"
        return steps

    def ranks(self) -> dict[int, int]:
        """The process of each rank."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes().split(b"\0")
                variables = (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"turbolm.train" in command and f"name={self.name}".encode() in command:
                found |= {int(v.removeprefix(b"RANK=")): int(process.name) for v in variables if v.startswith(b"RANK=")}
        return found

    def saving(self) -> list[Path]:
        return list((self.path / "checkpoints").glob(".tmp-*"))


def kill_one_of(run: Run, process: subprocess.Popen[str], victim: str, ranks: dict[int, int]) -> None:
    targets = {
        "rank 0": [ranks[0]],
        "rank 1": [ranks[1]],
        "all ranks": list(ranks.values()),
        "launcher": [process.pid],
    }
    for target in targets[victim]:
        os.kill(target, signal.SIGKILL)


def interrupt(run: Run, rng: random.Random, victim: str, inside_a_save: bool) -> bool:
    """Start the run and kill `victim` at a random moment, or while a checkpoint is written; whether it hit."""
    before = len(run.lines())
    process = run.start()
    deadline = time.monotonic() + 300
    wait_for = rng.randrange(1, 2 * SAVE_EVERY)
    while len(run.lines()) < before + wait_for:
        if process.poll() is not None:
            output = process.communicate()[0]
            assert process.returncode == 0, output
            return False  # it finished
        assert time.monotonic() < deadline
        time.sleep(0.02)
    ranks = run.ranks()
    while inside_a_save and not run.saving():
        if process.poll() is not None:
            return False
        time.sleep(0.0005)
    time.sleep(rng.random() * (0.004 if inside_a_save else 0.2))
    kill_one_of(run, process, victim, ranks)
    process.communicate(timeout=300)
    if inside_a_save and not run.saving():
        run.killed.append(f"{victim}, after a save")
    else:
        run.killed.append(f"{victim}, inside a save" if run.saving() else victim)
    gone = time.monotonic() + 60
    while run.ranks():
        assert time.monotonic() < gone, "a rank outlived its launcher"
        time.sleep(0.05)
    return True


def make_folder(folder: Path, zero_stage: int) -> Path:
    recipe = make_recipe(
        folder,
        train={"budget": STEPS * BINS_PER_BATCH * SEQ_LEN},
        logging={"every_steps": 1, "sample_tokens": 0},
        checkpoint={"every": f"{SAVE_EVERY} steps"},
        evaluation={"weight_average": {"last": "70%", "half_life": "10%"}},
        cluster={"processes_per_node": 2},
        execution={"zero_stage": zero_stage},
    )
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return folder


def check_ledger(run: Run) -> None:
    """What the run says it trained on is what the order of the data says, document by document, across epochs."""
    recipe = load_recipe(run.folder / "recipe.yaml")
    store = open_store(prepare(recipe))
    order = recipe_order(recipe, store, build_plan(recipe, detect_machine(), 1).curriculum, save=False)
    loader = BatchLoader(order, store, "train", 1, 0, "auto")
    learned, counts = run.learned(), {}  # type: ignore[var-annotated]
    for index in range(STEPS):
        batch = loader.global_batch(index)
        assert learned[index + 1][3] == batch.samples_digest
        for sample in sample_ids(batch):
            counts[sample] = counts.get(sample, 0) + 1
    positions = sum(length * count for (_, _, length), count in counts.items())
    epoch = int(store.lengths("train").sum()) - len(store.lengths("train"))
    assert positions > 1.1 * epoch, "the run must cross an epoch boundary"


@pytest.mark.parametrize(
    ("zero_stage", "kills", "inside"), [(2, LONGER or 4, max(2, LONGER // 3)), (3, max(1, LONGER // 3), 1)]
)
def test_killed_runs_equal_the_uninterrupted_one(zero_stage: int, kills: int, inside: int, tmp_path: Path) -> None:
    rng = random.Random(f"{SEED}/{zero_stage}")
    folder = make_folder(tmp_path, zero_stage)
    whole, run = Run(folder, "whole"), Run(folder, "killed")
    whole.finish_on_ranks()
    victims = [rng.choice(["rank 0", "rank 1", "all ranks", "launcher"]) for _ in range(kills)]
    victims[:4] = rng.sample(["rank 0", "rank 1", "all ranks", "launcher"], min(4, kills))
    victims += rng.choices(victims, k=4)  # for saves that had ended before the signal came
    for number, victim in enumerate(victims):
        hits = sum("inside" in what for what in run.killed)
        if number >= kills and hits >= inside:
            break
        assert interrupt(run, rng, victim, inside_a_save=hits < inside), f"finished after {number} kills: {run.killed}"
    print(f"seed {SEED}, ZeRO-{zero_stage}: killed {run.killed}")
    assert sum("inside" in what for what in run.killed) >= inside, run.killed
    run.finish()
    expected, learned = whole.learned(), run.learned()
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert learned == expected
    last = f"checkpoints/step-{STEPS:08d}"
    ours, theirs = read_tensors(run.path / last), read_tensors(whole.path / last)
    assert ours.keys() == theirs.keys()
    assert {name.split("/")[0] for name in ours} == {"weight", "exp_avg", "exp_avg_sq", "weight_average"}
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert not run.saving() and not (run.path / "lock.json").exists()
    check_ledger(run)
    check_ledger(whole)
