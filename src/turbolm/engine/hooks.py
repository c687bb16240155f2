"""A gate between the gradients of a step and its update, inside DeepSpeed's ZeRO optimizers.

These optimizers can skip a step: when the global gradient norm is not finite, they clear every buffer of their stage
and offload setting and leave weights and optimizer state unchanged. The gate skips steps the same way, for its own
reasons. ZeRO-0 has no such check; there `Engine.backward_and_step` calls the gate before it steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from deepspeed.runtime.utils import combine_grad_norm_groups


class Gate(Protocol):
    """Decides whether updates are applied. Its queries are collective and return the same answer on every rank."""

    @property
    def is_open(self) -> bool:
        """Return whether the next update is to be checked."""

    @property
    def judges_finite(self) -> bool:
        """Return whether it also refuses updates with finite gradients; if not, `refuses` is not called for them."""

    def refuses(self, norm: torch.Tensor | float) -> bool:
        """Return whether to skip the update; `norm` is that of the gradients before clipping, NaN if unknown."""

    def leaves_to_scaler(self) -> bool:
        """Return whether the loss scaler handles an overflow of scaled gradients."""


def install_gate(zero: Any, gate: Gate, *, scales_loss: bool) -> None:
    """Hook `gate` into the ZeRO 1-3 optimizer after the gradient norm is known and before any state changes."""
    if not hasattr(zero, "_update_scale"):  # BF16_Optimizer: bf16 on stage 1
        if gate.judges_finite:
            _guard_step(zero, gate)
        return
    norms: list[torch.Tensor | float] = [0.0]
    if gate.judges_finite:
        name = "scaled_global_norm" if hasattr(zero, "scaled_global_norm") else "_get_norm_groups"
        setattr(zero, name, _noting_norm(getattr(zero, name), norms))
    update_scale: Callable[[bool], None] = zero._update_scale

    def update_scale_or_drop(has_overflow: bool = False) -> None:
        """DeepSpeed calls this once a step, between norm and update. Sets `overflow` if the gate refuses."""
        if not gate.is_open:
            update_scale(has_overflow)
        elif has_overflow:
            if scales_loss and gate.leaves_to_scaler():
                update_scale(True)
            else:
                gate.refuses(math.nan)
        elif gate.judges_finite and gate.refuses(float(norms[-1]) / zero.loss_scale):
            zero.overflow = True
        else:
            update_scale(False)

    zero._update_scale = update_scale_or_drop


def _noting_norm(compute: Callable[[], Any], norms: list[torch.Tensor | float]) -> Callable[[], Any]:
    def noting() -> Any:
        result = compute()
        norms[:] = [combine_grad_norm_groups(result) if isinstance(result, list) else result]
        return result

    return noting


def _guard_step(zero: Any, gate: Gate) -> None:
    step = zero.optimizer.step

    def step_or_drop(*arguments: Any, **keywords: Any) -> Any:
        if gate.is_open and gate.refuses(float(zero._global_grad_norm)):
            zero.overflow = True
            return None
        return step(*arguments, **keywords)

    zero.optimizer.step = step_or_drop
