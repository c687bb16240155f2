"""What of fp16, which no CPU trains in, is the loss scaler's business and what is an anomaly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.checkpoint.toy import one_process
from turbolm.engine.engine import Engine
from turbolm.recipe.schema import Anomalies
from turbolm.reliability.anomalies import AnomalyWatch
from turbolm.train.gate import UpdateGate


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    with one_process():
        yield


class Zero:
    """What of DeepSpeed 0.19's ZeRO optimizer of stages 1 and 2 decides about a step, in its order."""

    def __init__(self) -> None:
        self.loss_scale, self.overflow = 1024.0, False
        self.optimizer = None  # of torch, which nothing here asks
        self.scaler_saw: list[bool] = []
        self.updates: list[float] = []

    def scaled_global_norm(self) -> torch.Tensor:
        return self.gradient * self.loss_scale

    def _update_scale(self, has_overflow: bool = False) -> None:
        self.scaler_saw.append(has_overflow)
        self.loss_scale *= 0.5 if has_overflow else 1.0

    def step(self, gradient: float) -> None:
        self.gradient = torch.tensor(gradient)
        self.overflow = not math.isfinite(gradient)  # check_overflow
        if not self.overflow:
            norm = self.scaled_global_norm()
        self._update_scale(self.overflow)
        if not self.overflow:
            self.updates.append(float(norm))


class DeepSpeed:
    module = device = None

    def __init__(self) -> None:
        self.optimizer: Any = Zero()

    def zero_optimization_stage(self) -> int:
        return 2

    def fp16_enabled(self) -> bool:
        return True


def build_gate(policy: Anomalies) -> tuple[UpdateGate, Any]:
    engine = DeepSpeed()
    return UpdateGate(Engine(engine), AnomalyWatch(policy)), engine.optimizer


def train(gate: UpdateGate, zero: Zero, loss: float, gradient: float) -> str | None:
    gate.open(torch.tensor(8 * loss), 8, 0)
    zero.step(gradient)
    anomaly = gate.close()
    gate.watch.decide(anomaly)
    return anomaly.kind if anomaly else None


def test_an_overflow_is_the_scalers_and_a_loss_that_is_not_finite_an_anomaly() -> None:
    gate, zero = build_gate(Anomalies())
    assert train(gate, zero, 2.0, 1.0) is None
    assert train(gate, zero, 2.0, math.inf) is None, "a finite loss whose scaled gradient overflows"
    assert (zero.scaler_saw, zero.loss_scale, len(zero.updates)) == ([False, True], 512.0, 1)
    assert train(gate, zero, math.nan, math.nan) == "non_finite"
    assert (zero.scaler_saw, zero.loss_scale, len(zero.updates)) == ([False, True], 512.0, 1), "not the scaler's"
    assert train(gate, zero, 2.0, 1.0) is None
    assert len(zero.updates) == 2


def test_a_spike_is_judged_by_its_unscaled_norm_and_leaves_the_scale_alone() -> None:
    policy = Anomalies(spikes="skip", window=8, threshold=6.0)
    gate, zero = build_gate(policy)
    for step in range(8):
        assert train(gate, zero, 2.0, 1.0 + step / 8) is None
        zero.loss_scale *= 2
    scale = zero.loss_scale
    assert train(gate, zero, 2.0, 50.0) == "norm_spike"
    assert gate.anomaly is not None
    assert (gate.anomaly.grad_norm, gate.anomaly.loss) == (50.0, 2.0)
    assert (zero.loss_scale, len(zero.updates), zero.scaler_saw) == (scale, 8, [False] * 8)
    assert train(gate, zero, 2.0, 1.5) is None
    assert len(zero.updates) == 9
