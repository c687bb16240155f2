"""Whole matrices under ZeRO: each is assembled on one rank, its owner, and the parts of a result are sent back.

What an optimizer keeps of a whole matrix stays on the owner, by the parameter's name, so a checkpoint holds it in a
form that any ZeRO stage and world size can read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from turbolm.engine.partitions import Fragment
from turbolm.plan.layout import matrix_owners


class Assembling:
    """Base of an optimizer whose groups marked `assembled` need whole matrices.

    Under ZeRO, `owned` has the state of each matrix that this rank assembles, and `elsewhere` the names of those that
    another rank does.
    """

    param_groups: list[dict[str, Any]]
    exchanges: dict[int, Exchange]  # by the flat partition; none where parameters are whole
    owned: dict[str, dict[str, Any]]
    elsewhere: frozenset[str]

    def start_whole(self) -> None:
        """Begin as without ZeRO, where parameters are whole."""
        self.exchanges, self.owned, self.elsewhere = {}, {}, frozenset()

    def distribute(self, flats: Sequence[torch.Tensor], fragments: Sequence[Fragment], device: torch.device) -> None:
        """Record which parts of the matrices are in this rank's partitions. Collective; call it once.

        Call it after ZeRO made the partitions. `flats` holds them in the order in which all ranks step them,
        `fragments` this rank's part of each parameter. `device` is where matrices are assembled: the GPU, even if the
        partitions are on the host.
        """
        no_tensor = torch.empty(0)  # other ranks need only the position of a fragment
        here = [[replace(one, flat=no_tensor) for one in fragments if one.flat is flat] for flat in flats]
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, here)
        names = {name for group in self.param_groups if group["assembled"] for name in group["tensor_names"]}
        for index, flat in enumerate(flats):
            by_rank = [theirs[index] for theirs in everywhere]
            if any(fragment.name in names for theirs in by_rank for fragment in theirs):
                self.exchanges[id(flat)] = Exchange(by_rank, device)
        self.owned = {name: {} for exchange in self.exchanges.values() for name in exchange.shapes}
        self.elsewhere = frozenset(names - self.owned.keys())


class Exchange:
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
        self, flats: Sequence[torch.Tensor], function: Callable[..., torch.Tensor], dtype: torch.dtype
    ) -> None:
        """Replace every matrix in the partition `flats[0]` by function(its name, it, the same matrix of other flats).

        Matrices are sent as `dtype`.
        """
        assembled = [self._assemble(flat, dtype) for flat in flats]
        results = {name: function(name, *(each[name] for each in assembled)).reshape(-1) for name in self.shapes}
        fragments = [fragment for fragments in self.received for fragment in fragments]
        back = [results[fragment.name].narrow(0, fragment.start, fragment.numel) for fragment in fragments]
        parts = _all_to_all(_concatenate(back, self.device, dtype), self.received, self.sent)
        targets = self._parts_of(flats[0])
        for target, part in zip(targets, parts.split([target.numel() for target in targets]), strict=True):
            target.copy_(part)

    def _assemble(self, flat: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the matrices that this rank owns. Collective."""
        parts = _all_to_all(_concatenate(self._parts_of(flat), self.device, dtype), self.sent, self.received)
        matrices = {name: parts.new_empty(shape) for name, shape in self.shapes.items()}
        fragments = [fragment for fragments in self.received for fragment in fragments]
        for fragment, part in zip(fragments, parts.split([fragment.numel for fragment in fragments]), strict=True):
            matrices[fragment.name].view(-1).narrow(0, fragment.start, fragment.numel).copy_(part)
        return matrices

    def _parts_of(self, flat: torch.Tensor) -> list[torch.Tensor]:
        return [flat.narrow(0, fragment.offset, fragment.numel) for fragments in self.sent for fragment in fragments]


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
