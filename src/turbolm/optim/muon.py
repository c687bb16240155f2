"""Muon (kellerjordan.github.io/posts/muon; arXiv 2502.16982) at every ZeRO stage.

The momentum is element-wise, so it lives in the flat partitions of ZeRO. Matrices are assembled only to orthogonalize
an update: each on one process, which sends the parts back to the others. DeepSpeed's own Muon orthogonalizes gradients
before it clips them, so it clips the update and logs the update's norm; here clipping comes first and acts on the
gradient, as without ZeRO.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from turbolm.optim.decay import AdamW, decay_
from turbolm.optim.eigenbasis import precondition
from turbolm.optim.exchange import Assembling

Coefficients = tuple[tuple[float, float, float], ...]

# From the post: steepest at zero, singular values end in about [0.7, 1.2]. One polynomial for every iteration.
_NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),)
# arXiv 2505.16932: the best polynomial for each of 5 iterations, with a safety factor of 1.02, as modded-nanogpt and
# nanochat use them.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
_SAFETY = 1.02
_ROW_EPS = 1e-8


class Muon(AdamW, Assembling):
    """Muon for the groups marked `assembled`, AdamW for the others."""

    def __init__(self, groups: list[dict[str, Any]], *, ns_dtype: torch.dtype, **adamw: Any):
        """Assembled groups have `momentum`, `nesterov`, `ns_steps`, `adjust_lr` and the options of the recipe in
        addition to AdamW's settings."""
        super().__init__(groups, **adamw)
        self.ns_dtype = ns_dtype
        self.start_whole()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Run one step. Collective if parameters are partitioned: all ranks step them in the same order."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["assembled"]]
        loss = super().step(closure)
        self.param_groups = groups
        for group in groups:
            if group["assembled"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_matrices(parameter, group)
        return loss

    def _step_matrices(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum.clone()
        matrices, dtype, step = [update], self.ns_dtype, 0
        with_soap, on_sphere = bool(group.get("soap_every")), group.get("hyperball", False)
        if with_soap:
            step = state.get("step", 0)
            matrices, dtype, state["step"] = [update, gradient], torch.float32, step + 1
        if on_sphere:
            matrices, dtype = [*matrices, parameter], torch.float32

        def transform(own: dict[str, Any], matrix: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
            if with_soap:
                matrix = precondition(own, matrix, more[0], step, group)
            result = self._orthogonal(own, matrix.to(self.ns_dtype), group)
            return move_on_sphere(more[-1], result, group["lr"]) if on_sphere else result

        exchange = self.exchanges.get(id(parameter))
        if exchange is None:
            update = transform(state, *(matrix.to(dtype) for matrix in matrices))
        else:
            exchange.transform(matrices, lambda name, *whole: transform(self.owned[name], *whole), dtype)
        update = update.to(parameter.dtype)
        if on_sphere:
            parameter.sub_(update)
            return
        decay_(parameter, update, group)
        parameter.add_(update, alpha=-group["lr"])

    def _orthogonal(self, own: dict[str, Any], matrix: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        is_polar = group.get("orthogonalization") == "polar_express"
        update = orthogonalise(matrix, group["ns_steps"], POLAR_EXPRESS if is_polar else _NEWTON_SCHULZ)
        update = update * update_scale(matrix.shape, group["adjust_lr"])
        beta2 = group.get("row_beta2")
        return update if beta2 is None else normalise_rows(own, update, beta2, group["adjust_lr"])


def orthogonalise(matrix: torch.Tensor, ns_steps: int, coefficients: Coefficients = _NEWTON_SCHULZ) -> torch.Tensor:
    """Approximate the orthogonal factor U V^T of U S V^T by polynomial iterations in the dtype of `matrix`.

    `coefficients` are those of each iteration, the last for all that follow. A tensor with more than two dimensions is
    a batch of matrices, as for experts.
    """
    is_tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if is_tall else matrix
    safety = 1.0 if coefficients is _NEWTON_SCHULZ else _SAFETY
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * safety).clamp(min=1e-7)
    for number in range(ns_steps):
        a, b, c = coefficients[min(number, len(coefficients) - 1)]
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


def normalise_rows(own: dict[str, Any], update: torch.Tensor, beta2: float, adjust_lr: str) -> torch.Tensor:
    """Divide each row by the root of its running mean square, which `own` keeps (NorMuon, arXiv 2510.05491).

    The result has a root mean square of 0.2, as in algorithm 1 there, or with `original` the norm that `update` has.
    """
    square = update.float().square().mean(-1)
    mean = own.setdefault("row_square", torch.zeros_like(square)).lerp_(square, 1 - beta2)
    result = update.float() / mean.sqrt().add_(_ROW_EPS).unsqueeze(-1)
    rows, columns = update.shape[-2:]
    wanted = 0.2 * math.sqrt(rows * columns)
    if adjust_lr == "original":
        wanted = update.float().norm(dim=(-2, -1), keepdim=True)
    return (result * (wanted / result.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-30))).to(update.dtype)


def move_on_sphere(weight: torch.Tensor, update: torch.Tensor, lr: float) -> torch.Tensor:
    """Return what to subtract from `weight` to go `lr` times its norm against `update` and back to its norm.

    Hyperball (arXiv 2606.16899): the Frobenius norm of a weight stays what it was at the start, so no state holds it.
    """
    norm = weight.norm(dim=(-2, -1), keepdim=True)
    step = update.to(weight.dtype)
    moved = weight - step * (lr * norm / step.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-30))
    return weight - moved * (norm / moved.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-30))


def update_scale(shape: Sequence[int], adjust_lr: str) -> float:
    """Return the factor for an orthogonal update of a matrix of this shape."""
    rows, columns = shape[-2:]
    if adjust_lr == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))  # arXiv 2502.16982, section 2.2: the size of AdamW's updates
