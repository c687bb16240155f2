"""What a model costs: its parameters, FLOPs and activation bytes, as traced by `models/profile.py`. Torch-free.

A profile depends on the model's configuration alone, not on the recipe: it has an entry for each way to run a layer
(recomputation x attention kernel x precision), and bytes as a function of the tokens of a micro-batch.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

TensorKind = Literal["embedding", "head", "matrix", "vector", "expert"]
Recomputation = Literal["none", "selective", "full"]
Kernel = Literal["eager", "sdpa", "flash"]
"""How attention is computed. flash: FlashAttention and torch's varlen attention, which save the same tensors. sdpa: the
CPU's flash kernel of torch with a dense mask. eager: the model's own code, with a matrix of all scores."""
Loss = Literal["full", "chunked", "liger"]
SpanKind = Literal["full", "window", "chunk", "none"]
"""What limits the keys of a query; none: no attention."""


@dataclass(frozen=True)
class Tensor:
    """One parameter. Tied weights are one tensor, under the name `named_parameters` gives them."""

    name: str
    shape: tuple[int, ...]
    kind: TensorKind  # expert: one slice for each expert of a mixture

    @property
    def num_parameters(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Cost:
    """A quantity of one micro-batch: fixed + per_token x tokens + per_pair x tokens x seq_len + per_row x chunk rows.

    `per_pair` is what dense masks and dense scores take, which have an entry for every pair of tokens of a sequence;
    `per_row` is for each row of logits that the loss makes at once (`chunk_rows`).
    """

    per_token: float = 0.0
    per_pair: float = 0.0
    fixed: float = 0.0
    per_row: float = 0.0

    def at(self, tokens: int, seq_len: int, num_rows: int = 0) -> float:
        """Return the quantity for `tokens` in sequences of `seq_len`."""
        return self.fixed + (self.per_token + self.per_pair * seq_len) * tokens + self.per_row * num_rows

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.per_token + other.per_token,
            self.per_pair + other.per_pair,
            self.fixed + other.fixed,
            self.per_row + other.per_row,
        )

    def times(self, number: float) -> Cost:
        """Return `number` times the quantity."""
        return Cost(*(number * value for value in (self.per_token, self.per_pair, self.fixed, self.per_row)))


@dataclass(frozen=True)
class Peak:
    """The largest of several quantities: bytes at the moments of a pass that are the worst for some micro-batch."""

    moments: tuple[Cost, ...]

    def at(self, tokens: int, seq_len: int, num_rows: int = 0) -> float:
        """Return the bytes at the worst moment, 0 if there is none."""
        return max((moment.at(tokens, seq_len, num_rows) for moment in self.moments), default=0.0)


@dataclass(frozen=True)
class Activations:
    """Bytes of a layer, or of what stands around the layers, for one way to run it. Eager: compiled code takes less."""

    recomputation: Recomputation
    kernel: Kernel
    element_bytes: int  # 2: bf16 or fp16; 4: fp32
    saved: Cost  # kept from the forward to the backward pass
    backward_peak: Peak  # on top of what is saved, at the worst moment of its backward pass; no gradients of weights
    elementwise_forward: Cost  # read and written by everything but matrix products and attention
    elementwise_backward: Cost  # with what is recomputed


@dataclass(frozen=True)
class LossBytes:
    """Bytes of the output head and the loss on top of the last hidden state: logits, their gradients and copies."""

    loss: Loss
    element_bytes: int
    saved: Cost  # from the end of the forward pass on; less than 0 where the last hidden state is not kept
    forward_peak: Peak
    backward_peak: Peak
    elementwise: Cost  # read and written in both passes by everything but matrix products

    def peak(self, tokens: int, seq_len: int, num_rows: int) -> float:
        """Return the bytes at the worst moment, with what is saved; `num_rows` are those of a chunk."""
        return max(one.at(tokens, seq_len, num_rows) for one in (self.forward_peak, self.backward_peak))


@dataclass(frozen=True)
class LayerKind:
    """Layers that cost the same."""

    name: str  # such as `full_attention`
    count: int
    num_parameters: int  # of one layer
    span_kind: SpanKind
    span_limit: int | None  # tokens of the window (with the query itself) or chunk
    matrix_flops_per_token: float  # forward pass of one layer, 2 per weight; active experts only
    attention_flops_per_pair: float  # forward pass of one layer, for one query and one of its keys: 2 x (qk + v width)
    activations: tuple[Activations, ...]

    def at(self, recomputation: Recomputation, kernel: Kernel, element_bytes: int) -> Activations:
        """Return the entry for one way to run the layer. Raises KeyError if it was not traced."""
        return _find(self.activations, recomputation, kernel, element_bytes)


@dataclass(frozen=True)
class Heads:
    """The heads of attention, alike in every layer: what processes share under sequence parallelism."""

    layers: int
    queries: int
    keys: int
    size: int  # elements of one


@dataclass(frozen=True)
class ModelProfile:
    """Everything the planner knows about a model. Counts are per token and forward pass unless they say otherwise."""

    model_type: str
    tensors: tuple[Tensor, ...]  # in the order of `model.named_parameters()`
    idle_parameters: int  # of experts that a token does not pass through
    is_tied: bool  # the output head is the embedding
    outer_flops_per_token: float  # forward pass: output head, and matrices outside the layers
    layers: tuple[LayerKind, ...]
    outer: tuple[Activations, ...]  # embedding, final norm, masks and rotary tables: all but layers and head
    losses: tuple[LossBytes, ...]
    versions: Mapping[str, str]  # of torch and transformers that traced it
    notes: tuple[str, ...] = ()
    heads: Heads | None = None  # not traced but read from the configuration, by `plan.exchange.read_heads`

    @property
    def num_parameters(self) -> int:
        """Return all parameters, tied weights once."""
        return sum(tensor.num_parameters for tensor in self.tensors)

    def parameters_by_kind(self) -> dict[TensorKind, int]:
        """Return the number of parameters of each kind of tensor."""
        counts: dict[TensorKind, int] = dict.fromkeys(("embedding", "head", "matrix", "vector", "expert"), 0)
        for tensor in self.tensors:
            counts[tensor.kind] += tensor.num_parameters
        return counts

    @property
    def num_layers(self) -> int:
        """Return the layers of the stack."""
        return sum(kind.count for kind in self.layers)

    @property
    def matrix_flops_per_token(self) -> float:
        """Return the FLOPs of matrix products in a forward pass, with the output head; active experts only."""
        return self.outer_flops_per_token + sum(kind.count * kind.matrix_flops_per_token for kind in self.layers)

    def around(self, recomputation: Recomputation, kernel: Kernel, element_bytes: int) -> Activations:
        """Return the entry of what stands around the layers. Raises KeyError if it was not traced."""
        return _find(self.outer, recomputation, kernel, element_bytes)

    def saved(self, recomputation: Recomputation, kernel: Kernel, element_bytes: int) -> Cost:
        """Return the bytes that all layers and what stands around them save, without the loss. Raises KeyError."""
        total = self.around(recomputation, kernel, element_bytes).saved
        for kind in self.layers:
            total += kind.at(recomputation, kernel, element_bytes).saved.times(kind.count)
        return total

    def loss(self, loss: Loss, element_bytes: int) -> LossBytes:
        """Return the bytes of head and loss. Raises KeyError if it was not traced."""
        for one in self.losses:
            if (one.loss, one.element_bytes) == (loss, element_bytes):
                return one
        raise KeyError(f"{loss} loss, {element_bytes} bytes")

    def to_json(self) -> str:
        """Return the profile as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelProfile:
        """Return the profile that `to_json` wrote, parsed. Raises KeyError, TypeError or ValueError for others."""
        tensors = tuple(Tensor(one["name"], tuple(one["shape"]), one["kind"]) for one in values["tensors"])
        layers = tuple(
            LayerKind(**{**one, "activations": tuple(map(_activations, one["activations"]))})
            for one in values["layers"]
        )
        outer = tuple(map(_activations, values["outer"]))
        losses = tuple(map(_loss_bytes, values["losses"]))
        heads = Heads(**values["heads"]) if values.get("heads") else None
        made = {"tensors": tensors, "layers": layers, "outer": outer, "losses": losses, "heads": heads}
        return cls(**{**values, **made, "notes": tuple(values["notes"])})

    @classmethod
    def from_json(cls, text: str) -> ModelProfile:
        """Return the profile that `to_json` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        return cls.from_dict(json.loads(text))


def mean_span(document_lengths: Iterable[int], span_kind: SpanKind = "full", limit: int | None = None) -> float:
    """Return the mean number of keys per query, for documents whose tokens attend only to their own past.

    The tokens of a document of length l attend to 1, 2, ..., l keys; with a window of w tokens to at most w, and with
    chunks of w tokens to those of their own chunk.
    """
    num_pairs = num_tokens = 0
    for length, number in Counter(document_lengths).items():  # a batch has far fewer lengths than documents
        num_tokens += number * length
        if limit is None or length <= limit:
            pairs = length * (length + 1) // 2
        elif span_kind == "window":
            pairs = limit * (limit + 1) // 2 + (length - limit) * limit
        else:
            chunks, rest = divmod(length, limit)
            pairs = chunks * (limit * (limit + 1) // 2) + rest * (rest + 1) // 2
        num_pairs += number * pairs
    return num_pairs / num_tokens if num_tokens else 0.0


CHUNK_LOGITS = {"cpu": 2**20, "cuda": 2**27}
"""Logits that the chunked loss holds at once: 4 MB stay in a core's cache, 512 MB fill a GPU."""


def chunk_rows(loss: Loss, tokens: int, vocab_size: int, hidden_size: int, device: str) -> int:
    """Return the rows of a chunk of the loss: equal chunks of at most CHUNK_LOGITS, or 256 rows where that is more.

    Every chunk reads and writes the gradient of the whole head, which would take longer than the rest of a small one.
    Liger's chunks are its own: a power of two, with about as many logits as the hidden states have elements.
    """
    if loss == "full":
        return 0
    if loss == "liger":
        rows = -(-tokens // -(-vocab_size // hidden_size))
        return int(min(tokens, 2 ** math.ceil(math.log2(rows))))
    most = max(256, CHUNK_LOGITS[device] // vocab_size)
    return -(-tokens // -(-tokens // most))


def _activations(values: Mapping[str, Any]) -> Activations:
    costs = {name: Cost(**values[name]) for name in ("saved", "elementwise_forward", "elementwise_backward")}
    return Activations(**{**values, **costs, "backward_peak": _peak(values["backward_peak"])})


def _loss_bytes(values: Mapping[str, Any]) -> LossBytes:
    costs = {name: Cost(**values[name]) for name in ("saved", "elementwise")}
    return LossBytes(**{**values, **costs, **{name: _peak(values[name]) for name in ("forward_peak", "backward_peak")}})


def _peak(values: Mapping[str, Any]) -> Peak:
    return Peak(tuple(Cost(**one) for one in values["moments"]))


def _find(entries: Iterable[Activations], recomputation: str, kernel: str, element_bytes: int) -> Activations:
    wanted = (recomputation, kernel, element_bytes)
    for one in entries:
        if (one.recomputation, one.kernel, one.element_bytes) == wanted:
            return one
    raise KeyError(f"{recomputation} recomputation, {kernel} attention, {element_bytes} bytes")
