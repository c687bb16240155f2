"""One optimizer step, exact in tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from turbolm.engine.engine import Engine
from turbolm.models.attention import model_inputs
from turbolm.reliability import heartbeat
from turbolm.reliability.anomalies import Anomaly
from turbolm.train.gate import UpdateGate
from turbolm.train.pace import ForwardTime


@dataclass(frozen=True)
class StepResult:
    """This rank's summed loss in nats, and the global gradient norm before clipping (not finite: no update).

    The device may still be computing them; reading them waits. With an `anomaly` no rank has updated. For a mixture of
    experts also this rank's router loss, summed over tokens, and the choices that each expert got, fp32 [layers,
    experts], as far as the type has them.
    """

    loss_sum: torch.Tensor
    grad_norm: torch.Tensor | float | None
    forward: ForwardTime
    anomaly: Anomaly | None = None
    router_loss_sum: torch.Tensor | None = None
    expert_load: torch.Tensor | None = None


def train_step(
    engine: Engine,
    micro_batches: list[dict[str, np.ndarray]],
    num_targets: int,
    attention: str,
    gate: UpdateGate | None = None,
    segment: int = 0,
) -> StepResult:
    """Forward and backward of this rank's micro-batches of one global batch, then the update.

    `num_targets` counts the valid targets of the global batch, over all ranks and micro-batches. Each micro-batch's
    summed loss is divided by it, so that the gradient is that of the mean over the global batch whatever the split:
    DeepSpeed averages over ranks, hence the factor `world_size`. Ranks that share sequences add up like others, each
    with the targets of its slices. So is the router loss, which is a sum over the tokens that are not padding: each has
    a target. `gate` keeps anomalies from being applied; `segment` is the curriculum's.
    """
    scale = dist.get_world_size() / num_targets
    loss_sum = torch.zeros((), device=engine.device)
    grad_norm = None
    forward = ForwardTime(engine)
    router_loss_sum = expert_load = None
    for index, micro_batch in enumerate(micro_batches):
        with forward:
            objective, nll, *routed = micro_batch_loss(engine, micro_batch, attention)
        heartbeat.advance()
        loss_sum += nll
        if routed:
            router_loss_sum, expert_load = _added(router_loss_sum, routed[0]), _added(expert_load, routed[1])
        is_boundary = index == len(micro_batches) - 1
        if gate and is_boundary:
            gate.open(loss_sum, num_targets, segment)
        # A loss that is not finite makes every gradient not finite: through the norm, all ranks see it.
        weighted = objective * (nll.detach() * 0 + scale)
        grad_norm = engine.backward_and_step(weighted, is_boundary=is_boundary)
        heartbeat.advance()
    anomaly = gate.close() if gate else None
    if engine.balance is not None and expert_load is not None and anomaly is None and not engine.dropped_update:
        engine.balance.update(expert_load)
    return StepResult(loss_sum, grad_norm, forward, anomaly, router_loss_sum, expert_load)


def micro_batch_loss(
    engine: Engine, micro_batch: dict[str, np.ndarray], attention: str, *, per_token: bool = False
) -> tuple[Any, ...]:
    """Return the objective of one micro-batch and its negative log likelihood; both summed, in nats.

    With gradients, a mixture of experts adds its router loss and load, as in `StepResult`. With `per_token`, which has
    no gradients, the loss of each target comes third, fp32 [positions].
    """
    targets = torch.from_numpy(micro_batch["targets"]).to(engine.device, non_blocking=True)
    inputs = model_inputs(micro_batch, attention, engine.device)
    loss: tuple[Any, ...] = engine(**inputs, targets=targets, **({"per_token": True} if per_token else {}))
    return loss


def _added(total: torch.Tensor | None, value: torch.Tensor | None) -> torch.Tensor | None:
    return value if total is None or value is None else total + value
