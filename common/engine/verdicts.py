"""What numbers over seeds, or over images, allow us to say: holds, fails or undecided. No torch.

A claim says that a difference is larger than a margin, which is stated before anything is trained.
One rule decides it. The claim *holds* if the whole interval of the difference lies above the
margin, it *fails* if the whole interval lies below, and it's *undecided* otherwise.

Two methods that are equal are called different in at most 5% of experiments, however many claims an
experiment makes: `judge` narrows the level of each by Holm's rule.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

LEVEL = 0.05  # share of experiments with equal methods in which one may be called the better
MOST_SEEDS = 1000  # beyond this nobody waits


@cache
def _quantile(degrees: int, level: float) -> float:
    """Of Student's t, for an interval that is wrong in a share `level` of cases."""
    from scipy.special import stdtrit  # without the checks of scipy.stats

    return float(stdtrit(degrees, 1 - level / 2))


@dataclass(frozen=True)
class OverSeeds:
    """Paired differences, one a seed: Student's t.

    NOTE: with a test set that each seed draws from the same images the seeds aren't quite
    independent (Nadeau and Bengio 2003), so the interval speaks of these images and not of others.

    Attributes:
        resolution: the smallest step of what is measured, 1/N for a share of N images. The
            deviation over seeds counts as at least this. Three nets that are all right in 100% of
            359 images have a deviation of zero, and yet are not known to be equal.
    """

    differences: Sequence[float]
    resolution: float = 0.0

    @cached_property
    def estimate(self) -> float:
        return sum(self.differences) / len(self.differences) if len(self.differences) else math.nan

    @cached_property
    def deviation(self) -> float:
        errors = [value - self.estimate for value in self.differences]
        return max(math.sqrt(sum(e * e for e in errors) / (len(errors) - 1)), self.resolution)

    def half_width(self, n: int, level: float) -> float:
        """Of the interval that n seeds of this deviation give."""
        return _quantile(n - 1, level) * self.deviation / math.sqrt(n)

    def interval(self, level: float) -> tuple[float, float]:
        """Where the true difference lies, wrong in a share `level` of cases; all numbers where one
        seed, or a deviation of zero, tells nothing.
        """
        n = len(self.differences)
        if n < 2 or self.deviation == 0:
            return -math.inf, math.inf
        half = self.half_width(n, level)
        return self.estimate - half, self.estimate + half

    def p_value(self, margin: float) -> float:
        """How often a true difference of `margin` gives one as far away as this, or farther."""
        from scipy.special import stdtr

        n = len(self.differences)
        if n < 2 or self.deviation == 0:
            return 1.0
        distance = abs(self.estimate - margin) * math.sqrt(n) / self.deviation
        return float(2 * stdtr(n - 1, -distance))

    def seeds_to_decide(self, margin: float, level: float) -> int | None:
        """About how many seeds would decide, if mean and deviation stay what they are."""
        n = len(self.differences)
        if n < 2 or self.deviation == 0:
            return None
        distance = abs(self.estimate - margin)
        enough = bisect_left(
            range(MOST_SEEDS), True, n + 1, key=lambda more: self.half_width(more, level) < distance
        )
        return enough if enough < MOST_SEEDS else None


@dataclass(frozen=True)
class OverImages:
    """Two trained nets and the same test images: McNemar's exact test. It speaks of these two nets,
    and not of two methods.

    Attributes:
        only_first, only_second: images that one net alone has right.
    """

    only_first: int
    only_second: int
    images: int

    @property
    def estimate(self) -> float:
        return (self.only_first - self.only_second) / self.images

    def interval(self, level: float) -> tuple[float, float]:
        """Of the difference of accuracies, the wider of two on each side: the exact one given how
        many images the nets disagree on, and one that knows that this number is chance too (Bonett
        and Price 2012: one image is added to each cell).
        """
        from scipy.special import betaincinv, ndtri

        k, n = self.only_first, self.only_first + self.only_second
        one, two = ((c + 1) / (self.images + 2) for c in (k, n - k))
        half = -ndtri(level / 2) * math.sqrt((one + two - (one - two) ** 2) / (self.images + 2))
        # Clopper and Pearson's interval for the share of images that the first has right.
        low = betaincinv(k, n - k + 1, level / 2) if k else 0.0
        high = betaincinv(k + 1, n - k, 1 - level / 2) if n - k else 1.0
        apart = n / self.images
        return (
            float(min(one - two - half, apart * (2 * low - 1))),
            float(max(one - two + half, apart * (2 * high - 1))),
        )

    def p_value(self, margin: float) -> float:
        """The level at which the margin is just outside of the interval."""
        from scipy.optimize import brentq

        def inside(level: float) -> float:
            low, high = self.interval(level)
            return min(margin - low, high - margin)

        if inside(1 - 1e-9) >= 0:
            return 1.0
        return 0.0 if inside(1e-12) < 0 else float(brentq(inside, 1e-12, 1 - 1e-9))

    def seeds_to_decide(self, margin: float, level: float) -> None:
        return None  # more seeds are other nets


@dataclass(frozen=True)
class Verdict:
    """One claim, judged. `low` and `high` bound the difference at `confidence`."""

    outcome: str  # "holds", "fails" or "undecided"
    difference: float
    low: float
    high: float
    margin: float
    confidence: float
    seeds_to_decide: int | None = None


def judge(evidence: Sequence[OverSeeds | OverImages], margins: Sequence[float]) -> list[Verdict]:
    """A verdict on each difference against its margin.  Holm 1979

    The k claims are taken from the clearest on, each with an interval of level LEVEL / (claims that
    are left). From the first that's undecided on, all stay at its level.
    """
    order = sorted(range(len(evidence)), key=lambda i: evidence[i].p_value(margins[i]))
    verdicts: dict[int, Verdict] = {}
    level, decided = 0.0, True
    for place, i in enumerate(order):
        if decided:
            level = LEVEL / (len(order) - place)
        low, high = evidence[i].interval(level)
        margin = margins[i]
        outcome = "holds" if low > margin else "fails" if high < margin else "undecided"
        decided = outcome != "undecided"
        seeds = None if decided else evidence[i].seeds_to_decide(margin, level)
        verdicts[i] = Verdict(outcome, evidence[i].estimate, low, high, margin, 1 - level, seeds)
    return [verdicts[i] for i in range(len(order))]


def wilson(hits: int, images: int) -> tuple[float, float]:
    """The interval of a share that stands alone; not of zero width at 0% or 100%.  Wilson 1927

    >>> [round(bound, 4) for bound in wilson(359, 359)]
    [0.9894, 1.0]
    """
    from scipy.stats import binomtest

    interval = binomtest(hits, images).proportion_ci(1 - LEVEL, method="wilson")
    return float(interval.low), float(interval.high)
