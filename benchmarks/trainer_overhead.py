"""Tokens/s of turbolm's step in one process against a hand-written PyTorch loop and `transformers.Trainer`.

    python benchmarks/trainer_overhead.py [--rounds 40] [--steps 1] [--zero-stage 0] [--threads N]

The same model, sequences, micro-batches, threads, fused AdamW, clipping and fp32 in all three; each is a separate
process, because Accelerate's state and environment are a process's, and they take turns, so that a machine whose speed
drifts is the same for all. Only steps are timed, not what Trainer sets up before its first. turbolm's processes run in
the environment that its launcher gives them, in which glibc keeps freed memory; the rivals both in that
(`_same_memory`) and as they come. The loop is judged in the same, Trainer as it comes. The sequences come from the
quickstart recipe's data: real packed documents, with the positions that keep them apart. The last line is one JSON
object.
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
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from turbolm.data.batch.loader import BatchLoader
from turbolm.data.order.batch_order import constant_order
from turbolm.data.prepare.build import prepare
from turbolm.data.store.token_store import TokenStore, open_store
from turbolm.engine.start import build_accelerator
from turbolm.launch.local import process_environment
from turbolm.models.attention import model_inputs
from turbolm.models.build import build_config, build_model
from turbolm.optim.build import build_optimizer
from turbolm.plan.machine import detect_machine
from turbolm.plan.plan import Plan, build_plan
from turbolm.recipe.load import load_recipe
from turbolm.train.build import build_engine
from turbolm.train.run_directory import RunDirectory
from turbolm.train.step import train_step

RECIPE = Path(__file__).parents[1] / "recipes/quickstart/config.yaml"
Timer = Callable[[], float]
Contender = Callable[[list[list[dict[str, Any]]], list[int]], float]  # returns the seconds of the steps


def turbolm_step(plan: Plan, store: TokenStore, folder: Path, timer: Timer) -> Contender:
    """The project's own engine and step."""
    accelerator = build_accelerator(plan.ds_config, device="cpu", precision="fp32", timeout_sec=600)
    engine, attention = build_engine(accelerator, plan, store, RunDirectory(folder))

    def run(batches: list[list[dict[str, Any]]], num_targets: list[int]) -> float:
        start = timer()
        for micro_batches, targets in zip(batches, num_targets, strict=True):
            engine.set_learning_rate(1e-4)
            float(train_step(engine, micro_batches, targets, attention).loss_sum)
        return timer() - start

    return run


def fresh_model(plan: Plan, store: TokenStore) -> Any:
    recipe = plan.recipe
    ids = {"bos_token_id": store.manifest["bos_id"], "eos_token_id": store.manifest["eos_id"]}
    config = build_config(recipe.model, seq_len=recipe.data.seq_len, vocab_size=store.vocab_size, **ids)
    return build_model(recipe.model, config, seed=0, attention="sdpa").train()


def plain_loop(plan: Plan, store: TokenStore, _: Path, timer: Timer) -> Contender:
    """What one would write by hand."""
    model = fresh_model(plan, store)
    optimizer = build_optimizer(model, plan.recipe)

    def run(batches: list[list[dict[str, Any]]], num_targets: list[int]) -> float:
        start = timer()
        for micro_batches, targets in zip(batches, num_targets, strict=True):
            total = 0.0
            for micro in micro_batches:
                logits = model(**model_inputs(micro, "sdpa", torch.device("cpu"))).logits
                labels = torch.from_numpy(micro["targets"]).flatten()
                loss = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100, reduction="sum") / targets
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return timer() - start

    return run


def hf_trainer(plan: Plan, store: TokenStore, folder: Path, timer: Timer) -> Contender:
    """`transformers.Trainer` with its fused AdamW; it shifts labels itself, so they are given unshifted."""
    from step_clock import StepClock
    from transformers import Trainer, TrainingArguments

    model = fresh_model(plan, store)
    model.config.use_cache = False
    clock = StepClock(timer)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=plan.batch.micro_batch_bins,
        gradient_accumulation_steps=plan.batch.gradient_accumulation_steps,
        max_steps=1,
        optim="adamw_torch_fused",
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        remove_unused_columns=False,
    )
    trainers: list[Any] = []

    def run(batches: list[list[dict[str, Any]]], num_targets: list[int]) -> float:
        rows = [
            {"input_ids": tokens, "position_ids": positions, "labels": tokens}
            for micro_batches in batches
            for micro in micro_batches
            for tokens, positions in zip(micro["input_ids"], micro["position_ids"], strict=True)
        ]
        arguments.max_steps = len(batches)
        if not trainers:
            trainers.append(Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[clock]))
        trainers[0].train_dataset = rows
        trainers[0].train()
        return clock.seconds

    return run


SAME_MEMORY = "_same_memory"
CONTENDERS = {
    "turbolm": turbolm_step,
    f"plain_loop{SAME_MEMORY}": plain_loop,
    f"transformers_trainer{SAME_MEMORY}": hf_trainer,
    "plain_loop": plain_loop,
    "transformers_trainer": hf_trainer,
}
TARGETS = {f"plain_loop{SAME_MEMORY}": 0.98, "transformers_trainer": 1.0}


def read_plan(arguments: argparse.Namespace) -> tuple[Plan, TokenStore]:
    overrides = ["train.precision=fp32", "cluster.device=cpu", f"execution.zero_stage={arguments.zero_stage}"]
    recipe = load_recipe(RECIPE, overrides)
    return build_plan(recipe, detect_machine(), 1), open_store(prepare(recipe))


def serve(name: str, arguments: argparse.Namespace, folder: Path, pipe: Connection) -> None:
    """A contender's process: for everything that comes through the pipe one turn, and the tokens/s of it back."""
    plan, store = read_plan(arguments)
    order = constant_order(store.lengths("train"), plan.batch.seq_len, plan.batch.bins_per_batch)
    loader = BatchLoader(order, store, "train", 1, 0, plan.batch.micro_batch_tokens)
    global_batches = [loader.global_batch(index) for index in range(arguments.steps)]
    batches, targets = [b.micro_batches for b in global_batches], [b.num_targets for b in global_batches]
    timer = time.process_time if arguments.processor_time else time.perf_counter
    with contextlib.redirect_stdout(sys.stderr):
        run = CONTENDERS[name](plan, store, folder / name, timer)
        run(batches[:2], targets[:2])
        while True:
            pipe.recv()
            torch.set_num_threads(arguments.threads)
            pipe.send(arguments.steps * plan.batch.global_batch_tokens / run(batches, targets))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Tokens/s of each round, by contender."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    plain, launched = dict(os.environ), process_environment(read_plan(arguments)[0])
    launched["OMP_NUM_THREADS"] = plain["OMP_NUM_THREADS"] = str(arguments.threads)
    for name in CONTENDERS:
        os.environ.update(launched if name == "turbolm" or name.endswith(SAME_MEMORY) else plain)
        pipes[name], end = context.Pipe()
        context.Process(target=serve, args=(name, arguments, folder, end), daemon=True).start()
        end.close()
        os.environ.clear()
        os.environ.update(plain)
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for round_index in range(-1, arguments.rounds):  # the first does not count: there all wait until all are built
        for name in sorted(pipes, reverse=round_index % 2 == 1):
            pipes[name].send("go")
            rates[name].append(pipes[name].recv())
        print({name: round(values[-1]) for name, values in rates.items()}, flush=True)
    return {name: values[1:] for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps of a turn")
    parser.add_argument("--zero-stage", type=int, default=0)
    parser.add_argument("--processor-time", action="store_true", help="not the clock's, which other work moves")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rates = measure(arguments, Path(folder))
    ours = rates.pop("turbolm")
    ratios = {
        name: statistics.median(a / b for a, b in zip(ours, values, strict=True)) for name, values in rates.items()
    }
    print(
        json.dumps(
            {
                "bench": "trainer_overhead",
                "figures": {"turbolm_tokens_per_sec": statistics.median(ours), "zero_stage": arguments.zero_stage},
                "rivals": {name: statistics.median(values) for name, values in rates.items()},
                "ratios": ratios,
                "targets": TARGETS,
                "met": {name: ratios[name] >= goal for name, goal in TARGETS.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
