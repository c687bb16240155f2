"""What one GPU gives: MFU, tokens/s and peak memory beside `transformers.Trainer`, and what each technique is worth.

    sh benchmarks/gpu.sh [--budget-sec 520] [--only PART_OF_NAME ...] [--smoke]

Each row runs in a process of its own, so that its memory is its own and one that fails costs only itself; rows that do
not fit in the budget say "not measured". The data are the source files of the running Python, packed as in training:
random tokens would give the same speed, but not the same lengths of documents. MFU is `training_flops_per_token` (6 N +
12 L H S: matrices and output head, attention within documents only; recomputation does not count) times tokens/s, over
the data sheet's dense bf16 peak. `--smoke` runs every row with a tiny model, on a CPU too: it shows that the script
works and measures nothing. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Settings = dict[str, Any]

GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": True}  # fmt: skip
LLAMA_1B = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 4096,
            "vocab_size": 128256, "tie_word_embeddings": True}  # fmt: skip
GPT2_128K = GPT2 | {"vocab_size": 131072}
TINY = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 4096},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 4096},
}  # fmt: skip

# Ours at its best known settings. A global batch of 16 micro-batches keeps the share of the update small.
BEST = {"compile": "model", "loss": "auto", "attention": "auto"}
EAGER = {"compile": "none"}  # where the shapes vary, each of which would be compiled
SMALL = {"model": GPT2, "seq_len": 1024, "num_sequences": 32, "accumulation": 8, "execution": BEST}
LARGE = {"model": LLAMA_1B, "seq_len": 4096, "num_sequences": 4, "accumulation": 8, "execution": BEST}


def _row(kind: str, base: Settings, **changes: Any) -> Settings:
    execution = base["execution"] | changes.pop("execution", {})
    return {"kind": kind, "who": "turbolm", **base, **changes, "execution": execution}


# In the order of their worth, as the time may not do for all of them.
ROWS: dict[str, Settings] = {
    "gpt2-124m turbolm": _row("rate", SMALL),
    "gpt2-124m Trainer, defaults": _row("rate", SMALL, who="trainer", num_sequences=8, accumulation=1),
    "llama-1b turbolm": _row("rate", LARGE),
    "llama-1b Trainer, defaults": _row("rate", LARGE, who="trainer", num_sequences=8, accumulation=1, steps=2),
    "128k vocabulary, largest micro-batch, turbolm": _row("largest", SMALL, model=GPT2_128K, execution=EAGER),
    "128k vocabulary, largest micro-batch, Trainer": _row("largest", SMALL, model=GPT2_128K, who="trainer"),
    "gpt2-124m Trainer, tuned": _row("rate", SMALL, who="trainer_tuned", num_sequences=16, accumulation=16),
    "llama-1b Trainer, tuned": _row("rate", LARGE, who="trainer_tuned", num_sequences=2, accumulation=16),
    "gpt2-124m without compile": _row("rate", SMALL, execution=EAGER),
    "gpt2-124m with all logits at once": _row(
        "rate", SMALL, num_sequences=16, accumulation=16, execution={"loss": "full"}
    ),
    "gpt2-124m with sdpa and a dense mask": _row("rate", SMALL, execution={"attention": "sdpa"}),
    "llama-1b in fp8, tensorwise": _row("rate", LARGE, fp8="tensorwise"),
    "llama-1b in fp8, rowwise": _row("rate", LARGE, fp8="rowwise"),
    "gpt2-124m loss after 40 s, turbolm": _row("time_to_loss", SMALL, accumulation=2),
    "gpt2-124m loss after 40 s, Trainer": _row(
        "time_to_loss", SMALL, who="trainer_tuned", num_sequences=16, accumulation=4
    ),
}  # fmt: skip
TRAINING_SEC = 40
TARGETS = {
    "mfu_124m": 0.45,
    "mfu_1b": 0.52,
    "over_trainer_defaults": 1.5,
    "largest_micro_batch": 2.5,
}


# ------------------------------------------------------------------------------- one row, in a process of its own


def run_row(row: Settings, smoke: bool) -> Settings:
    import torch

    from turbolm.data.batch.loader import BatchLoader
    from turbolm.data.order.batch_order import constant_order
    from turbolm.data.prepare.build import prepare
    from turbolm.data.store.token_store import open_store
    from turbolm.plan.machine import detect_machine
    from turbolm.plan.plan import build_plan
    from turbolm.recipe.schema import Recipe

    if smoke:
        row = row | {"model": row["model"] | TINY[row["model"]["model_type"]], "seq_len": 128, "num_sequences": 2,
                     "accumulation": 2, "steps": 1}  # fmt: skip
        row["execution"] = row["execution"] | {"compile": "none"}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.model_validate(recipe_of(row, Path(folder), on_gpu=torch.cuda.is_available()))
        store = open_store(prepare(recipe))
        plan = build_plan(recipe, detect_machine(), 1)
        order = constant_order(store.lengths("train"), plan.batch.seq_len, plan.batch.bins_per_batch)
        slices = order.max_slices(64) if recipe.execution.compile != "none" else None
        loader = BatchLoader(order, store, "train", 1, 0, plan.batch.micro_batch_tokens, slices)
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
    import torch

    from turbolm.engine.start import build_accelerator
    from turbolm.train.build import build_engine
    from turbolm.train.run_directory import RunDirectory
    from turbolm.train.step import micro_batch_loss, train_step

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
    import torch
    from step_clock import StepClock
    from transformers import Trainer, TrainingArguments

    from turbolm.models.build import build_config, build_model

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
    from turbolm.plan.flops import training_flops_per_token
    from turbolm.plan.machine import detect_machine
    from turbolm.recipe.gpus import peak_flops

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
    span = sum(batch.attention_pairs for batch in batches[2:]) / sum(batch.num_targets for batch in batches[2:])
    flops = training_flops_per_token(contender.model.config.to_dict(), span)
    peak = peak_flops(detect_machine().gpu_name, "bf16")
    return {
        "tokens_per_sec": plan.batch.global_batch_tokens / best,
        "mfu": flops * num_targets / best / peak if flops and peak else None,
        "peak_bytes": peak_bytes(),
        "micro_batch_rows": num_sequences,
        "mean_span": span,
        "num_parameters": sum(parameter.numel() for parameter in contender.model.parameters()),
    }


def one_of_each_size(batches: list[Any]) -> Batches:
    """A micro-batch for each number of slices and longest one that a compiler makes a graph for: none is timed."""
    import torch

    from turbolm.models.attention import model_inputs

    found = {}
    for micro in (micro for batch in batches for micro in batch.micro_batches if "cu_seqlens" in micro):
        inputs = model_inputs(micro, "varlen", torch.device("cpu"))
        found[len(inputs["cu_seq_lens_q"]), inputs["max_length_q"]] = ([micro], micro["targets"].size)
    return list(found.values())


def fits_in_memory(work: Callable[[], Any]) -> bool:
    """Whether the device's memory does for `work`; if not, what it took is given back."""
    import torch

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
    import numpy as np
    import torch

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
    from turbolm.data.batch.loader import evaluation_batches

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
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


# ------------------------------------------------------------------------------------------------------- all rows


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "deepspeed", "accelerate", "transformers", "liger-kernel", "torchao"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def run_all(arguments: argparse.Namespace) -> dict[str, Settings]:
    deadline = time.monotonic() + arguments.budget_sec
    results: dict[str, Settings] = {}
    for name, row in ROWS.items():
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        left = deadline - time.monotonic()
        if left < 20:
            results[name] = {"not_measured": "no time left"}
            continue
        command = [sys.executable, __file__, "--row", json.dumps(row), *["--smoke"] * arguments.smoke]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left)
            lines = done.stdout.strip().splitlines()
            if done.returncode or not lines:
                raise ValueError(" ".join(done.stderr.strip().splitlines()[-3:])[-400:])
            results[name] = json.loads(lines[-1])
        except (subprocess.TimeoutExpired, ValueError) as error:
            reason = "no time left" if isinstance(error, subprocess.TimeoutExpired) else str(error)
            results[name] = {"not_measured": reason}
        print(f"| {name} | {describe(results[name])} |", flush=True)
    return results


def describe(result: Settings) -> str:
    if "not_measured" in result:
        return f"not measured: {result['not_measured']}"
    parts = []
    if "tokens_per_sec" in result:
        parts.append(f"{result['tokens_per_sec']:,.0f} tokens/s")
        parts.append(f"MFU {result['mfu']:.1%}" if result["mfu"] else "MFU unknown")
        parts.append(f"peak {result['peak_bytes'] / 2**30:.1f} GiB" if result["peak_bytes"] else "peak unknown")
        parts.append(f"{result['micro_batch_rows']} sequences")
    if "largest_micro_batch_rows" in result:
        parts.append(f"{result['largest_micro_batch_rows']} sequences of {result['seq_len']}")
    if "eval_loss" in result:
        tokens, seconds = result["tokens"], result["seconds"]
        parts.append(f"held-out loss {result['eval_loss']:.3f} after {tokens:,} tokens in {seconds:.0f} s")
    return ", ".join(parts)


def figures_of(results: dict[str, Settings]) -> dict[str, float | None]:
    def value(name: str, key: str) -> float | None:
        found: float | None = results.get(name, {}).get(key)
        return found

    def ratio(one: str, other: str, key: str) -> float | None:
        a, b = value(one, key), value(other, key)
        return a / b if a and b else None

    models = ("gpt2-124m", "llama-1b")
    over = [ratio(f"{model} turbolm", f"{model} Trainer, defaults", "tokens_per_sec") for model in models]
    known = [number for number in over if number is not None]
    rows = "128k vocabulary, largest micro-batch"
    return {
        "mfu_124m": value("gpt2-124m turbolm", "mfu"),
        "mfu_1b": value("llama-1b turbolm", "mfu"),
        "over_trainer_defaults": min(known) if len(known) == len(over) else None,
        "largest_micro_batch": ratio(f"{rows}, turbolm", f"{rows}, Trainer", "largest_micro_batch_rows"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-sec", type=float, default=520)
    parser.add_argument("--only", nargs="*", help="rows whose name contains one of these")
    parser.add_argument("--smoke", action="store_true", help="tiny models, on a CPU too: measures nothing")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TURBOLM_BENCH_CACHE", cache)  # the rows share the token store
        if arguments.row:
            print(json.dumps(run_row(json.loads(arguments.row), arguments.smoke)))
            return
        results = run_all(arguments)
    figures = {} if arguments.smoke else figures_of(results)
    met = {name: None if figures.get(name) is None else figures[name] >= goal for name, goal in TARGETS.items()}
    rivals = {name: result for name, result in results.items() if "Trainer" in name}
    print(json.dumps({"bench": "gpu", "figures": figures, "rows": results, "rivals": rivals, "targets": TARGETS,
                      "met": met, "versions": versions()}))  # fmt: skip
    if any("not_measured" in result for result in results.values()) and arguments.smoke:
        sys.exit("a row failed")


if __name__ == "__main__":
    main()
