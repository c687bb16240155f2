"""One row of benchmarks/gpu.py, in a process of its own: `python benchmarks/gpu_row.py ROW_AS_JSON` prints its result.

TURBOLM_BENCH_CACHE is the folder of the token store, TURBOLM_BENCH_TRACE the file for the row's profile.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step_clock import StepClock
from transformers import Trainer, TrainingArguments

from turbolm.data.batch.loader import BatchLoader, evaluation_batches
from turbolm.data.order.batch_order import constant_order
from turbolm.data.prepare.build import prepare
from turbolm.data.store.token_store import open_store
from turbolm.engine.start import build_accelerator
from turbolm.models.attention import model_inputs
from turbolm.models.build import build_config, build_model
from turbolm.models.size import measure_model
from turbolm.plan.flops import span_of_documents, training_flops_per_token
from turbolm.plan.machine import detect_machine
from turbolm.plan.plan import build_plan
from turbolm.plan.profile import mean_span
from turbolm.recipe.gpus import peak_flops
from turbolm.recipe.schema import Recipe
from turbolm.train.build import build_engine
from turbolm.train.pinned import PinnedMemory
from turbolm.train.run_directory import RunDirectory
from turbolm.train.step import micro_batch_loss, train_step
from turbolm.train.trace import Summary, read_trace, summarize

Settings = dict[str, Any]

TINY = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 4096},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 4096},
}  # fmt: skip
TRAINING_SEC = 40


def run_row(row: Settings) -> Settings:
    on_gpu = torch.cuda.is_available()
    if row["smoke"]:
        row = row | {"model": row["model"] | TINY[row["model"]["model_type"]], "seq_len": 128, "num_sequences": 2,
                     "accumulation": 2, "steps": 1}  # fmt: skip
        row["execution"] = row["execution"] | {"compile": "none"}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.model_validate(recipe_of(row, Path(folder), on_gpu=on_gpu))
        store = open_store(prepare(recipe))
        plan = build_plan(recipe, detect_machine(), 1)
        order = constant_order(store.lengths("train"), plan.batch.seq_len, plan.batch.bins_per_batch)
        slices = order.max_slices(64) if recipe.execution.compile != "none" else None
        memory = PinnedMemory(torch.device("cuda:0")) if on_gpu else None
        loader = BatchLoader(order, store, "train", 1, 0, plan.batch.micro_batch_tokens, slices, memory)
        contender = turbolm_trainer if row["who"] == "turbolm" else hf_trainer
        measure = {"rate": rate, "largest": largest, "time_to_loss": time_to_loss}[row["kind"]]
        return measure(row, lambda: contender(row, plan, store, Path(folder)), loader, plan, store)


def recipe_of(row: Settings, folder: Path, *, on_gpu: bool) -> Settings:
    micro_batch = row["num_sequences"] * row["seq_len"]
    precision = "bf16" if on_gpu else "fp32"
    execution = row["execution"] if on_gpu else row["execution"] | {"attention": "sdpa"}
    return {
        "name": "gpu-benchmark",
        "model": {"config": row["model"]},
        "tokenizer": {"train": {"vocab_size": 4096, "sample_bytes": 4 * 10**6}},
        "data": {"seq_len": row["seq_len"], "validation": 0.02},
        "train": {
            "budget": 10**9,
            "global_batch": micro_batch * row["accumulation"],
            "precision": precision,
            "fp8": row.get("fp8", "off") if on_gpu else "off",
        },
        "optimizer": {"name": "adamw", "lr": 6e-4, "betas": [0.9, 0.95]},
        "execution": {
            "zero_stage": 1,
            "micro_batch": micro_batch,
            "cache_dir": os.environ["TURBOLM_BENCH_CACHE"],
            "runs_dir": str(folder / "runs"),
            **execution,
        },
    }


Batches = list[tuple[list[Settings], int]]  # the micro-batches of each global batch, and its targets


@dataclass
class Contender:
    """`run` trains on global batches and returns the seconds of the steps, the device's work included.

    `loss` sums the held-out loss of a micro-batch; `use_sequences` sets the sequences per micro-batch, and the
    micro-batches per global batch.
    """

    model: Any
    run: Callable[[Batches], float]
    loss: Callable[[Settings], float]
    use_sequences: Callable[[int, int], None]


def turbolm_trainer(row: Settings, plan: Any, store: Any, folder: Path) -> Contender:
    accelerator = build_accelerator(plan.ds_config, device=plan.device, precision=plan.precision, timeout_sec=600)
    engine, attention = build_engine(accelerator, plan, store, RunDirectory(folder))
    engine.set_learning_rate(6e-4)

    def run(batches: Batches) -> float:
        start = time.perf_counter()
        for micro_batches, num_targets in batches:
            train_step(engine, micro_batches, num_targets, attention)
        synchronize()
        return time.perf_counter() - start

    def loss(micro_batch: Settings) -> float:
        engine.eval()
        with torch.no_grad():
            return float(micro_batch_loss(engine, micro_batch, attention)[1])

    return Contender(engine.module, run, loss, use_sequences=lambda *_: None)  # what it is given says it


def hf_trainer(row: Settings, plan: Any, store: Any, folder: Path) -> Contender:
    """`transformers.Trainer`: as it comes (fp32, eight sequences), or in bf16 with its fused optimizer, compiled.

    It sees the same packed sequences, without their documents kept apart, which is how it is used and costs it no mask.
    """
    recipe, is_tuned = plan.recipe, row["who"] == "trainer_tuned"
    ids = {"bos_token_id": store.manifest["bos_id"], "eos_token_id": store.manifest["eos_id"]}
    config = build_config(recipe.model, seq_len=recipe.data.seq_len, vocab_size=store.vocab_size, **ids)
    model = build_model(recipe.model, config, seed=0, attention="sdpa").train()
    model.config.use_cache = False
    on_gpu = torch.cuda.is_available()
    tuned: Settings = {"bf16": on_gpu, "tf32": True if on_gpu else None, "optim": "adamw_torch_fused",
                       "torch_compile": on_gpu, "dataloader_pin_memory": on_gpu}  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=plan.batch.micro_batch_bins,
        gradient_accumulation_steps=plan.batch.gradient_accumulation_steps,
        max_steps=1,
        learning_rate=6e-4,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=not on_gpu,
        **(tuned if is_tuned else {}),
    )
    trainers: list[Any] = []
    clock = StepClock()

    def run(batches: Batches) -> float:
        arguments.max_steps = len(batches)  # one call for all of them: it sets up its loop in each
        tokens = [row for micro_batches, _ in batches for micro in micro_batches for row in micro["input_ids"]]
        dataset = [{"input_ids": row, "labels": row} for row in tokens]
        if not trainers:
            trainers.append(Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[clock]))
        trainers[0].train_dataset = dataset
        trainers[0].train()
        return clock.seconds

    def use_sequences(num_sequences: int, accumulation: int) -> None:
        arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = num_sequences, accumulation
        trainers.clear()

    def loss(micro_batch: Settings) -> float:
        inputs, positions, targets = (torch.from_numpy(micro_batch[name]).to(model.device)
                                      for name in ("input_ids", "position_ids", "targets"))  # fmt: skip
        model.eval()
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=on_gpu):
            logits = model(input_ids=inputs, position_ids=positions, use_cache=False).logits
        nll = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
        return float(nll)

    return Contender(model, run, loss, use_sequences)


def rate(row: Settings, build: Callable[[], Contender], loader: Any, plan: Any, store: Any) -> Settings:
    """Tokens/s, MFU and peak memory after the first steps, which compile.

    A rival whose micro-batch does not fit gets half of it twice: eight sequences, Trainer's default, are many for 1B.
    """
    contender, num_steps = build(), row.get("steps", 5)
    batches = [loader.global_batch(index) for index in range(2 * num_steps + 2)]
    num_sequences, accumulation = plan.batch.micro_batch_bins, plan.batch.gradient_accumulation_steps
    to_compile = arrays(batches[:2]) + (one_of_each_size(batches[2:]) if row["who"] == "turbolm" else [])
    while not fits_in_memory(lambda: contender.run(to_compile)):
        if row["who"] == "turbolm" or num_sequences == 1:
            raise MemoryError(f"{num_sequences} sequences do not fit")
        num_sequences, accumulation = num_sequences // 2, 2 * accumulation
        contender.use_sequences(num_sequences, accumulation)
    reset_peak()
    seconds = []
    for first in (2, 2 + num_steps):
        part = batches[first : first + num_steps]
        seconds.append(contender.run(arrays(part)) / len(part))
    best = min(seconds)
    num_targets = statistics.mean(batch.num_targets for batch in batches[2:])
    lengths = [length for batch in batches[2:] for length in batch.sequences.length.tolist()]
    flops = training_flops_per_token(measure_model(contender.model), span_of_documents(lengths))
    peak = peak_flops(detect_machine().gpu_name, "bf16")
    return {
        "tokens_per_sec": plan.batch.global_batch_tokens / best,
        "mfu": flops * num_targets / best / peak if peak else None,
        "peak_bytes": peak_bytes(),
        "micro_batch_rows": num_sequences,
        "mean_span": mean_span(lengths),
        "num_parameters": sum(parameter.numel() for parameter in contender.model.parameters()),
        **(profile(contender, arrays(batches[-2:])) if row["who"] == "turbolm" else {}),
    }


def profile(contender: Contender, batches: Batches) -> Settings:
    """Where the time of one step goes, and how often the host waits for the whole device in it, after the clock ran."""
    path = Path(os.environ["TURBOLM_BENCH_TRACE"])
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    with torch.profiler.profile(schedule=schedule) as profiler:
        for batch in batches:
            contender.run([batch])
            profiler.step()
    profiler.export_chrome_trace(str(path))
    events = read_trace(path)
    found = summarize(events)
    num_waits = sum(event.get("name") in ("cudaDeviceSynchronize", "cudaStreamSynchronize") for event in events)
    return {
        "profile": str(found),
        "limited_by": limit_of(found),
        "synchronizations": num_waits - found.on_gpu,  # the one before the clock stops is the benchmark's
        "micro_batches": len(batches[0][0]),
    }


def limit_of(found: Summary) -> str:
    """Return what takes most of the time."""
    name = max(found.shares, key=lambda kind: found.shares[kind])
    return f"{name} {found.shares[name]:.0%}"


def one_of_each_size(batches: list[Any]) -> Batches:
    """A micro-batch for each number of slices and longest one that a compiler makes a graph for: none is timed."""
    found = {}
    for micro in (micro for batch in batches for micro in batch.micro_batches if "cu_seqlens" in micro):
        inputs = model_inputs(micro, "varlen", torch.device("cpu"))
        found[len(inputs["cu_seq_lens_q"]), inputs["max_length_q"]] = ([micro], micro["targets"].size)
    return list(found.values())


def fits_in_memory(work: Callable[[], Any]) -> bool:
    """Whether the device's memory does for `work`; if not, what it took is given back."""
    try:
        work()
        return True
    except torch.OutOfMemoryError:
        pass  # the tensors are held by the exception until here
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def arrays(batches: list[Any]) -> Batches:
    return [(batch.micro_batches, batch.num_targets) for batch in batches]


def largest(row: Settings, build: Callable[[], Contender], loader: Any, plan: Any, store: Any) -> Settings:
    """Find the largest micro-batch whose step fits in memory: doubled until it does not, then by bisection."""
    contender, seq_len = build(), plan.batch.seq_len

    def fits(num_sequences: int) -> bool:
        tokens = np.random.default_rng(0).integers(0, 4096, (num_sequences, seq_len))
        positions = np.broadcast_to(np.arange(seq_len), tokens.shape).copy()
        ends = np.arange(num_sequences + 1, dtype=np.int32) * seq_len
        micro = {"input_ids": tokens, "position_ids": positions, "targets": tokens, "cu_seqlens": ends}
        contender.use_sequences(num_sequences, 1)
        return fits_in_memory(lambda: contender.run([([micro], tokens.size)]))

    fitting, too_many = 0, 1
    while fits(too_many) and too_many < (4096 if torch.cuda.is_available() else 4):
        fitting, too_many = too_many, 2 * too_many
    while too_many - fitting > max(1, fitting // 16):
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if fits(middle) else (fitting, middle)
    return {"largest_micro_batch_rows": fitting, "seq_len": seq_len}


def time_to_loss(row: Settings, build: Callable[[], Contender], loader: Any, plan: Any, store: Any) -> Settings:
    """The held-out loss after the same seconds of training; compiling does not count."""
    contender, seconds = build(), 2 if "steps" in row else TRAINING_SEC
    first = [loader.global_batch(index) for index in range(2 if "steps" in row else 32)]
    contender.run(arrays(first[:1]) + (one_of_each_size(first) if row["who"] == "turbolm" else []))
    chunk, index, spent = 1 if "steps" in row else 8, 1, 0.0
    while spent < seconds:
        batches = arrays([loader.global_batch(index + number) for number in range(chunk)])
        spent += contender.run(batches)
        index += chunk
    held_out = evaluation_batches(store, plan.batch.seq_len, 200_000, micro_batch_size=plan.batch.micro_batch_bins,
                                  fixed_cu_seqlens=plan.recipe.execution.compile != "none")  # fmt: skip
    nll = num_targets = 0.0
    for batch in held_out:
        nll += sum(contender.loss(micro) for micro in batch.micro_batches)
        num_targets += batch.num_targets
    return {
        "eval_loss": nll / num_targets,
        "tokens": index * plan.batch.global_batch_tokens,
        "seconds": spent,
    }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


if __name__ == "__main__":
    print(json.dumps(run_row(json.loads(sys.argv[1]))))
