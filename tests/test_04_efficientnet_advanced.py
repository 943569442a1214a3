"""Lesson 4: EfficientNet against torchvision, the paper's table and hand counts."""

from __future__ import annotations

import doctest
import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.efficientnet import MBConv as TorchvisionMBConv

from common.experiments import Experiment
from common.profiling import count_macs, count_parameters, macs_by_module
from tests.conftest import lesson as find_lesson
from tests.parity import PUBLISHED, largest_difference, torchvision_twin
from tests.simulation import assert_calm, results_of

lesson = find_lesson("04")
OFFICIAL = [name for name in lesson.MODELS if name in PUBLISHED]
EVERY_NAME = pytest.mark.parametrize("name", lesson.MODELS)


def on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return lesson.MODELS[name](**options)


def of_type(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kind)]


def test_doctests() -> None:
    failed, attempted = doctest.testmod(lesson)
    assert attempted >= 9 and failed == 0


def test_the_family_is_whole() -> None:
    assert [f"efficientnet_b{i}" for i in range(8)] == OFFICIAL


@pytest.mark.parametrize("name", OFFICIAL)
def test_cost_as_published(name: str) -> None:
    model, published = on_meta(name), PUBLISHED[name]
    size = lesson.TABLE[name].image_size
    assert size == int(published["input_px"])
    assert count_parameters(model) == int(published["params"])
    macs = count_macs(model, (3, size, size))
    assert macs == pytest.approx(float(published["gmacs"]) * 1e9, rel=0.005)


@torch.no_grad()
def steady_twin(name: str) -> nn.Module:
    """Torchvision's model with quieter residual branches, and statistics that fit them but for a
    tenth.

    With branches as loud as the shortcut, 55 blocks amplify a rounding error to the size of the
    logits, and equal models would differ.
    """
    twin = torchvision_twin(name, image_size=64, dropout=0.0, stochastic_depth_prob=0.0)
    for block in of_type(twin, TorchvisionMBConv):
        if block.use_res_connect:
            last_norm = block.block[-1][1]
            last_norm.weight *= 0.2
            last_norm.bias *= 0.2
    norms = of_type(twin, nn.BatchNorm2d)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.9
    twin.train()(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(2)))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    return twin.eval()


@pytest.mark.parametrize("name", OFFICIAL)
def test_logits_equal_torchvision(name: str) -> None:
    """And the comparison is as sharp as it claims: an epsilon of 1e-5 for 1e-3 is seen."""
    twin = steady_twin(name)
    ours = on_meta(name).to_empty(device="cpu")
    assert largest_difference(ours, twin, image_size=64) < 1e-4
    if name == "efficientnet_b5":
        wrong = on_meta(name, norm=nn.BatchNorm2d).to_empty(device="cpu")
        assert largest_difference(wrong, twin, image_size=64) > 1e-3


@pytest.mark.parametrize("name", OFFICIAL)
def test_training_constants_equal_torchvision(name: str) -> None:
    """What logits in eval mode can't show: momentum, dropout, stochastic depth of every block."""
    with torch.device("meta"):
        twin = torchvision.models.get_model(name, weights=None)
    ours = on_meta(name)

    def constants(
        model: nn.Module, depth_type: type[nn.Module], attribute: str
    ) -> dict[str, list[float]]:
        return {
            "norm": [(m.eps, m.momentum) for m in of_type(model, nn.BatchNorm2d)],
            "dropout": [m.p for m in of_type(model, nn.Dropout)],
            "depth": [getattr(m, attribute) for m in of_type(model, depth_type)],
        }

    expected = constants(twin, torchvision.ops.StochasticDepth, "p")
    assert constants(ours, lesson.StochasticDepth, "rate") == expected


@EVERY_NAME
def test_stochastic_depth_rises_with_depth(name: str) -> None:
    """From 0 in equal steps; the step times the number of blocks is the rate asked for."""
    model = on_meta(name, stochastic_depth=0.3)
    rates = [module.rate for module in of_type(model, lesson.StochasticDepth)]
    assert len(rates) == len(of_type(model, lesson.MBConv)) > 1
    steps = [after - before for before, after in itertools.pairwise(rates)]
    assert rates[0] == 0
    assert steps == pytest.approx([0.3 / len(rates)] * len(steps))


def test_stochastic_depth_drops_whole_images_at_its_rate_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop, images = lesson.StochasticDepth(0.3), 20_000
    out = drop(torch.ones(images, 2, 2, 2))
    per_image = out.flatten(1)
    assert (per_image == per_image[:, :1]).all(), "an image is kept whole or dropped whole"
    # Five standard errors of a Bernoulli(0.7) mean over 20,000 draws.
    tolerance = 5 * (0.7 * 0.3 / images) ** 0.5
    assert (per_image[:, 0] > 0).float().mean().item() == pytest.approx(0.7, abs=tolerance)
    assert out.mean().item() == pytest.approx(1.0, abs=tolerance / 0.7)
    assert torch.equal(drop.eval()(out), out)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_stochastic_depth_refuses_an_impossible_rate(rate: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        lesson.StochasticDepth(rate)


def test_a_dropped_block_is_the_identity() -> None:
    """The shortcut survives when the branch is dropped; a block without one is never dropped."""
    torch.manual_seed(0)
    x = torch.randn(64, 8, 4, 4)
    out = lesson.MBConv(8, 8, 3, drop_rate=0.5)(x)
    unchanged = (out == x).flatten(1).all(dim=1)
    assert 0 < unchanged.sum() < len(x)
    narrower = lesson.MBConv(8, 16, 3, drop_rate=0.5)(x)
    assert (narrower.flatten(1).abs().sum(dim=1) > 0).all()


def test_squeeze_excitation_scales_whole_channels() -> None:
    """Every pixel of one channel of one image is multiplied by the same gate, between 0 and 1."""
    torch.manual_seed(0)
    x = torch.rand(3, 16, 5, 5) + 0.1
    gate = lesson.SqueezeExcitation(16, reduction=4)(x) / x
    assert torch.allclose(gate, gate[:, :, :1, :1].expand_as(gate), atol=1e-5)
    assert (gate > 0).all() and (gate < 1).all()
    other = x.clone()
    other[:, 0] += 5  # one channel's mean moves the gates of the others
    moved = lesson.SqueezeExcitation(16, reduction=4)
    assert not torch.allclose((moved(x) / x)[:, 1:], (moved(other) / other)[:, 1:])


def test_mbconv_parameters_by_hand() -> None:
    """24 -> 40 channels, 5x5, six times wider in the middle; SE squeezes to a quarter of the 24."""
    middle, squeezed = 144, 6
    expand = 24 * middle + 2 * middle
    depthwise = 25 * middle + 2 * middle
    se = (middle * squeezed + squeezed) + (squeezed * middle + middle)
    project = middle * 40 + 2 * 40
    block = lesson.MBConv(24, 40, kernel_size=5, stride=2, expansion=6)
    assert count_parameters(block) == expand + depthwise + se + project


def test_table_1_of_the_paper() -> None:
    """Resolution, channels and layers of B0's seven stages, as Tan and Le print them."""
    model = on_meta("efficientnet_b0")
    x = model.stem(torch.zeros(1, 3, 224, 224, device="meta"))
    assert x.shape == (1, 32, 112, 112)
    seen = []
    for stage in model.stages:
        x = stage(x)
        seen.append((x.shape[2], x.shape[1], len(stage)))
    # The paper prints the resolution that enters a stage; this is what leaves it.
    assert seen == [
        (112, 16, 1),
        (56, 24, 2),
        (28, 40, 2),
        (14, 80, 3),
        (14, 112, 3),
        (7, 192, 4),
        (7, 320, 1),
    ]
    assert model.forward_features(torch.zeros(1, 3, 224, 224, device="meta")).shape == (
        1,
        1280,
        7,
        7,
    )


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_b5", "efficientnet_mini"])
def test_small_form_keeps_an_eighth_of_the_resolution(name: str) -> None:
    model = on_meta(name, num_classes=10, small_input=True)
    for size in (8, 32):
        image = torch.zeros(2, 3, size, size, device="meta")
        assert model.forward_features(image).shape[2:] == (size // 8, size // 8)
        assert model(image).shape == (2, 10)
    assert count_parameters(model) == count_parameters(on_meta(name, num_classes=10))


@pytest.mark.parametrize("size", [8, 32])
def test_every_parameter_of_the_small_form_gets_a_gradient(size: int) -> None:
    torch.manual_seed(0)
    model = lesson.MODELS["efficientnet_mini"](
        num_classes=10, small_input=True, stochastic_depth=0.0
    )
    model(torch.randn(4, 3, size, size)).square().sum().backward()
    assert [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ] == []


def test_compound_scaling_by_one_step_gives_b2() -> None:
    """phi = 1 is B2 but for the image size; what each costs stands in the last cell."""
    b0, b2 = (on_meta(f"efficientnet_{name}") for name in ("b0", "b2"))
    cost, rule = count_macs(b0, (3, 224, 224)), (1.1, 1.2, round(224 * 1.15))
    assert rule == (*lesson.TABLE["efficientnet_b2"][:2], 258)
    assert count_macs(b2, (3, 288, 288)) / cost == pytest.approx(2.82, abs=0.005)
    assert count_macs(b2, (3, 258, 258)) / cost == pytest.approx(2.57, abs=0.005)


def test_mini_is_the_rule_backwards() -> None:
    width, depth, side = 1.1**-4, 1.2**-4, 224 * 1.15**-4
    mini = lesson.TABLE["efficientnet_mini"]
    assert mini[:3] == (round(width, 1), round(depth, 1), round(side))


SCALING = lesson.compound_scaling(lesson.Config().resolve("digits"))
SEARCH = lesson.architecture_search(lesson.Config().resolve("digits"))


@pytest.mark.parametrize("side", [16, 32])
def test_the_arms_cost_four_times_the_start(side: int) -> None:
    """As the nets are really built, on digits and on CIFAR-10."""
    costs, blocks = {}, {}
    for arm in lesson.compound_scaling(lesson.Config(image_size=side).resolve("digits")).arms:
        with torch.device("meta"):
            model = arm.build(num_classes=10)
        size = arm.changes["image_size"]
        costs[arm.name] = count_macs(model, (3, size, size))
        blocks[arm.name] = len(of_type(model, lesson.MBConv)), size * 16 // side
    assert blocks == {
        "start": (7, 8), "depth": (26, 8), "width": (7, 8), "resolution": (7, 16),
        "compound": (10, 12),
    }  # fmt: skip
    for name, cost in costs.items():
        assert cost / costs["start"] == pytest.approx(1 if name == "start" else 4, rel=0.12), name


def test_the_arms_start_as_identities_and_drop_nothing() -> None:
    model = SCALING.arms[1].build()
    assert {m.rate for m in of_type(model, lesson.StochasticDepth)} == {0}
    assert {m.p for m in of_type(model, nn.Dropout)} == {0}
    for block in of_type(model, lesson.MBConv):
        if block.has_shortcut:
            x = torch.randn(2, block.project[0].out_channels, 4, 4)
            assert torch.equal(block(x), x)


# -- the search


def differences(a: tuple, b: tuple) -> int:
    return sum(x != y for s, t in zip(a, b) for x, y in zip(s, t))


def test_reward_is_the_papers() -> None:
    """Tan and Le 2019, sec. 4: ACC(m) x [FLOPS(m) / T]^w with w = -0.07."""
    assert lesson.reward(0.8, macs=400e6, target=400e6) == 0.8
    assert lesson.reward(0.8, macs=800e6, target=400e6) == pytest.approx(0.8 * 2**-0.07)


def test_mutation_changes_one_gene_and_stays_in_the_space() -> None:
    rng = random.Random(0)
    reached = set()
    stages = lesson.random_stages(rng)
    for _ in range(300):
        child = lesson.mutate(stages, rng)
        changed = [
            (i, gene)
            for i, (before, after) in enumerate(zip(stages, child))
            for gene in lesson.Stage._fields
            if getattr(before, gene) != getattr(after, gene)
        ]
        assert len(changed) == 1
        (i, gene) = changed[0]
        reached.add((i, gene, getattr(child[i], gene)))
        stages = child
    every = {
        (i, gene, value)
        for i in range(len(lesson.ROWS))
        for gene, values in lesson.CHOICES.items()
        for value in values
    }
    assert reached == every, "no other gene changes, and each takes all of its values"


def climbable(stages: tuple) -> float:
    """A reward that is known: minus the number of genes that differ from a goal."""
    return -differences(stages, lesson.random_stages(random.Random(99)))


@pytest.mark.parametrize("evolve", [True, False])
def test_a_search_judges_so_many_different_nets_from_the_same_first_ones(evolve: bool) -> None:
    judged = []
    found = lesson.search(evolve, lambda s: judged.append(s) or climbable(s), 40, random.Random(0))
    assert list(found) == judged and len(set(judged)) == 40
    other = lesson.search(not evolve, climbable, lesson.POPULATION, random.Random(0))
    assert judged[: lesson.POPULATION] == list(other)


def test_a_search_ends_when_it_has_seen_the_whole_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most that --nets takes is far less than the space; here it is all of it."""
    sizes = [len(values) for values in lesson.CHOICES.values()]
    knob = next(f for f in fields(lesson.Config) if f.name == "nets")
    assert knob.metadata["high"] < math.prod(sizes) ** len(lesson.ROWS) / 10
    monkeypatch.setattr(lesson, "CHOICES", {"kernel_size": (3, 5)})
    for evolve in (True, False):
        assert len(lesson.search(evolve, climbable, 2**4, random.Random(0))) == 2**4


def test_evolution_beats_chance_where_the_landscape_can_be_climbed() -> None:
    """Where every right gene helps, breeding must win: a broken selection would not."""
    best = {
        evolve: sum(
            max(lesson.search(evolve, climbable, 80, random.Random(seed)).values())
            for seed in range(8)
        )
        for evolve in (True, False)
    }
    assert best[True] > best[False] + 8, best


def test_evolution_forgets_the_old() -> None:
    """The first net is the best of all, and has no children once the population is younger."""
    born = itertools.count()
    found = list(lesson.search(True, lambda stages: -next(born), 40, random.Random(1)))
    for i in range(lesson.POPULATION, len(found)):
        parents = found[i - lesson.POPULATION : i]
        assert min(differences(found[i], parent) for parent in parents) == 1


def test_rows_of_the_space_are_b0s_own() -> None:
    for row, b0 in zip(lesson.ROWS, lesson.B0):
        assert row._replace(channels=0) == b0._replace(channels=0)
        assert all(getattr(row, gene) in values for gene, values in lesson.CHOICES.items())


# -- verdicts follow from the numbers, whichever way they fall


@pytest.mark.parametrize(
    ("experiment", "ahead", "behind"),
    [(SCALING, "compound", ("depth", "width", "resolution")), (SEARCH, "evolution", ("random",))],
)
def test_every_claim_can_hold_fail_and_stay_open(
    experiment: Experiment, ahead: str, behind: tuple[str, ...]
) -> None:
    for value, outcome in ((0.97, "holds"), (0.80, "fails"), (0.90, "undecided")):
        values = {arm.name: [0.89, 0.90, 0.91] for arm in experiment.arms}
        noise = [0.05, -0.05, 0.0] if outcome == "undecided" else [-0.01, 0.004, 0.01]
        values[ahead] = [value + n for n in noise]
        verdicts = results_of(experiment, values, images=359).verdicts()
        assert [v.outcome for v in verdicts] == [outcome] * len(experiment.claims)
    claims = [(claim.higher, claim.lower) for claim in experiment.claims]
    assert set(claims) == {(ahead, lower) for lower in behind}


@pytest.mark.parametrize("experiment", [SCALING, SEARCH])
def test_equal_arms_are_not_called_different(experiment: Experiment) -> None:
    assert_calm(experiment, seeds=3)


# -- the command line, in miniature


def outcome(tmp_path: Path, name: str) -> tuple[Path, dict[str, object]]:
    """The folder of the one run there is, and what its file `name` says."""
    (path,) = tmp_path.rglob(name)
    return path.parent, json.loads(path.read_text(encoding="utf-8"))


TINY = (
    "--dataset",
    "digits",
    "--device",
    "cpu",
    "--image-size",
    "8",
    "--smoke",
    "--batch-size",
    "16",
)


def test_a_run_through_the_command_line(cli: Callable, tmp_path: Path) -> None:
    code, _, errors = cli("04", *TINY, "--width-mult", "0.3", "--depth-mult", "0.5")
    assert code == 0, errors
    folder, result = outcome(tmp_path, "result.json")
    small = on_meta("efficientnet_mini", num_classes=10, width_mult=0.3, depth_mult=0.5)
    assert result["model"] == "efficientnet_mini" and result["params"] == count_parameters(small)
    assert (folder / "report.html").is_file() and len(list(folder.glob("*.png"))) >= 6


def test_compound_scaling_through_the_command_line(cli: Callable, tmp_path: Path) -> None:
    code, _, errors = cli("04", *TINY, "--experiment", "compound-scaling", "--seeds", "1")
    assert code == 0, errors
    folder, result = outcome(tmp_path, "experiment.json")
    assert [row["name"] for row in result["rows"]] == list(lesson.GROWTH)
    assert len(result["claims"]) == 3 and (folder / "compound_scaling.png").stat().st_size > 10_000


def test_search_through_the_command_line(cli: Callable, tmp_path: Path) -> None:
    flags = ("--seeds", "1", "--nets", "7", "--proxy-epochs", "1")
    code, _, errors = cli("04", *TINY, "--experiment", "search", *flags)
    assert code == 0, errors
    folder, result = outcome(tmp_path, "experiment.json")
    trainings = {record["arm"]: record for record in result["trainings"]}
    assert list(trainings) == ["evolution", "random", "B0's rows"]
    best = {name: record["best reward by nets trained"] for name, record in trainings.items()}
    assert [len(values) for values in best.values()] == [7, 7, 1]
    assert best["evolution"][:6] == best["random"][:6]
    assert all(values == sorted(values) for values in best.values())
    assert trainings["random"]["best_reward"] == best["random"][-1]
    assert 0 < trainings["random"]["proposed_reward"] <= best["random"][-1]
    assert "proposed_reward" not in trainings["B0's rows"]
    assert (folder / "search.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flag", "value", "complaint"),
    [
        ("--stochastic-depth", "1", "1.0: the most that makes sense is 0.95"),
        ("--budget", "0", "0.0: the least that makes sense is 0.05"),
        ("--depth-mult", "inf", "inf: the most that makes sense is 8"),
    ],
)
def test_what_makes_no_sense_is_refused(
    cli: Callable, flag: str, value: str, complaint: str
) -> None:
    code, _, errors = cli("04", flag, value)
    assert code == 2 and errors.strip() == f"error: {flag} {complaint}"


def test_what_the_lesson_says_to_notice() -> None:
    """The shares and the numbers of blocks that the last cell tells."""
    model = on_meta("efficientnet_b0")
    by_path = macs_by_module(model, (3, 224, 224))
    total = count_macs(model, (3, 224, 224))

    def share(*parts: str) -> float:
        paths = (path for path in by_path if path.rpartition(".")[2] in parts)
        return sum(sum(by_path[path].values()) for path in paths) / total

    assert share("expand", "project") == pytest.approx(0.83, abs=0.005)
    assert share("depthwise") == pytest.approx(0.09, abs=0.005)
    assert share("se") == pytest.approx(0.002, abs=0.0005)
    gates = sum(count_parameters(m) for m in of_type(model, lesson.SqueezeExcitation))
    assert gates == pytest.approx(0.6e6, rel=0.1)
    assert gates / count_parameters(model) == pytest.approx(0.12, abs=0.005)
    blocks = [len(of_type(on_meta(f"efficientnet_{n}"), lesson.MBConv)) for n in ("b0", "b2")]
    assert blocks == [16, 23]
    ours, theirs = PUBLISHED["efficientnet_b0"], PUBLISHED["resnet50"]
    assert float(ours["gmacs"]) / float(theirs["gmacs"]) == pytest.approx(1 / 10, rel=0.1)
    assert float(ours["params"]) / float(theirs["params"]) == pytest.approx(1 / 5, rel=0.1)
