"""What stands in for kernels that do not run on meta tensors while a model is traced (`models/profile.py`).

Each allocates and saves for its backward pass what the kernel does, so the trace sees the same bytes. The tests compare
them with the kernels that run on a CPU, and with the autograd functions of those that do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from transformers import AttentionInterface, masking_utils
from transformers.integrations import moe

from turbolm.models import loss
from turbolm.models.attention import varlen_keywords

FLASH = "turbolm_traced"


def _flash_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Stand in for FlashAttention, varlen and flex attention: torch's own varlen operator, which runs on meta tensors.

    All of them save queries, keys, values, output and the log-sum-exp of each query in fp32.
    """
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    ends = torch.zeros(2, dtype=torch.int32, device=query.device)
    heads = varlen_keywords(query.shape[1], key.shape[1])
    # The operator takes values as wide as the keys; where they are narrower (MLA), FlashAttention pads them too.
    wide = F.pad(value, (0, query.shape[-1] - value.shape[-1])) if value.shape[-1] < query.shape[-1] else value
    output = varlen.varlen_attn(
        query, key, wide, ends, ends, len(query), len(query), scale=scaling, window_size=(-1, 0), **heads
    )
    return output[..., : value.shape[-1]].unsqueeze(0), None


AttentionInterface.register(FLASH, _flash_forward)


def _cpu_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Stand in for `scaled_dot_product_attention` as a CPU runs it: boolean masks become floats, then the flash kernel.

    On meta tensors torch would choose its plain kernel, which saves all scores.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output: torch.Tensor = kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return output


class LigerLoss(torch.autograd.Function):
    """Stand in for Liger Kernel's fused head and loss (Triton, GPUs only), with the tensors of its forward pass.

    `fused_linear_cross_entropy_forward` of liger_kernel 0.6 and 0.7: gradients of the input and of the weight (summed
    in fp32, then in the weight's type), and the logits of one chunk, in which the gradient replaces the logits.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int) -> torch.Tensor:
        """Return the summed loss."""
        grad_rows, grad_weight = torch.zeros_like(rows), torch.zeros_like(weight, dtype=torch.float32)
        losses = torch.zeros(len(rows), dtype=torch.float32, device=rows.device)
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            logits = part @ weight.t()
            grad_rows[start : start + chunk] = logits @ weight
            grad_weight += torch.mm(logits.t(), part).float()
        ctx.save_for_backward(grad_rows, grad_weight.to(weight.dtype))
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of the forward pass, scaled in place."""
        return *ctx.saved_tensors, None, None


@contextmanager
def loss_chunks(rows: int) -> Iterator[None]:
    """Make the logits of the chunked loss and of Liger's `rows` at a time."""

    def liger(*_: Any) -> Any:
        def fused(hidden: torch.Tensor, weight: torch.Tensor, bias: Any, targets: torch.Tensor) -> Any:
            objective = LigerLoss.apply(hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), rows)
            return objective, objective.detach()

        return fused

    with patch.object(loss, "_chunk_tokens", lambda *_: rows), patch.object(loss, "_liger_loss", liger):
        yield


def _packed(position_ids: torch.Tensor) -> torch.Tensor:
    """Stand in for the search for documents in positions, which reads values: as if there were several."""
    return torch.zeros_like(position_ids)


def _takes_meta(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> bool:
    """Whether torch's grouped product of experts runs on these meta tensors; its fallback saves the same two."""
    return weight.dtype == torch.bfloat16


@contextmanager
def stand_ins() -> Iterator[None]:
    """Replace what does not run on meta tensors, for the model types that use it."""
    with (
        patch.object(F, "scaled_dot_product_attention", _cpu_attention),
        patch.object(masking_utils, "find_packed_sequence_indices", _packed),
        patch.object(moe, "_can_use_grouped_mm", _takes_meta),
    ):
        yield
