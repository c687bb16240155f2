"""Training FLOPs of a decoder-only transformer: what `plan`, the estimate and MFU while training count. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from turbolm.plan.parameters import ModelSize
from turbolm.plan.profile import ModelProfile, SpanKind, mean_span

SpanOf = Callable[[SpanKind, int | None], float]
"""The mean keys per query of layers that see at most so many keys, see `plan.profile.mean_span`."""


def training_flops_per_token(model: ModelProfile | ModelSize, span_of: SpanOf) -> float:
    """Return the FLOPs of one forward and backward pass for one token.

        6 N + 12 L H S

    N: the weights a token is multiplied with, which are the matrices of all layers and the output head (tied or not),
    without embeddings, norms and biases; for a mixture of experts only those that a token is sent to. L: layers. H:
    heads x head size. S: keys per query on average. A profile has N and L H as traced, and S for each kind of layer,
    within its window or chunk. A size has them counted or by formula, and every layer sees all keys.

    A matrix takes 2 FLOPs a weight forward (multiply, add) and twice that backward (gradients of input and weight):
    6 N. Attention takes 2 H S for the scores and 2 H S for the weighted values, three times that with the backward
    pass: 12 L H S. This is appendix B of PaLM (arXiv 2204.02311), with the span that causal masking and the limits of
    packed documents leave in place of the whole sequence. Recomputed activations do not count.
    """
    if isinstance(model, ModelSize):
        return 6.0 * model.matmul + 12.0 * model.attention_width * span_of("full", None)
    pairs = sum(
        kind.count * kind.attention_flops_per_pair * span_of(kind.span_kind, kind.span_limit)
        for kind in model.layers
        if kind.span_kind != "none"
    )
    return 3.0 * (model.matrix_flops_per_token + pairs)


def span_of_documents(lengths: Iterable[int]) -> SpanOf:
    """Return the spans in documents of these lengths."""
    documents = list(lengths)
    return lambda kind, limit: mean_span(documents, kind, limit)
