"""Whether a difference between two arms is one: a paired t-test over the seeds, and plain words for what it says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

SIGNIFICANCE = 0.05
LOSS_NOISE = 0.005  # relative; smaller differences of a loss between two runs are taken for chance
_INTERVALS = 2000


@dataclass(frozen=True)
class Comparison:
    """An arm against the baseline in one measure.

    `ratio` is the arm's mean over the baseline's. `p` is the probability of such a difference, or a larger one, by
    chance; None with a single seed. `verdict` is gain, loss, null (less than the noise level) or not significant.
    """

    ratio: float
    p: float | None
    verdict: str


def compare(
    arm: Sequence[float], baseline: Sequence[float], noise: float, *, less_is_better: bool = True
) -> Comparison:
    """Compare the runs of an arm with the baseline's of the same seeds; at least one. `noise` is relative."""
    mean, reference = fmean(arm), fmean(baseline)
    ratio = mean / reference if reference else (1.0 if mean == reference else math.inf)
    direction = "gain" if (mean < reference) == less_is_better else "loss"
    p = paired_p(arm, baseline)
    if p is None:
        verdict = direction if abs(ratio - 1) > noise else "not significant"
    elif p < SIGNIFICANCE:
        verdict = direction
    else:
        verdict = "null" if abs(ratio - 1) <= noise else "not significant"
    return Comparison(ratio, p, verdict)


def paired_p(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Two-sided p of Student's t-test for differences whose mean is 0; None for a single pair.

    A seed gives all arms the same initial weights and the same data, and so moves them together.
    """
    differences = [first - second for first, second in zip(one, other, strict=True)]
    if len(differences) < 2:
        return None
    spread = stdev(differences)
    if spread == 0:
        return 1.0 if differences[0] == 0 else 0.0
    return student_p(fmean(differences) * math.sqrt(len(differences)) / spread, len(differences) - 1)


def student_p(t: float, degrees: float) -> float:
    """P(|T| >= |t|) of Student's distribution with `degrees` >= 1 of freedom.

    With t = sqrt(degrees) tan(x) its density is cos(x) ** (degrees - 1), up to a factor: smooth on a finite range, so
    Simpson's rule is exact to many digits.
    """
    start = math.atan(abs(t) / math.sqrt(degrees))
    return _integrate_cos(start, degrees - 1) / _integrate_cos(0.0, degrees - 1)


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
) -> tuple[str, str]:
    """(verdict, sentence) on an arm, from each run's time to the target loss (None: not reached) and final loss.

    The baseline's are of the same seeds.
    Where a run does not reach the target, the final losses decide.
    """
    diverged = sum(not math.isfinite(loss) for loss in losses)
    if diverged:
        return "loss", f"loss: the loss is not finite in {diverged} of {len(losses)} runs"
    if not all(map(math.isfinite, baseline_losses)):
        return "not significant", "the baseline's loss is not finite"
    reached = [sec for sec in seconds if sec is not None]
    baseline_reached = [sec for sec in baseline_seconds if sec is not None]
    if len(reached) == len(seconds) and len(baseline_reached) == len(baseline_seconds):
        found = compare(reached, baseline_reached, noise)
        how = f"{1 / found.ratio:.2f}x as fast"
    else:
        found = compare(losses, baseline_losses, LOSS_NOISE)
        missed, who = len(seconds) - len(reached), ""
        if not missed:
            missed, who = len(baseline_seconds) - len(baseline_reached), "baseline: "
        runs = len(baseline_seconds) if who else len(seconds)
        how = f"{who}target not reached in {missed} of {runs} runs; final loss {found.ratio - 1:+.1%}"
    if found.p is not None:
        how += f" (p {found.p:.2g})" if found.p >= 0.001 else " (p < 0.001)"
        return found.verdict, f"{found.verdict}: {how}"
    if found.verdict == "not significant":
        return found.verdict, f"one seed: not significant ({how})"
    return found.verdict, f"{found.verdict}: {how} (one seed)"
