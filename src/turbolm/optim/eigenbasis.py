"""The eigenbasis of Shampoo's preconditioner, in which Muon's momentum is scaled before it is made orthogonal.

SOAP-Muon (nikhilvyas.github.io/SOAP_Muon.pdf), as in results 14 and 44 of modded-nanogpt's optimization benchmark.
"""

from __future__ import annotations

from typing import Any

import torch

_SIDES = (("rows", -2), ("columns", -1))
_EPS = 1e-8


def precondition(
    state: dict[str, Any], momentum: torch.Tensor, gradient: torch.Tensor, step: int, group: dict[str, Any]
) -> torch.Tensor:
    """Return the momentum divided by its root mean square in the eigenbasis, at its own norm; update `state` after it.

    `step` counts from 0. The first step has no basis yet: it returns the momentum. Tensors with more dimensions are
    batches of matrices. Sides longer than the group's `soap_max_dim` keep their axes.
    """
    if step == 0:
        state["exp_avg_sq"] = torch.zeros_like(momentum)
        result = momentum
    else:
        rotated = _rotate(state, momentum)
        square = state["exp_avg_sq"].lerp_(rotated.square(), 1 - group["soap_beta2"])
        result = _rotate(state, rotated / square.sqrt().add_(_EPS), back=True)
        norms = (one.norm(dim=(-2, -1), keepdim=True) for one in (momentum, result))
        result = result * (next(norms) / next(norms).clamp(min=_EPS))
    for side, dim in _SIDES:
        if gradient.size(dim) <= group["soap_max_dim"]:
            _follow(state, side, dim, gradient, step, group)
    return result


def _follow(
    state: dict[str, Any], side: str, dim: int, gradient: torch.Tensor, step: int, group: dict[str, Any]
) -> None:
    """Add the gradient to the covariance of one side; every `soap_every` steps, turn the basis to its eigenvectors."""
    outer = gradient @ gradient.mT if dim == -2 else gradient.mT @ gradient
    covariance = state.setdefault(side, torch.zeros_like(outer)).lerp_(outer, 1 - group["soap_beta2"])
    if step == 0:
        state[f"{side}_basis"] = torch.linalg.eigh(covariance)[1].flip(-1).contiguous()
    elif step % group["soap_every"] == 0:  # one power iteration; the mean square follows the order of eigenvalues
        basis = state[f"{side}_basis"]
        power = covariance @ basis
        order = (basis * power).sum(-2).argsort(-1, descending=True)
        square = state["exp_avg_sq"]
        state["exp_avg_sq"] = torch.take_along_dim(square, order.unsqueeze(-1 if dim == -2 else -2), dim)
        state[f"{side}_basis"] = torch.linalg.qr(torch.take_along_dim(power, order.unsqueeze(-2), -1))[0].contiguous()


def _rotate(state: dict[str, Any], matrix: torch.Tensor, back: bool = False) -> torch.Tensor:
    rows, columns = state.get("rows_basis"), state.get("columns_basis")
    if rows is not None:
        matrix = (rows if back else rows.mT) @ matrix
    if columns is not None:
        matrix = matrix @ (columns.mT if back else columns)
    return matrix
