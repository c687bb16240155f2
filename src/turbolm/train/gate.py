"""Stands between the gradients of a step and its update: what is anomalous is applied on no rank.

DeepSpeed's ZeRO optimizers know a way to drop a step: when the global norm of the gradients is not finite, they clear
every buffer of their stage and offload setting and leave weights and optimizer state as they were. The gate takes that
way for its own reasons too, and keeps apart what the loss scaler of fp16 does on purpose. ZeRO-0 has no such check; the
gate is asked before the engine steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import combine_grad_norm_groups

from turbolm.reliability.anomalies import Anomaly, AnomalyWatch


class UpdateGate:
    """Judges the updates of one engine. Every rank comes to the same answer, from sums over all ranks."""

    def __init__(self, engine: Any, watch: AnomalyWatch):
        self.watch = watch
        self.anomaly: Anomaly | None = None  # of the step that was open last
        self._is_open = False
        self._by_scaler = False
        self._norm: torch.Tensor | float | None = None
        if engine.zero_optimization_stage() > 0:
            self._install(engine)

    def open(self, loss_sum: torch.Tensor, num_targets: int, segment: int) -> None:
        """Before the update of a step; `loss_sum` is this rank's."""
        self.anomaly, self._norm, self._is_open, self._by_scaler = None, None, True, False
        self._loss_sum, self._num_targets, self._segment = loss_sum, num_targets, segment

    def refuses_whole(self, norm: torch.Tensor) -> bool:
        """Whether the open step of ZeRO-0 must not be applied. Collective; waits for the device."""
        sums = torch.stack([self._loss_sum.double(), norm.double().to(self._loss_sum.device)])
        dist.all_reduce(sums)
        loss_sum, norm_sum = sums.tolist()
        return self._refuses(loss_sum / self._num_targets, norm_sum / dist.get_world_size())

    def close(self, engine: Any) -> Anomaly | None:
        """After the step; what was wrong with it."""
        dropped = engine.zero_optimization_stage() > 0 and engine.optimizer.overflow
        if dropped and self.anomaly is None and not self._by_scaler:  # bf16 on stage 1, which has no scaler
            self._refuses(self._global_loss(), math.nan)
        self._is_open = False
        return self.anomaly

    def _refuses(self, loss: float, norm: float) -> bool:
        self.anomaly = self.watch.judge(loss, norm, self._segment)
        return self.anomaly is not None

    def _global_loss(self) -> float:
        """Mean loss of the global batch. Collective; waits for the device."""
        total = self._loss_sum.double()
        dist.all_reduce(total)
        return float(total) / self._num_targets

    def _install(self, engine: Any) -> None:
        """Be asked by DeepSpeed's optimizer of stages 1 to 3 where it knows the norm and has changed nothing yet."""
        zero = engine.optimizer
        looks_for_spikes = self.watch.policy.spikes != "off"
        if not hasattr(zero, "_update_scale"):  # BF16_Optimizer: bf16 on stage 1
            if looks_for_spikes:
                self._guard_step(zero)
            return
        if looks_for_spikes:
            name = "scaled_global_norm" if hasattr(zero, "scaled_global_norm") else "_get_norm_groups"
            setattr(zero, name, self._noting_norm(getattr(zero, name)))
        update_scale: Callable[[bool], None] = zero._update_scale

        def update_scale_or_drop(has_overflow: bool = False) -> None:
            """DeepSpeed calls it once a step, between the norm and the update, and then reads `overflow`."""
            if not self._is_open:
                update_scale(has_overflow)
            elif has_overflow:
                loss = self._global_loss()
                self._by_scaler = engine.fp16_enabled() and math.isfinite(loss)
                if self._by_scaler:
                    update_scale(True)
                else:
                    self._refuses(loss, math.nan)
            elif looks_for_spikes and self._refuses(self._global_loss(), float(self._norm or 0.0) / zero.loss_scale):
                zero.overflow = True
            else:
                update_scale(False)

        zero._update_scale = update_scale_or_drop

    def _noting_norm(self, compute: Callable[[], Any]) -> Callable[[], Any]:
        def noting() -> Any:
            result = compute()
            self._norm = combine_grad_norm_groups(result) if isinstance(result, list) else result
            return result

        return noting

    def _guard_step(self, zero: Any) -> None:
        inner = zero.optimizer
        step = inner.step

        def step_or_drop(*arguments: Any, **keywords: Any) -> Any:
            if self._is_open and self._refuses(self._global_loss(), float(zero._global_grad_norm)):
                zero.overflow = True
                return None
            return step(*arguments, **keywords)

        inner.step = step_or_drop
