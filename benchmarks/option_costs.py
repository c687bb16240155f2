"""What each option of `benchmarks/options.py` costs a step: time beside its baseline, and memory.

    python benchmarks/option_costs.py [--corpus corpus.parquet] [--folder FOLDER] [--studies muon adamw] [--rounds 8]

Every arm is a process of its own with turbolm's engine and step, one thread, on the same ten batches of 2,048 tokens
(eigenbases turn every ten steps). They take turns, so that a machine whose speed drifts is the same for all, and a
ratio is between two turns of one round: the median over the rounds, with the quartiles. Memory is the most that the
process ever held, torch and start included. The folder may be that of the other two: it keeps prepared data. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from options import BASE, STUDIES
from speedrun import TRICKS, write_recipe

from turbolm.data.batch.loader import BatchLoader
from turbolm.data.order.batch_order import constant_order
from turbolm.data.prepare.build import prepare
from turbolm.data.store.token_store import open_store
from turbolm.engine.start import build_accelerator
from turbolm.launch.local import process_environment
from turbolm.plan.machine import detect_machine
from turbolm.plan.plan import build_plan
from turbolm.plan.rates import step_rates
from turbolm.recipe.load import load_recipe
from turbolm.train.build import build_engine
from turbolm.train.run_directory import RunDirectory
from turbolm.train.step import train_step

STEPS = 10


def arms_of(study: str, folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """The recipe file and the overrides of every arm; the first is the baseline."""
    found = {}
    for arm, added in {BASE: [], **STUDIES[study].arms}.items():
        settings = [*STUDIES[study].common, *added]
        tricks = [TRICKS / f"{name}.yaml" for name in settings if "=" not in name]
        file = write_recipe(folder, f"{study}-{arm}", tricks)
        found[f"{study}-{arm}"] = (file, [setting for setting in settings if "=" in setting])
    return found


def serve(file: Path, overrides: list[str], folder: Path, pipe: Connection) -> None:
    """An arm's process: for everything that comes through the pipe ten steps, and their seconds and peak bytes back."""
    recipe = load_recipe(file, overrides)
    plan = build_plan(recipe, detect_machine(), 1)
    store = open_store(prepare(recipe))
    order = constant_order(store.lengths("train"), plan.batch.seq_len, plan.batch.bins_per_batch)
    loader = BatchLoader(order, store, "train", 1, 0, plan.batch.micro_batch_tokens)
    batches = [loader.global_batch(index) for index in range(STEPS)]
    with contextlib.redirect_stdout(sys.stderr):
        accelerator = build_accelerator(plan.ds_config, device="cpu", precision=plan.precision, timeout_sec=600)
        engine, attention = build_engine(accelerator, plan, store, RunDirectory(folder / file.stem))
        while True:
            pipe.recv()
            torch.set_num_threads(1)
            start = time.process_time()
            for step, batch in enumerate(batches, plan.num_steps // 2):
                engine.set_rates(step_rates(plan, step, step))
                float(train_step(engine, batch.micro_batches, batch.num_targets, attention).loss_sum)
            seconds = (time.process_time() - start) / STEPS
            pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def measure(arms: dict[str, tuple[Path, list[str]]], folder: Path, rounds: int) -> dict[str, list[tuple[float, int]]]:
    """Processor seconds of a step and peak bytes, round by round, of each arm."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    file, overrides = next(iter(arms.values()))
    os.environ.update(process_environment(build_plan(load_recipe(file, overrides), detect_machine(), 1)))
    prepare(load_recipe(file, overrides))  # once, before all read it
    for arm, (file, overrides) in arms.items():
        pipes[arm], end = context.Pipe()
        context.Process(target=serve, args=(file, overrides, folder, end), daemon=True).start()
        end.close()
    found: dict[str, list[tuple[float, int]]] = {arm: [] for arm in arms}
    for index in range(-1, rounds):  # the first does not count: there all wait until all are built
        for arm in sorted(pipes, reverse=index % 2 == 1):
            pipes[arm].send("go")
            found[arm].append(pipes[arm].recv())
        print(f"round {index + 1} of {rounds}", file=sys.stderr, flush=True)
    return {arm: turns[1:] for arm, turns in found.items()}


def costs(turns: dict[str, list[tuple[float, int]]]) -> dict[str, dict[str, Any]]:
    """Of one study, whose baseline is the first: seconds, slowdown with its quartiles, and memory."""
    base = next(iter(turns.values()))
    found = {}
    for arm, rounds in turns.items():
        ratios = [seconds / other for (seconds, _), (other, _) in zip(rounds, base, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        found[arm] = {
            "step_cpu_sec": statistics.median(seconds for seconds, _ in rounds),
            "slowdown": median,
            "quartiles": [low, high],
            "peak_bytes": rounds[-1][1],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="a parquet file with a column `text`")
    parser.add_argument("--folder", type=Path, help="for recipes and prepared data; default: a temporary one")
    parser.add_argument("--studies", nargs="+", choices=("muon", "adamw"), default=["muon", "adamw"])
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds: quartiles need two")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        common = [f"execution.cache_dir={folder / 'cache'}", "execution.threads_per_process=1"]
        common.append("cluster.processes_per_node=1")
        if arguments.corpus:
            common.append(f'data.sources=[{{"type": "parquet", "path": "{arguments.corpus.resolve()}"}}]')
        studies = {study: arms_of(study, folder) for study in arguments.studies}
        arms = {arm: (file, [*own, *common]) for study in studies.values() for arm, (file, own) in study.items()}
        turns = measure(arms, folder, arguments.rounds)
    figures = {}
    print("| arm | a step, processor s | beside the baseline (quartiles) | peak memory |\n|---|---|---|---|")
    for study in studies.values():
        found = costs({arm: turns[arm] for arm in study})
        figures.update(found)
        for arm, cost in found.items():
            low, high = cost["quartiles"]
            memory = f"{cost['peak_bytes'] / 1e6:.0f} MB"
            print(
                f"| {arm} | {cost['step_cpu_sec']:.3f} | {cost['slowdown']:.2f}x ({low:.2f} to {high:.2f}) | {memory} |"
            )
    print(json.dumps({"bench": "option_costs", "figures": figures, "rivals": {}, "targets": {}, "met": {}}))


if __name__ == "__main__":
    main()
