"""Experiments: what a verdict may say, and what a killed one keeps."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, t, ttest_1samp
from torch import nn

from common.config import TrainConfig
from common.data import Data
from common.engine.errors import Diverged, Interrupted
from common.engine.files import Store
from common.engine.sources import load_digits, load_folder
from common.engine.verdicts import LEVEL, OverImages, OverSeeds, judge, wilson
from common.experiments import Arm, Claim, Experiment, open_store, run_experiment, train_arms
from tests.simulation import CASES, assert_calm, results_of
from tests.warm import Warm


def net(num_classes: int, width: int = 2) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, num_classes)
    )


def design(config: TrainConfig) -> Experiment:
    arms = [Arm("narrow", net), Arm("wide", partial(net, width=8), {"epochs": 2})]
    claims = [Claim("wide is better", "wide", "narrow", margin=0.01)]
    return Experiment("Width", arms, claims)


LESSON = "01_resnet_beginner"


def config_for(folder: Path, **more: object) -> TrainConfig:
    common = {"dataset": "digits", "device": "cpu", "epochs": 1, "smoke": True, "seeds": 2}
    return TrainConfig(experiment="width", run_dir=str(folder), **{**common, **more})


# -- what may be said


def test_an_arm_whose_best_rate_is_the_last_tried_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of rates that move nothing and one that learns, the larger; between two extremes nobody."""

    def rated(config: TrainConfig) -> Experiment:
        arms = [Arm("few", net, rates=(1e-7, 0.1)), Arm("as it is", net, rates=(0.1,))]
        arms += [Arm("enough", net, rates=(1e-7, 0.1, 99)), Arm("few again", net, rate_of="few")]
        return Experiment("Rates", arms, [Claim("they differ", "few", "enough")])

    run_experiment(LESSON, rated, config_for(tmp_path, smoke=False, seeds=1, epochs=3))
    out = capsys.readouterr().out
    assert "a better one may lie beyond: few (largest, 0.1)\n" in out


def test_intervals_are_scipys() -> None:
    values = [0.01, 0.03, 0.02, 0.05]
    test = ttest_1samp(values, 0.005)
    evidence = OverSeeds(values)
    assert evidence.interval(0.05) == pytest.approx(test.confidence_interval(0.95))
    assert evidence.p_value(0.005) == pytest.approx(test.pvalue)


@pytest.mark.parametrize(
    ("differences", "outcome"),
    [
        ([0.05, 0.06, 0.07], "holds"),
        ([-0.01, 0.0, 0.01], "undecided"),
        ([0.001, 0.002, 0.003], "fails"),  # it is better, but by less than was claimed
        ([-0.05, -0.06, -0.07], "fails"),
        ([0.5], "undecided"),
    ],
)
def test_a_claim_has_three_outcomes(differences: list[float], outcome: str) -> None:
    assert judge([OverSeeds(differences, 1 / 10_000)], [0.01])[0].outcome == outcome


def test_a_spread_of_zero_decides_nothing() -> None:
    for same in (0.0, 1 / 359):
        assert judge([OverSeeds([same] * 3, 1 / 359)], [0.0])[0].outcome == "undecided"
        assert judge([OverSeeds([same] * 3)], [0.0])[0].outcome == "undecided"
    low, high = wilson(359, 359)
    assert low < 0.99 and high == 1


def test_seeds_to_decide_would_decide() -> None:
    """Copies of the same differences, as many as were said, decide; half as many don't."""
    few = OverSeeds([0.0, 0.02, 0.04])
    needed = few.seeds_to_decide(0.0, LEVEL)
    half = t.isf(LEVEL / 2, needed - 1) * few.deviation / needed**0.5
    assert half < few.estimate
    half = t.isf(LEVEL / 2, needed // 2 - 1) * few.deviation / (needed // 2) ** 0.5
    assert half > few.estimate


def test_holm_asks_more_of_the_clearest_of_several() -> None:
    clear = OverSeeds([0.05, 0.06, 0.07])  # p = 0.0094
    assert judge([clear], [0.0])[0].outcome == "holds"
    noise = OverSeeds([0.3, -0.2, 0.1])
    together = judge([noise, clear] + [noise] * 4, [0.0] * 6)
    assert together[1].outcome == "undecided"  # 0.0094 > 0.05 / 6
    assert together[1].confidence == pytest.approx(1 - LEVEL / 6)
    assert [v.outcome for v in judge([noise, clear, clear], [0.0] * 3)] == [
        "undecided", "holds", "holds",
    ]  # fmt: skip


def test_mcnemar_is_the_exact_test() -> None:
    """At a margin of zero no pair of counts is decided that scipy's binomial test doesn't."""
    for one, two in [(0, 0), (5, 0), (6, 0), (12, 3), (3, 12), (20, 8), (9, 9)]:
        exact = binomtest(one, one + two).pvalue if one + two else 1.0
        outcome = judge([OverImages(one, two, 359)], [0.0])[0].outcome
        if exact > LEVEL:
            assert outcome == "undecided"
        if exact < 0.01:
            assert outcome == ("holds" if one > two else "fails")


def test_nets_that_answer_alike_are_not_worse_by_much() -> None:
    """A copy in 8 bits that errs on the same images: not 2 points worse, but 0.2 can't be said."""
    assert judge([OverImages(0, 0, 359)], [-0.02])[0].outcome == "holds"
    assert judge([OverImages(0, 0, 359)], [-0.002])[0].outcome == "undecided"


# -- equal methods


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_equal_methods_are_rarely_called_different(seeds: int) -> None:
    assert_calm(design(TrainConfig()), seeds)
    pair = Experiment("", [Arm("a", net), Arm("b", net)], [Claim("", "a", "b")])
    assert_calm(pair, seeds)


def test_one_of_four_is_rarely_called_the_best() -> None:
    names = "abcd"
    every = [Claim("", one, two) for i, one in enumerate(names) for two in names[i + 1 :]]
    assert_calm(Experiment("", [Arm(name, net) for name in names], every))
    rivals = [Claim("", "a", rival, margin=0.0) for rival in "bcd"]
    assert_calm(Experiment("", [Arm(name, net) for name in names], rivals), seeds=5)


@pytest.mark.parametrize("images", [359, 10_000])
def test_equal_nets_are_rarely_called_different(images: int) -> None:
    """McNemar over images, for nets that disagree on few and on many."""
    generator = np.random.default_rng(0)
    for share in (0.004, 0.02, 0.2):
        apart = generator.binomial(images, share, CASES)
        first = generator.binomial(apart, 0.5)
        pairs = {(int(a), int(b - a)) for a, b in zip(first, apart)}
        said = {p: judge([OverImages(*p, images)], [0.0])[0].outcome for p in pairs}
        wrong = sum(said[int(a), int(b - a)] != "undecided" for a, b in zip(first, apart))
        assert wrong / CASES <= LEVEL


def test_the_simulation_notices_a_rule_that_is_too_bold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule of before, more than the spread over seeds, doesn't pass."""
    bold = lambda self, level: (self.estimate - self.deviation, self.estimate + self.deviation)  # noqa: E731
    monkeypatch.setattr(OverSeeds, "interval", bold)
    with pytest.raises(AssertionError, match="called different in"):
        assert_calm(Experiment("", [Arm("a", net), Arm("b", net)], [Claim("", "a", "b")]))


# -- claims


def test_what_a_claim_subtracts() -> None:
    arms = [Arm(name, net) for name in "abcd"]
    claims = [Claim("", "a", "b"), Claim("", "a", "b", beyond=("c", "d")), Claim("", "a", 0.1)]
    experiment = Experiment("", arms, claims)
    values = {"a": [0.9, 0.8], "b": [0.5, 0.6], "c": [0.4, 0.4], "d": [0.3, 0.2]}
    results = results_of(experiment, values, images=100)
    got = [results.evidence(claim).differences for claim in claims]
    assert np.allclose(got, [[0.4, 0.2], [0.3, 0.0], [0.8, 0.7]])


# -- whole experiments


def test_an_experiment_ends_in_a_table_a_figure_and_a_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    outcome = run_experiment(LESSON, design, config_for(tmp_path))
    (folder,) = (tmp_path / LESSON).iterdir()
    assert json.loads((folder / "experiment.json").read_text()) == outcome
    assert [row["name"] for row in outcome["rows"]] == ["narrow", "wide"]
    assert len(outcome["trainings"]) == 4 and outcome["claims"][0]["text"] == "wide is better"
    assert (folder / "width.png").stat().st_size > 10_000 and (folder / "report.html").exists()
    assert "wide is better" in capsys.readouterr().out
    first, again = (r for r in outcome["trainings"] if r["arm"] == "narrow")
    right = np.unpackbits(np.frombuffer(bytes.fromhex(first["right"]), np.uint8))[
        : first["test_images"]
    ]
    assert right.mean() == pytest.approx(first["test_top1"])
    assert first["losses"] != again["losses"]


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    outcome = run_experiment(LESSON, design, config_for(tmp_path, seeds=1))
    assert [c["outcome"] for c in outcome["claims"]] == ["undecided"]
    assert "with one seed, which decides nothing" in outcome["verdict"][0]


def test_an_experiment_may_ask_for_more_seeds_on_digits(tmp_path: Path) -> None:
    """... where a training takes seconds; --seeds goes first, and a rehearsal takes 3."""

    def five(config: TrainConfig) -> Experiment:
        return Experiment("", [Arm("a", net)], [], seeds=5)

    for seeds, smoke, expected in ((None, False, 5), (2, False, 2), (None, True, 3)):
        folder = tmp_path / f"{seeds} {smoke}"
        outcome = run_experiment(LESSON, five, config_for(folder, seeds=seeds, smoke=smoke))
        assert len(outcome["trainings"]) == outcome["seeds"] == expected
        assert json.loads(next(folder.rglob("config.json")).read_text())["seeds"] == expected


def test_arms_are_paired(tmp_path: Path) -> None:
    """Twins get the same weights, images and order; seeds get other test images."""
    seen: list[tuple[int, torch.Tensor]] = []

    def note(model: nn.Module, data: Data) -> dict[str, float]:
        seen.append((float(model[0].weight.detach().sum()), data.test.labels_there, data))
        return {"note": 1.0}

    def twins(config: TrainConfig) -> Experiment:
        return Experiment("", [Arm("a", net), Arm("b", net)], [], before=note)

    outcome = run_experiment(LESSON, twins, config_for(tmp_path))
    losses = [r["losses"] for r in outcome["trainings"]]
    assert losses[0] == losses[2] and losses[1] == losses[3] and losses[0] != losses[1]
    weights = [w for w, _, _ in seen]
    assert weights[0] == weights[1] != weights[2] == weights[3]
    tests = [data.test.take(np.arange(30)) for _, _, data in seen]
    assert torch.equal(tests[0], tests[1]) and not torch.equal(tests[0], tests[2])


def test_a_rate_is_chosen_on_validation_and_not_counted(tmp_path: Path) -> None:
    def search(config: TrainConfig) -> Experiment:
        arms = [Arm("a", net, rates=(1e-9, 0.1)), Arm("b", net, rate_of="a", times=10)]
        return Experiment("", arms, [])

    outcome = run_experiment(LESSON, search, config_for(tmp_path, seeds=1, smoke=False))
    assert [(r["arm"], r["lr"]) for r in outcome["trainings"]] == [("a", 0.1), ("b", 1.0)]


def test_a_training_that_diverges_counts_as_a_guess(tmp_path: Path) -> None:
    def wild(config: TrainConfig) -> Experiment:
        def infinite(config: TrainConfig) -> Callable[..., torch.Tensor]:
            return lambda output, y: output.sum() * float("inf")

        return Experiment("", [Arm("wild", net, loss=infinite)], [Claim("", "wild", 0.5)])

    outcome = run_experiment(LESSON, wild, config_for(tmp_path))
    assert [r["test_top1"] for r in outcome["trainings"]] == [0.1, 0.1]
    assert outcome["rows"][0]["diverged"] == 2 and outcome["claims"][0]["outcome"] == "fails"


def test_seeds_that_diverge_or_stop_early_leave_a_figure_and_a_table(tmp_path: Path) -> None:
    """... and one that diverged has no interval: it gave no answers."""

    def some(config: TrainConfig) -> Experiment:
        def infinite(config: TrainConfig) -> nn.Module:
            return Infinite() if config.seed == 1 else nn.CrossEntropyLoss()

        return Experiment("", [Arm("a", net, loss=infinite), Arm("b", net)], [Claim("", "a", "b")])

    more = {"smoke": False, "patience": 1, "epochs": 9, "lr": 0.4}
    outcome = run_experiment(LESSON, some, config_for(tmp_path, **more))
    lengths = {len(r["losses"]) for r in outcome["trainings"] if "losses" in r}
    assert len(lengths) > 1 and outcome["rows"][0]["diverged"] == 1
    alone = run_experiment(LESSON, some, config_for(tmp_path, seed=1, seeds=1))
    assert ["95% interval" in row for row in alone["rows"]] == [False, True]


class Infinite(nn.Module):
    def forward(self, output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return output.sum() * float("inf")


def test_a_students_copy_is_another_lesson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a store keeps is for the text that was run, wherever it lies, and for that of the
    experiment, where it is at home in common."""
    copy, home = tmp_path / f"{LESSON}.py", tmp_path / "resnet9.py"
    monkeypatch.setattr("common.experiments.script", lambda: str(copy))
    run = SimpleNamespace(config=config_for(tmp_path), folder=tmp_path, resumed=False)
    names: dict[str, Any] = {"__name__": "common.resnet9"}
    exec(compile("def bag(config): pass", home, "exec"), names)

    def settings(path: Path, text: str, experiment: Callable) -> dict[str, object]:
        path.write_text(text)
        return open_store(run, LESSON, "images", torch.device("cpu"), experiment).settings

    for path, experiment in ((copy, design), (home, names["bag"])):
        one, same, other = (settings(path, text, experiment) for text in ("a = 1", "a = 1", "a"))
        assert one == same != other and {**one, "lesson": ""} == {**other, "lesson": ""}


def test_what_is_stopped_goes_on_and_says_how(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, calls = config_for(tmp_path), []

    def stopping(config: TrainConfig, at: int) -> Experiment:
        def build(num_classes: int) -> nn.Module:
            calls.append(1)
            if len(calls) == at:
                raise Interrupted(signal.SIGTERM, "anywhere")
            return net(num_classes)

        return Experiment("", [Arm("a", build), Arm("b", build)], [])

    with pytest.raises(Interrupted, match=r"3 finished trainings are kept.* --resume ") as stop:
        run_experiment(LESSON, partial(stopping, at=4), config)
    assert stop.value.signum == signal.SIGTERM
    assert "for seeds: 1\n" in capsys.readouterr().out
    run_experiment(LESSON, partial(stopping, at=0), config)  # the same command again
    assert len(calls) == 5  # 3 done, one stopped, one more
    assert "expected" not in capsys.readouterr().out  # no seconds of trainings that were kept
    assert len(list((tmp_path / LESSON).iterdir())) == 1


SCRIPT = """
import sys
import time
from pathlib import Path
from tests.test_experiments import LESSON, config_for, design
from common import experiments
fit = experiments.fit
naps = iter([0.2] * 5 + [3600])  # so that no machine is done with all six before it is killed
def slowly(*args, **kwargs):
    time.sleep(next(naps))
    return fit(*args, **kwargs)
experiments.fit = slowly
experiments.run_experiment(LESSON, design, config_for(Path(sys.argv[1]), smoke=False, seeds=3))
"""


def test_a_killed_experiment_resumes_to_the_same_table(tmp_path: Path) -> None:
    def table(folder: Path) -> list[dict[str, object]]:
        (path,) = folder.rglob("experiment.json")
        trainings = json.loads(path.read_text())["trainings"]
        return [{k: v for k, v in record.items() if k != "seconds"} for record in trainings]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = {"smoke": False, "seeds": 3}
    run_experiment(LESSON, design, config_for(whole, **settings))
    store: Callable[[], list[Path]] = lambda: list(killed.rglob("trainings.json"))  # noqa: E731
    running = Warm(tmp_path, "-c", SCRIPT, str(killed))
    while not store() and running.process.is_alive():
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5))
    running.kill(signal.SIGKILL)
    running.join()
    kept = len(json.loads(store()[0].read_text()))
    assert 1 <= kept < 6
    run_experiment(LESSON, design, config_for(killed, **settings))
    assert table(killed) == table(whole)


def test_each_seed_draws_its_own_test_set(image_folder: Callable) -> None:
    digits = load_digits()
    other = digits.redrawn(1)
    assert not torch.equal(other.test.pixels, digits.test.pixels)
    assert torch.equal(other.test.labels.bincount(), digits.test.labels.bincount())
    assert len(other.train) + len(other.test) == 1797
    flat = load_folder(str(image_folder(per_class=20)), seed=0)
    assert set(flat.redrawn(1).test.paths) != set(flat.test.paths)
    own = load_folder(str(image_folder(splits=("train", "test"), name="own")), seed=0)
    assert own.redrawn(1) is own


def test_a_folder_is_decoded_once_for_all_seeds_and_sizes(
    tmp_path: Path, image_folder: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from common import data

    reads: list[int] = []
    decode = data.read_files

    def counting(splits: dict, image_size: int, *rest: object) -> tuple:
        reads.append(image_size)
        return decode(splits, image_size, *rest)

    monkeypatch.setattr(data, "read_files", counting)
    folder = str(image_folder(per_class=30, size=16))

    def two_sizes(config: TrainConfig) -> Experiment:
        pooled = partial(AnySize, width=2)
        return Experiment("", [Arm("8 px", pooled), Arm("16 px", pooled, {"image_size": 16})], [])

    settings = {"dataset": "folder", "data_dir": folder, "image_size": 8, "batch_size": 8}
    outcome = run_experiment(LESSON, two_sizes, config_for(tmp_path, **settings))
    assert reads == [16]  # at the largest of the sizes, from which the smaller one is made
    macs = [r["macs"] for r in outcome["trainings"]]
    assert macs[2] > 4 * macs[0]


def test_an_arm_that_ran_out_of_memory_halves_no_other_arms_batch(tmp_path: Path) -> None:
    seen = []

    def train(arm: Arm, data: Data, config: TrainConfig, device: torch.device) -> None:
        seen.append((data.train.batch_size, data.train.accumulate))
        data.train.rebatch(data.train.batch_size // 2, 2 * data.train.accumulate)
        raise Diverged("enough seen")

    two = Experiment("", [Arm(name, net, train=train) for name in ("large", "small")], [])
    config = config_for(tmp_path, seeds=1, batch_size=64).resolve("digits")
    store = Store(tmp_path / "trainings.json", {})
    train_arms(two, config, torch.device("cpu"), load_digits(), store)
    assert seen == [(64, 1)] * 2


class AnySize(nn.Sequential):
    def __init__(self, num_classes: int, width: int) -> None:
        conv, pool = nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1)
        super().__init__(conv, nn.ReLU(), pool, nn.Flatten(), nn.Linear(width, num_classes))
