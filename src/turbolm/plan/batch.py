"""Batch arithmetic: how a global batch is shared by the processes and cut into micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from turbolm.errors import UserError
from turbolm.recipe.checks import not_whole_bins, too_few_sequences
from turbolm.recipe.schema import Recipe

IGNORED_TARGET = -100  # the target that no loss counts: torch's default `ignore_index`
AUTO_MICRO_BATCH_TOKENS = 16 * 1024  # `micro_batch: auto` goes no higher, unless one bin is longer


@dataclass(frozen=True)
class BatchPlan:
    """One optimizer step: `bins_per_batch` rows of `seq_len` tokens over `world_size` processes."""

    seq_len: int
    global_batch_tokens: int
    bins_per_batch: int
    world_size: int
    micro_batch_bins: int  # bins of one forward pass on one process
    gradient_accumulation_steps: int
    num_filler_bins: int  # bins whose targets are all ignored, where the processes do not divide the batch

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of one forward pass on one process."""
        return self.micro_batch_bins * self.seq_len


def plan_batch(
    recipe: Recipe, world_size: int, *, seq_len: int | None = None, batch_tokens: int | None = None
) -> BatchPlan:
    """The batch arithmetic of `recipe` on `world_size` processes, at its longest rows and largest batch by default.

    `micro_batch: auto` cuts a process's share of the batch into the fewest even parts of at most 16k tokens. A larger
    `micro_batch` than the share is lowered to it, since the rest would be filler. Shorter rows make micro-batches of as
    many tokens.
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    longest = recipe.data.seq_len
    seq_len, batch_tokens = seq_len or longest, batch_tokens or recipe.train.global_batch
    bins, rest = divmod(batch_tokens, seq_len)
    if rest:
        raise UserError(f"train.global_batch: {not_whole_bins(batch_tokens, seq_len)}")
    too_few = too_few_sequences(batch_tokens, seq_len, world_size)
    if too_few:
        raise UserError(f"train.global_batch: {too_few}")
    micro_tokens = recipe.execution.micro_batch
    if micro_tokens != "auto" and micro_tokens % longest:
        raise UserError(f"execution.micro_batch: {not_whole_bins(micro_tokens, longest)}")
    micro_bins = choose_micro_batch_bins(micro_tokens, seq_len, bins, world_size)
    accumulation = _ceil(bins, world_size * micro_bins)
    return BatchPlan(
        seq_len=seq_len,
        global_batch_tokens=batch_tokens,
        bins_per_batch=bins,
        world_size=world_size,
        micro_batch_bins=micro_bins,
        gradient_accumulation_steps=accumulation,
        num_filler_bins=world_size * micro_bins * accumulation - bins,
    )


def choose_micro_batch_bins(micro_tokens: int | str, seq_len: int, num_bins: int, world_size: int) -> int:
    """Rows of `seq_len` in one micro-batch of a batch of `num_bins`; `micro_tokens` as `execution.micro_batch`."""
    share = _ceil(num_bins, world_size)
    if isinstance(micro_tokens, str):
        return _ceil(share, _ceil(share, max(AUTO_MICRO_BATCH_TOKENS // seq_len, 1)))
    return min(max(micro_tokens // seq_len, 1), share)


def _ceil(count: int, parts: int) -> int:
    return -(-count // parts)
