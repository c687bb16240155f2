"""What optimizers allocate and free again in an update, counted, against what the planner says."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from turbolm.engine.partitions import Fragment
from turbolm.optim.build import build_optimizer
from turbolm.plan.machine import Machine
from turbolm.plan.plan import build_plan
from turbolm.plan.profile import Tensor
from turbolm.plan.zero_memory import estimate_zero_memory
from turbolm.recipe.schema import Recipe

ROWS, COLUMNS = 96, 160
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("adamw", {}),
    ("cautious_adamw", {}),
    ("ademamix", {}),
    ("lion", {}),
    ("sgd", {}),
    ("sgd", {"weight_decay": 0.1, "nesterov": True}),
    ("rmsprop", {}),
    ("rmsprop", {"weight_decay": 0.1, "momentum": 0.5}),
    ("adafactor", {}),
    ("soap", {"precondition_every": 2}),
]


class Peak(TorchDispatchMode):
    """Bytes of the storages that operators make, at most at once, less those of `known` that are freed meanwhile."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.most = 0
        for one in known:
            self._watch(one)
        self.now = 0

    def _watch(self, one: torch.Tensor) -> None:
        storage, key = one.untyped_storage(), one.untyped_storage()._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for one in tree_leaves(output):
            if isinstance(one, torch.Tensor):
                self._watch(one)
        self.most = max(self.most, self.now)
        return output

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


def recipe_of(name: str, settings: dict[str, Any], stage: int = 0, precision: str = "fp32") -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {"config": {"model_type": "llama"}},
            "tokenizer": {"train": {}},
            "data": {"seq_len": 8},
            "train": {"budget": "1M", "global_batch": 1024, "precision": precision},
            "execution": {"zero_stage": stage, "micro_batch": 1024},
            "cluster": {"device": "cpu"},
            "optimizer": {"name": name, **settings},
        }
    )


def predicted(tensors: list[Tensor], recipe: Recipe, world_size: int = 1) -> int:
    machine = Machine(0, None, None, 2, cpu_has_bf16=True, memory_bytes=0)
    plan = build_plan(recipe, machine, world_size=world_size)
    return estimate_zero_memory(tensors, plan).updating.copies


def _tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, gradients and state, of which nothing is held."""
    kept = [*optimizer.state.values(), *getattr(optimizer, "owned", {}).values()]
    for one in (*tree_leaves(kept), *module.parameters(), *(p.grad for p in module.parameters())):
        if isinstance(one, torch.Tensor):
            yield one


def peak_of_a_step(optimizer: torch.optim.Optimizer, module: nn.Module) -> int:
    """Bytes beside parameters, gradients and state from the third step on, when the state is there."""
    most = 0
    for step in range(5):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        if step >= 2:
            with Peak(_tensors(optimizer, module)) as peak:
                optimizer.step()
            assert peak.now <= 64, "a step must hold nothing but scalars for the passes that follow"
            most = max(most, peak.most)
        else:
            optimizer.step()
    return most


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)
def test_the_temporaries_of_an_update(name: str, settings: dict[str, Any]) -> None:
    """One tensor, as ZeRO steps them: a flat part of a group."""
    module = nn.Linear(COLUMNS, ROWS, bias=False)
    recipe = recipe_of(name, settings)
    counted = peak_of_a_step(build_optimizer(module, recipe), module)
    # Nesterov's SGD allocates less with foreach, which a GPU takes; scalars are no matter.
    tensors = [Tensor("weight", (ROWS, COLUMNS), "matrix")]
    assert predicted(tensors, recipe) == pytest.approx(counted, rel=0.02, abs=64)


@pytest.mark.parametrize("settings", [{}, {"soap": {"every": 2}}, {"soap": {"every": 2, "max_dim": 100}}], ids=str)
@pytest.mark.parametrize("shape", [(96, 96), (96, 160), (160, 96), (32, 256)], ids=str)
def test_the_temporaries_of_muon(shape: tuple[int, int], settings: dict[str, Any]) -> None:
    """Of whole matrices at stage 0, the largest last."""
    module = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(shape[1], shape[0], bias=False))
    recipe = recipe_of("muon", settings)
    counted = peak_of_a_step(build_optimizer(module, recipe), module)
    tensors = [Tensor("0.weight", (16, 16), "matrix"), Tensor("1.weight", shape, "matrix")]
    assert predicted(tensors, recipe) == pytest.approx(counted, rel=0.01)


SENT: list[tuple[int, str, dict[str, Any]]] = [
    (1, "muon", {}),
    (2, "muon", {"hyperball": True}),
    (3, "muon", {"hyperball": True, "soap": {"every": 2}}),
    (1, "soap", {"precondition_every": 2}),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("number", "kind", "settings"), SENT, ids=str)
def test_the_temporaries_of_an_exchange(number: int, kind: str, settings: dict[str, Any], precision: str) -> None:
    """Matrices of a flat part, assembled, updated and sent back; a world of one holds and owns all of them."""
    shapes = {"small": (32, 64), "large": (64, 96), "last": (64, 96)}
    module = nn.ModuleDict({name: nn.Linear(shape[1], shape[0], bias=False) for name, shape in shapes.items()})
    recipe = recipe_of(kind, settings, stage=2, precision=precision)
    optimizer = build_optimizer(module, recipe)
    (group,) = optimizer.param_groups
    flat = nn.Parameter(torch.cat([parameter.detach().view(-1) for parameter in group["params"]]))
    fragments, offset = [], 0
    for name, parameter in zip(group["tensor_names"], group["params"], strict=True):
        fragments.append(Fragment(name, tuple(parameter.shape), 0, parameter.numel(), flat, offset))
        offset += parameter.numel()
    group["params"], whole = [flat], nn.ParameterList([flat])
    sent: list[torch.dtype] = []

    def to_itself(received: torch.Tensor, parts: torch.Tensor, *_: list[int]) -> None:
        """Of a world of one. gloo does so too, but lets go of the tensors some time later."""
        sent.append(parts.dtype)
        received.copy_(parts)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        optimizer.distribute([flat], fragments, flat.device)
        with patch.object(dist, "all_to_all_single", to_itself):
            counted = peak_of_a_step(optimizer, whole)
    finally:
        dist.destroy_process_group()
    tensors = [Tensor(f"{name}.weight", shape, "matrix") for name, shape in shapes.items()]
    flat_copy = 4 * len(flat) if precision == "fp32" else 0
    assert predicted(tensors, recipe) - flat_copy == pytest.approx(counted, rel=0.03)
    assert recipe.optimizer.num_exchanged == number and len(sent) == 5 * (number + 1), "and one comes back, in 5 steps"
    in_fp32 = precision == "fp32" or recipe.optimizer.exchanges_fp32
    assert set(sent) == {torch.float32 if in_fp32 else torch.bfloat16}
