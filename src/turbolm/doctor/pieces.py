"""Pieces of a training step that `calibrate` times: products, attention, a model of few layers, an update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig

from turbolm.engine.device import DTYPES
from turbolm.models.attention import ATTENTION_NAMES, model_inputs
from turbolm.models.config import make_config
from turbolm.models.loss import attach_loss
from turbolm.plan.profile import Loss
from turbolm.plan.weight_bytes import gradient_bytes, update_bytes
from turbolm.plan.work import Unit, add, attention_amounts, head_amounts, product_amounts
from turbolm.recipe.model_config import heads_of

_ELEMENTS = {"cpu": 2**22, "cuda": 2**28}  # weights of the cases about them
_SMALL_TENSORS, _SMALL_SIZE = 64, 2**12
_ZEROED = 4  # bytes of a weight: its sum over micro-batches, which is cleared once a step
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm"}


@dataclass(frozen=True)
class Case:
    """Something to time, and what it amounts to."""

    name: str
    amounts: Mapping[Unit, float]
    run: Callable[[], object]
    weight: float = 1.0  # in the fit


@dataclass(frozen=True)
class Subject:
    """A model to take pieces of, and a micro-batch."""

    config: Mapping[str, Any]
    num_layers: int
    sequences: int
    seq_len: int
    attention: str  # a name in ATTENTION_NAMES: sdpa, varlen
    loss: Loss


def model_cases(values: Mapping[str, Any], device: torch.device, precision: str) -> Iterator[Case]:
    """Yield the cases of a subject: its products, its attention, and a forward and backward pass of all of it."""
    subject, dtype = Subject(**values), DTYPES[precision]
    model, inputs, targets = build_subject(subject, device, dtype)
    tokens, text = subject.sequences * subject.seq_len, model.config.get_text_config()
    for inner, outer in sorted({*_shapes(model), _head_shape(model)}):
        yield product_case(tokens, inner, outer, device, dtype)
    if subject.attention == "sdpa":
        heads, head_dim = heads_of(lambda name: getattr(text, name, None)) or (0, 0)
        yield attention_case(subject.sequences, subject.seq_len, heads, head_dim, device, dtype)
    amounts = model_amounts(subject, model, inputs, dtype)
    attach_loss(model, subject.loss)

    def run() -> None:
        model.zero_grad()
        model(**inputs, targets=targets)[0].backward()

    name = f"{model.config.model_type} of {subject.num_layers} layers, width {model.config.hidden_size}"
    yield Case(f"{name}, {subject.sequences} x {subject.seq_len} tokens", amounts, run)


def model_amounts(subject: Subject, model: Any, inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[Unit, float]:
    """Return what a forward and backward pass of all of the model amounts to."""
    tokens, text = subject.sequences * subject.seq_len, model.config.get_text_config()
    heads, head_dim = heads_of(lambda name: getattr(text, name, None)) or (0, 0)
    span = subject.seq_len if subject.attention == "sdpa" else (subject.seq_len // 2 + 1) / 2
    rows = float(heads * tokens * subject.num_layers)
    head = model.get_output_embeddings().weight
    is_tied = head is model.get_input_embeddings().weight
    return add(
        *(product_amounts(tokens, inner, outer, dtype.itemsize) for inner, outer in _shapes(model)),
        head_amounts(tokens, tuple(head.shape), dtype.itemsize, subject.loss, head.device.type, is_tied),
        {"matrix_flops": 6.0 * tokens * head.numel()},
        attention_amounts(rows, rows * span, 4 * head_dim * rows * span),
        {"memory_bytes": count_memory_bytes(model, inputs), "layers": float(subject.num_layers)},
        {"logits": float(tokens * text.vocab_size)},
    )


def _shapes(model: Any) -> list[tuple[int, int]]:
    """Return the inner and outer size of each linear layer but the head."""
    head = model.get_output_embeddings()
    layers = [one for one in model.modules() if isinstance(one, nn.Linear) and one is not head]
    return [(one.in_features, one.out_features) for one in layers]


def _head_shape(model: Any) -> tuple[int, int]:
    outer, inner = model.get_output_embeddings().weight.shape
    return inner, outer


def small_config(subject: Subject) -> PreTrainedConfig:
    """Return the configuration with few layers."""
    config = make_config(None, dict(subject.config))
    text = config.get_text_config()
    for key, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == text.num_hidden_layers:
            setattr(text, key, list(value[: subject.num_layers]))
    text.num_hidden_layers = subject.num_layers
    return config


def build_subject(
    subject: Subject, device: torch.device, dtype: torch.dtype
) -> tuple[Any, dict[str, Any], torch.Tensor]:
    """Return the model with few layers, and inputs and targets [sequences, seq_len]: of two documents each."""
    config, name = small_config(subject), ATTENTION_NAMES[subject.attention]
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=name, trust_remote_code=False)
    return model.train(), *_inputs(subject, config, device)


def _inputs(subject: Subject, config: PreTrainedConfig, device: torch.device) -> tuple[dict[str, Any], torch.Tensor]:
    shape = (subject.sequences, subject.seq_len)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    positions = np.tile(np.arange(subject.seq_len), (subject.sequences, 1))
    positions[:, subject.seq_len // 2 :] -= subject.seq_len // 2
    inputs = model_inputs({"input_ids": tokens, "position_ids": positions}, subject.attention, device)
    return inputs, torch.from_numpy(tokens).to(device)


class _MemoryBytes(TorchDispatchMode):
    """Count what operators read and write, but for views, allocations, matrix products and attention."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        skipped = name in _PRODUCTS or "attn" in name or "attention" in name
        if not skipped and not func.is_view and not name.startswith(("empty", "new_empty", "detach", "_unsafe_view")):
            tensors = [one for one in tree_leaves((args, kwargs, output)) if isinstance(one, torch.Tensor)]
            self.num_bytes += sum(
                min(one.numel() * one.element_size(), one.untyped_storage().nbytes()) for one in tensors
            )
        return output


def count_memory_bytes(model: Any, inputs: Mapping[str, Any]) -> float:
    """Return what the operators of a forward and a backward pass read and write, without head and loss."""
    with _MemoryBytes() as counted:
        hidden = model.base_model(**inputs)[0]
        hidden.backward(torch.ones_like(hidden))
    model.zero_grad()
    return float(counted.num_bytes)


def product_case(rows: int, inner: int, outer: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Return a linear layer's forward and backward pass."""
    inputs = torch.randn(rows, inner, device=device).to(dtype).requires_grad_()
    weight = torch.randn(outer, inner, device=device).to(dtype).requires_grad_()
    gradient = torch.randn(rows, outer, device=device).to(dtype)

    def run() -> None:
        torch.autograd.grad(F.linear(inputs, weight), (inputs, weight), gradient)

    return Case(f"{rows} x {inner} x {outer}", product_amounts(rows, inner, outer, dtype.itemsize), run)


def attention_case(
    sequences: int, seq_len: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> Case:
    """Return a forward and a backward pass of torch's kernel with a dense mask, which computes every pair."""
    shape = (sequences, heads, seq_len, head_dim)
    query, key, value = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3))
    mask = torch.ones(seq_len, seq_len, dtype=torch.bool, device=device).tril().expand(sequences, 1, -1, -1)
    gradient = torch.randn(shape, device=device).to(dtype)

    def run() -> None:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        torch.autograd.grad(out, (query, key, value), gradient)

    rows = float(sequences * heads * seq_len)
    amounts = attention_amounts(rows, rows * seq_len, 4 * head_dim * rows * seq_len)
    return Case(f"attention {sequences} x {heads} x {seq_len} x {head_dim}", amounts, run)


def weight_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield what DeepSpeed does with gradients and weights, in few large and in many small tensors."""
    for tensors, size in ((4, _ELEMENTS[device.type] // 4), (_SMALL_TENSORS, _SMALL_SIZE)):
        yield gradient_case(tensors, size, device, dtype)
        yield update_case(tensors, size, device, dtype)


def gradient_case(tensors: int, size: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Return what a gradient goes through at ZeRO stage 2 with one process, without DeepSpeed's bookkeeping.

    The operators are those that `turbolm.plan.weight_bytes` names: into a bucket, divided, joined, to fp32 and back,
    added to the sum over micro-batches.
    """
    number, is_wide = tensors * size, dtype == torch.float32
    gradients = torch.zeros(number, device=device, dtype=dtype).split(size)
    sums, bucket = torch.zeros(number, device=device), torch.zeros(number, device=device, dtype=dtype)

    def run() -> None:
        parts = bucket.split(size)
        for part, gradient in zip(parts, gradients, strict=True):
            part.copy_(gradient.view(-1))
        bucket.div_(1.0)
        joined = torch.cat(parts)
        wide = joined.float()
        if not is_wide:
            joined.copy_(wide)
        for part, new, total in zip(parts, wide.split(size), sums.split(size), strict=True):
            total.add_(new)
            part.copy_(new)

    taken = 8 + 8 + 8 + 12 + 8 if is_wide else gradient_bytes(2, dtype.itemsize, 1, 1) - _ZEROED
    amounts: Mapping[Unit, float] = {"gradient_bytes": float(number * taken), "gradients": float(tensors)}
    return Case(f"{tensors} gradients of {size}", amounts, run)


def update_case(tensors: int, size: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Return an update of torch's fused AdamW, with all that ZeRO does before and after it with one process."""
    number = tensors * size
    weight = torch.zeros(number, device=device, requires_grad=True)
    copy, gradient = torch.zeros(number, device=device, dtype=dtype), torch.full((number,), 1e-3, device=device)
    optimizer = torch.optim.AdamW([weight], fused=True)

    def run() -> None:
        parts = gradient.split(size)
        if dtype != torch.float32:
            for part in parts:
                torch.isfinite(part.amax()).logical_and(torch.isfinite(part.amin())).logical_not()
        norms = [torch.linalg.vector_norm(part.double()) for part in parts]
        torch.stack(norms).pow(2).sum()
        weight.grad = torch.cat(parts) if dtype == torch.float32 else gradient
        weight.grad.mul_(1.0)
        optimizer.step()
        copy.copy_(weight.detach())

    moved = float(number * update_bytes(2, dtype.itemsize, 1))
    return Case(f"AdamW, {tensors} x {size}", {"optimizer_bytes": moved, "gradients": float(tensors)}, run)
