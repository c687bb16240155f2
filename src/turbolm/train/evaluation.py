"""Loss and bits per byte on the held-out documents."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from turbolm.data.batch.loader import evaluation_batches, evaluation_set
from turbolm.engine.engine import Engine
from turbolm.reliability import heartbeat
from turbolm.train.context import Context
from turbolm.train.pinned import pinned_memory
from turbolm.train.step import micro_batch_loss


@dataclass(frozen=True)
class EvaluationResult:
    """`loss` is in nats per target token; `bits_per_byte` counts every byte of the text and each document's end.

    Bits per byte is omitted if the tokenizer does not reproduce its text: some bytes have no token.
    """

    loss: float
    bits_per_byte: float | None
    num_targets: int


@torch.no_grad()
def evaluate(engine: Engine, context: Context, attention: str) -> EvaluationResult | None:
    """Evaluate the model in its current state. Collective; returns the same on every rank.

    Returns None if a rank was asked to stop meanwhile.
    """
    plan, store, data = context.plan, context.store, context.recipe.data
    held_out = evaluation_set(store, data.seq_len, plan.recipe.evaluation.tokens, data.packing)
    device_sum = torch.zeros((), dtype=torch.float64, device=engine.device)  # read once, at the end
    engine.eval()
    for batch in evaluation_batches(
        held_out,
        store,
        micro_batch_size=plan.batch.micro_batch_bins,
        fixed_cu_seqlens=plan.recipe.execution.compile != "none",
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        shared_by=plan.batch.sequence_parallel,
        memory=pinned_memory(engine.device),
    ):
        heartbeat.advance()
        if _any_rank_asked_to_stop(context):
            engine.train()
            return None
        for micro_batch in batch.micro_batches:
            device_sum += micro_batch_loss(engine, micro_batch, attention)[1].double()
        heartbeat.advance()
    engine.train()
    loss_sum = device_sum.cpu()
    dist.all_reduce(loss_sum, group=context.group)
    loss = float(loss_sum) / held_out.num_targets
    bits_per_byte = float(loss_sum) / math.log(2) / held_out.text_bytes
    return EvaluationResult(loss, None if store.text_loss else bits_per_byte, held_out.num_targets)


def _any_rank_asked_to_stop(context: Context) -> bool:
    """Agree on the answer over all ranks. Collective, on the host."""
    asked = torch.tensor([context.stop.reason is not None], dtype=torch.int64)
    dist.all_reduce(asked, group=context.group)
    return bool(asked[0])
