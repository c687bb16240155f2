"""What a schedule of sequence lengths saves on the clock, as a share of what its FLOPs predict; compiled and not.

    python benchmarks/length_schedule.py [--lengths 128 512 2048] [--rounds 5] [--modes none layers model]

Steps of each length are timed in turns through turbolm's own engine and step (one process, fp32), and a run with equal
parts of its tokens at each length is compared with one that has the longest sequences throughout. Every sequence is a
long document after a very short one: a query attends to nearly half a sequence on average, and a mask is needed, as in
real packed sequences. sdpa computes full sequences under a mask, so the saving by what is computed is shown beside that
predicted. Times are of the processor (one thread), because other work on the machine moves the clock; the clock's are
shown too. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from turbolm.engine.start import build_accelerator, wrap
from turbolm.models.attention import model_inputs
from turbolm.models.build import build_config, build_model
from turbolm.models.compile import apply_compile, compilations
from turbolm.models.loss import attach_loss
from turbolm.optim.build import build_optimizer
from turbolm.plan.flops import span_of_documents, training_flops_per_token
from turbolm.plan.machine import detect_machine
from turbolm.plan.parameters import estimate_size
from turbolm.plan.plan import build_plan
from turbolm.recipe.schema import Recipe
from turbolm.train.step import train_step

VOCAB_SIZE = 1024
SHORT = 8  # tokens of the document in front
TARGET = 0.95


def make_recipe(arguments: argparse.Namespace) -> Recipe:
    """A small Llama in which attention over the longest sequences matters."""
    longest = max(arguments.lengths)
    config = {
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "max_position_embeddings": longest, "vocab_size": VOCAB_SIZE,
    }  # fmt: skip
    return Recipe.model_validate(
        {
            "name": "length-schedule",
            "model": {"config": config},
            "tokenizer": {"train": {"vocab_size": VOCAB_SIZE}},
            "data": {"seq_len": longest},
            "train": {"budget": 2**20, "global_batch": longest, "precision": "fp32"},
            "cluster": {"device": "cpu"},
            "execution": {"zero_stage": 0, "threads_per_process": 1},
        }
    )


def build(recipe: Recipe, mode: str) -> Any:
    """A fresh engine, its model compiled by `mode`."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    plan = build_plan(recipe, detect_machine(), 1)
    accelerator = build_accelerator(plan.ds_config, device="cpu", precision="fp32", timeout_sec=3600)
    config = build_config(
        recipe.model, seq_len=recipe.data.seq_len, vocab_size=VOCAB_SIZE, bos_token_id=0, eos_token_id=0
    )
    model = build_model(recipe.model, config, seed=0, attention="sdpa")
    engine = wrap(accelerator, model, build_optimizer(model, recipe))
    engine.train()
    attach_loss(engine.module, "chunked")
    apply_compile(engine.module, mode)
    engine.set_learning_rate(1e-4)
    return engine


def micro_batch(seq_len: int, num_tokens: int) -> dict[str, np.ndarray]:
    """Sequences of a short document and a long one."""
    shape = (num_tokens // seq_len, seq_len)
    tokens = np.random.default_rng(seq_len).integers(0, VOCAB_SIZE, shape)
    positions = np.broadcast_to(np.append(np.arange(SHORT), np.arange(seq_len - SHORT)), shape).copy()
    return {"input_ids": tokens, "position_ids": positions, "targets": np.roll(tokens, -1, axis=1)}


def measure(arguments: argparse.Namespace, mode: str) -> dict[str, Any]:
    """Median seconds of a step by length, on the processor and on the clock."""
    recipe = make_recipe(arguments)
    engine = build(recipe, mode)
    batches = {length: micro_batch(length, recipe.train.global_batch) for length in arguments.lengths}
    for batch in batches.values():
        assert model_inputs(batch, "sdpa", engine.device)["input_ids"].numel() == recipe.train.global_batch
        train_step(engine, [batch], recipe.train.global_batch, "sdpa")
    num_compiled, compile_seconds = (compilations.count, compilations.seconds) if mode != "none" else (0, 0.0)
    cpu: dict[int, list[float]] = {length: [] for length in batches}
    clock: dict[int, list[float]] = {length: [] for length in batches}
    for _ in range(arguments.rounds):
        for length, batch in batches.items():
            started = time.process_time(), time.perf_counter()
            float(train_step(engine, [batch], recipe.train.global_batch, "sdpa").loss_sum)
            cpu[length].append(time.process_time() - started[0])
            clock[length].append(time.perf_counter() - started[1])
    engine.deepspeed_engine.destroy()
    return {
        "compilations": num_compiled,
        "compile_sec": compile_seconds,
        "cpu_sec": {length: statistics.median(values) for length, values in cpu.items()},
        "clock_sec": {length: statistics.median(values) for length, values in clock.items()},
    }


def saved(cost_by_length: dict[int, float]) -> float:
    """Share saved by equal parts at each length, against the longest throughout."""
    return 1 - statistics.mean(cost_by_length.values()) / cost_by_length[max(cost_by_length)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--modes", nargs="+", default=["none", "layers", "model"])
    arguments = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    size = estimate_size(make_recipe(arguments).model.config or {})
    assert size is not None
    flops = {n: training_flops_per_token(size, span_of_documents([SHORT, n - SHORT])) for n in arguments.lengths}
    dense = {n: training_flops_per_token(size, lambda *_, span=n: span) for n in arguments.lengths}
    predicted, predicted_dense = saved(flops), saved(dense)
    print(f"FLOPs saved: {predicted:.1%} (causal), {predicted_dense:.1%} (full sequences)", flush=True)
    figures: dict[str, Any] = {"flops_saved": predicted, "whole_row_flops_saved": predicted_dense}
    for mode in arguments.modes:
        found = measure(arguments, mode)
        for clock in ("cpu", "clock"):
            found[f"{clock}_saved"] = saved(found[f"{clock}_sec"])
            found[f"{clock}_share_of_flops"] = found[f"{clock}_saved"] / predicted
            found[f"{clock}_share_of_whole_row_flops"] = found[f"{clock}_saved"] / predicted_dense
        figures[mode] = found
        print(mode, json.dumps(found), flush=True)
    compiled = [mode for mode in arguments.modes if mode != "none"]
    met = {mode: figures[mode]["cpu_share_of_flops"] >= TARGET for mode in compiled}
    met["compilations"] = all(figures[mode]["compilations"] <= len(arguments.lengths) for mode in compiled)
    targets = {"share_of_flops_compiled": TARGET, "compilations": len(arguments.lengths)}
    print(json.dumps({"bench": "length_schedule", "figures": figures, "rivals": {}, "targets": targets, "met": met}))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
