"""Even the load of experts by the bias that chooses them, without a loss (arXiv 2408.15664).

After each update, the bias of an expert that got fewer tokens than the mean rises by a fixed step, and that of one that
got more falls: b_i += u * sign(mean load - load_i). The load is that of the global batch's real tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from turbolm.errors import UserError

# Added to a router's scores to choose experts, outside the gradient.
BALANCING_BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")


@dataclass(frozen=True)
class BiasBalance:
    """The balancing biases of a model, fp32 buffers, each beside the row of the load that is of its experts."""

    biases: list[tuple[int, torch.Tensor]]
    step: float

    @torch.no_grad()
    def update(self, load: torch.Tensor) -> None:
        """Move the biases after an update. Collective.

        `load` is how often this rank's tokens of the global batch chose each expert, fp32 [layers, experts], NaN where
        a layer has fewer experts. Sums of whole numbers are exact, so all ranks move the biases alike.
        """
        total = load.double()
        dist.all_reduce(total)
        moves = self.step * torch.sign(total.nanmean(1, keepdim=True) - total)
        for row, bias in self.biases:
            bias.add_(moves[row, : bias.numel()].view_as(bias))


def find_balance(model: nn.Module, model_type: str, experts: Sequence[nn.Module], step: float) -> BiasBalance:
    """Return what moves the balancing biases of `model` by `step`; `experts` are the modules whose load is counted.

    Raises UserError for a type without such biases, or with one that is not of the experts whose load is counted.
    """
    buffers = {name: buffer for name, buffer in model.named_buffers() if name.endswith(BALANCING_BIASES)}
    key = f"train.router_bias_update: {step:g} cannot act: {model_type}"
    if not buffers:
        raise UserError(f"{key} does not balance its experts by a bias of the routers; set 0")
    rows = {id(module): row for row, module in enumerate(experts)}
    names = {name: rows[id(module)] for name, module in model.named_modules() if id(module) in rows}
    biases = []
    for name, buffer in buffers.items():
        row = _experts_beside(name, names)
        if row is None or buffer.numel() != int(getattr(experts[row], "num_experts", 0)):
            raise UserError(
                f"{key} does not count the tokens of the {buffer.numel()} experts that {name} chooses among; set 0"
            )
        biases.append((row, buffer))
    return BiasBalance(biases, step)


def _experts_beside(bias: str, experts: dict[str, int]) -> int | None:
    """Return the row of the experts in the smallest module that holds the bias and any; None if it holds several."""
    module = bias
    while module:
        module = module.rpartition(".")[0]
        found = [row for name, row in experts.items() if name.startswith(f"{module}.")]
        if found:
            return found[0] if len(found) == 1 else None
    return None
