"""Scheduled quantities as pure functions of the tokens seen. Torch-free.

A value depends on nothing but the recipe and a token count, so a resumed run, a run on another world size and the
preview in `turbolm plan` read the same curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from turbolm.recipe.schema import Schedule
from turbolm.units import Span


def lr_ratio(schedule: Schedule, tokens: float, budgets_tokens: Sequence[int], global_batch_tokens: int) -> float:
    """The learning rate after `tokens` tokens, as a ratio of the recipe's peak.

    `budgets_tokens` holds the run's token budget and, for a finished run that was extended, each larger budget after
    it. With `on_extend: rewarm` every extension warms up from where the one before it ended and runs the same shape
    over the added tokens; with `on_extend: stretch` the curve of the larger budget, drawn from the start of the run,
    holds from where the run stands. Either way the values up to the earlier budget stay as they were.
    """
    reached = next((i for i, budget in enumerate(budgets_tokens) if tokens <= budget), len(budgets_tokens) - 1)
    if schedule.on_extend == "stretch":
        return _segment_ratio(schedule, tokens, budgets_tokens[reached], global_batch_tokens, start_ratio=0.0)
    starts_tokens = [0, *budgets_tokens[:reached]]
    start_ratio = 0.0
    for start, end in pairwise(starts_tokens):
        start_ratio = _segment_ratio(schedule, end - start, end - start, global_batch_tokens, start_ratio)
    start = starts_tokens[-1]
    length = budgets_tokens[reached] - start
    return _segment_ratio(schedule, tokens - start, length, global_batch_tokens, start_ratio)


def _segment_ratio(
    schedule: Schedule, tokens: float, length_tokens: int, global_batch_tokens: int, start_ratio: float
) -> float:
    """One warmup, plateau and decay over `length_tokens`, starting from `start_ratio`."""

    def span_tokens(span: Span) -> float:
        return span.tokens(length_tokens, global_batch_tokens)

    floor = schedule.min_lr_ratio
    warmup_tokens = min(span_tokens(schedule.warmup), length_tokens)
    if tokens < warmup_tokens:
        return start_ratio + (1 - start_ratio) * tokens / warmup_tokens
    decay_start = warmup_tokens
    if schedule.name == "wsd":  # warmup, stable, decay (arXiv 2404.06395)
        decay_start = max(warmup_tokens, length_tokens - span_tokens(schedule.decay))
    if schedule.name == "constant" or tokens <= decay_start:
        return 1.0
    progress = min((tokens - decay_start) / max(length_tokens - decay_start, 1), 1.0)
    shape = schedule.decay_shape if schedule.name == "wsd" else schedule.name
    return floor + (1 - floor) * _DECAYS[shape](progress)


# Each falls from 1 at progress 0 to 0 at progress 1.
_DECAYS = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "sqrt": lambda progress: 1 - math.sqrt(progress),  # "1-sqrt" of arXiv 2405.18392
}
