"""Build the torch optimizer of a recipe's `optimizer` section, in a form that DeepSpeed accepts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from turbolm.optim.groups import build_param_groups
from turbolm.recipe.schema import Recipe


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimizer over the model's parameter groups (`turbolm.optim.groups`)."""
    settings = recipe.optimizer
    kinds = {"assembled": settings.assembled, "own_decays": recipe.schedule.own_decays}
    groups = build_param_groups(model, settings.weight_decay, settings.lr_scales, **kinds)
    for group in groups if getattr(settings, "cautious_weight_decay", False) else ():
        group["cautious_decay"] = True
    optimizer = settings.build(groups, recipe)
    if settings.package == "pytorch_optimizer":
        count_steps_in_state(optimizer)
    return optimizer


def count_steps_in_state(optimizer: torch.optim.Optimizer) -> None:
    """Keep the step count with the moments; pytorch-optimizer keeps it in the parameter group.

    At stage 3 DeepSpeed steps a group's partitions one by one, which would count each as a step of the group. A
    checkpoint also stores state by parameter.
    """

    def before(stepped: torch.optim.Optimizer, *_: object) -> None:
        for group in stepped.param_groups:
            counted = [stepped.state[p]["step"] for p in group["params"] if "step" in stepped.state.get(p, {})]
            group["step"] = counted[0] if counted else 0

    def after(stepped: torch.optim.Optimizer, *_: object) -> None:
        for group in stepped.param_groups:
            for parameter in group["params"]:
                if parameter in stepped.state:
                    stepped.state[parameter]["step"] = group["step"]

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def eight_bit_share(tensors: Iterable[torch.Tensor]) -> float:
    """Return the share of elements whose moments torchao keeps in 8 bits: tensors of at least 16 full blocks of 256."""
    sizes = [tensor.numel() for tensor in tensors]
    return sum(size for size in sizes if size >= 4096 and size % 256 == 0) / max(sum(sizes), 1)
