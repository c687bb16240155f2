"""Recomputation: activations made again in the backward pass, or kept in the host's memory, to save the GPU's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from turbolm.errors import UserError

# What `selective` keeps: the outputs of matrix products and of attention, which take nearly all of the time to make.
# Norms, activation functions and the like take most of the memory and are made again (arXiv 2205.05198).
_KEPT = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_grouped_mm",  # the experts of a mixture
    "transformers::grouped_mm_fallback",  # the same where torch has none, as in compiled fp32
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
}


def apply_activation_checkpointing(model: PreTrainedModel, kind: str | int) -> None:
    """Recompute each layer (`full`), every n-th (a number) or what is cheap in each (`selective`) in the backward pass.

    `offloaded` is full, with what each layer begins from waiting in the host's memory. `none` does nothing.
    """
    if kind == "none":
        return
    if not model.supports_gradient_checkpointing:
        raise UserError(f"execution.activation_checkpointing: {model.config.model_type} does not support it; use none")
    recompute: Callable[..., Any] = functools.partial(checkpoint, use_reentrant=False)
    if kind == "selective":
        contexts = functools.partial(create_selective_checkpoint_contexts, _selective_policy)
        recompute = functools.partial(recompute, context_fn=contexts)
    if kind == "offloaded":
        recompute = functools.partial(_offloading, recompute)
    model._set_gradient_checkpointing(
        enable=True, gradient_checkpointing_func=recompute, every_n_layers=kind if isinstance(kind, int) else 1
    )


def _selective_policy(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator.name() in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _offloading(recompute: Callable[..., Any], function: Callable[..., Any], *arguments: Any) -> Any:
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return recompute(function, *arguments)
