"""The engine of 64 and 512 ranks: partitions, fragments, process groups and open files, without the machines.

A rank of a fake world (torch's `fake` backend) builds the real engine from a real plan; its collective operations do
nothing, so values are of no use, and ZeRO-3, whose forward pass gathers weights, is not run. What a rank owns is
compared with what its place says by hand.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.train.harness import MODELS, SEQ_LEN, make_recipe
from tests.world import run_world
from turbolm.plan.machine import Machine
from turbolm.plan.plan import Plan, build_plan
from turbolm.reliability.open_files import num_gloo_groups

RANKS = [(64, 0), (64, 1), (64, 63), (512, 0), (512, 1), (512, 255), (512, 511)]
VOCABULARY = 320
H, MLP, KV, LAYERS = 48, 96, 24, 2  # hidden, intermediate, and all key heads of MODELS["llama"]
LAYER = {
    "self_attn.q_proj": H * H, "self_attn.k_proj": KV * H, "self_attn.v_proj": KV * H, "self_attn.o_proj": H * H,
    "mlp.gate_proj": MLP * H, "mlp.up_proj": MLP * H, "mlp.down_proj": H * MLP, "input_layernorm": H,
    "post_attention_layernorm": H,
}  # fmt: skip
SIZES = {  # elements of every parameter, from the definition of the Llama architecture
    "model.embed_tokens.weight": VOCABULARY * H,
    **{f"model.layers.{n}.{name}.weight": size for n in range(LAYERS) for name, size in LAYER.items()},
    "model.norm.weight": H,
    "lm_head.weight": VOCABULARY * H,
}
# The parameters that are decayed, and those that are not: one flat tensor for each on every rank.
GROUPS = [
    [name for name in SIZES if "proj" in name or "lm_head" in name],
    [name for name in SIZES if "proj" not in name and "lm_head" not in name],
]


def plan_of(folder: Path, world_size: int, stage: int, precision: str) -> Plan:
    recipe = make_recipe(
        folder,
        model={"config": {**MODELS["llama"], "vocab_size": VOCABULARY, "tie_word_embeddings": False}},
        train={"global_batch": 2 * world_size * SEQ_LEN, "budget": 8 * world_size * SEQ_LEN, "precision": precision},
        cluster={"device": "cpu", "num_nodes": world_size // 8, "processes_per_node": 8, "slurm": {}},
        execution={"zero_stage": stage, "micro_batch": SEQ_LEN},
    )
    return build_plan(recipe, Machine(0, None, None, 8, False, 10**10), world_size)


def build(folder: Path, world_size: int, rank: int, layouts: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """What one rank of a fake world owns, in each layout (stage, precision)."""
    import torch
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from turbolm.engine.device import DTYPES
    from turbolm.engine.start import build_accelerator, wrap
    from turbolm.models.build import build_config, build_model
    from turbolm.optim.build import build_optimizer

    local = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank % 8, "LOCAL_WORLD_SIZE": 8}
    os.environ |= {name: str(number) for name, number in local.items()}
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    found = []
    for stage, precision in layouts:
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        plan = plan_of(folder, world_size, stage, precision)
        files, began = len(os.listdir("/proc/self/fd")), time.perf_counter()
        accelerator = build_accelerator(plan.ds_config, device="cpu", precision=precision, timeout_sec=60)
        config = build_config(plan.recipe.model, seq_len=SEQ_LEN, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1)
        model = build_model(
            plan.recipe.model, config, seed=1, attention="sdpa",
            sharded_by=plan.ds_config if stage == 3 else None, held_as=(DTYPES[precision], torch.device("cpu")),
        )  # fmt: skip
        optimizer = build_optimizer(model, plan.recipe)
        engine = wrap(accelerator, model, optimizer)
        fragments = engine.fragments()
        engine.materialise_state()  # of what this rank steps, if that is nothing but padding
        seconds = time.perf_counter() - began
        groups = dist.distributed_c10d._world.pg_group_ranks.values()
        found.append({
            "fragments": [(one.name, one.shape, one.start, one.numel, one.offset) for one in fragments],
            "flats": [tensor.numel() for tensor in engine.stepped_partitions()],
            "held": sum(one.view(one.flat).numel() for one in fragments),
            "state": sum(tensor.numel() for one in engine.optimizer.state.values() for tensor in one.values()),
            "groups_of_all": sum(len(ranks) == world_size for ranks in groups), "groups": len(list(groups)),
            "files": len(os.listdir("/proc/self/fd")) - files, "seconds": seconds,
        })  # fmt: skip
        engine.deepspeed_engine.destroy()
    return found


def expected(world_size: int, rank: int, stage: int) -> list[tuple[str, int, int, int]]:
    """(parameter, first element, number of elements, place in the flat tensor) of what a rank owns, by hand."""
    if stage == 0:
        return [(name, 0, size, 0) for name, size in SIZES.items()]
    found = []
    for names in GROUPS:
        place = 0
        if stage == 3:  # an equal part of every parameter, rounded up
            for name in names:
                part = math.ceil(SIZES[name] / world_size)
                numel = min(part, SIZES[name] - rank * part)
                if numel > 0:
                    found.append((name, rank * part, numel, place))
                place += part
            continue
        part = flat_size(world_size, stage, names)
        begin = 0  # of the parameter, in all of the group's parameters one after the other
        for name in names:
            start, end = max(rank * part, begin), min((rank + 1) * part, begin + SIZES[name])
            if start < end:
                found.append((name, start - begin, end - start, start - rank * part))
            begin += SIZES[name]
    return found


def flat_size(world_size: int, stage: int, names: list[str]) -> int:
    """Elements of a rank's flat tensor: at stages 1 and 2 an even number, so that all begin at 4 bytes in bf16."""
    if stage == 3:
        return sum(math.ceil(SIZES[name] / world_size) for name in names)
    return 2 * math.ceil(sum(SIZES[name] for name in names) / (2 * world_size))


def check(folder: Path, world_size: int, rank: int, layouts: list[tuple[int, str]]) -> None:
    found = run_world(1, build, folder, world_size, rank, layouts)[0]
    for (stage, precision), owned in zip(layouts, found, strict=True):
        case = f"rank {rank} of {world_size}, stage {stage}, {precision}"
        wanted = sorted(expected(world_size, rank, stage))
        assert sorted((name, start, numel, offset) for name, _, start, numel, offset in owned["fragments"]) == wanted, (
            case
        )
        assert {name: math.prod(shape) for name, shape, *_ in owned["fragments"]}.items() <= SIZES.items(), case
        flats = [flat_size(world_size, stage, names) for names in GROUPS] if stage else []
        assert owned["flats"] == flats, case
        assert owned["held"] == sum(numel for _, _, numel, _ in wanted), case
        moments = 2 * (sum(flats) or sum(SIZES.values()))
        assert moments <= owned["state"] <= moments + len(SIZES), case  # and the number of steps of each tensor
        assert owned["groups"] == owned["groups_of_all"] == num_gloo_groups("cpu"), case
        assert owned["files"] <= 2 and owned["seconds"] < 30, case


@pytest.mark.parametrize(("world_size", "rank"), [(512, 255), (512, 511)])
def test_a_rank_of_many_owns_its_part(world_size: int, rank: int, tmp_path: Path) -> None:
    check(tmp_path, world_size, rank, [(2, "fp32"), (3, "bf16")])


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "rank"), RANKS)
def test_a_rank_of_many_owns_its_part_in_every_layout(world_size: int, rank: int, tmp_path: Path) -> None:
    check(tmp_path, world_size, rank, [(0, "fp32"), (1, "fp32"), (2, "bf16"), (1, "bf16"), (3, "fp32")])


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [64, 512])
def test_the_parts_of_all_ranks_tile_every_parameter(world_size: int, stage: int) -> None:
    owners: dict[str, list[tuple[int, int]]] = {name: [] for name in SIZES}
    for rank in range(world_size):
        for name, start, numel, _ in expected(world_size, rank, stage):
            owners[name].append((start, numel))
    for name, parts in owners.items():
        ends = [0, *(start + numel for start, numel in sorted(parts))]
        assert [start for start, _ in sorted(parts)] == ends[:-1] and ends[-1] == SIZES[name], name
