"""The error of predicted step times on this CPU: `turbolm calibrate`, then shapes that it has not seen.

    python benchmarks/planner_time.py [--rounds 3] [--steps 5] [--seconds 45] [--processor-time] [--precision bf16]

Each shape (model, sequence length, micro-batch) is trained by turbolm's own engine and step in a process of its own,
with one thread. A round calibrates and then measures every shape; the pair of a round is its prediction and its
measurement, so that a machine that drifts drifts for both. The error of a shape is that of its median pair. The
machine's own spread is that of repeated steps, and of the medians of rounds. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from turbolm.data.prepare.build import prepare
from turbolm.launch.calibrate import calibrate
from turbolm.launch.local import rank_environment
from turbolm.plan.count import read_model_config
from turbolm.plan.estimate import estimate, rates_for
from turbolm.plan.machine import detect_machine
from turbolm.plan.parameters import head_dim_of
from turbolm.plan.plan import Plan, build_plan
from turbolm.plan.profile import ModelProfile
from turbolm.plan.profiles import profile_request
from turbolm.plan.time import shares
from turbolm.recipe.load import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes/quickstart/config.yaml"
TARGETS = {"median_error": 0.10, "worst_error": 0.20}
# Hidden and intermediate size, layers, heads, sequence length, sequences of a micro-batch, micro-batches: none of these
# models is among those that `calibrate` measures.
SHAPES = (
    (192, 576, 4, 3, 256, 8, 1),
    (256, 1024, 3, 4, 512, 2, 2),
    (320, 960, 2, 5, 1024, 1, 2),
    (384, 1024, 4, 6, 256, 4, 1),
    (448, 1344, 3, 7, 512, 2, 1),
    (640, 1728, 2, 10, 256, 4, 1),
)


def read_plan(shape: tuple[int, ...], precision: str, cache_dir: str) -> Plan:
    hidden, inner, layers, heads, seq_len, sequences, micro_batches = shape
    overrides = [
        "cluster.device=cpu",
        "cluster.processes_per_node=1",
        "execution.threads_per_process=1",
        f"train.precision={precision}",
        f"model.config.hidden_size={hidden}",
        f"model.config.intermediate_size={inner}",
        f"model.config.num_hidden_layers={layers}",
        f"model.config.num_attention_heads={heads}",
        f"model.config.max_position_embeddings={seq_len}",
        f"data.seq_len={seq_len}",
        f"train.global_batch={seq_len * sequences * micro_batches}",
        f"execution.micro_batch={seq_len * sequences}",
        f"execution.cache_dir={cache_dir}",
    ]
    return build_plan(load_recipe(RECIPE, overrides), detect_machine(), 1)


def serve(shape: tuple[int, ...], arguments: argparse.Namespace, folder: Path, pipe: Connection) -> None:
    """A shape's process: its model's profile, then for everything that comes through the pipe the seconds of steps."""
    import torch

    from turbolm.data.batch.loader import BatchLoader
    from turbolm.data.order.batch_order import constant_order
    from turbolm.data.prepare.build import find_store
    from turbolm.data.store.token_store import open_store
    from turbolm.engine.start import build_accelerator
    from turbolm.models.profile import answer
    from turbolm.train.build import build_engine
    from turbolm.train.run_directory import RunDirectory
    from turbolm.train.step import train_step

    plan = read_plan(shape, arguments.precision, arguments.cache)
    folder_of_store = find_store(plan.recipe)
    assert folder_of_store is not None
    store = open_store(folder_of_store)
    timer = time.process_time if arguments.processor_time else time.perf_counter
    with contextlib.redirect_stdout(sys.stderr):
        accelerator = build_accelerator(plan.ds_config, device="cpu", precision=plan.precision, timeout_sec=600)
        engine, attention = build_engine(accelerator, plan, store, RunDirectory(folder))
    torch.set_num_threads(1)
    order = constant_order(store.lengths("train"), plan.batch.seq_len, plan.batch.bins_per_batch)
    batch = BatchLoader(order, store, "train", 1, 0, plan.batch.micro_batch_tokens).global_batch(0)

    def step() -> float:
        begun = timer()
        engine.set_learning_rate(1e-4)
        float(train_step(engine, batch.micro_batches, batch.num_targets, attention).loss_sum)
        return timer() - begun

    step()
    config, _ = read_model_config(plan.recipe, RECIPE)
    assert config is not None
    pipe.send((config, answer(profile_request(config, plan.recipe.model.dropout))))
    while pipe.recv():
        pipe.send([step() for _ in range(arguments.steps)])


def predict(plan: Plan, profile: ModelProfile, config: dict[str, Any]) -> tuple[float, str]:
    """Return the predicted seconds of a step, and where they go."""
    found = estimate(plan, profile, detect_machine(), head_dim=head_dim_of(config))
    assert found is not None
    step = found.bill.step
    return step.total, ", ".join(f"{name} {share:.0%}" for name, share in shares(step) if share >= 0.01)


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    plans = [read_plan(shape, arguments.precision, arguments.cache) for shape in SHAPES]
    for plan in plans:
        prepare(plan.recipe)  # here: a daemonic process may start none
    os.environ.update(rank_environment("cpu", 1))
    context = multiprocessing.get_context("spawn")  # as a rank starts: what a server forks measures up to twice as slow
    pipes, configs, profiles = [], [], []
    for number, shape in enumerate(SHAPES):
        pipe, end = context.Pipe()
        context.Process(target=serve, args=(shape, arguments, folder / str(number), end), daemon=True).start()
        end.close()
        pipes.append(pipe)
    for shape, pipe in zip(SHAPES, pipes, strict=True):
        config, profile = pipe.recv()
        print(f"{shape} is ready", flush=True)
        configs.append(config)
        profiles.append(ModelProfile.from_json(profile))
    rows: list[dict[str, Any]] = [{"shape": shape, "predicted": [], "measured": [], "spreads": []} for shape in SHAPES]
    clock = "cpu" if arguments.processor_time else "wall"
    overrides = ["cluster.device=cpu", "cluster.processes_per_node=1", "execution.threads_per_process=1"]
    overrides += [f"train.precision={arguments.precision}", f"execution.cache_dir={arguments.cache}"]
    for round_number in range(arguments.rounds):
        calibrate(str(RECIPE), overrides, arguments.seconds, clock, with_own=False)
        for row, plan, profile, config, pipe in zip(rows, plans, profiles, configs, pipes, strict=True):
            predicted, parts = predict(plan, profile, config)
            pipe.send("go")
            taken = pipe.recv()
            middle = statistics.median(taken)
            row["predicted"].append(predicted)
            row["measured"].append(middle)
            row["spreads"].append(statistics.median(abs(one - middle) for one in taken) / middle)
            row["parts"] = parts
            print(
                f"{round_number} {row['shape']}: {predicted:.4f} s predicted, {middle:.4f} s measured; {parts}",
                flush=True,
            )
    for pipe in pipes:
        pipe.send("")
    rates = rates_for(plans[0], detect_machine())
    assert rates is not None
    print(f"rates: {dict(rates.sec_per)}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="steps of a shape in a round")
    parser.add_argument("--seconds", type=float, default=45, help="of a calibration")
    parser.add_argument("--processor-time", action="store_true", help="not the clock's, which other work moves")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--cache", default=".cache/turbolm", help="folder of prepared data, profiles and rates")
    arguments = parser.parse_args()
    arguments.cache = str(Path(arguments.cache).absolute())
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, Path(folder))
    for row in rows:
        ratios = [p / m for p, m in zip(row["predicted"], row["measured"], strict=True)]
        row["error"] = abs(statistics.median(ratios) - 1)
        row["drift"] = max(row["measured"]) / min(row["measured"]) - 1
        print(
            f"| {row['shape']} | {statistics.median(row['predicted']):.3f} | "
            f"{statistics.median(row['measured']):.3f} | "
            f"{statistics.median(ratios) - 1:+.1%} | ±{statistics.median(row['spreads']):.1%} | {row['drift']:.1%} |"
        )
    errors = [row["error"] for row in rows]
    figures = {
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "spread_of_steps": statistics.median(spread for row in rows for spread in row["spreads"]),
        "drift_between_rounds": statistics.median(row["drift"] for row in rows),
        "load": os.getloadavg()[0],
    }
    met = {name: figures[name] <= goal for name, goal in TARGETS.items()}
    print(json.dumps({"bench": "planner_time", "figures": figures, "targets": TARGETS, "met": met}))


if __name__ == "__main__":
    main()
