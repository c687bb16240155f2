"""What a recipe may switch on, in the order it is applied."""

from __future__ import annotations

import torch


def clip_by_value(optimizer: torch.optim.Optimizer, max_grad_value: float) -> None:
    """Clamp every gradient element to ±`max_grad_value` just before the update.

    DeepSpeed clips by norm only. When its inner optimizer steps, gradients are averaged, unscaled and laid out as the
    partitions this rank owns, at every ZeRO stage; clamping is element-wise, so clamping the partitions is the same.
    """

    def clamp(stepped: torch.optim.Optimizer, *_: object) -> None:
        for group in stepped.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.clamp_(-max_grad_value, max_grad_value)

    optimizer.register_step_pre_hook(clamp)
