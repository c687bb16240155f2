"""The settings whose collectives are compared with the plan, and what a rank does to record them."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.train.harness import SEQ_LEN, Cell, cell_recipe
from tests.world import run_world
from turbolm.data.prepare.build import prepare
from turbolm.environment import use_flight_recorder
from turbolm.plan.profile import Heads, Tensor
from turbolm.plan.traffic import Collective

RECORDED_STEP = 3
TIED_APART = "ZeRO-3 gpt2 with its embedding far from its head"
_OF_THE_LOOP = ("agreement on targets and stops", "metrics")  # not of `train_step`

# Layers, heads of queries and of keys, size: of `harness.MODELS`.
HEADS = {
    "llama": Heads(2, 4, 2, 12),
    "qwen3": Heads(2, 4, 1, 16),
    "gpt2": Heads(2, 4, 4, 12),
    "mixtral": Heads(2, 4, 2, 12),
}

Key = tuple[str, int, str, int]  # kind, bytes, dtype, ranks of the group


def cell(name: str, world_size: int, accumulation: int, *, train: Any = None, **settings: Any) -> Cell:
    """A cell with `accumulation` micro-batches of one sequence on each rank or group, and none that is filler."""
    groups = world_size // settings.get("execution", {}).get("sequence_parallel", 1)
    tokens = groups * accumulation * SEQ_LEN
    batch = {"global_batch": tokens, "budget": 10 * tokens, **(train or {})}
    return Cell(name=f"{name}, accumulation {accumulation}", micro_batch_bins=1, train=batch, **settings)


def grid(world_size: int) -> list[Cell]:
    """Every stage, in both precisions where there are two, with all that changes its collectives."""
    found = []
    for accumulation in (1, 3):

        def add(name: str, accumulation: int = accumulation, **settings: Any) -> None:
            found.append(cell(name, world_size, accumulation, **settings))

        add("ZeRO-0", zero_stage=0)
        for stage in (1, 2, 3):
            for precision in ("fp32", "bf16"):
                add(f"ZeRO-{stage} {precision}", zero_stage=stage, precision=precision)
                offloaded = {"zero_stage": stage, "precision": precision, "offload_optimizer": True}
                add(f"ZeRO-{stage} {precision} offloaded", **offloaded)
                add(f"ZeRO-{stage} {precision} Muon", zero_stage=stage, precision=precision, optimizer={"name": "muon"})
            add(f"ZeRO-{stage} cautious", zero_stage=stage, optimizer={"name": "cautious_adamw"})
            for model in ("llama", "gpt2", "qwen3_moe"):
                small = {"communication_bucket": 20_000}
                add(f"ZeRO-{stage} {model} small buckets", zero_stage=stage, model=model, execution=small)
            tiny = {"communication_bucket": 5_000, "overlap_communication": True}
            add(f"ZeRO-{stage} buckets below a matrix, overlap", zero_stage=stage, execution=tiny)
        for precision in ("fp32", "bf16"):
            hpz = {"hierarchical_partition": 2}
            add(f"hpZ {precision}", zero_stage=3, precision=precision, execution=hpz)
        add("ZeRO-2 reduced in bf16", zero_stage=2, precision="bf16", execution={"reduce_precision": "bf16"})
        add("ZeRO-0 not clipped", zero_stage=0, train={"max_grad_norm": None})
        add("ZeRO-3 recomputed", zero_stage=3, activation_checkpointing="full")
        add("ZeRO-3 chunked loss", zero_stage=3, execution={"loss": "chunked"})
        add("ZeRO-3 documents alone", zero_stage=3, packing="single")
        for model, stage, recomputed in (("llama", 0, "full"), ("qwen3", 2, "none"), ("gpt2", 3, 2)):
            shared = {"sequence_parallel": world_size}
            again: dict[str, Any] = {"activation_checkpointing": recomputed}
            add(f"ZeRO-{stage} {model} shared sequences", zero_stage=stage, model=model, execution=shared, **again)
        pairs = {"sequence_parallel": 2}
        add("ZeRO-1 bf16 shared sequences", zero_stage=1, precision="bf16", execution=pairs)
        add("ZeRO-2 experts, shared sequences", zero_stage=2, model="mixtral", execution=pairs)
        add(TIED_APART, zero_stage=3, model="gpt2", execution={"communication_bucket": 20_000})
    return found


@dataclass
class Recorded:
    """Of one cell: by rank what it did, and what the plan says."""

    by_rank: list[list[Key]]
    planned: list[Collective]
    stage: int
    counted: list[int | None]  # bytes by rank, of torch's flight recorder

    def seen(self) -> Counter[Key]:
        """What a step did: all ranks alike, but for exchanges, of which the largest over ranks counts."""
        ranks = [[key for key in keys if not (self.stage == 3 and key[0] == "broadcast")] for keys in self.by_rank]
        alike = [[key for key in keys if key[0] != "all_to_all"] for keys in ranks]
        assert all(keys == alike[0] for keys in alike)
        exchanges = zip(*([key for key in keys if key[0] == "all_to_all"] for keys in ranks), strict=True)
        return Counter(alike[0] + [max(keys, key=lambda key: key[1]) for keys in exchanges])

    def expected(self) -> Counter[Key]:
        """The same of the plan, for the calls of a step of `train_step`."""
        counted: Counter[Key] = Counter()
        for one in self.planned:
            if one.what not in _OF_THE_LOOP:
                assert one.calls == int(one.calls)
                counted[one.kind, one.bytes, one.dtype, one.ranks] += int(one.calls)
        return counted

    def differences(self) -> str:
        """What is not as planned: kinds, bytes and counts; at stage 3 the sums of bytes instead of messages."""
        seen, expected = self.seen(), self.expected()
        if self.stage == 3:
            seen, expected = _as_bytes(seen), _as_bytes(expected)
        both = {key: (seen[key], expected[key]) for key in seen | expected if seen[key] != expected[key]}
        return "\n".join(f"{key}: {done} done, {planned} planned" for key, (done, planned) in both.items())


def _as_bytes(counted: Counter[Key]) -> Counter[Key]:
    """Replace what ZeRO-3 groups as its prefetcher and its hooks see fit by one message for every byte."""
    result: Counter[Key] = Counter()
    for (kind, num_bytes, dtype, ranks), number in counted.items():
        if kind in ("all_gather", "reduce_scatter"):
            result[kind, 1, dtype, ranks] += num_bytes * number
        else:
            result[kind, num_bytes, dtype, ranks] += number
    return result


def record(folder: Path, world_size: int, cells: list[Cell]) -> dict[str, Recorded]:
    """Train every cell for `RECORDED_STEP` steps in one world, and record the last."""
    prepare(cell_recipe(folder, cells[0]))
    answers = run_world(world_size, _record, folder, cells, timeout_sec=1200)
    return {
        one.name: Recorded(
            [answer[one.name][0] for answer in answers],
            answers[0][one.name][1],
            one.zero_stage,
            [answer[one.name][2] for answer in answers],
        )
        for one in cells
    }


Answer = tuple[list[Key], list[Collective], int | None]


def _record(folder: Path, cells: list[Cell]) -> dict[str, Answer]:
    use_flight_recorder(os.environ, None)
    return {one.name: _record_cell(folder, one) for one in cells}


def _record_cell(folder: Path, one: Cell) -> Answer:
    import torch.distributed as dist

    from tests.plan.recorder import Recorder
    from tests.train import cells as rank_side
    from turbolm.data.batch.loader import BatchLoader
    from turbolm.data.order.batch_order import recipe_order
    from turbolm.plan.traffic import collectives
    from turbolm.recipe.schema import Anomalies
    from turbolm.reliability.anomalies import AnomalyWatch
    from turbolm.reliability.collectives import bytes_since, last_records
    from turbolm.train.gate import UpdateGate
    from turbolm.train.step import train_step

    build_plan = rank_side.build_plan_of_large_matrices

    def with_reuse(*arguments: Any) -> Any:
        plan = build_plan(*arguments)
        if one.name.startswith(TIED_APART):
            plan.ds_config["zero_optimization"]["stage3_max_reuse_distance"] = 10_000
        return plan

    with patch.object(rank_side, "build_plan_of_large_matrices", with_reuse):
        plan, store, engine, attention = rank_side.build_cell(folder, one)
    order = recipe_order(plan.recipe, store, plan.curriculum, save=False)
    ranks, execution = (dist.get_world_size(), dist.get_rank()), plan.recipe.execution
    loader = BatchLoader(order, store, "train", *ranks, execution.micro_batch, shared_by=execution.sequence_parallel)
    gate = UpdateGate(engine, AnomalyWatch(Anomalies()))
    for step in range(RECORDED_STEP):
        batch = loader.global_batch(step)
        before = last_records()
        with Recorder() as recorder:
            train_step(engine, batch.micro_batches, batch.num_targets, attention, gate)
        counted = bytes_since(before)
    found = collectives(parameters_of(engine), plan, HEADS.get(one.model))
    engine.deepspeed_engine.destroy()
    return recorder.seen, list(found), counted


def parameters_of(engine: Any) -> list[Tensor]:
    """The parameters of an engine's model with their kinds, as a profile has them."""
    from turbolm.optim.groups import parameter_kinds

    kinds = {name: kind for name, _, kind in parameter_kinds(engine.module)}
    names: dict[str, Any] = {"embeddings": "embedding", "head": "head", "matrices": "matrix", "vectors": "vector"}
    shapes = engine.parameter_shapes().items()
    return [Tensor(name, shape, "expert" if ".experts." in name else names[kinds[name]]) for name, shape in shapes]
