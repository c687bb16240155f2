"""Cautious AdamW (arXiv 2411.16085): AdamW without the elements of its update that point against the gradient.

The rest is scaled up to make up for the masked share of each tensor. Where ZeRO cuts tensors, that share is counted
over all processes, so the update is the same at every stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from turbolm.engine.partitions import Fragment
from turbolm.optim.decay import decay_


class CautiousAdamW(torch.optim.Optimizer):
    """Algorithm 2 of the paper. Each group names its tensors as `tensor_names`, the same on every rank."""

    param_groups: list[dict[str, Any]]

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.fragments: dict[int, list[Fragment]] = {}  # by the flat partition; none where parameters are whole
        self.device: torch.device | None = None

    def distribute(self, flats: Sequence[torch.Tensor], fragments: Sequence[Fragment], device: torch.device) -> None:
        """Record which parts of the tensors are in this rank's partitions, as `Muon.distribute` does."""
        self.device = device
        self.fragments = {id(flat): [fragment for fragment in fragments if fragment.flat is flat] for flat in flats}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Run one step. Collective if parameters are partitioned."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)

    def _step(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        state["step"] += 1
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        kept = (mean * gradient > 0).to(parameter.dtype)
        self._make_up(kept, parameter, group)
        update = mean * kept
        decay_(parameter, update, group)
        parameter.addcdiv_(update, root, value=-group["lr"] / (1 - beta1 ** state["step"]))

    def _make_up(self, kept: torch.Tensor, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        """Multiply the mask of each tensor by elements / (elements kept + 1)."""
        fragments = self.fragments.get(id(parameter))
        if fragments is None:
            kept.mul_(kept.numel() / (kept.sum() + 1))
            return
        indices = {name: index for index, name in enumerate(group["tensor_names"])}
        # Kept elements and all, of each tensor; summed where the mask is, without waiting for the device.
        counts = torch.zeros(len(indices), 2, dtype=torch.float64, device=kept.device)
        parts = [(indices[fragment.name], kept.narrow(0, fragment.offset, fragment.numel)) for fragment in fragments]
        for index, part in parts:
            counts[index, 0] += part.sum(dtype=torch.float64)
            counts[index, 1] += part.numel()
        counts = counts.to(self.device)
        dist.all_reduce(counts)
        for index, part in parts:
            part.mul_((counts[index, 1] / (counts[index, 0] + 1)).to(part))
