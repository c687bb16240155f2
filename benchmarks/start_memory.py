"""Memory of a rank while its model is built at ZeRO stage 3, from a folder and from fresh weights.

    python benchmarks/start_memory.py [--sizes 50 200] [--processes 4] [--kinds folder fresh]

The rise of the anonymous resident memory (RssAnon in /proc/self/status, read every millisecond in a thread) from before
the model is built to before `deepspeed.initialize`, in fp32: its peak and what is left of it, of the process that needs
most. Memory-mapped files are not in it: their pages belong to the page cache, which all processes of a node share. A
small model is built first, so that imports are not counted. The weights are compared with the seed's or the folder's by
a digest over all processes. Each size and kind runs in processes of its own. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

KINDS = ("folder", "fresh")
MB = 2**20
SLACK = 32 * MB  # the target: 1.5 parts of the weights, 2 of the largest tensor, and this


def shape(size_mb: int) -> dict[str, Any]:
    """A Llama of about `size_mb` MiB in fp32 whose tensors are small: what is held whole is seen."""
    layers = max(1, round((size_mb * MB / 4 - 2 * 2048 * 512) / (4 * 512 * 512 + 3 * 512 * 1408)))
    return {"model_type": "llama", "vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1408,
            "num_hidden_layers": layers, "num_attention_heads": 8, "tie_word_embeddings": False}  # fmt: skip


SMALL = {**shape(1), "hidden_size": 32, "intermediate_size": 32}


class Peak:
    """The highest RssAnon of this process, in bytes, since `start`."""

    def __init__(self) -> None:
        self.before = self.highest = rss_anon()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.highest = max(self.highest, rss_anon())

    def stop(self) -> tuple[int, int]:
        """Return how far it rose, at most and at the end."""
        self._done.set()
        self._thread.join()
        now = rss_anon()
        return max(self.highest, now) - self.before, now - self.before


def rss_anon() -> int:
    """Return the anonymous resident memory of this process, in bytes."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def measure(kind: str, size_mb: int, folder: Path) -> dict[str, Any]:
    """Build the model as one rank. Collective."""
    import torch
    import torch.distributed as dist

    from turbolm.engine.start import build_accelerator
    from turbolm.models.build import build_config, build_model
    from turbolm.recipe.schema import Model

    torch.set_num_threads(1)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 3},
    }
    build_accelerator(settings, device="cpu", precision="fp32", timeout_sec=300)

    def build(values: dict[str, Any], at: Path) -> Any:
        section = Model(pretrained=str(at)) if kind == "folder" else Model(config=values)
        config = build_config(section, seq_len=64, vocab_size=2048, bos_token_id=0, eos_token_id=0)
        return build_model(section, config, seed=0, attention="sdpa", sharded_by=settings)

    build(SMALL, folder / "small")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    dist.barrier()
    peak, start = Peak(), time.perf_counter()
    model = build(shape(size_mb), folder / str(size_mb))
    seconds = time.perf_counter() - start
    highest, left = peak.stop()
    digest = hashlib.sha256()
    for parameter in model.parameters():
        part = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.detach()
        if not hasattr(parameter, "ds_tensor"):  # what DeepSpeed would partition later
            size = -(-part.numel() // dist.get_world_size())
            part = part.reshape(-1)[dist.get_rank() * size :][:size]
        digest.update(part.contiguous().numpy().tobytes())
    shapes = [tuple(getattr(parameter, "ds_shape", parameter.shape)) for parameter in model.parameters()]
    sizes = [4 * math.prod(one) for one in shapes]
    return {"rise": highest, "left": left, "seconds": seconds, "weights": sum(sizes), "largest": max(sizes),
            "digest": digest.hexdigest()[:16]}  # fmt: skip


def run_ranks(kind: str, size_mb: int, folder: Path, processes: int) -> dict[str, Any]:
    """Return what the process with the highest peak needed."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = str(listening.getsockname()[1])
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}  # fmt: skip
    command = [sys.executable, __file__, "--rank", kind, str(size_mb), str(folder)]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(processes)
    ]
    answers = [json.loads(rank.communicate(timeout=600)[0].splitlines()[-1]) for rank in ranks]
    worst: dict[str, Any] = max(answers, key=lambda answer: answer["rise"])
    worst["digest"] = "".join(answer["digest"] for answer in answers)
    worst["limit"] = limit(worst, processes)
    return worst


def limit(answer: dict[str, Any], processes: int) -> int:
    """Return how far the memory of a process may rise, in bytes."""
    return int(1.5 * answer["weights"] / processes + 2 * answer["largest"] + SLACK)


def save_folders(folder: Path, sizes: list[int]) -> None:
    """Save a model of each size in bf16, and a small one."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    for name, values in {"small": SMALL, **{str(s): shape(s) for s in sizes}}.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LlamaConfig(**values), dtype=torch.bfloat16).save_pretrained(folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        kind, size_mb, folder = arguments.rank
        answer = measure(kind, int(size_mb), Path(folder))
        print(json.dumps(answer), flush=True)
        os._exit(0)  # ZeRO-3 may abort at exit
    figures = {}
    with tempfile.TemporaryDirectory() as made:
        save_folders(Path(made), arguments.sizes)
        for kind in arguments.kinds:
            for size in arguments.sizes:
                one = figures[f"{kind} {size} MB"] = run_ranks(kind, size, Path(made), arguments.processes)
                in_mb = {name: round(one[name] / MB, 1) for name in ("rise", "left", "limit", "weights", "largest")}
                print(kind, size, in_mb, f"{one['seconds']:.2f} s", flush=True)
    targets = {name: one["limit"] for name, one in figures.items()}
    met = {name: one["rise"] <= one["limit"] for name, one in figures.items()}
    print(json.dumps({"bench": "start_memory", "figures": figures, "rivals": {}, "targets": targets, "met": met}))


if __name__ == "__main__":
    main()
