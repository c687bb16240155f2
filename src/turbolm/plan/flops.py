"""Training FLOPs of a decoder-only transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turbolm.plan.parameters import ModelSize, estimate_size


def training_flops_per_token(
    config: Mapping[str, Any], mean_span: float, size: ModelSize | None = None
) -> float | None:
    """Return the FLOPs of one forward and backward pass for one token, or None if unknown.

        6 N + 12 L H S

    N: the weights a token is multiplied with, which are the matrices of all layers and the output head (tied or not),
    without embeddings, norms and biases; for a mixture of experts only those that a token is sent to. L: layers. H:
    heads x head size. S: keys per query on average. For model types without a formula, `size` has N and L H as counted.

    A matrix takes 2 FLOPs a weight forward (multiply, add) and twice that backward (gradients of input and weight):
    6 N. Attention takes 2 H S for the scores and 2 H S for the weighted values, three times that with the backward
    pass: 12 L H S. This is appendix B of PaLM (arXiv 2204.02311), with the span that causal masking and the limits of
    packed documents leave (`plan.profile.mean_span`) in place of the whole sequence. Recomputed activations do not
    count.
    """
    size = estimate_size(config) or size
    return None if size is None else 6.0 * size.matmul + 12.0 * size.attention_width * mean_span
