"""Scheduled quantities as pure functions of the tokens seen. Torch-free.

A value depends on nothing but the recipe and a token count, so a resumed run, a run on another world size and the
preview in `turbolm plan` read the same curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from turbolm.recipe.schema import Ramp, Schedule
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
    if schedule.name == "inverse_sqrt":  # arXiv 1706.03762, section 5.3; without a warmup, counted in first steps
        return max(floor, math.sqrt(max(warmup_tokens, global_batch_tokens) / max(tokens, global_batch_tokens)))
    if schedule.name == "restarts":
        done = _cycle_progress(tokens - warmup_tokens, span_tokens(schedule.cycle), schedule.cycle_growth)
        return floor + (1 - floor) * _DECAYS["cosine"](done)
    progress = min((tokens - decay_start) / max(length_tokens - decay_start, 1), 1.0)
    shape = schedule.decay_shape if schedule.name == "wsd" else schedule.name
    return floor + (1 - floor) * _DECAYS[shape](progress)


def _cycle_progress(tokens: float, cycle_tokens: float, growth: float) -> float:
    """How much of the current cycle is done, in (0, 1]: 1 at the end of each (warm restarts, arXiv 1608.03983)."""
    if growth > 1:  # cycles done: the sum of a geometric series
        number = math.ceil(math.log(1 + tokens / cycle_tokens * (growth - 1), growth)) - 1
        start = cycle_tokens * (growth**number - 1) / (growth - 1)
    else:
        number = math.ceil(tokens / cycle_tokens) - 1
        start = cycle_tokens * number
    return min((tokens - start) / (cycle_tokens * growth**number), 1.0)


def ramp_value(ramp: Ramp, tokens: float, budget_tokens: int, global_batch_tokens: int) -> float:
    """A ramp's value after `tokens` tokens; `budget_tokens` is the run's first budget, also after an extension."""
    progress = min(tokens / ramp.over.tokens(budget_tokens, global_batch_tokens), 1.0)
    if ramp.shape == "cosine":
        progress = 1 - _DECAYS["cosine"](progress)
    return ramp.start + (ramp.end - ramp.start) * progress


# Each falls from 1 at progress 0 to 0 at progress 1.
_DECAYS = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "sqrt": lambda progress: 1 - math.sqrt(progress),  # "1-sqrt" of arXiv 2405.18392
}
