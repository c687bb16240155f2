"""Check each step between its gradients and its update: no rank applies an anomaly.

The loss scaler handles an overflow of scaled fp16 gradients; it is not an anomaly.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from turbolm.engine.engine import Engine
from turbolm.reliability.anomalies import Anomaly, AnomalyWatch


class UpdateGate:
    """Decides about the updates of one engine (`engine.hooks.Gate`), from sums over all ranks."""

    def __init__(self, engine: Engine, watch: AnomalyWatch):
        self.watch = watch
        self.anomaly: Anomaly | None = None  # of the last step
        self.is_open = False
        self.judges_finite = watch.policy.spikes != "off"
        self._engine = engine
        self._by_scaler = False
        engine.guard_updates(self)

    def open(self, loss_sum: torch.Tensor, num_targets: int, segment: int) -> None:
        """Start checking a step, before its update; `loss_sum` is this rank's."""
        self.anomaly, self.is_open, self._by_scaler = None, True, False
        self._loss_sum, self._num_targets, self._segment = loss_sum, num_targets, segment

    def refuses(self, norm: torch.Tensor | float) -> bool:
        """Return whether the current step must be skipped. Collective; waits for the device."""
        loss_sum, norm_sum = self._sums(norm)
        self.anomaly = self.watch.judge(loss_sum / self._num_targets, norm_sum / dist.get_world_size(), self._segment)
        return self.anomaly is not None

    def leaves_to_scaler(self) -> bool:
        """Return whether the loss scaler handles an overflow: the loss is finite. Collective; waits for the device."""
        self._by_scaler = math.isfinite(self._sums(0.0)[0])
        return self._by_scaler

    def close(self) -> Anomaly | None:
        """Finish the step; return its anomaly, if any."""
        if self._engine.dropped_update and self.anomaly is None and not self._by_scaler:  # bf16, which has no scaler
            self.refuses(math.nan)
        self.is_open = False
        return self.anomaly

    def _sums(self, norm: torch.Tensor | float) -> list[float]:
        """Return the loss of the global batch, in nats, and the sum of the ranks' norms."""
        norm = torch.as_tensor(norm, dtype=torch.float64, device=self._loss_sum.device)
        sums = torch.stack([self._loss_sum.double(), norm])
        dist.all_reduce(sums)
        return sums.tolist()
