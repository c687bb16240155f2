"""SOAP (arXiv 2409.11321) at every ZeRO stage, and its preconditioner alone, for Muon."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from pytorch_optimizer import SOAP

from turbolm.optim.exchange import Assembling


class Soap(SOAP, Assembling):
    """pytorch-optimizer's SOAP. Under ZeRO 1 to 3 it runs on the owner of each matrix, with all state of the matrix."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any):
        super().__init__(groups, **settings)
        self.start_whole()
        self.of_one = SOAP([torch.zeros(1)])  # its parameter, group and state are replaced by those of one matrix

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Run one step. Collective if parameters are partitioned: all ranks step them in the same order."""
        groups = self.param_groups
        parts = [group for group in groups if any(id(parameter) in self.exchanges for parameter in group["params"])]
        self.param_groups = [group for group in groups if not any(group is one for one in parts)]
        loss = super().step(closure)
        self.param_groups = groups
        for group in parts:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_parts(parameter, group)
            group["step"] = group.get("step", 0) + 1
        return loss

    def _step_parts(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        """Update this rank's part of some matrices. The first step only fills the preconditioners, as in SOAP."""
        step = group.get("step", 0)
        scalars = {"precondition_frequency": group["precondition_frequency"], "shampoo_beta": group["betas"][1]}
        self.state[parameter] |= {"step": step + 1, **scalars}  # what `SOAP` keeps with a whole parameter
        update = parameter.grad.clone()
        self.exchanges[id(parameter)].transform(
            [update], lambda name, gradient: self._update(self.owned[name], gradient, group), torch.float32
        )
        if step > 0:
            parameter.add_(update, alpha=-group["lr"])
            parameter.mul_(1 - group["lr"] * group["weight_decay"])

    def _update(self, state: dict[str, Any], gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Return what SOAP subtracts from a matrix at learning rate 1, without weight decay."""
        weight = torch.zeros_like(gradient)
        weight.grad = gradient
        self.of_one.state = defaultdict(dict, {weight: state})
        self.of_one.param_groups = [{"step": 0, **group, "params": [weight], "lr": 1.0, "weight_decay": 0.0}]
        self.of_one.step()
        self.of_one.state, self.of_one.param_groups = defaultdict(dict), []  # which hold the weight and its gradient
        return -weight
