"""Batch arithmetic: how a global batch is shared by the processes and cut into micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from turbolm.errors import UserError
from turbolm.recipe.checks import not_full_sequences, too_few_sequences
from turbolm.recipe.schema import Recipe
from turbolm.recipe.sequence_parallel import KEY, not_a_divisor

IGNORED_TARGET = -100  # the target that no loss counts: torch's default `ignore_index`
AUTO_MICRO_BATCH_TOKENS = 16 * 1024  # `micro_batch: auto` goes no higher, unless one sequence is longer


@dataclass(frozen=True)
class BatchPlan:  # the names with `bins` are keys of plan.json
    """One optimizer step: `bins_per_batch` sequences of `seq_len` tokens over `world_size` processes.

    Groups of `sequence_parallel` processes share their sequences; a micro-batch is a group's.
    """

    seq_len: int
    global_batch_tokens: int
    bins_per_batch: int
    world_size: int
    micro_batch_bins: int  # sequences of one forward pass on one process
    gradient_accumulation_steps: int
    num_filler_bins: int  # sequences of ignored targets, if the processes do not divide the batch
    sequence_parallel: int = 1

    @property
    def num_groups(self) -> int:
        """Return how many groups of processes read sequences of their own: the data-parallel size."""
        return self.world_size // self.sequence_parallel

    @property
    def micro_batch_tokens(self) -> int:
        """Return the tokens of one forward pass on one process, or on the group that shares its sequences."""
        return self.micro_batch_bins * self.seq_len

    @property
    def process_tokens(self) -> int:
        """Return the tokens of one forward pass that one process holds: those of its slices."""
        return self.micro_batch_tokens // self.sequence_parallel


def plan_batch(
    recipe: Recipe, world_size: int, *, seq_len: int | None = None, batch_tokens: int | None = None
) -> BatchPlan:
    """Plan the batches of `recipe` on `world_size` processes; by default its longest sequences and largest batch.

    `micro_batch: auto` cuts a process's share of the batch into the fewest even parts of at most 16k tokens. A
    `micro_batch` larger than the share is lowered to it, since the rest would be filler. With shorter sequences a
    micro-batch has the same number of tokens.
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    longest, shared_by = recipe.data.seq_len, recipe.execution.sequence_parallel
    if world_size % shared_by:
        raise UserError(f"{KEY}: {not_a_divisor(shared_by, world_size, 'processes')}")
    num_groups = world_size // shared_by
    seq_len, batch_tokens = seq_len or longest, batch_tokens or recipe.train.global_batch
    num_sequences, rest = divmod(batch_tokens, seq_len)
    if rest:
        raise UserError(f"train.global_batch: {not_full_sequences(batch_tokens, seq_len)}")
    too_few = too_few_sequences(batch_tokens, seq_len, world_size, shared_by)
    if too_few:
        raise UserError(f"train.global_batch: {too_few}")
    micro_tokens = recipe.execution.micro_batch
    if micro_tokens != "auto" and micro_tokens % longest:
        raise UserError(f"execution.micro_batch: {not_full_sequences(micro_tokens, longest)}")
    micro_size = choose_micro_batch_size(micro_tokens, seq_len, num_sequences, num_groups, shared_by)
    accumulation = _ceil(num_sequences, num_groups * micro_size)
    return BatchPlan(
        seq_len=seq_len,
        global_batch_tokens=batch_tokens,
        bins_per_batch=num_sequences,
        world_size=world_size,
        micro_batch_bins=micro_size,
        gradient_accumulation_steps=accumulation,
        num_filler_bins=num_groups * micro_size * accumulation - num_sequences,
        sequence_parallel=shared_by,
    )


def choose_micro_batch_size(
    micro_tokens: int | str, seq_len: int, num_sequences: int, num_groups: int, shared_by: int = 1
) -> int:
    """Return the sequences per micro-batch in a batch of `num_sequences` over `num_groups`, each of `shared_by`
    processes; `micro_tokens` is `execution.micro_batch`."""
    share = _ceil(num_sequences, num_groups)
    if isinstance(micro_tokens, str):
        return _ceil(share, _ceil(share, max(AUTO_MICRO_BATCH_TOKENS * shared_by // seq_len, 1)))
    return min(max(micro_tokens // seq_len, 1), share)


def slice_of_sequence(seq_len: int, shared_by: int, index: int) -> slice:
    """Return the tokens that process `index` of a group of `shared_by` has of every sequence."""
    size, rest = divmod(seq_len, shared_by)
    assert not rest, f"{shared_by} processes cannot share {seq_len} tokens"
    return slice(index * size, (index + 1) * size)


def few_sizes(count: int, most: int) -> int:
    """Return a size that holds `count`, one of three at most: the next power of two, from `most` / 4 up, or `most`.

    What is compiled has a graph for each size, and kernels start blocks for all of it.
    """
    return min(most, 1 << (max(count, _ceil(most, 4)) - 1).bit_length())


def _ceil(count: int, parts: int) -> int:
    return -(-count // parts)
