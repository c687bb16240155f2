"""The suggested batch and rate against values worked out by hand from the paper's formula."""

from __future__ import annotations

import pytest

from turbolm.plan.suggestions import suggest


def test_the_step_law() -> None:
    """A billion parameters on 100 billion tokens, the point its authors check: in logarithms of ten."""
    suggestion = suggest(10**9, 10**11)
    assert suggestion.lr == pytest.approx(1.79 * 10 ** (-0.713 * 9 + 0.307 * 11))
    assert suggestion.lr == pytest.approx(1.63e-3, rel=0.01)
    assert suggestion.global_batch_tokens == pytest.approx(0.58 * 10 ** (0.571 * 11), abs=1)
    assert not suggestion.is_extrapolated
    assert suggest(10**6, 10**7).is_extrapolated
