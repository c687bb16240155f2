"""Loss and bits per byte on the held-out documents."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from turbolm.data.batch.loader import evaluation_batches, evaluation_set
from turbolm.data.store.token_store import TokenStore
from turbolm.engine.engine import Engine
from turbolm.plan.plan import Plan
from turbolm.reliability import heartbeat
from turbolm.train.step import micro_batch_loss


@dataclass(frozen=True)
class EvaluationResult:
    """`loss` is in nats per target token; `bits_per_byte` counts every byte of the text and each document's end.

    There are no bits per byte where the tokenizer does not give its text back: no token stands for some of the bytes.
    """

    loss: float
    bits_per_byte: float | None
    num_targets: int


@torch.no_grad()
def evaluate(
    engine: Engine,
    store: TokenStore,
    plan: Plan,
    attention: str,
    group: dist.ProcessGroup | None,
    should_stop: Callable[[], bool] = lambda: False,
) -> EvaluationResult | None:
    """Evaluate the model as it is. Collective; the same on every rank.

    None when `should_stop` said so between two batches; it must say the same on every rank.
    """
    data, max_tokens = plan.recipe.data, plan.recipe.evaluation.tokens
    layout = {"world_size": dist.get_world_size(), "rank": dist.get_rank()}
    loss_sum = torch.zeros((), dtype=torch.float64)
    engine.eval()
    for batch in evaluation_batches(
        store,
        data.seq_len,
        max_tokens,
        data.packing,
        micro_batch_bins=plan.batch.micro_batch_bins,
        fixed_cu_seqlens=plan.recipe.execution.compile != "none",
        **layout,
    ):
        heartbeat.advance()
        if should_stop():
            engine.train()
            return None
        for micro_batch in batch.micro_batches:
            loss_sum += micro_batch_loss(engine, micro_batch, attention)[1].cpu().double()
        heartbeat.advance()
    engine.train()
    dist.all_reduce(loss_sum, group=group)
    held_out = evaluation_set(store, data.seq_len, max_tokens, data.packing)
    loss = float(loss_sum) / held_out.num_targets
    bits_per_byte = float(loss_sum) / math.log(2) / held_out.text_bytes
    return EvaluationResult(loss, None if store.text_loss else bits_per_byte, held_out.num_targets)
