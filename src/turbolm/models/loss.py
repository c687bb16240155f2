"""Token-exact language-model loss: sums over targets, so that any split of a batch adds up to the same number."""

from __future__ import annotations

import torch
import torch.nn.functional as F

IGNORED_TARGET = -100


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The summed negative log likelihood in nats, in fp32.

    `logits` is [..., vocabulary], `targets` has as many entries as there are rows of logits and is already shifted:
    each entry is the token that follows, or `IGNORED_TARGET`.
    """
    return F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(),
        targets.reshape(-1),
        ignore_index=IGNORED_TARGET,
        reduction="sum",
    )
