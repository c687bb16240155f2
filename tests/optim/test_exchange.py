"""An update from parts of matrices on two ranks equals the update of the whole matrices, from the same gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.train.harness import make_recipe
from tests.world import run_world
from turbolm.engine.partitions import Fragment

SHAPES = {"square": (12, 12), "wide": (7, 13), "tall": (15, 6), "experts": (3, 8, 5)}
STEPS = 7
CHOICES: list[dict[str, Any]] = [
    {"name": "muon", "cautious_weight_decay": True, "row_beta2": 0.9, "orthogonalization": "polar_express"},
    {"name": "muon", "soap": {"every": 3}, "row_beta2": 0.9},
    {"name": "muon", "hyperball": True, "row_beta2": 0.9},
    {"name": "soap", "precondition_every": 3},
]


def test_parts_are_updated_like_whole_matrices(tmp_path: Path) -> None:
    for moved, error in run_world(2, _largest_errors, tmp_path):
        assert min(moved) > 0.05
        assert max(error) < 1e-5


def _largest_errors(folder: Path) -> tuple[list[float], list[float]]:
    """How far the weights moved, and the largest difference to whole matrices, for each choice and each way to cut."""
    dist.init_process_group("gloo")
    own = folder / str(dist.get_rank())
    own.mkdir()
    moved, errors = [], []
    for choice in CHOICES:
        recipe = make_recipe(own, optimizer={"lr": 0.02, "weight_decay": 0.5, **choice})
        for each in (False, True):
            whole = _train(recipe, None)
            start = torch.cat([_random(0, name).reshape(-1) for name in SHAPES])
            parts = _train(recipe, each)
            expected = {name: value.reshape(-1) for name, value in whole.items()}
            errors += [float((expected[name][a : a + len(v)] - v).abs().max()) for name, (a, v) in parts.items()]
            moved.append(float((torch.cat(list(expected.values())) - start).abs().max()))
    return moved, errors


def _random(step: int, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator)


def _train(recipe: Any, cuts_each: bool | None) -> dict[str, Any]:
    """Train whole matrices, or with `cuts_each` this rank's part of each (stage 3) or of all of them (stages 1, 2)."""
    rank, offset, fragments = dist.get_rank(), 0, {}
    for name in SHAPES:  # the elements [start, end) of each matrix that are here
        numel = _random(0, name).numel()
        middle = -(-numel // 2) if cuts_each else min(max(170 - offset, 0), numel)
        fragments[name] = (0, numel) if cuts_each is None else (0, middle) if rank == 0 else (middle, numel)
        offset += numel
    fragments = {name: place for name, place in fragments.items() if place[0] < place[1]}
    here = {name: _random(0, name).reshape(-1)[start:end] for name, (start, end) in fragments.items()}
    if cuts_each is None:
        params = [torch.nn.Parameter(_random(0, name)) for name in SHAPES]
    else:
        params = [torch.nn.Parameter(torch.cat(list(here.values())))]
    group = {"params": params, "tensor_names": list(SHAPES), "weight_decay": 0.5, "assembled": True}
    optimizer: Any = recipe.optimizer.build([group], recipe)
    if cuts_each is not None:
        own, at = [], 0
        for name, (start, end) in fragments.items():
            own.append(Fragment(name, SHAPES[name], start, end - start, params[0], at))
            at += end - start
        optimizer.distribute(params, own, torch.device("cpu"))
    for step in range(1, STEPS + 1):
        if cuts_each is None:
            for name, parameter in zip(SHAPES, params, strict=True):
                parameter.grad = _random(step, name)
        else:
            parts = [_random(step, name).reshape(-1)[start:end] for name, (start, end) in fragments.items()]
            params[0].grad = torch.cat(parts)
        optimizer.step()
    if cuts_each is None:
        return {name: parameter.detach() for name, parameter in zip(SHAPES, params, strict=True)}
    values = params[0].detach().split([end - start for start, end in fragments.values()])
    return {name: (start, value) for (name, (start, _)), value in zip(fragments.items(), values, strict=True)}
