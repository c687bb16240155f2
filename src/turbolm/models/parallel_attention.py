"""The attention functions of sequence-parallel models: an exchange, a kernel over whole sequences, an exchange back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward

from turbolm.errors import UserError
from turbolm.models.attention import varlen_attention_forward
from turbolm.models.sequence_parallel import WholeSequences, repeated_heads, sequence_group
from turbolm.models.settings import ropes_by_length
from turbolm.recipe.sequence_parallel import KERNELS, KEY, not_a_divisor

Kernel = Callable[..., torch.Tensor]
"""Query, key and value of whole sequences, [sequences, heads, tokens, width], to [sequences, tokens, heads, width]."""


def share_attention(model: PreTrainedModel, attention: str) -> None:
    """Have `model` call the attention function that shares the heads of `attention` in this process's group.

    Raises UserError for a type whose attention is its own code.
    """
    name = _NAMES[attention]
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise UserError(f"{KEY}: {model.config.model_type} has attention code of its own; set 1")


def check_shared_sequences(
    config: PreTrainedConfig, attention: str, *, shared_by: int, seq_len: int, reason: str | None
) -> None:
    """Raise UserError for a model whose sequences `shared_by` ranks cannot share, as far as its configuration says.

    `reason`: why documents in one sequence cannot be kept apart. The isolation check tries the rest.
    """
    kind, text = config.model_type, config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if reason:
        raise UserError(f"{KEY}: {reason}, across the slices of a sequence, outside attention; set 1")
    if attention not in KERNELS:
        raise UserError(
            f"{KEY}: {kind} has {attention} attention here, which cannot be shared; set execution.attention: flex on a "
            "GPU, or sequence_parallel: 1"
        )
    if isinstance(heads, int) and heads % shared_by:
        raise UserError(f"{KEY}: {not_a_divisor(shared_by, heads, f'attention heads of {kind}')}")
    if ropes_by_length(text):
        raise UserError(
            f"{KEY}: {kind} chooses its rotary factors by the longest document, which one rank does not see; set "
            "model.rope_factors: short (or long)"
        )
    chunk = getattr(text, "attention_chunk_size", None)
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()) and chunk and seq_len > chunk:
        raise UserError(f"{KEY}: {kind} attends by chunks of {chunk} tokens, which no shared kernel does; set 1")
    tuned_from = getattr(text, "floor_scale", None) if getattr(text, "attn_temperature_tuning", False) else None
    if tuned_from is not None and seq_len >= tuned_from:
        raise UserError(
            f"{KEY}: {kind} scales attention by the place in a sequence from token {tuned_from} on, and a rank counts "
            "from its slice; set 1, or `model.config.attn_temperature_tuning: false`"
        )


def _shared(
    kernel: Kernel,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as Transformers calls it, over the slices of all ranks of the group."""
    whole: WholeSequences | None = kwargs.pop("whole_sequences", None)
    if whole is None:
        raise ValueError("its layers do not hand on what attention has to know of whole sequences")
    is_causal = kwargs.pop("is_causal", None)
    if attention_mask is not None or not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError("it masks attention in a way of its own, or reads both ways")
    if any(kwargs.get(name) is not None for name in ("s_aux", "position_bias")):
        raise ValueError("its attention has sinks or a position bias, by head")
    group = sequence_group()
    if not whole.is_sliced or group is None:
        return kernel(module, query, key, value, whole, **kwargs), None
    times = repeated_heads(query.shape[1], key.shape[1], group.size)
    if times > 1:
        key, value = (tensor.repeat_interleave(times, 1) for tensor in (key, value))
    query, key, value = (group.gather_tokens(tensor) for tensor in (query, key, value))
    return group.gather_heads(kernel(module, query, key, value, whole, **kwargs)), None


def _sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    whole: WholeSequences,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> torch.Tensor:
    if softcap is not None:
        raise ValueError("sdpa attention has no soft cap; set execution.attention: flex")
    times = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(times, 1) for tensor in (key, value))
    mask = whole.mask(sliding_window)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return output.transpose(1, 2).contiguous()


def _varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    whole: WholeSequences,
    **kwargs: Any,
) -> torch.Tensor:
    num_sequences = query.shape[0]
    query, key, value = (tensor.transpose(0, 1).flatten(1, 2)[None] for tensor in (query, key, value))
    output = varlen_attention_forward(module, query, key, value, None, **kwargs, **whole.lengths)[0]
    return output[0].unflatten(0, (num_sequences, -1))


def _flex(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    whole: WholeSequences,
    *,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    return flex_attention_forward(module, query, key, value, whole.block_mask(sliding_window), **kwargs)[0]


_NAMES = {kernel: f"turbolm_shared_{kernel}" for kernel in ("sdpa", "varlen", "flex")}
for _kernel, _function in (("sdpa", _sdpa), ("varlen", _varlen), ("flex", _flex)):
    # Without a mask function of the name, Transformers makes no masks, which would be of the slice alone.
    AttentionInterface.register(_NAMES[_kernel], functools.partial(_shared, _function))
