"""Create the state of an optimizer that has not stepped yet, so that a checkpoint can be loaded into it."""

from __future__ import annotations

from itertools import chain

import torch

# Optimizers whose state tensors all have the parameter's shape; by name, because DeepSpeed's compile on import.
_ELEMENT_WISE = {"torch.optim.adamw.AdamW", "deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam"}


def materialise_state(optimizer: torch.optim.Optimizer, by_group: list[list[torch.Tensor]]) -> None:
    """Make the optimizer create its state for `by_group`, the tensors it steps in each of its groups. Collective.

    The optimizer creates the state in its own format, by one update with zero gradients at learning rate 0. If every
    state tensor is known to have the parameter's shape, that update runs on one element per tensor and the state is
    then enlarged: this saves the memory of the gradients and most of the time. The caller overwrites weights and state
    afterwards.
    """
    if f"{type(optimizer).__module__}.{type(optimizer).__name__}" not in _ELEMENT_WISE:
        _step_without_change(optimizer, by_group)
        return
    bare = [[flat for flat in flats if not optimizer.state.get(flat)] for flats in by_group]
    stand_ins = [[torch.zeros(1, dtype=flat.dtype, device=flat.device) for flat in flats] for flats in bare]
    _step_without_change(optimizer, stand_ins)
    for flat, stand_in in zip(chain(*bare), chain(*stand_ins), strict=True):
        optimizer.state[flat] = {
            name: torch.zeros_like(flat, dtype=value.dtype) if torch.is_tensor(value) and value.dim() == 1 else value
            for name, value in optimizer.state.pop(stand_in).items()
        }


@torch.no_grad()
def _step_without_change(optimizer: torch.optim.Optimizer, by_group: list[list[torch.Tensor]]) -> None:
    """Run one update of these tensors instead of the groups' own, with zero gradients at learning rate 0."""
    flats = {id(flat): flat for flats in by_group for flat in flats}
    gradients = {key: flat.grad for key, flat in flats.items()}
    for flat in flats.values():
        flat.grad = torch.zeros_like(flat)
    groups = [(group, group["params"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    hooks = optimizer._optimizer_step_pre_hooks
    optimizer._optimizer_step_pre_hooks = type(hooks)()
    for (group, *_), params in zip(groups, by_group, strict=True):
        group["params"] = params
        group["lr"] = torch.zeros_like(group["lr"]) if torch.is_tensor(group["lr"]) else 0.0  # torchao's
        group["weight_decay"] = 0.0
    optimizer.step()
    optimizer._optimizer_step_pre_hooks = hooks
    for group, params, lr, weight_decay in groups:
        group["params"], group["lr"], group["weight_decay"] = params, lr, weight_decay
    for key, flat in flats.items():
        flat.grad = gradients[key]
