"""Launch many small trainings as cells of one world of ranks."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.world import run_world
from turbolm.data.prepare.build import prepare
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
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "router_aux_loss_coef": 0.5},
    "qwen3_moe": {
        "model_type": "qwen3_moe", "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.5,
    },
    "olmoe": {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 1, "router_aux_loss_coef": 0.5},
}  # fmt: skip
MODELS["qwen3"] = {**MODELS["llama"], "model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 1}
MODELS |= {name: {**MODELS["llama"], **mixture} for name, mixture in MIXTURES.items()}
MODELS["glm4_moe"] = {  # balanced by the bias of its routers
    **MODELS["llama"], "model_type": "glm4_moe", "head_dim": 12, "moe_intermediate_size": 16, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1,
}  # fmt: skip
MODELS["crowded"] = {**MODELS["olmoe"], "num_experts": 40}  # more experts than a sequence has tokens
MODELS["dbrx"] = {  # whose experts are a module inside
    "model_type": "dbrx", "d_model": 48, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
    "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 40, "moe_top_k": 1},
}  # fmt: skip
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
    compiler: str = "inductor"  # half a minute of C++; `aot_eager` makes the same graphs, `eager` also of an optimizer
    device: str = "cpu"
    steps: int = 10
    load: str | None = None  # a checkpoint folder to start from
    save_at: list[int] = field(default_factory=list)
    save_in: str | None = None
    save_late_in: str | None = None  # once more, beside the training, copied only when the next update waits for it
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


def run_cells(
    folder: Path, world_size: int, cells: list[Cell], timeout_sec: float = 600
) -> dict[str, list[list[float]]]:
    """Train every cell on `world_size` ranks of one world; returns (loss, grad_norm) by step for each name.

    Of a mixture of experts also its router loss and the norm of the gradient of its routers.
    """
    prepare(cell_recipe(folder, cells[0]))
    trained: dict[str, list[list[float]]] = run_world(
        world_size, _train_cells, folder, cells, device=cells[0].device, timeout_sec=timeout_sec
    )[0]
    return trained


def _train_cells(folder: Path, cells: list[Cell]) -> dict[str, list[list[float]]]:
    from tests.train.cells import train_cell  # the trainer: only its ranks need to import it

    return {cell.name: train_cell(folder, cell) for cell in cells}


def train_in_world(recipe: Recipe, world_size: int = 2) -> int | str:
    """Train prepared data as `turbolm train` does, without its launcher: the exit code, or why the ranks refused."""
    answer: int | str = run_world(world_size, _train_recipe, recipe)[0]
    return answer


def _train_recipe(recipe: Recipe) -> int | str:
    from turbolm.errors import UserError
    from turbolm.train.worker import run_worker

    try:
        return run_worker(recipe)
    except UserError as error:
        return str(error)
