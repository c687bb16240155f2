"""Launch many small trainings as cells of one process group, so that a launch is paid once for each world size."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turbolm.data.prepare import prepare
from turbolm.recipe.schema import Recipe

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "= x + y", "\n\t"]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mamba": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4},
}
SEQ_LEN = 32
BINS_PER_BATCH = 5  # divided by none of the layouts below: there are always ranks with less than the others


def make_recipe(folder: Path, **sections: dict[str, Any]) -> Recipe:
    """A recipe of a tiny model on a tiny corpus in `folder`; `sections` replace single keys."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        rng = random.Random(0)
        texts = [f"{i} " + " ".join(rng.choices(WORDS, k=1 + int(rng.paretovariate(0.7)) % 90)) for i in range(150)]
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    values: dict[str, dict[str, Any]] = {
        "model": {"config": MODELS["llama"]},
        "tokenizer": {"train": {"vocab_size": 300}},
        "data": {"sources": [{"type": "jsonl", "path": str(corpus)}], "seq_len": SEQ_LEN, "validation": "10%"},
        "train": {
            "budget": 10 * BINS_PER_BATCH * SEQ_LEN,
            "global_batch": BINS_PER_BATCH * SEQ_LEN,
            "precision": "fp32",
            "max_grad_norm": 0.5,
            "seed": 3,
        },
        "optimizer": {"lr": 3e-3},
        "cluster": {"device": "cpu"},
        "execution": {"cache_dir": str(folder / "cache"), "runs_dir": str(folder / "runs"), "prepare_workers": 1},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    return Recipe.model_validate({"name": "cell", **values})


@dataclass
class Cell:
    """One training inside a launch: which model, how it runs, where it starts, which steps it saves."""

    name: str
    model: str = "llama"
    zero_stage: int = 1
    micro_batch_bins: int = BINS_PER_BATCH
    activation_checkpointing: str | int = "none"
    offload_optimizer: bool = False
    precision: str = "fp32"
    train: dict[str, Any] = field(default_factory=dict)
    execution: dict[str, Any] = field(default_factory=dict)  # whatever has no field of its own
    packing: str = "best_fit"
    data: dict[str, Any] = field(default_factory=dict)
    adam_kernel: str = "torch"
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    attention: str = "auto"
    device: str = "cpu"
    steps: int = 10
    load: str | None = None  # a checkpoint folder to start from
    save_at: list[int] = field(default_factory=list)
    save_in: str | None = None
    save_loaded_in: str | None = None  # save what was loaded again, before any step


def cell_recipe(folder: Path, cell: Cell) -> Recipe:
    """The recipe that a cell trains."""
    return make_recipe(
        folder,
        model={"config": MODELS[cell.model]},
        data={"packing": cell.packing, **cell.data},
        train={"precision": cell.precision, **cell.train},
        optimizer=cell.optimizer,
        schedule=cell.schedule,
        cluster={"device": cell.device},
        execution={
            "zero_stage": cell.zero_stage,
            "micro_batch": cell.micro_batch_bins * SEQ_LEN,
            "activation_checkpointing": cell.activation_checkpointing,
            "offload_optimizer": cell.offload_optimizer,
            "adam_kernel": cell.adam_kernel,
            "attention": cell.attention,
            **cell.execution,
        },
    )


def run_cells(folder: Path, world_size: int, cells: list[Cell]) -> dict[str, list[list[float]]]:
    """Train every cell on `world_size` processes of one launch; returns (loss, grad_norm) by step for each name."""
    prepare(cell_recipe(folder, cells[0]))
    jobs, results = folder / f"cells-{world_size}.json", folder / f"results-{world_size}.json"
    jobs.write_text(json.dumps([vars(cell) for cell in cells]), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size), "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "tests.train.cells"]
    done = subprocess.run(
        [*command, str(folder), str(jobs), str(results)],
        cwd=Path(__file__).parents[2],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    trained: dict[str, list[list[float]]] = json.loads(results.read_text(encoding="utf-8"))
    return trained
