"""Sequence parallelism: the ranks of a group have a slice of every sequence each, and attention sees all of it.

An all-to-all before attention gives each rank all tokens of a share of the heads, one after it all heads of its own
tokens (Ulysses, arXiv 2309.14509). All else in a model works on single tokens. Every rank reads the whole sequences
from the token store, so it knows their documents without asking. DeepSpeed is not told: to it every rank is a
data-parallel one with a loss that is a sum over its tokens, as without groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as collectives
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import flex_attention_mask

from turbolm.plan.batch import slice_of_sequence

_SLICED = ("input_ids", "position_ids", "targets")
WHOLE_POSITIONS = "whole_position_ids"  # of a micro-batch that holds slices of its sequences, see `data.batch.collate`


@dataclass(frozen=True)
class SequenceGroup:
    """The `size` neighboring ranks that share their sequences; this one has the slice `index`."""

    size: int
    index: int
    group: dist.ProcessGroup
    name: str  # torch's, which a compiler can put into a graph

    def share(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return this rank's part of a micro-batch of whole sequences, [..., seq_len], as `data.batch.collate` does."""
        part = slice_of_sequence(batch["position_ids"].shape[-1], self.size, self.index)
        sliced = {name: batch[name][..., part] for name in _SLICED if name in batch}
        return batch | sliced | {WHOLE_POSITIONS: batch["position_ids"]}

    def gather_tokens(self, heads_first: torch.Tensor) -> torch.Tensor:
        """[sequences, heads, local tokens, width] to [sequences, heads / size, all tokens, width]."""
        parts = heads_first.unflatten(1, (self.size, -1)).movedim(1, 0)
        return self._exchange(parts).movedim(0, 2).flatten(2, 3)

    def gather_heads(self, tokens_first: torch.Tensor) -> torch.Tensor:
        """[sequences, all tokens, heads / size, width] to [sequences, local tokens, heads, width]."""
        parts = tokens_first.unflatten(1, (self.size, -1)).movedim(1, 0)
        return self._exchange(parts).movedim(0, 2).flatten(2, 3)

    def gather_logits(self, local: torch.Tensor) -> torch.Tensor:
        """[sequences, local tokens, vocabulary] to [sequences, all tokens, vocabulary], without gradient."""
        parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, local.contiguous(), group=self.group)
        return torch.cat(parts, 1)

    def total(self, share: torch.Tensor) -> torch.Tensor:
        """Return the sum over the group; its gradient is that of this rank's share alone."""
        return share + (collectives.all_reduce(share.detach(), "sum", self.name) - share.detach())

    def _exchange(self, parts: torch.Tensor) -> torch.Tensor:
        """Part r goes to rank r, in both directions of the pass."""
        return collectives.all_to_all_single_autograd(parts.contiguous(), None, None, self.name)


_groups: dict[int, SequenceGroup] = {}  # by size: a process makes each once
_current: SequenceGroup | None = None


def start_sequence_group(size: int) -> SequenceGroup | None:
    """Make the group that this process's models run in from now on; None for `size` 1. Collective.

    Ranks are numbered node by node, so that a group lies within a node where it fits.
    """
    global _current
    if size > 1 and size not in _groups:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        for first in range(0, world_size, size):  # every rank makes every group
            group = dist.new_group(list(range(first, first + size)))
            if first <= rank < first + size:
                _groups[size] = SequenceGroup(size, rank - first, group, group.group_name)
    _current = _groups.get(size)
    return _current


def sequence_group() -> SequenceGroup | None:
    """Return the group that this process's models run in; None where it has whole sequences."""
    return _current


@dataclass(frozen=True)
class WholeSequences:
    """What attention has to know of the whole sequences of a micro-batch.

    `documents` numbers each token's document in its sequence, int32 [sequences, seq_len]. `lengths` are arguments of
    varlen attention for the sequences end to end. `is_sliced`: the model got this rank's slice of them, else all.
    """

    documents: torch.Tensor
    lengths: dict[str, Any]
    is_sliced: bool
    _masks: dict[Any, Any] = field(default_factory=dict)  # layers share them

    def mask(self, window: int | None) -> torch.Tensor:
        """Return which keys (last) each query sees, bool [sequences, 1, seq_len, seq_len]."""
        if torch.compiler.is_compiling():  # a graph has no memory of others
            return self._make_mask(window)
        if window not in self._masks:
            self._masks[window] = self._make_mask(window)
        mask: torch.Tensor = self._masks[window]
        return mask

    def _make_mask(self, window: int | None) -> torch.Tensor:
        documents = self.documents
        tokens = torch.arange(documents.shape[1], device=documents.device)
        distance = tokens[:, None] - tokens
        is_near = (distance >= 0) & (distance < (window or documents.shape[1]))
        return ((documents[:, :, None] == documents[:, None, :]) & is_near)[:, None]

    def block_mask(self, window: int | None) -> BlockMask:
        """Return the same for flex attention."""
        key = ("block", window)
        if key not in self._masks:
            documents = self.documents
            num_sequences, seq_len = documents.shape

            def sees(sequence: Any, _: Any, query: Any, key: Any) -> Any:
                is_near = (query >= key) & (query - key < (window or seq_len))
                return is_near & (documents[sequence, query] == documents[sequence, key])

            sizes = {"batch_size": num_sequences, "q_length": seq_len, "kv_length": seq_len}
            self._masks[key] = flex_attention_mask(**sizes, mask_function=sees, device=documents.device)
        return self._masks[key]


def repeated_heads(num_heads: int, num_key_heads: int, size: int) -> int:
    """Return how often key and value heads are repeated, as little as lets `size` ranks share them evenly.

    Raises ValueError if query heads do not divide by `size`.
    """
    if num_heads % size:
        raise ValueError(f"execution.sequence_parallel: {size} processes cannot share {num_heads} attention heads")
    return math.lcm(num_key_heads, size) // num_key_heads
