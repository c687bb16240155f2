"""What one GPU gives: MFU, tokens/s and peak memory beside `transformers.Trainer`, and what each technique is worth.

    sh benchmarks/gpu.sh [--budget-sec 520] [--only PART_OF_NAME ...] [--out FOLDER] [--smoke]

Each row runs in a process of its own, so that its memory is its own and one that fails costs only itself; rows that do
not fit in the budget say "not measured". Each result is written to FOLDER when it is there; the same command measures
what is missing, with what was compiled before. Rows of turbolm are profiled for one step, after the clock. The data are
the source files of the running Python, packed as in training: random tokens would give the same speed, but not the same
lengths of documents. MFU is `training_flops_per_token` (6 N + 12 L H S: matrices and output head, attention within
documents only; recomputation does not count) times tokens/s, over the data sheet's dense bf16 peak. `--smoke` runs
every row with a tiny model, on a CPU too: it shows that the script works and measures nothing. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from turbolm.files import read_json, write_json

Settings = dict[str, Any]

GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": True}  # fmt: skip
LLAMA_1B = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 4096,
            "vocab_size": 128256, "tie_word_embeddings": True}  # fmt: skip
GPT2_128K = GPT2 | {"vocab_size": 131072}
# Ours at its best known settings: layers are compiled, which takes less of the budget than whole models do. A global
# batch of 8 micro-batches keeps the share of the update small.
BEST = {"compile": "layers", "loss": "auto", "attention": "auto"}
EAGER = {"compile": "none"}  # where the shapes vary, each of which would be compiled
SMALL = {"model": GPT2, "seq_len": 1024, "num_sequences": 32, "accumulation": 8, "execution": BEST}
LARGE = {"model": LLAMA_1B, "seq_len": 4096, "num_sequences": 4, "accumulation": 8, "execution": BEST}


def _row(kind: str, base: Settings, **changes: Any) -> Settings:
    execution = base["execution"] | changes.pop("execution", {})
    return {"kind": kind, "who": "turbolm", **base, **changes, "execution": execution}


# By importance, as the time may not do for all of them: the targets first. The first row also shows whether anything
# waits for the device within an accumulation.
ROWS: dict[str, Settings] = {
    "gpt2-124m turbolm": _row("rate", SMALL),
    "gpt2-124m Trainer, defaults": _row("rate", SMALL, who="trainer", num_sequences=8, accumulation=1),
    "llama-1b turbolm": _row("rate", LARGE),
    "llama-1b Trainer, defaults": _row("rate", LARGE, who="trainer", num_sequences=8, accumulation=1, steps=2),
    "128k vocabulary, largest micro-batch, turbolm": _row("largest", SMALL, model=GPT2_128K, execution=EAGER),
    "128k vocabulary, largest micro-batch, Trainer": _row("largest", SMALL, model=GPT2_128K, who="trainer"),
    "gpt2-124m without compile": _row("rate", SMALL, execution=EAGER),
    "gpt2-124m overlapping communication": _row("rate", SMALL, execution={"overlap_communication": True}),
    "llama-1b in fp8, rowwise": _row("rate", LARGE, fp8="rowwise"),
    "llama-1b in fp8, tensorwise": _row("rate", LARGE, fp8="tensorwise"),
    "gpt2-124m with all logits at once": _row(
        "rate", SMALL, num_sequences=16, accumulation=16, execution={"loss": "full"}
    ),
    "gpt2-124m with sdpa and a dense mask": _row("rate", SMALL, execution={"attention": "sdpa"}),
    "gpt2-124m Trainer, tuned": _row("rate", SMALL, who="trainer_tuned", num_sequences=16, accumulation=16),
    "llama-1b Trainer, tuned": _row("rate", LARGE, who="trainer_tuned", num_sequences=2, accumulation=16),
    "gpt2-124m compiled as a whole": _row("rate", SMALL, execution={"compile": "model"}),
    "gpt2-124m loss after 40 s, turbolm": _row("time_to_loss", SMALL, accumulation=2),
    "gpt2-124m loss after 40 s, Trainer": _row(
        "time_to_loss", SMALL, who="trainer_tuned", num_sequences=16, accumulation=4
    ),
}  # fmt: skip
MOST_SEC = 150  # of one row: what compiles for longer, or hangs, leaves time for the others
LEAST_SEC = 25  # a row that is not begun with less
TARGETS = {
    "mfu_124m": 0.45,
    "mfu_1b": 0.52,
    "over_trainer_defaults": 1.5,
    "largest_micro_batch": 2.5,
}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "deepspeed", "accelerate", "transformers", "liger-kernel", "torchao"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def run_all(arguments: argparse.Namespace, about: Settings) -> dict[str, Settings]:
    """Measure the rows that the folder has no result of; each result is on disk before the next row begins."""
    deadline = time.monotonic() + arguments.budget_sec
    results: dict[str, Settings] = {}
    for name, row in ROWS.items():
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        row = {**row, "smoke": arguments.smoke}
        if about["compiles"] != "yes":
            row["execution"] = {**row["execution"], "compile": "none"}
        record = arguments.out / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
        known = read_json(record) or {}
        if known.get("row") == row and known.get("about") == about and "not_measured" not in known["result"]:
            results[name] = known["result"]
        else:
            results[name] = measure(row, deadline - time.monotonic(), record.with_suffix(".trace.json.gz"))
            write_json(record, {"row": row, "about": about, "result": results[name]})
        print(f"| {name} | {describe(results[name])} |", flush=True)
    return results


def measure(row: Settings, left_sec: float, trace: Path) -> Settings:
    if left_sec < LEAST_SEC:
        return {"not_measured": "no time left"}
    command = [sys.executable, str(Path(__file__).with_name("gpu_row.py")), json.dumps(row)]
    environment = {**os.environ, "TURBOLM_BENCH_TRACE": str(trace)}
    limit = min(left_sec, MOST_SEC)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            return {"not_measured": " ".join(done.stderr.strip().splitlines()[-3:])[-400:]}
        result: Settings = json.loads(lines[-1])
        return result
    except subprocess.TimeoutExpired:
        return {"not_measured": f"not done after {limit:.0f} s"}


def about_this_machine() -> Settings:
    """What results depend on. Triton compiles against Python.h: without it every row runs eager, and says so."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which(query[0]) else "none"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    compiles = "yes" if header.is_file() else f"no: {header} is missing (python3-dev)"
    return {"gpu": gpu, "compiles": compiles, **versions()}


def describe(result: Settings) -> str:
    if "not_measured" in result:
        return f"not measured: {result['not_measured']}"
    parts = []
    if "tokens_per_sec" in result:
        parts.append(f"{result['tokens_per_sec']:,.0f} tokens/s")
        parts.append(f"MFU {result['mfu']:.1%}" if result["mfu"] else "MFU unknown")
        parts.append(f"peak {result['peak_bytes'] / 2**30:.1f} GiB" if result["peak_bytes"] else "peak unknown")
        parts.append(f"{result['micro_batch_rows']} sequences")
    if "profile" in result:
        count, micro_batches = result["synchronizations"], result["micro_batches"]
        parts.append(f"most of it {result['limited_by']} ({result['profile']})")
        parts.append(f"{count} synchronizations in {micro_batches} micro-batches")
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
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-benchmark"), help="results, traces and caches")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    # The rows, and later calls, share the token store and what was compiled
    for variable, name in (
        ("TURBOLM_BENCH_CACHE", "store"), ("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")
    ):  # fmt: skip
        os.environ.setdefault(variable, str((arguments.out / name).absolute()))
    about = about_this_machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    results = run_all(arguments, about)
    figures = {} if arguments.smoke else figures_of(results)
    met = {name: None if figures.get(name) is None else figures[name] >= goal for name, goal in TARGETS.items()}
    rivals = {name: result for name, result in results.items() if "Trainer" in name}
    print(json.dumps({"bench": "gpu", "figures": figures, "rows": results, "rivals": rivals, "targets": TARGETS,
                      "met": met, "about": about}))  # fmt: skip
    if any("not_measured" in result for result in results.values()) and arguments.smoke:
        sys.exit("a row failed")


if __name__ == "__main__":
    main()
