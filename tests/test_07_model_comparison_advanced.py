"""Lesson 7: the timeline's ends against torchvision and hand counts, and the comparison itself."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from common import plotting
from common.cli import parse_flags
from common.comparison import training
from common.comparison.conclusion import trained_verdict
from common.comparison.entries import chosen_names, is_small, match_target, small_entries
from common.comparison.imagenet import evaluate_imagenet, published, with_newer_weights
from common.comparison.results import (
    Candidate,
    choose,
    judge_pairs,
    markdown_table,
    summarise,
)
from common.comparison.training import train_all
from common.config import TrainConfig
from common.engine.errors import UserError
from common.engine.files import Store
from common.engine.progress import Bar
from common.engine.sources import load_source
from common.experiments import Arm, Trial
from common.lessons import Models, get_model, lesson_names, load_lesson
from common.pretrained import load_pretrained, load_torchvision_state
from common.profiling import count_macs, count_parameters
from common.runs import Run
from tests.parity import PUBLISHED, largest_difference, torchvision_twin
from tests.warm import Warm

lesson = load_lesson("07")
TWINS = [name for name in lesson.MODELS if name in PUBLISHED]


def build_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return lesson.MODELS[name](**options)


# ------------------------------------------------------------------------------- the architectures


def test_torchvision_has_these() -> None:
    assert TWINS == ["alexnet", "vit_b_16", "vit_b_32", "vit_l_16"]


@pytest.mark.parametrize("name", TWINS)
def test_parameters_and_macs_as_published(name: str) -> None:
    model, row = build_meta(name), PUBLISHED[name]
    size = int(row["input_px"])
    assert count_parameters(model) == int(row["params"])
    assert count_macs(model, (3, size, size)) / 1e9 == pytest.approx(float(row["gmacs"]), rel=0.005)


@pytest.mark.parametrize("name", ["alexnet", "vit_b_32"])
def test_logits_equal_torchvisions(name: str) -> None:
    size = 64 if name == "alexnet" else 224  # torchvision's ViT takes no other
    ours = build_meta(name).to_empty(device="cpu")  # every number comes from the twin
    assert largest_difference(ours, torchvision_twin(name, size), size) < 1e-4


@pytest.mark.parametrize("name", ["vit_b_16", "vit_l_16"])
def test_logits_equal_torchvisions_two_layers_deep(name: str) -> None:
    """The width and heads of the real model on a small image; every layer of it is the same."""
    row = lesson.TABLE[name]._replace(depth=2)
    torch.manual_seed(0)
    twin = VisionTransformer(64, row.patch_size, 2, row.heads, row.dim, row.mlp_dim).eval()
    nn.init.normal_(twin.heads.head.weight, std=0.1)  # torchvision starts it at zero
    ours = lesson.VisionTransformer(*row, image_size=64)
    assert largest_difference(ours, twin, 64) < 1e-4


@pytest.mark.parametrize("name", TWINS)
def test_every_tensor_of_torchvisions_checkpoint_fits(name: str) -> None:
    with torch.device("meta"):
        state = torchvision.models.get_model(name, weights=None).state_dict()
    load_torchvision_state(build_meta(name), state)


def test_positions_are_interpolated_as_torchvision_does() -> None:
    row = lesson.Row(16, 2, 2, 32, 64)
    torch.manual_seed(0)
    small = VisionTransformer(64, *row)
    nn.init.normal_(small.heads.head.weight, std=0.5)
    nn.init.normal_(small.encoder.pos_embedding)
    large = VisionTransformer(96, *row).eval()
    large.load_state_dict(interpolate_embeddings(96, 16, small.state_dict()))
    ours = lesson.VisionTransformer(*row, image_size=64).eval()
    load_torchvision_state(ours, small.state_dict())
    x = torch.randn(2, 3, 96, 96)
    assert (ours(x) - large(x)).abs().max() < 1e-4


def test_hand_counts() -> None:
    # LeNet-5 with three input channels and a full C3: C1, C3, C5, F6, output, a bias for each unit.
    lenet = (3 * 25 + 1) * 6 + (6 * 25 + 1) * 16 + (400 + 1) * 120 + (120 + 1) * 84 + (84 + 1) * 10
    assert count_parameters(build_meta("lenet5", num_classes=10)) == lenet == 62_006
    convs = (3 * 9 + 1) * 32 + (32 * 9 + 1) * 64 + (64 * 9 + 1) * 128
    simple = convs + (128 * 16 + 1) * 512 + (512 + 1) * 10
    assert count_parameters(build_meta("simple_cnn", num_classes=10)) == simple == 1_147_466
    macs = 32**2 * 3 * 9 * 32 + 16**2 * 32 * 9 * 64 + 8**2 * 64 * 9 * 128 + 2048 * 512 + 512 * 10
    assert count_macs(build_meta("simple_cnn", num_classes=10), (3, 32, 32)) == macs


def test_attention_products_are_counted() -> None:
    """T tokens of width D: 4 T D^2 for the projections, 2 T^2 D for Q K' and the sum of V."""
    tokens, dim = 65, 64
    with torch.device("meta"):
        block = lesson.EncoderBlock(dim, 4, 2 * dim)
    macs = count_macs(nn.Sequential(nn.Flatten(2), block), (tokens, 1, dim))
    assert macs == 4 * tokens * dim**2 + 2 * tokens**2 * dim + 2 * tokens * dim * 2 * dim


@pytest.mark.parametrize("name", ["lenet5", "simple_cnn", "alexnet", "vit_xs_16"])
@pytest.mark.parametrize("size", [8, 28, 32])
def test_small_input(name: str, size: int) -> None:
    model = lesson.MODELS[name](num_classes=10, small_input=True)
    if name == "vit_xs_16":
        model.get_classifier().weight.data.normal_()  # born zero, it would pass no gradient on
    logits = model(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert sum(bool(p.grad.any()) for p in model.parameters()) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["lenet5", "simple_cnn", "alexnet", "vit_xs_16"])
def test_width_mult_scales_the_parameters(name: str) -> None:
    params = [
        count_parameters(build_meta(name, num_classes=10, small_input=True, width_mult=w))
        for w in (0.5, 1.0, 2.0)
    ]
    assert 2 < params[1] / params[0] < 5 and 2 < params[2] / params[1] < 5


# ---------------------------------------------------------------------------------- common.lessons


def test_lessons_are_found_by_number_and_by_name() -> None:
    assert "07_model_comparison_advanced" in lesson_names()
    assert load_lesson("07") is load_lesson("07_model_comparison_advanced") is lesson


def test_all_models_holds_every_lessons() -> None:
    models, lessons = Models(), [load_lesson(name).MODELS for name in lesson_names()[:7]]
    assert [name for of_one in lessons for name in of_one] == list(models)
    assert len(set(models)) == len(models), "two lessons use one name"
    assert get_model("lenet5") is lesson.MODELS["lenet5"]


@pytest.mark.parametrize(
    ("call", "argument", "meant"),
    [(load_lesson, "01_resnet_beginer", "01_resnet_beginner"), (get_model, "resnet81", "resnet18")],
)
def test_an_unknown_name_names_the_closest(call: object, argument: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"unknown .* '{argument}' .did you mean {meant}"):
        call(argument)


# -------------------------------------------------------------------- what the comparison counts


def test_published_figures_are_those_of_the_reference() -> None:
    """Torchvision's metadata against the table of the papers' and its own published figures."""
    assert set(published()) == set(PUBLISHED)
    for name, row in published().items():
        assert (row.top1, row.top5) == (
            float(PUBLISHED[name]["imagenet_top1"]),
            float(PUBLISHED[name]["imagenet_top5"]),
        )
        assert row.crop == int(PUBLISHED[name]["input_px"])
        image = row.transform(Image.new("RGB", (700, 800)))
        assert image.shape == (3, row.crop, row.crop)


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "mobilenet_v2", "googlenet", "vit_b_32"])
def test_a_row_of_the_table(name: str) -> None:
    row = PUBLISHED[name]
    built = lesson.entry("ImageNet", name, get_model(name), int(row["input_px"])).candidate
    assert built.macs / 1e9 == pytest.approx(float(row["gmacs"]), rel=0.005)
    assert 100 * built.top1 == pytest.approx(float(row["imagenet_top1"]))
    # Convolutions and linear layers are counted alike; only attention is ours alone.
    assert built.thop_macs > built.macs or name.startswith("vit")
    assert ("-" in built.thop_note) == name.startswith("vit")


def test_thop_differs_by_what_the_note_says() -> None:
    with torch.device("meta"):
        model = lesson.MODELS["vit_xs_16"](num_classes=10, small_input=True)
    ours = count_macs(model, (3, 32, 32))
    thop, note = lesson.count_by_thop(model, (3, 32, 32), ours)
    tokens, dim, depth = 65, 128, 6
    attention = depth * 2 * tokens**2 * dim
    norms = 4 * dim * (depth * 2 * tokens + 1)  # thop: four an element; the last has one token
    assert note == f"+{norms / 1e3:.3g}K LayerNorm, -{attention / 1e6:.3g}M attention products"
    assert thop == ours - attention + norms


def test_size_on_paper_is_the_size_of_the_file(tmp_path: Path) -> None:
    candidate = lesson.entry("ImageNet", "alexnet", get_model("alexnet"), 224).candidate
    small = lesson.MODELS["vit_xs_16"](num_classes=10, small_input=True)
    torch.save(small.state_dict(), tmp_path / "weights.pt")
    build = partial(lesson.MODELS["vit_xs_16"], num_classes=10, small_input=True)
    on_paper = lesson.entry("digits", "vit_xs_16", build, 32).candidate
    assert on_paper.size_mb * 1e6 == pytest.approx(
        (tmp_path / "weights.pt").stat().st_size, rel=0.02
    )
    assert candidate.size_mb == pytest.approx(4 * 61.100840)


def test_every_model_has_its_place_on_the_timeline() -> None:
    years = {name: lesson.era(name).year for name in Models()}
    assert years["lenet5"] == 1998 and years["resnet110"] == 2015 and years["se_resnet50"] == 2017
    assert [name for name, year in years.items() if year is None] == ["simple_cnn"]


@pytest.mark.parametrize(
    ("match", "models"), [("params", "all"), ("macs", "simple_cnn,resnet18,vit_xs_16")]
)
def test_matched_sizes_are_about_equal(
    match: str, models: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.comparison.entries.count_by_thop", lambda *parts: (0, ""))
    sizes = {"experiment": "matched-size", "match": match, "model": models}
    config = lesson.Config(dataset="digits", profile_only=True, **sizes).resolve("digits")
    target = match_target(config, 10, lesson.FAMILIES)
    bar = Bar(0, "test", show=False)
    names = chosen_names(models, [lesson.default_model(family) for family in lesson.FAMILIES])
    entries = small_entries(names, config, 10, bar, lesson.FAMILIES, lesson.entry)
    assert len(entries) == bar.done == (10 if models == "all" else 3)
    for e in entries:
        size = e.candidate.params if match == "params" else e.candidate.macs
        assert 0.7 < size / target < 1.4, f"{e.candidate.model}: {size} for {target}"


def test_cifar_nets_are_not_in_imagenets_table() -> None:
    for name in ("lenet5", "simple_cnn", "resnet20", "densenet40_k12"):
        assert is_small(get_model(name))
    for name in ("resnet18", "mobilenet_v1", "vgg11", "densenet121", "vit_xs_16", "inception_v3"):
        assert not is_small(get_model(name))


# ----------------------------------------------------------------------- the command, in miniature


def command(tmp_path: Path, *flags: str) -> Warm:
    # The data set is explicit: `auto` looks for CIFAR-10 in ./data.
    line = [lesson.__file__, "--dataset", "digits", "--device", "cpu", *flags]
    return Warm(tmp_path, *line, "--run-dir", str(tmp_path), cwd=tmp_path)


def folder_of(tmp_path: Path) -> Path:
    [folder] = (tmp_path / "07_model_comparison_advanced").iterdir()
    return folder


def test_a_comparison_from_start_to_report_and_on_with_more_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = ["--model", "lenet5,vit_xs_16", "--epochs", "1", "--seeds", "1", "--pass-limit", "0.01"]
    tiny += ["--rates", "1"]
    code, out, err = command(tmp_path, *tiny).join()
    assert code == 0, err
    assert "verdict    digits: " in out and "one seed decides nothing" in out
    folder = folder_of(tmp_path)
    for name in ("comparison.md", "comparison.csv", "comparison.json", "report.html"):
        assert (folder / name).stat().st_size > 0
    assert {p.name for p in folder.glob("*.png")} >= {"trained_cost.png", "training_curves.png"}
    first = json.loads((folder / "trainings.json").read_text(encoding="utf-8"))
    assert len(first) == 2

    # One more seed: what is there stays to the last digit, what is missing is made.
    monkeypatch.setattr(sys, "argv", [lesson.__file__])  # from here on without a new process
    for name in ("cost_figure", "curves_figure"):  # drawn once
        empty = lambda *parts: plotting.panels(1)[0]  # noqa: E731
        monkeypatch.setattr(f"common.comparison.conclusion.{name}", empty)
    resume = ["--resume", str(folder), "--seeds"]
    lesson.run(parse_flags(lesson.Config, [*resume, "2", "--choose", "params<100K"]))
    said = capsys.readouterr().out
    assert "2 results read from trainings.json" in said
    second = json.loads((folder / "trainings.json").read_text(encoding="utf-8"))
    assert len(second) == 4 and {k: second[k] for k in first} == first
    table = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))["tables"][-1]
    by_hand = {}
    for kept in second.values():
        by_hand.setdefault(kept["result"]["arm"], []).append(kept["result"]["test_top1"])
    for candidate in table["candidates"]:
        assert candidate["top1"] == pytest.approx(mean(by_hand[candidate["model"]]))
        assert candidate["top1_std"] == pytest.approx(stdev(by_hand[candidate["model"]]))
    assert "params<100K: " in said and "  1. lenet5" in said

    # Results of other settings are never mixed in: they are made again.
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings["weight_decay"] = 0.123
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    lesson.run(parse_flags(lesson.Config, [*resume, "1"]))
    assert "4 in trainings.json are of other settings: made again" in capsys.readouterr().out
    third = json.loads((folder / "trainings.json").read_text(encoding="utf-8"))
    assert len(third) == 2
    assert all(kept["settings"]["weight_decay"] == 0.123 for kept in third.values())


def test_the_folder_of_many_models_has_a_short_name(tmp_path: Path) -> None:
    """A list of all names would be longer than the 255 bytes that a file system takes."""
    many = ",".join(Models())
    assert len(many) > 255
    config = lesson.Config(model=many, dataset="digits", run_dir=str(tmp_path))
    folder = Run.open(config, lesson.LESSON).folder
    assert re.fullmatch(r"resnet18-and-\d+-more-digits-s0-\d+-\d+", folder.name)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"] == many
    one = Run.open(replace(config, model="torchvision:resnet18"), lesson.LESSON).folder
    assert one.name.startswith("torchvision-resnet18-digits-s0-")


def test_a_stopped_comparison_keeps_what_is_done_and_says_how_to_go_on(tmp_path: Path) -> None:
    flags = ["--model", "lenet5,vit_xs_16", "--epochs", "10", "--seeds", "1"]
    running = command(tmp_path, *flags, "--pass-limit", "0.001")
    deadline = time.monotonic() + 150
    while not list(tmp_path.glob("*/*/trainings.json")):  # the first of two is done
        assert running.process.is_alive() and time.monotonic() < deadline
        time.sleep(0.1)
    running.kill(signal.SIGTERM)
    code, _, said = running.join()
    assert code == 143
    assert f"--resume {folder_of(tmp_path)}" in said and said.count("\n") == 1
    kept = json.loads((folder_of(tmp_path) / "trainings.json").read_text(encoding="utf-8"))
    assert {k["result"]["arm"] for k in kept.values()} == {"lenet5"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--choose", "parms<5M"], "unknown word in --choose 'parms' (did you mean params?)"),
        (["--choose", ""], "--choose: '' is no constraint"),
        (["--choose", "latency<5"], "latency needs a unit"),
        (["--model", "resnet18,resnet81"], "unknown model 'resnet81' (did you mean resnet18?)"),
        (["--budget", "soon"], "--budget soon"),
        (["--eval-imagenet", "nowhere"], "--eval-imagenet DIR and --pretrained go together"),
        (["--summary"], "name it with --model"),
        (["--experiment", "matched"], "did you mean matched-size?"),
        (["--match-to", "1M"], "--match-to are for --experiment matched-size"),
        (["--match", "macs", "--profile-only"], "are for --experiment matched-size"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    cli: Callable, flags: list[str], message: str
) -> None:
    code, _, err = cli("07", "--dataset", "digits", "--device", "cpu", *flags)
    assert code == 2
    assert message in err and err.count("\n") == 1


def record(test_top1: float, **more: object) -> dict[str, object]:
    """One training, as the harness keeps it."""
    kept = {"test_top1": test_top1, "test_top5": 1.0, "failure": "", "lr": 0.1, "test_images": 359}
    return kept | {"losses": [1.0] * 6, "seconds": 1.0, **more}


def test_a_failed_training_is_a_result_and_no_mean_hides_it() -> None:
    candidate = lesson.entry("digits", "lenet5", get_model("lenet5"), 32).candidate
    bad = {k: v for k, v in record(0.1, failure="not finite").items() if k not in ("losses",)}
    failed = summarise(candidate, [record(0.9), bad])
    assert failed.top1 is None
    assert "failed under this recipe" in trained_verdict(
        [replace(candidate, model="other", top1=0.5, seeds=1), failed], lesson.pareto_front
    )


def test_only_the_transformer_takes_adamw_and_all_try_the_same_factors() -> None:
    config = lesson.Config(dataset="digits").resolve("digits")
    vit, resnet = (lesson.entry("digits", n, get_model(n), 32) for n in ("vit_xs_16", "resnet18"))
    own = lesson.arm(vit, config)
    assert own.changes == {"optimizer": "adamw", "weight_decay": 0.05}
    assert own.rates == pytest.approx([f * 1e-3 * 64 / 256 for f in (0.25, 1, 4)])
    plain = lesson.arm(resnet, config)
    assert not plain.changes and plain.rates == pytest.approx([0.025, 0.1, 0.4])
    same = lesson.arm(vit, replace(config, one_optimizer=True))
    assert (same.changes, same.rates) == (plain.changes, plain.rates)
    assert lesson.arm(resnet, replace(config, rates="1")).rates == [config.lr]
    assert not lesson.arm(vit, replace(config, optimizer="muon")).changes


def test_each_network_is_trained_at_the_rate_that_validates_best(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The search sees no seed that counts, the test images don't choose, and nothing is made
    twice.
    """
    seen: list[tuple[str, int, float]] = []
    best = {"lenet5": 0.1, "simple_cnn": 0.4}  # peak rate

    def fake(_: object, arm: Arm, __: object, config: TrainConfig, ___: object) -> dict:
        seen.append((arm.name, config.seed, config.lr))
        val = 1 - abs(config.lr - best[arm.name])  # the test says the contrary
        record = {"failure": "", "lr": config.lr, "seed": config.seed, "test_images": 359}
        record |= {"test_top1": 1 - val, "test_top5": 1.0, "val_top1": val, "train_loss": 1.0}
        return record | {"losses": [1.0], "seconds": 1.0}

    monkeypatch.setattr("common.experiments.train_arm", fake)
    config = lesson.Config(dataset="digits", epochs=3, seeds=2).resolve("digits")
    entries = [lesson.entry("digits", name, get_model(name), 32) for name in best]
    arms, source = [lesson.arm(e, config) for e in entries], load_source(config)
    store = Store(tmp_path / "trainings.json", {}, tell=False)
    done = train_all(arms, config, torch.device("cpu"), source, store)
    for e, (name, lr) in zip(entries, best.items()):
        tried = [(name, 1000, pytest.approx(rate)) for rate in (0.025, 0.1, 0.4)]
        counted = [(name, seed, pytest.approx(lr)) for seed in (0, 1)]
        assert [run for run in seen if run[0] == name] == tried + counted
        row = summarise(e.candidate, done.records[name])
        assert row.lr == pytest.approx(lr) and row.seeds == 2
        assert f"| {lr:.3g} |" in re.sub(" +", " ", markdown_table([row]))
    again = len(seen)
    train_all(arms, config, torch.device("cpu"), source, store)
    assert len(seen) == again


def test_newer_weights_are_points_of_their_own() -> None:
    rows = [lesson.entry("ImageNet", n, get_model(n), 224).candidate for n in ("resnet50", "vgg16")]
    first, newer, vgg = with_newer_weights(rows)
    assert (first.model, newer.model, vgg.model) == ("resnet50", "resnet50 (V2)", "vgg16")
    assert newer.macs == first.macs
    assert (first.top1, newer.top1) == pytest.approx((0.7613, 0.80858))  # torchvision's page


def test_a_time_budget_becomes_whole_epochs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = lesson.Config(dataset="digits", budget="60s").resolve("digits")
    timed: list[int] = []

    def fake(name: str, build: object, data: object, config: TrainConfig, *_: object) -> Trial:
        timed.append(config.epochs)
        return Trial(1, 1, 0.5, 7.0, [])

    monkeypatch.setattr(training, "train_trial", fake)
    arms = [lesson.arm(lesson.entry("digits", "lenet5", get_model("lenet5"), 8), config)]
    store = Store(tmp_path / "trainings.json", {}, tell=False)
    arguments = arms, config, torch.device("cpu"), load_source(config), store
    for _ in range(2):  # measured, then read back
        [arm] = training.within_seconds(*arguments)
        assert arm.changes == {"epochs": 8, "warmup": config.warmup}
    assert timed == [1]


def trained(**scores: list[float]) -> list[Candidate]:
    """Made-up results: each model's accuracies by seed; the later, the cheaper."""
    base = lesson.entry("digits", "lenet5", get_model("lenet5"), 32).candidate
    return [
        summarise(replace(base, model=model, macs=1000 - i), [record(top1) for top1 in values])
        for i, (model, values) in enumerate(scores.items())
    ]


def test_verdict_has_three_outcomes() -> None:
    rows = trained(
        best=[0.990, 0.985, 0.992, 0.988, 0.990] * 4,
        level=[0.990, 0.985, 0.992, 0.987, 0.990] * 4,
        noisy=[0.99, 0.95, 0.98, 1.0, 0.97] * 4,
        worse=[0.80, 0.79, 0.81, 0.80, 0.795] * 4,
    )
    said = trained_verdict(rows, lesson.pareto_front)
    assert "it is more than 0.5 points better than worse;" in said
    assert "at most 0.5 points worse: level;" in said and "undecided: noisy;" in said
    assert "the cheapest that it is not shown to beat is noisy" in said
    # What is tied in the verdict is tied where one is chosen.
    assert choose(rows, []).tied == ["best", "level", "noisy"]


def test_one_seed_decides_nothing() -> None:
    rows = trained(a=[0.99], b=[0.10])
    assert "one seed decides nothing" in trained_verdict(rows, lesson.pareto_front)
    assert choose(rows, []).tied == ["a", "b"]


def test_the_luckiest_of_equals_is_not_called_better() -> None:
    """Four equal rivals, five seeds: the one with the highest mean is said to beat another in at
    most 5% of 2,000 comparisons.
    """
    draw = np.random.default_rng(0)
    errors = 0
    base = Candidate("made up", "", "07", None, 8, 1, 1)
    for _ in range(2000):
        scores = draw.normal(0.7, 0.1, (4, 5)).tolist()  # so wide that the margin helps little
        rows = [
            replace(base, model=str(i), top1=mean(s), top1_by_seed=s, test_images=359)
            for i, s in enumerate(scores)
        ]
        best = max(rows, key=lambda c: c.top1).model
        errors += any(v.outcome == "holds" for (a, _), v in judge_pairs(rows).items() if a == best)
    assert errors <= 0.05 * 2000


# --------------------------------------------------------------------------------- --eval-imagenet


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Six classes of three made-up pictures of different sizes, one of them grey, one a PNG."""
    generator = torch.Generator().manual_seed(0)
    for label in range(6):
        folder = tmp_path / "val" / f"n{label:08d}"
        folder.mkdir(parents=True)
        for i in range(3):
            height, width = 230 + 37 * i, 300 - 20 * label
            coarse = torch.rand(3, 6, 6, generator=generator)
            fine = nn.functional.interpolate(coarse[None], (height, width), mode="bicubic")[0]
            image = Image.fromarray((fine.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())
            if i == 1:
                image = image.convert("L")
            image.save(folder / f"{i}.{'png' if i == 2 else 'jpg'}")
    return tmp_path


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_accuracy_on_a_folder_equals_torchvisions(
    photographs: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights in torchvision's model, the images through torchvision's own preset."""
    options = {"num_classes": 6}
    if name == "googlenet":  # as the official checkpoint comes
        options |= {"transform_input": True, "aux_logits": True, "init_weights": False}
    twin = torchvision_twin(name, 64, **options)
    preset = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].transforms()
    images = torchvision.datasets.ImageFolder(str(photographs / "val"))
    x, labels = torch.stack([preset(image) for image, _ in images]), torch.tensor(images.targets)
    with torch.no_grad():
        for module in twin.modules():  # statistics of these pictures, so that logits stay in bounds
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        twin.train()(x)
        logits = twin.eval()(x)
    monkeypatch.setattr("common.pretrained.official_state", lambda _: twin.state_dict())
    ours = load_pretrained(get_model(name)(num_classes=6), name)
    config = lesson.Config(eval_imagenet=str(photographs), batch_size=4, workers=0)
    with torch.no_grad():
        assert (ours.eval()(x) - logits).abs().max() < 1e-4 * logits.abs().max()
    top1, top5, count = evaluate_imagenet(ours, name, config)
    assert count == 18
    assert top1 == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    five = logits.topk(5).indices.eq(labels[:, None]).any(1).double().mean().item()
    assert top5 == pytest.approx(five) and 0 < top5 < 1


def test_a_wrong_imagenet_folder_is_one_clear_line(photographs: Path) -> None:
    model = get_model("resnet18")(num_classes=7)
    config = lesson.Config(eval_imagenet=str(photographs), batch_size=4, workers=0)
    with pytest.raises(UserError, match="6 class folders, and the weights know 7"):
        evaluate_imagenet(model, "resnet18", config)
    with pytest.raises(UserError, match="no such folder"):
        evaluate_imagenet(model, "resnet18", replace(config, eval_imagenet="nowhere"))
    broken = photographs / "val" / "n00000003" / "0.jpg"
    broken.write_bytes(b"not a picture")
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^\S*n00000003/0.jpg can't be read") as caught:
            evaluate_imagenet(
                get_model("resnet18")(num_classes=6), "resnet18", replace(config, workers=workers)
            )
        assert "\n" not in str(caught.value)
