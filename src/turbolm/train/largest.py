"""Run the largest micro-batch of a schedule once before the first step, so that what does not fit fails at once.

A run that begins with short sequences or small batches would otherwise end when they grow, hours later. What does not
fit is told with what to change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from turbolm.data.batch.collate import fill_cu_seqlens
from turbolm.errors import RunError
from turbolm.models.sequence_parallel import sequence_group
from turbolm.plan.batch import choose_micro_batch_size
from turbolm.plan.plan import Plan
from turbolm.plan.suggestions import is_accepted
from turbolm.reliability import heartbeat
from turbolm.train.session import Session
from turbolm.train.step import micro_batch_loss


def micro_batch_shapes(plan: Plan, step: int) -> set[tuple[int, int]]:
    """Return every (sequences, seq_len) of a micro-batch that the run meets after `step` finished steps."""
    curriculum, micro_batch = plan.curriculum, plan.recipe.execution.micro_batch
    groups = plan.batch.num_groups, plan.batch.sequence_parallel
    remaining = curriculum.segments[curriculum.segments.index(curriculum.segment(step)) :]
    batches = {(segment.global_batch_tokens, seq_len) for segment in remaining for seq_len in segment.seq_lens}
    return {
        (choose_micro_batch_size(micro_batch, seq_len, tokens // seq_len, *groups), seq_len)
        for tokens, seq_len in batches
    }


@contextmanager
def memory_told(plan: Plan, what: str) -> Iterator[None]:
    """Turn torch's OutOfMemoryError into a RunError that names the keys to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).partition(". ")[0]
        raise RunError(f"{what}: {first}. {_cure(plan)}; `turbolm plan` shows what takes the memory") from error


def _cure(plan: Plan) -> str:
    """Return the changes of the execution that this recipe has left and accepts, cheapest first."""
    execution, batch = plan.recipe.execution, plan.batch
    changes: list[dict[str, Any]] = []
    if batch.micro_batch_bins > 1:
        changes.append({"micro_batch": batch.micro_batch_bins // 2 * batch.seq_len})
    if plan.world_size > 1:
        changes += [{"zero_stage": stage} for stage in range(execution.zero_stage + 1, 4)]
    if execution.activation_checkpointing not in ("full", "offloaded"):
        changes.append({"activation_checkpointing": "full"})
    if not execution.offload_optimizer:
        changes.append({"offload_optimizer": True})
    ways = [
        f"execution.{key}={str(value).lower()}"
        for change in changes
        if is_accepted(plan.recipe, execution=execution.model_copy(update=change))
        for key, value in change.items()
    ]
    return f"Set one or more of {', '.join(ways)}" if ways else "Use more or larger GPUs"


def run_largest(session: Session) -> None:
    """Run the largest micro-batch forward and backward with a loss of 0, as the first one of the step that follows.

    Its gradients are zeros, which change no sum, and it draws no random numbers of the run. Where every micro-batch
    has one shape, the first step is that run. Collective.
    """
    engine, plan = session.engine, session.plan
    shapes = micro_batch_shapes(plan, session.skipped.batch_index(session.step))
    if len(shapes) == 1:
        return
    num_sequences, seq_len = max(shapes, key=lambda shape: (shape[0] * shape[1], shape[1]))
    session.log.say(f"trying the largest micro-batch of the schedule: {num_sequences} x {seq_len} tokens")
    micro_batch = _made_up(session, num_sequences, seq_len)
    what = f"execution.micro_batch: {num_sequences} x {seq_len} tokens, the largest micro-batch of the schedule"
    with memory_told(plan, what), torch.random.fork_rng([engine.device] if engine.device.type == "cuda" else []):
        heartbeat.advance()
        objective = micro_batch_loss(engine, micro_batch, session.attention)[0]
        engine.backward_and_step(objective * 0.0, is_boundary=False)
        heartbeat.advance()
    session.log.reset_clock()


def _made_up(session: Session, num_sequences: int, seq_len: int) -> dict[str, np.ndarray]:
    """Return a micro-batch without padding. Documents share its sequences if the run's do: attention takes a mask."""
    documents = 1 if session.plan.recipe.data.packing == "single" else 2
    first = np.arange(seq_len) % -(-seq_len // documents)
    tokens = np.arange(num_sequences * seq_len).reshape(num_sequences, seq_len) % session.loader.store.vocab_size
    micro_batch = {"input_ids": tokens, "position_ids": np.tile(first, (num_sequences, 1)), "targets": tokens}
    max_slices = session.loader.max_slices
    if max_slices is not None:
        starts = np.flatnonzero(micro_batch["position_ids"].ravel() == 0)
        ends = np.append(starts[1:], tokens.size)
        micro_batch["cu_seqlens"] = fill_cu_seqlens(ends, num_sequences * (max_slices[seq_len] + 1))
    group = sequence_group()
    return micro_batch if group is None else group.share(micro_batch)
