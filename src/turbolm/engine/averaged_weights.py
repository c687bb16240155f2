"""A mean of the weights over the steps of a run (arXiv 1803.05407, 2306.03241), which training does not see.

    mean' = mean + share (theta - mean)

One more fp32 vector beside those that the optimizer steps, in the same partitions. It is no part of the optimizer's
state: optimizers take a tensor that has any state for one that they have stepped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from turbolm.engine.partitions import Fragment

_SWAPPED_ELEMENTS = 2**24  # at once, which bounds the memory that a swap takes


class AveragedWeights:
    """The mean of the tensors that an optimizer steps; empty until the first `add`."""

    def __init__(self) -> None:
        self._means: dict[int, torch.Tensor] = {}  # by the identity of the stepped tensor

    @property
    def is_empty(self) -> bool:
        """Return whether there is no mean yet."""
        return not self._means

    def of(self, fragment: Fragment) -> torch.Tensor | None:
        """Return the fragment's elements of the mean, 1-D, in its own memory; None while there is no mean."""
        mean = self._means.get(id(fragment.flat))
        return None if mean is None else fragment.view(mean)

    @torch.no_grad()
    def add(self, flats: Sequence[torch.Tensor], share: float) -> None:
        """Move the mean towards the weights by `share` of their distance; the first time it becomes the weights."""
        for flat in flats:
            mean = self._means.get(id(flat))
            if mean is None:
                self._means[id(flat)] = flat.detach().clone()
            else:
                mean.lerp_(flat, share)

    def clear(self) -> None:
        """Forget the mean."""
        self._means.clear()

    @torch.no_grad()
    def materialise(self, flats: Sequence[torch.Tensor]) -> None:
        """Create the mean, which a checkpoint is loaded into."""
        self._means = {id(flat): torch.zeros_like(flat, requires_grad=False) for flat in flats}

    @torch.no_grad()
    def swap(self, flats: Sequence[torch.Tensor]) -> None:
        """Exchange weights and mean. A second call restores both to the bit."""
        for flat in flats:
            parts = (one.detach().view(-1).split(_SWAPPED_ELEMENTS) for one in (flat, self._means[id(flat)]))
            for weight, mean in zip(*parts, strict=True):
                kept = weight.clone()
                weight.copy_(mean)
                mean.copy_(kept)
