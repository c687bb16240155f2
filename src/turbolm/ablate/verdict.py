"""Decide whether two arms differ: a paired t-test over the seeds, and a sentence that says what it found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev

TEST = "two-sided paired t-test over the seeds"
SIGNIFICANCE = 0.05
LOSS_NOISE = 0.005  # relative; a smaller difference between the losses of two runs is taken for chance
UNRESOLVED = "cannot be resolved"
_INTERVALS = 2000


@dataclass(frozen=True)
class Comparison:
    """An arm against the baseline in one measure.

    `ratio` is the arm's mean over the baseline's. `p` is the probability of such a difference, or a larger one, by
    chance; None with a single seed. `verdict` is gain, loss, or `UNRESOLVED`. `smallest_effect` is the smallest
    difference, as a share of the baseline's mean, that these runs tell from chance: with several seeds half the width
    of the 95% confidence interval of the paired differences, with one seed the noise level.
    """

    ratio: float
    p: float | None
    verdict: str
    smallest_effect: float


def compare(
    arm: Sequence[float], baseline: Sequence[float], noise: float, *, less_is_better: bool = True
) -> Comparison:
    """Compare one or more runs of an arm with the baseline's runs of the same seeds.

    `noise` is relative, and decides where there is one seed.
    """
    mean, reference = fmean(arm), fmean(baseline)
    ratio = mean / reference if reference else (1.0 if mean == reference else math.inf)
    direction = "gain" if (mean < reference) == less_is_better else "loss"
    p = paired_p(arm, baseline)
    if p is None:
        return Comparison(ratio, p, UNRESOLVED if abs(ratio - 1) <= noise else direction, noise)
    differences = [first - second for first, second in zip(arm, baseline, strict=True)]
    half_width = critical_t(len(differences) - 1) * stdev(differences) / math.sqrt(len(differences))
    smallest = half_width / abs(reference) if reference else math.inf
    return Comparison(ratio, p, direction if p < SIGNIFICANCE else UNRESOLVED, smallest)


def paired_p(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Two-sided p of the paired t-test (Student, 1908); None for a single pair.

    A seed gives all arms the same initial weights and data, so it moves them together: only the differences within a
    seed count.
    """
    differences = [first - second for first, second in zip(one, other, strict=True)]
    if len(differences) < 2:
        return None
    spread = stdev(differences)
    if spread == 0:
        return 1.0 if differences[0] == 0 else 0.0
    return student_p(fmean(differences) * math.sqrt(len(differences)) / spread, len(differences) - 1)


def student_p(t: float, degrees: float) -> float:
    """P(|T| >= |t|) of Student's t distribution with `degrees` >= 1 degrees of freedom.

    With t = sqrt(degrees) tan(x) the density is cos(x) ** (degrees - 1) up to a factor: smooth on a finite range, so
    Simpson's rule is exact to many digits.
    """
    start = math.atan(abs(t) / math.sqrt(degrees))
    return _integrate_cos(start, degrees - 1) / _integrate_cos(0.0, degrees - 1)


@cache
def critical_t(degrees: int) -> float:
    """The t whose `student_p` is `SIGNIFICANCE`, by bisection."""
    low, high = 0.0, 100.0  # 12.7 with one degree of freedom
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(middle, degrees) > SIGNIFICANCE else (low, middle)
    return high


def _integrate_cos(start: float, power: float) -> float:
    """Integral of cos(x) ** power from `start` to pi / 2."""
    width = (math.pi / 2 - start) / _INTERVALS
    values = [max(0.0, math.cos(start + index * width)) ** power for index in range(_INTERVALS + 1)]
    return width / 3 * (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]))


def words(
    seconds: Sequence[float | None],
    baseline_seconds: Sequence[float | None],
    losses: Sequence[float],
    baseline_losses: Sequence[float],
    noise: float,
    num_unresolved: int = 0,
) -> tuple[str, str, float | None]:
    """(verdict, sentence, smallest effect) on an arm, from the time to the target loss (None: not reached) and final
    loss of each run.

    The baseline's runs have the same seeds. `num_unresolved` of the runs of both met the target at their first
    evaluation, so their time to the target is unknown. Where a run does not reach the target, the final losses decide.
    The smallest effect is that of the measure that decides; None where none does.
    """
    diverged = sum(not math.isfinite(loss) for loss in losses)
    if diverged:
        return "loss", f"loss: the loss is not finite in {diverged} of {len(losses)} runs", None
    if not all(map(math.isfinite, baseline_losses)):
        return "inconclusive", "inconclusive: the baseline's loss is not finite", None
    if num_unresolved:
        text = (
            f"inconclusive: target met at the first evaluation in {num_unresolved} of the {2 * len(losses)} runs of "
            "arm and baseline; evaluate more often or set a lower --target-loss"
        )
        return "inconclusive", text, None
    reached = [sec for sec in seconds if sec is not None]
    baseline_reached = [sec for sec in baseline_seconds if sec is not None]
    if len(reached) == len(seconds) and len(baseline_reached) == len(baseline_seconds):
        found, measure = compare(reached, baseline_reached, noise), "time"
        how = f"{1 / found.ratio:.2f}x as fast"
    else:
        found, measure = compare(losses, baseline_losses, LOSS_NOISE), "loss"
        who, missed = "", len(seconds) - len(reached)
        if not missed:
            who, missed = "baseline: ", len(baseline_seconds) - len(baseline_reached)
        how = f"{who}target not reached in {missed} of {len(seconds)} runs; final loss {found.ratio - 1:+.1%}"
    if found.verdict == UNRESOLVED:
        how += f"; the smallest effect that these runs resolve is {found.smallest_effect:.1%} of the {measure}"
    test = "one seed"
    if found.p is not None:
        test = f"p {found.p:.2g}" if found.p >= 0.001 else "p < 0.001"
    return found.verdict, f"{found.verdict}: {how} ({test})", found.smallest_effect
