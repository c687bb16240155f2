"""Decoupled weight decay, everywhere or only where it points the same way as the update (arXiv 2510.12402)."""

from __future__ import annotations

from typing import Any

import torch


def decay_(parameter: torch.Tensor, update: torch.Tensor, group: dict[str, Any]) -> None:
    """Shrink `parameter` by the group's weight decay; call it before `update` is subtracted.

    With `cautious_decay` only elements with parameter x update >= 0 shrink (algorithm 1 of the paper).
    """
    amount = group["lr"] * group["weight_decay"]
    if group.get("cautious_decay"):
        parameter.addcmul_(parameter, (parameter * update >= 0).to(parameter.dtype), value=-amount)
    else:
        parameter.mul_(1 - amount)


class AdamW(torch.optim.AdamW):
    """torch's AdamW; groups with `cautious_decay` decay cautiously."""

    param_groups: list[dict[str, Any]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Run one step."""
        cautious = [(group, group["weight_decay"]) for group in self.param_groups if group.get("cautious_decay")]
        for group, _ in cautious:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].get("exp_avg")  # the sign of an update is that of the mean
                    new = parameter.grad if mean is None else mean.lerp(parameter.grad, 1 - group["betas"][0])
                    decay_(parameter, new, group)
            group["weight_decay"] = 0.0
        loss = super().step(closure)
        for group, weight_decay in cautious:
            group["weight_decay"] = weight_decay
        return loss
