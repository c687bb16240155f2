"""Batch size and learning rate that a published scaling law would choose: suggestions, never applied. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

STEP_LAW = "Step Law (arXiv 2503.04715)"
_FITTED_PARAMETERS = (60e6, 1e9)  # what the law was fitted on, section 4 there
_FITTED_TOKENS = (2e9, 100e9)


@dataclass(frozen=True)
class Suggestion:
    """What the law gives for AdamW, and whether this run lies within what it was fitted on."""

    source: str
    lr: float
    global_batch_tokens: int
    is_extrapolated: bool


def suggest(num_parameters: int, budget_tokens: int) -> Suggestion:
    """The best peak learning rate 1.79 N^-0.713 D^0.307 and batch 0.58 D^0.571 tokens of the Step Law.

    `num_parameters` N are those without embeddings and head; D is the token budget.
    """
    size, tokens = max(num_parameters, 1), budget_tokens
    inside = _FITTED_PARAMETERS[0] <= size <= _FITTED_PARAMETERS[1] and _FITTED_TOKENS[0] <= tokens <= _FITTED_TOKENS[1]
    return Suggestion(STEP_LAW, 1.79 * size**-0.713 * tokens**0.307, round(0.58 * tokens**0.571), not inside)
