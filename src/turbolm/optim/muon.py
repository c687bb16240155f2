"""Muon (kellerjordan.github.io/posts/muon; arXiv 2502.16982) at every ZeRO stage.

The momentum is element-wise, so it lives in the flat partitions of ZeRO. Matrices are assembled only to orthogonalize
an update: each on one process, which sends the parts back to the others. DeepSpeed's own Muon orthogonalizes gradients
before it clips them, so it clips the update and logs the update's norm; here clipping comes first and acts on the
gradient, as without ZeRO.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from turbolm.engine.partitions import Fragment
from turbolm.plan.layout import matrix_owners

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # from the post: steepest at zero, singular values end in about [0.7, 1.2]


class Muon(torch.optim.AdamW):
    """Muon for the groups marked `orthogonal`, AdamW for the others."""

    param_groups: list[dict[str, Any]]

    def __init__(self, groups: list[dict[str, Any]], *, ns_dtype: torch.dtype, **adamw: Any):
        """Orthogonal groups have `momentum`, `nesterov`, `ns_steps` and `adjust_lr` in addition to AdamW's settings."""
        super().__init__(groups, **adamw)
        self.ns_dtype = ns_dtype
        self.exchanges: dict[int, _Exchange] = {}  # by the flat partition; none where parameters are whole

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Run one step. Collective if parameters are partitioned: all ranks step them in the same order."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        loss = super().step(closure)
        self.param_groups = groups
        for group in groups:
            if group["orthogonal"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_matrices(parameter, group)
        return loss

    def distribute(self, flats: Sequence[torch.Tensor], fragments: Sequence[Fragment], device: torch.device) -> None:
        """Record which parts of the matrices are in this rank's partitions. Collective; call it once.

        Call it after ZeRO made the partitions. `flats` holds them in the order in which all ranks step them,
        `fragments` this rank's part of each parameter. `device` is where matrices are orthogonalized: the GPU, even if
        the partitions are on the host.
        """
        no_tensor = torch.empty(0)  # other ranks need only the position of a fragment
        here = [[replace(one, flat=no_tensor) for one in fragments if one.flat is flat] for flat in flats]
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, here)
        names = {name for group in self.param_groups if group["orthogonal"] for name in group["tensor_names"]}
        for index, flat in enumerate(flats):
            by_rank = [theirs[index] for theirs in everywhere]
            if any(fragment.name in names for theirs in by_rank for fragment in theirs):
                self.exchanges[id(flat)] = _Exchange(by_rank, device)

    def _step_matrices(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum.clone()

        def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
            scale = update_scale(matrix.shape, group["adjust_lr"])
            return orthogonalise(matrix, group["ns_steps"]) * scale

        exchange = self.exchanges.get(id(parameter))
        if exchange is None:
            update = orthogonal(update.to(self.ns_dtype))
        else:
            exchange.transform(update, orthogonal, self.ns_dtype)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.to(parameter.dtype), alpha=-group["lr"])


def orthogonalise(matrix: torch.Tensor, ns_steps: int) -> torch.Tensor:
    """Approximate the orthogonal factor U V^T of U S V^T by Newton-Schulz iterations in the dtype of `matrix`.

    A tensor with more than two dimensions is a batch of matrices, as for experts.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if is_tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ns_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


def update_scale(shape: Sequence[int], adjust_lr: str) -> float:
    """Return the factor for an orthogonal update of a matrix of this shape."""
    rows, columns = shape[-2:]
    if adjust_lr == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))  # arXiv 2502.16982, section 2.2: the size of AdamW's updates


class _Exchange:
    """Assembles the matrices of one set of partitions, each on one rank, and sends the parts back.

    Where the load allows, a matrix goes to the rank that already holds most of it. At stages 1 and 2, which cut one
    flat tensor of all parameters, only the few matrices that straddle two partitions are sent.
    """

    def __init__(self, by_rank: Sequence[Sequence[Fragment]], device: torch.device):
        self.device = device
        owners, rank = _owners(by_rank), dist.get_rank()
        ranks = range(len(by_rank))
        self.sent = [[fragment for fragment in by_rank[rank] if owners[fragment.name] == other] for other in ranks]
        self.received = [[fragment for fragment in by_rank[other] if owners[fragment.name] == rank] for other in ranks]
        self.shapes = {fragment.name: fragment.shape for fragments in self.received for fragment in fragments}

    def transform(
        self, flat: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
    ) -> None:
        """Replace every matrix in the partition `flat` by function(matrix); matrices are sent as `dtype`."""
        sent = [flat.narrow(0, fragment.offset, fragment.numel) for fragments in self.sent for fragment in fragments]
        parts = _all_to_all(_concatenate(sent, self.device, dtype), self.sent, self.received)
        matrices = {name: parts.new_empty(shape) for name, shape in self.shapes.items()}
        fragments = [fragment for fragments in self.received for fragment in fragments]
        for fragment, part in zip(fragments, parts.split([fragment.numel for fragment in fragments]), strict=True):
            matrices[fragment.name].view(-1).narrow(0, fragment.start, fragment.numel).copy_(part)
        results = {name: function(matrix).reshape(-1) for name, matrix in matrices.items()}
        back = [results[fragment.name].narrow(0, fragment.start, fragment.numel) for fragment in fragments]
        parts = _all_to_all(_concatenate(back, self.device, dtype), self.received, self.sent)
        for target, part in zip(sent, parts.split([target.numel() for target in sent]), strict=True):
            target.copy_(part)


def _owners(by_rank: Sequence[Sequence[Fragment]]) -> dict[str, int]:
    """Assign each matrix to a rank; every rank computes the same assignment."""
    held: dict[str, dict[int, int]] = defaultdict(dict)  # matrix: {rank: elements}
    shapes = {}
    for rank, fragments in enumerate(by_rank):
        for fragment in fragments:
            held[fragment.name][rank] = fragment.numel
            shapes[fragment.name] = fragment.shape
    return matrix_owners(shapes, held)


def _concatenate(parts: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return (
        torch.cat([part.to(device, dtype) for part in parts]) if parts else torch.empty(0, device=device, dtype=dtype)
    )


def _all_to_all(sent: torch.Tensor, to: Sequence[Sequence[Fragment]], of: Sequence[Sequence[Fragment]]) -> torch.Tensor:
    """Send consecutive parts of `sent` to each rank, sized by its parts in `to`; receive parts sized by `of`."""
    sizes_to, sizes_of = ([sum(fragment.numel for fragment in fragments) for fragments in side] for side in (to, of))
    received = sent.new_empty(sum(sizes_of))
    dist.all_to_all_single(received, sent, sizes_of, sizes_to)
    return received
