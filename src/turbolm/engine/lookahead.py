"""EMA-Nesterov (arXiv 2605.25395): gradients are taken ahead of the weights, along the mean of their movement.

    theta' = A(theta + beta m),    m' = decay m + (1 - decay) (theta' - theta)

where A is the update of any optimizer. The mean m lives with the optimizer's state, in the same partitions, so
checkpoints have it. Between steps the weights are theta: that is what is evaluated and saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_MEAN = "lookahead"


class Lookahead:
    """Moves the tensors that an optimizer steps, before a step and, if nothing was updated, back after it."""

    def __init__(self, decay: float):
        self.decay = decay
        self._before: list[torch.Tensor] = []

    @torch.no_grad()
    def begin(self, optimizer: torch.optim.Optimizer, flats: Sequence[torch.Tensor], beta: float) -> bool:
        """Move the weights ahead by `beta` means; return whether they have to be published to the model."""
        self._before = [flat.detach().clone() for flat in flats]
        for flat in flats if beta else ():
            mean = optimizer.state.get(flat, {}).get(_MEAN)
            if mean is not None:
                flat.add_(mean, alpha=beta)
        return beta > 0

    @torch.no_grad()
    def finish(self, optimizer: torch.optim.Optimizer, flats: Sequence[torch.Tensor], *, is_updated: bool) -> bool:
        """Add the movement of this step to the mean, or without an update restore the weights; return `is_updated`."""
        for flat, before in zip(flats, self._before, strict=True):
            if not is_updated:
                flat.copy_(before)
                continue
            mean = optimizer.state[flat].setdefault(_MEAN, torch.zeros_like(before))
            mean.lerp_(flat - before, 1 - self.decay)
        self._before = []
        return is_updated

    def materialise(self, optimizer: torch.optim.Optimizer, flats: Sequence[torch.Tensor]) -> None:
        """Create the means, which a checkpoint is loaded into."""
        for flat in flats:
            optimizer.state[flat][_MEAN] = torch.zeros_like(flat, requires_grad=False)
