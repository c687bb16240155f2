"""Statistics against tables and values worked out by hand."""

from __future__ import annotations

import math

import pytest

from turbolm.ablate.verdict import compare, critical_t, paired_p, student_p, words


@pytest.mark.parametrize(
    ("t", "degrees", "p"),
    [  # two-sided critical values of Student's distribution, from any table
        (12.706, 1, 0.05),
        (4.303, 2, 0.05),
        (2.776, 4, 0.05),
        (2.228, 10, 0.05),
        (3.169, 10, 0.01),
        (1.962, 1000, 0.05),
        (0.0, 3, 1.0),
    ],
)
def test_student(t: float, degrees: float, p: float) -> None:
    assert student_p(t, degrees) == pytest.approx(p, abs=1e-4)
    assert student_p(-t, degrees) == student_p(t, degrees)


def test_student_has_closed_forms_for_one_and_two_degrees() -> None:
    for t in (0.1, 0.7, 1.0, 3.0, 25.0):
        assert student_p(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-6)
        assert student_p(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-6)


def test_pairs_by_hand() -> None:
    """Differences -2, -3, -4: mean -3, deviation 1, t = -3 sqrt(3) with 2 degrees."""
    t = 3 * math.sqrt(3)
    assert paired_p([1, 2, 3], [3, 5, 7]) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-6)
    assert paired_p([101.2, 99.1, 100.4, 98.7], [95.0, 97.2, 90.1, 96.0]) == pytest.approx(
        0.07069504922580423, rel=1e-6
    )  # scipy.stats.ttest_rel


def test_what_seeds_do_to_both_arms_alike_is_no_spread() -> None:
    assert compare([70, 100, 130], [100, 125, 150], noise=0.05).verdict == "gain"  # 30, 25 and 20 less
    assert (
        compare([130, 100, 70], [100, 125, 150], noise=0.05).verdict == "cannot be resolved"
    )  # the same, of other seeds


def test_the_smallest_effect_is_the_half_width_of_the_confidence_interval() -> None:
    """Differences -2, -3, -4 have the deviation 1, and t is 4.303 with 2 degrees; the baseline's mean is 5."""
    found = compare([1, 2, 3], [3, 5, 7], noise=0.05)
    assert found.smallest_effect == pytest.approx(4.30265 / math.sqrt(3) / 5, rel=1e-4)
    assert [round(critical_t(degrees), 3) for degrees in (1, 2, 4, 10)] == [12.706, 4.303, 2.776, 2.228]
    assert compare([97], [100], noise=0.03).smallest_effect == 0.03
    # A difference of that size is the smallest that is called one.
    spread = [-1.0, 0.0, 1.0]
    for share, verdict in ((1.01, "loss"), (0.99, "cannot be resolved")):
        arm = [100 + step + share * 4.30265 / math.sqrt(3) for step in spread]
        assert compare(arm, [100] * 3, noise=0.0).verdict == verdict


def test_pairs_without_spread() -> None:
    assert paired_p([1.0], [2.0]) is None
    assert paired_p([2.0, 3.0], [2.0, 3.0]) == 1
    assert paired_p([2.0, 4.0], [3.0, 5.0]) == 0


@pytest.mark.parametrize(
    ("arm", "baseline", "verdict"),
    [
        ([80, 81, 82], [100, 101, 99], "gain"),
        ([120, 121, 119], [100, 101, 99], "loss"),
        ([100, 103, 98], [100, 101, 99], "cannot be resolved"),
        ([130, 100, 70], [100, 125, 150], "cannot be resolved"),
        ([80], [100], "gain"),
        ([97], [100], "cannot be resolved"),
        ([106], [100], "loss"),
    ],
)
def test_verdicts(arm: list[float], baseline: list[float], verdict: str) -> None:
    assert compare(arm, baseline, noise=0.05).verdict == verdict
    other_way = {"gain": "loss", "loss": "gain"}.get(verdict, verdict)
    assert compare(arm, baseline, noise=0.05, less_is_better=False).verdict == other_way


@pytest.mark.parametrize(
    ("seconds", "baseline", "losses", "verdict", "text"),
    [
        (
            [50.0],
            [100.0],
            [4.0],
            "gain",
            "gain: 2.00x as fast (one seed)",
        ),
        (
            [98.0],
            [100.0],
            [4.0],
            "cannot be resolved",
            "cannot be resolved: 1.02x as fast; the smallest effect that these runs resolve is 5.0% of the time (one",
        ),
        ([50.0, 51.0], [100.0, 101.0], [4.0, 4.0], "gain", "gain: 1.99x as fast (p 0.0002"),
        ([None], [100.0], [4.1], "loss", "loss: target not reached in 1 of 1 runs; final loss +2.5%"),
        ([50.0], [None], [3.9], "gain", "gain: baseline: target not reached in 1 of 1 runs; final loss -2.5%"),
        (
            [None],
            [None],
            [4.01],
            "cannot be resolved",
            "cannot be resolved: target not reached in 1 of 1 runs; final loss +0.2%; the smallest effect that "
            "these runs resolve is 0.5% of the loss (one seed)",
        ),
        ([None], [100.0], [math.inf], "loss", "loss: the loss is not finite in 1 of 1 runs"),
    ],
)
def test_words(
    seconds: list[float | None], baseline: list[float | None], losses: list[float], verdict: str, text: str
) -> None:
    found, sentence, _ = words(seconds, baseline, losses, [4.0] * len(baseline), noise=0.05)
    assert found == verdict
    assert sentence.startswith(text.partition(" (p")[0])
    assert ("one seed" in sentence) == (len(seconds) == 1 and math.isfinite(losses[0]))


def test_a_target_met_at_the_first_evaluation_gives_no_number() -> None:
    found, sentence, smallest = words([None, 50.0], [90.0, 100.0], [3.0, 3.0], [4.0, 4.0], noise=0.05, num_unresolved=1)
    assert found == "inconclusive"
    assert sentence.startswith("inconclusive: target met at the first evaluation in 1 of the 4 runs")
    assert smallest is None
    diverged, _, _ = words([None], [90.0], [math.inf], [4.0], noise=0.05, num_unresolved=1)
    assert diverged == "loss"
