"""What one process does in an optimizer step, in amounts that a machine has rates for. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from turbolm.plan.profile import Kernel, LayerKind, Loss, ModelProfile, Recomputation, Tensor, chunk_rows, mean_span

Unit = Literal[
    "matrix_flops",  # of matrix products
    "matrix_bytes",  # operands and results of matrix products, each once
    "products",  # number of matrix products
    "attention_flops",  # of the pairs of query and key that the kernel computes
    "attention_pairs",  # those pairs, for each head
    "attention_rows",  # queries, for each head
    "memory_bytes",  # read and written by all other operators of the layers and around them
    "layers",  # passes of a layer, forward and backward together: operators to start, whatever their size
    "logits",  # tokens x vocabulary: the loss, without its matrix products
    "gradient_bytes",  # read and written to sum gradients up and prepare their reduction
    "gradients",  # tensors of them, in every micro-batch and the update: operators to start, whatever their size
    "optimizer_bytes",  # read and written by the update of the weights
    "offloaded_bytes",  # the same, by the host
]
Amounts = Mapping[Unit, float]

_PASSES = 3  # a forward pass and a backward pass, whose products and attention have twice the FLOPs


@dataclass(frozen=True)
class Shape:
    """A micro-batch and how it is computed."""

    tokens: int
    seq_len: int
    kernel: Kernel
    element_bytes: int
    head_dim: int
    documents: tuple[int, ...]  # lengths of documents, as a sample: what a kernel without dense masks computes
    recomputation: Recomputation = "none"
    recomputed_share: float = 1.0  # of the layers, where there is recomputation
    loss: Loss = "full"
    device: str = "cuda"  # which chooses the chunks of a loss
    shared_by: int = 1  # processes that have a slice of each sequence

    @property
    def mask_len(self) -> int:
        """Return the entries of dense masks for each token: every process makes those of its whole sequences."""
        return self.seq_len * self.shared_by


def product_amounts(rows: float, inner: int, outer: int, element_bytes: int, passes: float = _PASSES) -> Amounts:
    """Return what a product [rows, inner] x [inner, outer] takes, in so many passes of the FLOPs of a forward pass."""
    return {
        "matrix_flops": passes * 2 * rows * inner * outer,
        "matrix_bytes": passes * element_bytes * (rows * (inner + outer) + inner * outer),
        "products": passes,
    }


def head_amounts(
    tokens: int, head: tuple[int, int], element_bytes: int, loss: Loss, device: str, tied: bool
) -> Amounts:
    """Return what the products of the head [vocabulary, width] take, and its gradient beside them, without FLOPs.

    A loss in chunks multiplies chunk by chunk and adds each one's gradient of the head to a sum in fp32
    (`models.loss.chunked_linear_loss`); a tied head's is added to that of the embedding.
    """
    rows = chunk_rows(loss, tokens, *head, device)
    chunks = math.ceil(tokens / rows) if rows else 1
    one = product_amounts(tokens / chunks, head[1], head[0], element_bytes)
    moved = 3.0 * element_bytes if tied else 0.0
    if rows:
        moved += 4 + 8 + 4 + element_bytes + chunks * (8 + element_bytes)  # cleared, scaled, rounded; added to
    return {
        "matrix_bytes": chunks * one["matrix_bytes"],
        "products": chunks * one["products"],
        "memory_bytes": moved * head[0] * head[1],
    }


def attention_amounts(rows: float, pairs: float, flops: float, passes: float = _PASSES) -> Amounts:
    """Return what attention takes whose forward pass has so many FLOPs, queries and pairs (for each head)."""
    return {"attention_flops": passes * flops, "attention_pairs": passes * pairs, "attention_rows": passes * rows}


def micro_batch_amounts(profile: ModelProfile, shape: Shape) -> dict[Unit, float]:
    """Return what a forward and a backward pass of one micro-batch take, with what they compute twice.

    Raises KeyError if the profile has no entry for the way it is computed.
    """
    tokens, size = shape.tokens, shape.element_bytes
    around = profile.around("none", shape.kernel, size)
    outer = (around.elementwise_forward + around.elementwise_backward).at(tokens, shape.mask_len)
    total = add(
        *(_matrix_bytes(profile, one, shape) for one in profile.tensors),
        {"matrix_flops": _PASSES * profile.outer_flops_per_token * tokens, "memory_bytes": outer},
        {"logits": float(tokens * _vocabulary(profile))},
    )
    for kind in profile.layers:
        plain = kind.at("none", shape.kernel, size)
        memory = (plain.elementwise_forward + plain.elementwise_backward).at(tokens, shape.mask_len)
        layer: Amounts = {
            "matrix_flops": _PASSES * kind.matrix_flops_per_token * tokens,
            "memory_bytes": memory,
            "layers": 1.0,
        }
        twice = _recomputed(kind, shape)
        total = add(total, scale(add(layer, _attention(kind, shape), twice), kind.count))
    return total


def _recomputed(kind: LayerKind, shape: Shape) -> Amounts:
    """Return what one layer computes a second time."""
    mode, size = shape.recomputation, shape.element_bytes
    if mode == "none":
        return {}
    at = (shape.tokens, shape.mask_len)
    plain, again = (kind.at(which, shape.kernel, size).elementwise_backward for which in ("none", mode))
    memory: Amounts = {"memory_bytes": max(0.0, again.at(*at) - plain.at(*at)), "layers": 1 / _PASSES}
    if mode == "full":
        flops: Amounts = {"matrix_flops": kind.matrix_flops_per_token * shape.tokens}
        memory = add(memory, flops, scale(_attention(kind, shape), 1 / _PASSES))
    return scale(memory, shape.recomputed_share)


def _attention(kind: LayerKind, shape: Shape) -> Amounts:
    if kind.span_kind == "none":
        return {}
    dense = shape.kernel != "flash"  # a dense mask hides pairs, but they are computed
    span = shape.seq_len if dense else mean_span(shape.documents, kind.span_kind, kind.span_limit)
    heads = kind.attention_flops_per_pair / (4 * shape.head_dim)
    pairs = shape.tokens * span
    return attention_amounts(heads * shape.tokens, heads * pairs, kind.attention_flops_per_pair * pairs)


def _matrix_bytes(profile: ModelProfile, tensor: Tensor, shape: Shape) -> Amounts:
    """Return the bytes and the number of a weight's products; their FLOPs are counted by layers."""
    is_head = tensor.kind == "embedding" and profile.is_tied and "position" not in tensor.name
    if len(tensor.shape) < 2 or not (tensor.kind in ("matrix", "head", "expert") or is_head):
        return {}
    *several, outer, inner = tensor.shape
    number = several[0] if several else 1
    rows = float(shape.tokens)
    if tensor.kind == "expert":
        rows *= number * (1 - profile.idle_parameters / profile.parameters_by_kind()["expert"])
    if is_head or tensor.kind == "head":
        return head_amounts(shape.tokens, (outer, inner), shape.element_bytes, shape.loss, shape.device, is_head)
    one = product_amounts(rows / number, inner, outer, shape.element_bytes)
    return {"matrix_bytes": number * one["matrix_bytes"], "products": number * one["products"]}


def _vocabulary(profile: ModelProfile) -> int:
    return max((one.shape[0] for one in profile.tensors if one.kind in ("embedding", "head")), default=0)


def add(*amounts: Amounts) -> dict[Unit, float]:
    """Return the sum of amounts."""
    total: dict[Unit, float] = {}
    for one in amounts:
        for unit, value in one.items():
            total[unit] = total.get(unit, 0.0) + value
    return total


def scale(amounts: Amounts, factor: float) -> dict[Unit, float]:
    """Return amounts times a factor."""
    return {unit: value * factor for unit, value in amounts.items()}


def seconds(amounts: Amounts, rates: Mapping[Unit, float], units: Iterable[Unit] | None = None) -> float:
    """Return the time of amounts at `rates`, in seconds per unit; of some units only, if they are named."""
    chosen = amounts if units is None else [unit for unit in units if unit in amounts]
    return sum(amounts[unit] * rates.get(unit, 0.0) for unit in chosen)
