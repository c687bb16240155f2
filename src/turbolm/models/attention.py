"""Attention for packed sequences: which kernels exist, which one a machine should use, and the inputs of each.

A packed sequence holds several documents. Positions start again at each, and Transformers builds the mask that keeps
them apart from the positions alone, provided that no attention mask and no cache is passed (`use_cache=False`). Kernels
of the FlashAttention family read cumulative lengths instead: their micro-batch is one long sequence, [1, sequences x
seq_len].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flex_attention_mask, sdpa_mask

from turbolm.errors import UserError
from turbolm.models.sequence_parallel import WHOLE_POSITIONS, WholeSequences, sequence_group
from turbolm.plan.batch import few_sizes

# The recipe's names and Transformers' own.
ATTENTION_NAMES = {
    "eager": "eager",
    "sdpa": "sdpa",
    "flex": "turbolm_flex",
    "flash": "flash_attention_2",
    "varlen": "turbolm_varlen",
}
_FLATTENED = {"flash", "varlen"}
_WITHOUT_LENGTHS = ("NemotronForCausalLM", "StableLmForCausalLM")  # their layers do not hand cumulative lengths on


def choose_attention(
    requested: str, device: str, precision: str, model_class: type[PreTrainedModel], *, carries_state: bool = False
) -> str:
    """The attention kernel for `auto`: varlen on a GPU in half precision, else sdpa, else the model's own code.

    torch's own varlen attention (FlashAttention kernels, see models/flash.py) needs no extra package and computes
    nothing across documents, but it joins the sequences of a micro-batch, over which a model that `carries_state` would
    carry it; sdpa builds a dense [seq_len, seq_len] mask but runs everywhere.
    """
    if requested != "auto":
        return requested
    if not model_class._supports_sdpa:
        return "eager"
    if carries_state or not model_class._supports_attention_backend or model_class.__name__ in _WITHOUT_LENGTHS:
        return "sdpa"
    if device == "cuda" and precision in ("bf16", "fp16") and torch.cuda.get_device_capability() >= (8, 0):
        return "varlen"
    return "sdpa"


def check_long_sequences(
    config: PreTrainedConfig, attention: str, *, seq_len: int, joined_tokens: int, packed: bool
) -> None:
    """Raise UserError for attention that changes beyond some length, which a short probe does not see.

    `joined_tokens`: the tokens of a micro-batch, which kernels that read cumulative lengths join to one sequence.
    """
    has_chunks = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    if attention in _FLATTENED and has_chunks and seq_len > config.attention_chunk_size:
        raise UserError(
            f"execution.attention: {attention} has no attention by chunks, which {config.model_type} has of "
            f"{config.attention_chunk_size} tokens; set sdpa"
        )
    tuned_from = getattr(config, "floor_scale", None) if getattr(config, "attn_temperature_tuning", False) else None
    long = joined_tokens if attention in _FLATTENED else seq_len
    if tuned_from is not None and long >= tuned_from and (packed or long > seq_len):
        raise UserError(
            f"data.packing: {config.model_type} scales attention by a position in its sequence of {long} tokens, not "
            f"in its document, from {tuned_from} on; set `data.packing: single` and `execution.attention: sdpa`, or "
            "`model.config.attn_temperature_tuning: false`"
        )


def takes_gqa(varlen_attn: Callable[..., Any]) -> bool:
    """Whether a torch's `varlen_attn` must be told of fewer key and value heads: from 2.12 on.

    That of 2.11 hands them to the kernel as they are, which reads them in groups.
    """
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


_TAKES_GQA = takes_gqa(varlen.varlen_attn)  # here, since a compiler would trace into `inspect`


def varlen_keywords(num_heads: int, num_key_heads: int) -> dict[str, bool]:
    """Return what this torch's `varlen_attn` takes besides for so many heads; none are ever repeated."""
    return {"enable_gqa": True} if _TAKES_GQA and num_heads != num_key_heads else {}


def model_inputs(batch: dict[str, np.ndarray], attention: str, device: torch.device) -> dict[str, Any]:
    """What the model is called with for one micro-batch of shape [sequences, seq_len].

    For kernels that read cumulative lengths the sequences are joined to [1, sequences x seq_len] and `cu_seq_lens_*`
    (int32, one entry more than there are slices, or the micro-batch's own `cu_seqlens`, which end with empty slices)
    and `max_length_*` (an int) are added; they are computed on the host, so that no layer has to ask the device. The
    kernels start blocks for every slice up to that length: it is that of the longest slice, or, where the micro-batch
    has `cu_seqlens` because a compiler is at work, the next of `few_sizes`.

    In a group that shares sequences none are joined, and attention gets what it has to know as `whole_sequences`.
    """
    tokens, positions = batch["input_ids"], batch["position_ids"]
    is_shared = sequence_group() is not None
    is_flat = attention in _FLATTENED and not is_shared
    inputs: dict[str, Any] = {
        "input_ids": torch.from_numpy(tokens.reshape(1, -1) if is_flat else tokens).to(device, non_blocking=True),
        "position_ids": torch.from_numpy(positions.reshape(1, -1) if is_flat else positions).to(
            device, non_blocking=True
        ),
        "use_cache": False,
    }
    whole = batch.get(WHOLE_POSITIONS, positions)
    lengths = _lengths(whole, batch.get("cu_seqlens"), device) if attention in _FLATTENED else {}
    if is_shared:
        documents = torch.from_numpy(np.cumsum(whole == 0, axis=1, dtype=np.int32)).to(device, non_blocking=True)
        return inputs | {"whole_sequences": WholeSequences(documents, lengths, WHOLE_POSITIONS in batch)}
    return inputs | lengths


def _lengths(positions: np.ndarray, cumulative: np.ndarray | None, device: torch.device) -> dict[str, Any]:
    """Return the cumulative lengths of a micro-batch's slices, and the longest, under Transformers' names."""
    if cumulative is None:
        starts = np.flatnonzero(positions.reshape(-1) == 0)
        cumulative = np.append(starts, positions.size).astype(np.int32)
        max_length = int(np.diff(cumulative).max())
    else:
        max_length = few_sizes(int(np.diff(cumulative).max()), positions.shape[1])
    cu_seq_lens = torch.from_numpy(cumulative).to(device, non_blocking=True)
    return {
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": max_length,
        "max_length_k": max_length,
    }


def varlen_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over packed documents, causal where the module is, with `torch.nn.attention.varlen`.

    `query` is [1, heads, tokens, head_dim], `key` and `value` may have fewer heads. Returns [1, tokens, heads,
    head_dim]. A generation call (no cumulative lengths) falls back to Transformers' sdpa.
    """
    cu_seq_lens = kwargs.get("cu_seq_lens_q")
    if cu_seq_lens is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if attention_mask is not None:  # of a model that makes its own; none is made for packed documents
        raise ValueError("varlen attention takes no mask; set execution.attention: sdpa")
    if dropout and module.training:
        raise ValueError("varlen attention has no dropout; set execution.attention: sdpa")
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise ValueError("varlen attention has no soft cap, sinks or position bias; set execution.attention: flex")
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)  # an encoder reads both ways here too, and is refused for it
    # Transformers' window counts the token itself, the kernel's counts what lies left of it.
    window = (sliding_window - 1 if sliding_window is not None else -1, 0 if is_causal else -1)
    output = varlen.varlen_attn(
        query,
        key,
        value,
        cu_seq_lens,
        kwargs["cu_seq_lens_k"],
        kwargs["max_length_q"],
        kwargs["max_length_k"],
        scale=scaling,
        window_size=window,
        **varlen_keywords(query.shape[1], key.shape[1]),
    )
    return output.unsqueeze(0), None


ALWAYS_MASKED_SDPA = "turbolm_sdpa_masked"
"""sdpa that gets a mask for every batch. Transformers leaves it out when each sequence holds one document, and layers
that are compiled apart from the model would be compiled for both."""


def _always_mask(*arguments: Any, allow_is_causal_skip: bool = False, **kwargs: Any) -> torch.Tensor | None:
    mask = sdpa_mask(*arguments, allow_is_causal_skip=False, **kwargs)
    return None if mask is None else mask.contiguous()  # else its strides differ where sequences share a mask


AttentionInterface.register(ALWAYS_MASKED_SDPA, sdpa_attention_forward)
AttentionMaskInterface.register(ALWAYS_MASKED_SDPA, _always_mask)
AttentionInterface.register(ATTENTION_NAMES["varlen"], varlen_attention_forward)
# Under a name of our own, flex attention also serves models whose class does not declare it (GPT-2); the isolation
# check and the tests hold it to the same standard.
AttentionInterface.register(ATTENTION_NAMES["flex"], flex_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAMES["flex"], flex_attention_mask)
