"""`torch.nn.attention.varlen.varlen_attn` as torch 2.11, 2.12 and 2.13 declare it, computed by a loop over documents.

The kernel itself needs a GPU. The signatures are those of the released wheels; tests/models/test_attention.py compares
that of the installed torch with its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def varlen_attn_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """It asks for no equal heads: aten's kernel reads fewer key and value heads in groups (flash_api.cpp)."""
    assert return_aux is None
    return loop_over_documents(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def varlen_attn_2_12(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False, seqused_k: Tensor | None = None, block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:  # fmt: skip
    """Raises ValueError for fewer key and value heads without `enable_gqa`, as torch does. That of 2.13 is the same."""
    assert return_aux is seqused_k is block_table is num_splits is None and cu_seq_k is not None
    if not enable_gqa and query.size(1) != key.size(1):
        raise ValueError("Expect query and key/value to have the same number of heads")
    return loop_over_documents(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


STUBS = {"2.11": varlen_attn_2_11, "2.12": varlen_attn_2_12, "2.13": varlen_attn_2_12}


def loop_over_documents(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    scale: float | None, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """What `varlen_attn` documents: (tokens, heads, head_dim), a window of (left, right) neighbors."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[2] ** -0.5 if scale is None else scale
    outputs = []
    bounds = cu_seq_q.tolist()
    assert bounds[0] == 0 and bounds[-1] == query.shape[0]
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        assert 0 <= end - start <= max_q == max_k  # empty ones fill up to one of few sizes
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = distance >= 0 if window_size[1] == 0 else torch.ones_like(distance, dtype=torch.bool)
        if window_size[0] >= 0:
            seen &= distance <= window_size[0]
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)
