"""One optimizer step, exact in tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from turbolm.models.attention import model_inputs
from turbolm.models.loss import Loss
from turbolm.reliability import heartbeat
from turbolm.train.engine import backward_and_step


@dataclass(frozen=True)
class StepResult:
    """This rank's summed loss in nats, and the global gradient norm before clipping (None: the update was skipped).

    Both may still be on their way on the device; reading them waits for it.
    """

    loss_sum: torch.Tensor
    grad_norm: torch.Tensor | float | None


def train_step(engine: Any, micro_batches: list[dict[str, np.ndarray]], num_targets: int, attention: str) -> StepResult:
    """Forward and backward of this rank's micro-batches of one global batch, then the update.

    `num_targets` counts the valid targets of the whole global batch, over all ranks and micro-batches. Each
    micro-batch's summed loss is divided by it, so that the gradient is that of the mean over the global batch whatever
    the split: DeepSpeed averages over ranks, hence the factor `world_size`.
    """
    scale = dist.get_world_size() / num_targets
    loss_sum = torch.zeros((), device=engine.device)
    grad_norm = None
    for index, micro_batch in enumerate(micro_batches):
        objective, nll = micro_batch_loss(engine, micro_batch, attention)
        heartbeat.advance()
        is_boundary = index == len(micro_batches) - 1
        grad_norm = backward_and_step(engine, objective * scale, is_boundary=is_boundary)
        heartbeat.advance()
        loss_sum += nll
    return StepResult(loss_sum, grad_norm)


def micro_batch_loss(engine: Any, micro_batch: dict[str, np.ndarray], attention: str) -> Loss:
    """What is minimised for one micro-batch, and its negative log likelihood; both summed, in nats."""
    targets = torch.from_numpy(micro_batch["targets"]).to(engine.device, non_blocking=True)
    loss: Loss = engine(**model_inputs(micro_batch, attention, engine.device), targets=targets)
    return loss
