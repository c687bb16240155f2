"""Bytes that DeepSpeed reads and writes for each weight beside the forward and backward pass. Torch-free.

Each operator's operands and results count once, as with `memory_bytes` (`turbolm.plan.work`); what a collective sends
is traffic and counts there. Counted on the real engine, which tests/engine/test_weight_bytes.py repeats. Where most of
it is, in DeepSpeed 0.19.8: runtime/zero/stage_1_and_2.py, `reduce_independent_p_g_buckets_and_remove_grads` (copy to
the bucket), `average_tensor` (division), `allreduce_bucket` (joined, to fp32 and back), `_add_to_grad_partition_buffer`
(sum over micro-batches), `has_inf_or_nan`, `get_grad_norm_direct` (norm in fp64), `unscale_and_clip_grads`; the same in
runtime/zero/stage3.py; runtime/bf16_optimizer.py for stage 1 in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass

Pair = tuple[float, float]  # of every weight of the model, and of each that the process updates


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a weight at one ZeRO stage."""

    each: Pair  # of its gradient, in every micro-batch
    later: Pair  # more in every micro-batch of a step but the first
    last: Pair  # more once a step
    update: Pair  # norm, clipping, AdamW (28), the copy that the model computes with
    alone: float = 0.0  # of a reduction: not with a single process


_BYTES = {  # by ZeRO stage and bytes of an element of the model
    (0, 4): WeightBytes((0, 0), (12, 0), (24, 0), (40, 0), alone=8),
    (1, 4): WeightBytes((0, 0), (12, 0), (24, 16), (0, 72), alone=8),
    (1, 2): WeightBytes((18, 0), (8, 0), (16, 0), (28, 34), alone=8),
    (2, 4): WeightBytes((24, 16), (0, 12), (0, 0), (0, 72), alone=8),
    (2, 2): WeightBytes((24, 18), (0, 0), (0, 4), (0, 70)),
    (3, 4): WeightBytes((24, 16), (0, 4), (0, 0), (0, 72)),
    (3, 2): WeightBytes((22, 16), (0, 4), (0, 0), (0, 70)),
}


def gradient_bytes(stage: int, element_bytes: int, micro_batches: int, world_size: int) -> float:
    """Return the bytes that the gradient of a weight takes in a step, as the mean over the weights of the model."""
    one = _of(stage, element_bytes)
    reductions = micro_batches if stage >= 2 else 1
    total = micro_batches * _mean(one.each, world_size) + (micro_batches - 1) * _mean(one.later, world_size)
    return total + _mean(one.last, world_size) - (one.alone * reductions if world_size == 1 else 0.0)


def update_bytes(stage: int, element_bytes: int, world_size: int) -> float:
    """Return the bytes that the update of a weight by AdamW takes on each process, as the mean over the weights."""
    return _mean(_of(stage, element_bytes).update, world_size)


def _mean(pair: Pair, world_size: int) -> float:
    return pair[0] + pair[1] / world_size


def _of(stage: int, element_bytes: int) -> WeightBytes:
    """Return a stage's; stage 0 in half precision, which recipes refuse, counts as stage 1."""
    return _BYTES.get((stage, element_bytes)) or _BYTES[1, element_bytes]
