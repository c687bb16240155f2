"""The decisions about anomalies, against values computed by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from turbolm.recipe.schema import Anomalies
from turbolm.reliability.anomalies import AnomalyWatch, SkippedBatches, spike_limit

EIGHT = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 100.0]  # median 4.5; deviations .5 .5 1.5 1.5 2.5 2.5 3.5 95.5: median 2


def watch(**policy: Any) -> AnomalyWatch:
    return AnomalyWatch(Anomalies.model_validate({"window": 8, "threshold": 2.0, **policy}))


def filled(**policy: Any) -> AnomalyWatch:
    found = watch(spikes="skip", **policy)
    for value in EIGHT:
        assert found.judge(value, 10 * value) is None, "nothing is a spike before the window is full"
    return found


def test_the_limit_is_the_median_and_so_many_median_absolute_deviations() -> None:
    assert spike_limit(EIGHT, 2.0) == pytest.approx(4.5 + 2 * 1.4826 * 2.0)
    assert spike_limit([2.0] * 9, 6.0) == pytest.approx(2.0 + 6 * 0.01 * 2.0), "a constant has room for a little"
    assert spike_limit([-2.0, -2.0, -2.0], 1.0) == pytest.approx(-1.98)


def test_a_loss_or_a_norm_above_its_limit_is_a_spike_and_one_at_it_is_not() -> None:
    limit = 4.5 + 2 * 1.4826 * 2.0
    assert filled().judge(limit, 10 * limit) is None
    spike = filled().judge(limit + 1e-9, 0.0)
    assert spike is not None
    assert (spike.kind, spike.limit) == ("loss_spike", pytest.approx(limit))
    spike = filled().judge(0.0, 10 * limit + 1e-9)
    assert spike is not None
    assert (spike.kind, spike.limit) == ("norm_spike", pytest.approx(10 * limit))


def test_a_spike_does_not_enter_the_window_and_old_steps_leave_it() -> None:
    found = filled()
    for _ in range(5):
        assert found.judge(1000.0, 1.0) is not None
        assert found.judge(math.nan, 1.0) is not None
    assert found.losses == EIGHT
    assert found.judge(9.0, 1.0) is None
    assert found.losses == [*EIGHT[1:], 9.0]
    assert found.norms == [*(10 * value for value in EIGHT[1:]), 1.0]


def test_a_new_segment_of_the_curriculum_starts_a_new_window() -> None:
    found = filled()
    assert found.judge(1000.0, 1.0, segment=50) is None
    assert found.losses == [1000.0]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_an_anomaly_from_the_first_step_on(loss: float, norm: float) -> None:
    for found in (watch(), watch(spikes="skip"), filled()):
        anomaly = found.judge(loss, norm)
        assert anomaly is not None
        assert anomaly.kind == "non_finite"


def test_spikes_are_trained_on_unless_the_recipe_says_otherwise() -> None:
    found = watch()
    assert [found.judge(value, value) for value in (*EIGHT, 1e9)] == [None] * 9
    assert found.losses == []


def decisions(found: AnomalyWatch, losses: str) -> list[str | None]:
    """One decision for each letter: `x` is a step with a NaN, `.` a clean one. Rollbacks are counted as in training."""
    made = []
    for letter in losses:
        decision = found.decide(found.judge(math.nan if letter == "x" else 1.0, 1.0))
        if decision == "rollback":
            found.in_a_row, found.num_rollbacks = 0, found.num_rollbacks + 1
        made.append(decision)
    return made


def test_more_in_a_row_than_allowed_roll_back_and_then_stop() -> None:
    skip, back = "skip", "rollback"
    assert decisions(watch(max_in_a_row=2, max_rollbacks=1), "xx.xx.xxxxxx") == [
        skip, skip, None, skip, skip, None, skip, skip, back, skip, skip, "stop",
    ]  # fmt: skip
    assert decisions(watch(max_in_a_row=0, max_rollbacks=2), "xxx") == [back, back, "stop"]
    assert decisions(watch(non_finite="rollback", max_rollbacks=1), ".x.x") == [None, back, None, "stop"]
    assert decisions(watch(non_finite="stop"), ".x") == [None, "stop"]


def test_the_default_skips_three_in_a_row_rolls_back_twice_and_stops() -> None:
    made = decisions(AnomalyWatch(Anomalies()), "x" * 12)
    assert made == [*["skip"] * 3, "rollback"] * 2 + [*["skip"] * 3, "stop"]


def test_the_state_survives_json() -> None:
    found = filled()
    found.decide(found.judge(math.nan, 1.0))
    found.num_rollbacks = 1
    other = watch(spikes="skip")
    other.restore(json.loads(json.dumps(found.state(), allow_nan=False)))
    assert other == found
    other.restore({})
    assert other == watch(spikes="skip"), "a checkpoint from before there were anomalies"


def test_the_batches_of_steps_after_windows_were_left_out() -> None:
    assert [SkippedBatches().batch_index(step) for step in range(3)] == [0, 1, 2]
    skipped = SkippedBatches().without(2, 5)
    assert [skipped.batch_index(step) for step in range(5)] == [0, 1, 5, 6, 7]
    again = skipped.without(6, 7)  # the second begins after the first, in batches
    assert [again.batch_index(step) for step in range(5)] == [0, 1, 5, 7, 8]
    assert again.num_batches == 4
    adjacent = SkippedBatches().without(0, 2).without(2, 3)
    assert [adjacent.batch_index(step) for step in range(3)] == [3, 4, 5]
