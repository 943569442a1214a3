"""Experiments with made-up numbers: what a lesson's claims would say of methods that are equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import binomtest

from common.engine.verdicts import LEVEL
from common.experiments import Claim, Experiment, Record, Results

CASES = 2000


def results_of(experiment: Experiment, values: dict[str, Sequence[float]], images: int) -> Results:
    """Results in which each arm measured `values[arm]`, one a seed, whatever a claim asks for."""
    keys = {claim.measure for claim in experiment.claims}

    def record(value: float) -> Record:
        return {"test_images": images, "train_images": images, **dict.fromkeys(keys, value)}

    return Results(experiment, {arm: [record(v) for v in values[arm]] for arm in values})


def wrong(claim: Claim, outcome: str) -> bool:
    """Whether the outcome is an error where the two sides are equal."""
    if claim.margin == 0:
        return outcome != "undecided"
    return outcome == ("holds" if claim.margin > 0 else "fails")


def share_of_errors(
    experiment: Experiment, draw: Callable[[], dict[str, Sequence[float]]], images: int = 359
) -> float:
    """Of CASES experiments whose numbers `draw` makes up, those with at least one wrong verdict."""
    errors = 0
    for _ in range(CASES):
        verdicts = results_of(experiment, draw(), images).verdicts()
        errors += any(wrong(c, v.outcome) for c, v in zip(experiment.claims, verdicts))
    return errors / CASES


def assert_calm(experiment: Experiment, seeds: int = 3, images: int = 359) -> None:
    """Equal arms are called different in at most 5% of cases: with accuracies of 80% and of 99.7%,
    and with numbers that know no steps, such as a loss.

    A rate of exactly 5% gives more than 5% in half of all simulations: what fails is a number that
    a rate of 5% would give in one simulation of a thousand.
    """
    generator = np.random.default_rng(0)
    names = [arm.name for arm in experiment.arms]

    def accuracies(top1: float) -> Callable[[], dict[str, Sequence[float]]]:
        return lambda: dict(
            zip(names, (generator.binomial(images, top1, (len(names), seeds)) / images).tolist())
        )

    def losses() -> dict[str, Sequence[float]]:
        return dict(zip(names, generator.lognormal(-3, 0.2, (len(names), seeds)).tolist()))

    for draw in (accuracies(0.8), accuracies(0.997), losses):
        share = share_of_errors(experiment, draw, images)
        test = binomtest(round(share * CASES), CASES, LEVEL, alternative="greater")
        assert test.pvalue > 0.001, f"equal arms are called different in {share:.1%} of cases"


def assert_calm_at_the_bar(experiment: Experiment, seeds: int = 3) -> None:
    """For claims about a number: where every measure's true mean is just what is claimed, neither
    side is proved in more than 5% of cases. The bound is that of `assert_calm`.
    """
    generator = np.random.default_rng(0)
    (arm,) = {claim.higher for claim in experiment.claims}
    bars = {c.measure: c.lower + c.margin for c in experiment.claims}

    def decided() -> bool:
        noise = generator.normal(0, 0.1, (seeds, len(bars)))
        records = [{m: bar + n for (m, bar), n in zip(bars.items(), row)} for row in noise]
        verdicts = Results(experiment, {arm: records}).verdicts()
        return any(verdict.outcome != "undecided" for verdict in verdicts)

    errors = sum(decided() for _ in range(CASES))
    test = binomtest(errors, CASES, LEVEL, alternative="greater")
    assert test.pvalue > 0.001, f"{errors / CASES:.1%} of claims that are just true are decided"
