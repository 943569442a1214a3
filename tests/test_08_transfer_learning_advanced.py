"""Lesson 8: what is frozen stays, what learns does so at its own rate, each way in or out works."""

from __future__ import annotations

import csv
import doctest
import errno
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import nn

from common.config import TrainConfig
from common.data import make_data
from common.engine import checkpoint, file_loader
from common.engine.baselines import baselines
from common.engine.errors import UserError
from common.engine.sources import Pictures, load_digits, read_image
from common.pretrained import load_torchvision_state
from common.training import fit, make_schedule
from common.transfer import (
    arms,
    calibration,
    deployment,
    embedding,
    flags,
    images,
    origins,
    parts,
    task,
)
from common.transfer.deployment import export_model
from common.transfer.images import choose_classes, few_labels, long_tail, shifted
from common.transfer.origins import Catalogue, TorchvisionModel
from common.transfer.parts import TwoDomains
from common.transfer.prediction import load_images, predict_files
from tests.conftest import lesson
from tests.simulation import assert_calm, results_of

transfer = lesson("08")
CPU = torch.device("cpu")


def small_net(num_classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return lesson("01").cifar_resnet(8, num_classes=num_classes)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    """The tensors that are no longer what they were."""
    return {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}


def few_digits(**options: object) -> tuple[object, TrainConfig]:
    options = {"strategy": "full", **options}
    config = transfer.Config(dataset="digits", epochs=2, batch_size=16, **options).resolve("digits")
    source = choose_classes(load_digits(), range(5, 10))
    return make_data(few_labels(source, 0.05, 0), config, CPU), config


@pytest.mark.parametrize("module", [transfer, images, parts, calibration])
def test_doctests(module: object) -> None:
    failed, attempted = doctest.testmod(module)
    assert attempted >= 1 and failed == 0


def test_from_and_several_pictures_are_read() -> None:
    argv = ["--from", "runs/a", "--predict", "x.png", "y.png", "--seed", "1"]
    config = flags.parse_flags(transfer.Config, argv)
    assert (config.from_run, config.seed) == ("runs/a", 1)
    assert config.predict == os.pathsep.join(["x.png", "y.png"])


# ------------------------------------------------------------------------------ freezing and rates


def step(model: nn.Module) -> None:
    """One step of training on noise, weight decay and momentum included."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model.train()
    for _ in range(2):
        F.cross_entropy(model(torch.randn(8, 3, 8, 8)), torch.arange(8) % 5).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_frozen_body_keeps_every_tensor_and_a_thawed_one_learns() -> None:
    model = small_net()
    transfer.freeze(model)
    transfer.thaw(model.get_classifier())
    before = snapshot(model)
    step(model)
    assert changed(before, model) == {"head.2.weight", "head.2.bias"}
    transfer.thaw(model)
    before = snapshot(model)
    step(model)
    assert changed(before, model) == set(before)  # statistics and num_batches_tracked too


def test_parts_hold_every_parameter_once() -> None:
    for name in ("resnet20", "vgg11_bn", "mobilenet_v2", "densenet121", "vit_b_16"):
        with torch.device("meta"):
            model = transfer.MODELS[name](num_classes=5)
        parts = transfer.parts_of(model)
        mine = [id(p) for part in parts for p in part.parameters()]
        assert sorted(mine) == sorted(id(p) for p in model.parameters())
        assert len(parts) <= 6
        assert any(p is model.get_classifier().weight for p in parts[-1].parameters())


def test_discriminative_rates_fall_from_the_head_to_the_stem() -> None:
    model = small_net()
    parts = transfer.parts_of(model)
    groups = transfer.discriminative_groups(parts, lr=1.0, decay=2.0, weight_decay=0.5)
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert len(rate) == len(list(model.parameters()))
    expected = {"stem": 1 / 16, "stages.0": 1 / 8, "stages.1": 1 / 4, "stages.2": 1 / 2, "head": 1}
    for name, p in model.named_parameters():
        (part,) = (part for part in expected if name.startswith(part))
        assert rate[id(p)] == expected[part]
        assert decay[id(p)] == (0.5 if p.dim() > 1 else 0)


def test_unfreezing_wakes_one_part_after_the_other() -> None:
    model = small_net()
    parts = transfer.parts_of(model)
    groups = transfer.discriminative_groups(parts, 0.1, 2.0, 0.0)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    schedule = transfer.UnfreezingSchedule(optimizer, "constant", 100, 0, parts, every=10)

    def awake() -> list[bool]:
        return [all(p.requires_grad for p in part.parameters()) for part in parts]

    seen = []
    for i in range(50):
        if i % 10 == 0:
            seen.append(sum(awake()))
            assert awake() == sorted(awake())  # the last parts first
        schedule.step()
    assert seen == [1, 2, 3, 4, 5]
    # A run that goes on elsewhere finds the same parts awake.
    again = transfer.UnfreezingSchedule(optimizer, "constant", 100, 0, parts, every=10)
    assert sum(awake()) == 1
    again.load_state_dict({**schedule.state_dict(), "taken": 25})
    assert sum(awake()) == 3


@pytest.mark.parametrize("strategy", transfer.STRATEGIES)
def test_what_each_strategy_changes(strategy: str) -> None:
    data, config = few_digits(strategy=strategy)
    model = small_net()
    before = snapshot(model)
    history = transfer.transfer(model, data, config, nn.CrossEntropyLoss())
    assert len(history) == 2
    moved = {name.rpartition(".")[0] for name in changed(before, model)}
    parts = {name.split(".")[0] + "." + name.split(".")[1] for name in moved}
    assert "head.2" in parts
    if strategy == "features":
        assert parts == {"head.2"}
    elif strategy == "last-stage":
        assert parts == {"head.2", "stages.2"}
    elif strategy != "progressive":  # two epochs don't take it to the stem
        assert {"stem.0", "stages.0", "stages.1", "stages.2"} < parts


# ------------------------------------------------------------------------------- cached features


def test_features_are_what_the_classifier_sees() -> None:
    model = small_net().eval()
    x = torch.randn(4, 3, 8, 8)
    logits, features = transfer.classify_with_features(model, x)
    by_hand = model.forward_features(x).mean((2, 3))
    torch.testing.assert_close(features, by_hand)
    torch.testing.assert_close(logits, model(x))
    assert not model.get_classifier()._forward_pre_hooks


def test_cached_features_train_the_same_classifier_as_the_whole_frozen_net() -> None:
    data, config = few_digits(strategy="features", augment="none")
    cached, whole = small_net(), small_net()
    transfer.transfer(cached, data, config, nn.CrossEntropyLoss())
    optimizer, schedule = transfer.set_up(whole, config, data.train)
    fit(whole, data, nn.CrossEntropyLoss(), optimizer, schedule, config)
    for a, b in zip(cached.state_dict().values(), whole.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- rare classes


def test_focal_loss_by_hand() -> None:
    logits, y = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0])
    p = logits.softmax(1)[0, 0]
    focal = float(-((1 - p) ** 2) * p.log())
    assert transfer.FocalLoss(2.0)(logits, y) == pytest.approx(focal)
    alpha = torch.tensor([3.0, 1.0, 1.0])
    assert transfer.FocalLoss(2.0, alpha)(logits, y) == pytest.approx(3 * focal)


def test_class_balanced_weights_between_none_and_those_of_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = torch.tensor([0] * 70 + [1] * 20 + [2] * 40)
    counts = torch.bincount(labels)
    theirs = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    ours = transfer.class_balanced_weights(counts, beta=1 - 1e-7)  # nothing overlaps
    assert ours.tolist() == pytest.approx((theirs * 3 / theirs.sum()).tolist(), rel=1e-4)
    assert transfer.class_balanced_weights(counts, beta=0.0).tolist() == [1, 1, 1]
    # The effective number as the paper derives it: the n-th image adds beta^(n-1).
    effective = np.array([sum(0.9**i for i in range(n)) for n in counts])
    expected = 3 / effective / (1 / effective).sum()
    assert transfer.class_balanced_weights(counts, beta=0.9).tolist() == pytest.approx(
        expected.tolist(), rel=1e-5
    )


def test_logit_adjustment_is_least_where_the_plain_net_is_right_for_even_classes() -> None:
    """Classes as Gaussians at -1 and 1, drawn 9 to 1: with the adjusted loss the best threshold on
    the line is 0, as if both were as common; without it log(9) / 2 away.
    """
    generator = torch.Generator().manual_seed(0)
    y = (torch.rand(200_000, generator=generator) < 0.1).long()
    x = torch.randn(len(y), generator=generator) + 2 * y - 1

    def best(loss: nn.Module) -> float:  # with a slope of 2, the true one; convex in the bias
        def of(b: float) -> float:
            return float(loss(torch.stack((-x - b / 2, x + b / 2), dim=1), y))

        return minimize_scalar(of, bounds=(-4, 4), method="bounded", options={"xatol": 0.01}).x

    assert best(transfer.LogitAdjustedLoss(torch.bincount(y))) == pytest.approx(0, abs=0.1)
    assert best(nn.CrossEntropyLoss()) == pytest.approx(-np.log(9), abs=0.1)


def test_long_tail_falls_by_one_factor_and_balanced_order_evens_it_out() -> None:
    labels = torch.arange(5).repeat(100)
    tail = long_tail(Pictures(labels, torch.zeros(500, 1, 1, 1)), 5, ratio=16, seed=0)
    assert torch.bincount(tail.labels).tolist() == [100, 50, 25, 12, 6]
    drawn = torch.cat([images.balanced_order(tail.labels, 0, e) for e in range(50)])
    shares = torch.bincount(tail.labels[drawn]) / len(drawn)
    assert shares.tolist() == pytest.approx([0.2] * 5, abs=0.02)


def test_features_come_as_balanced_as_their_images() -> None:
    here, config = a_task(fraction=1.0)
    loader = here.data(here.images, config, CPU, imbalance=30.0).train
    loader.order = partial(images.balanced_order, loader.labels, 0)
    (_, y), *_ = images.FeatureLoader(loader, torch.zeros(len(loader.labels), 3)).batches()
    assert torch.equal(y, loader.labels[loader.order(0)[: len(y)]])


# ------------------------------------------------------------------------------- domains


def test_coral_loss_is_numpys_and_its_gradient_pulls_covariances_together() -> None:
    a, b = torch.randn(20, 4), (3 * torch.randn(30, 4)).requires_grad_()
    distance = np.cov(a.numpy().T) - np.cov(b.detach().numpy().T)
    assert float(transfer.coral_loss(a, b).detach()) == pytest.approx(
        (distance**2).sum() / 64, rel=1e-4
    )
    (gradient,) = torch.autograd.grad(transfer.coral_loss(a, b), b)
    assert transfer.coral_loss(a, b - gradient) < transfer.coral_loss(a, b)


def test_reversal_sends_the_critics_gradient_back_with_the_other_sign() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    layer = nn.Linear(4, 1)
    (plain,) = torch.autograd.grad(layer(x).sum(), x)
    reversed_ = transfer.reverse_gradient(x, 0.7)
    assert torch.equal(reversed_, x)
    (gradient,) = torch.autograd.grad(layer(reversed_).sum(), x)
    torch.testing.assert_close(gradient, -0.7 * plain)


def test_dann_grows_its_reversal_from_nothing() -> None:
    learner, loss = TwoDomains(small_net()).train(), transfer.DANNLoss(64, steps=10)
    with torch.no_grad():
        loss.critic[-1].weight.mul_(1e6)  # what reaches the stem is the critic's gradient
    gradients = []
    for _ in range(11):
        learner.zero_grad()
        logits, *rest = learner(torch.randn(4, 3, 8, 8))
        loss((logits.detach().requires_grad_(), *rest), torch.tensor([0, 1])).backward()
        gradients.append(learner.model.stem[0].weight.grad.norm().item())
    assert gradients[0] == 0 and gradients[-1] > 0
    assert learner.eval()(torch.zeros(2, 3, 8, 8)).shape == (2, 5)


def test_two_domains_are_normalised_each_by_itself() -> None:
    """One that is brighter and has more contrast gives the same logits."""
    learner, x = TwoDomains(small_net()).train(), torch.randn(4, 3, 8, 8)
    learner.model.stem[0].padding = (0, 0)  # zeros at the edge are no brighter in either
    logits, features, other_logits, other_features = learner(torch.cat((x, 5 * x + 3)))
    torch.testing.assert_close(logits, other_logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(features, other_features, rtol=1e-3, atol=1e-3)
    assert transfer.DeepCoralLoss()((logits, features, logits, features), torch.arange(4)) == (
        F.cross_entropy(logits, torch.arange(4))
    )


def test_adabn_measures_the_statistics_of_the_new_images_and_nothing_else() -> None:
    data, _ = few_digits()
    model = small_net()
    before = snapshot(model)
    transfer.adapt_batch_norm(model, data.train)
    assert all("running" in n or "num_batches" in n for n in changed(before, model))
    images = data.train.take(range(len(data.train.labels)))
    responses = model.stem[0](images)  # what the first BatchNorm sees
    torch.testing.assert_close(model.stem[1].running_mean, responses.mean((0, 2, 3)))
    assert model.stem[1].momentum == 0.1 and not model.training


def test_adabn_does_not_depend_on_the_order_of_the_files() -> None:
    """In a folder all images of a class come together; here the dark ones, and then the bright."""
    digits = load_digits()
    by_brightness = digits.train.pixels.float().mean((1, 2, 3)).argsort()
    config = transfer.Config(dataset="digits").resolve("digits")
    source = replace(digits, train=digits.train.take(by_brightness))
    data = make_data(source, config, torch.device("cpu"))
    model = transfer.adapt_batch_norm(small_net(), data.train)
    responses = model.stem[0](data.train.take(range(len(data.train.labels))))
    torch.testing.assert_close(
        model.stem[1].running_var, responses.var((0, 2, 3)), rtol=0.03, atol=0
    )


def test_adabn_gives_no_image_more_weight_than_another() -> None:
    data = make_data(load_digits(), transfer.Config(dataset="digits").resolve("digits"), CPU)
    data.train.labels = data.train.labels[:257]  # one more than a batch holds
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    transfer.adapt_batch_norm(model, data.train)
    means = data.train.take(range(257)).mean((0, 2, 3))
    torch.testing.assert_close(model[1].running_mean, means, rtol=0, atol=2e-3)


def test_shifted_digits_keep_their_labels_and_shape() -> None:
    pictures = load_digits().test
    for kind in ("inverted", "noisy", "textured"):
        other = shifted(pictures, kind, seed=0)
        assert other.pixels.dtype == torch.uint8 and other.pixels.shape == pictures.pixels.shape
        assert torch.equal(other.labels, pictures.labels)
        assert (other.pixels != pictures.pixels).float().mean() > 0.3


# ------------------------------------------------------------------------------- data and models


def test_classes_are_chosen_and_labels_stratified() -> None:
    source = load_digits()
    target = choose_classes(source, range(5, 10))
    assert target.class_names == ["5", "6", "7", "8", "9"]
    digit = int((source.train.labels == 7).sum())
    assert int((target.train.labels == 2).sum()) == digit
    few, all_ = (few_labels(target, f, seed=1) for f in (0.05, 1.0))
    assert torch.equal(few.val.pixels, all_.val.pixels)  # as large, whatever the fraction
    assert len(few.train) == pytest.approx(0.05 * len(all_.train), abs=3)


def test_the_share_kept_for_validation_is_that_of_the_flag() -> None:
    here, config = a_task(val_share=0.4, fraction=1.0)
    data = here.data(here.images, config, CPU)
    count = len(data.train.labels)
    assert count == here.labelled(1.0)
    assert len(data.val.labels) / (count + len(data.val.labels)) == pytest.approx(0.4, abs=0.01)


def test_torchvision_model_is_torchvisions_own_with_our_interface() -> None:
    from torchvision import models

    torch.manual_seed(0)
    theirs = models.shufflenet_v2_x0_5(num_classes=7).eval()
    ours = TorchvisionModel("shufflenet_v2_x0_5", num_classes=7).eval()
    ours.net.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))
    assert ours.forward_features(x).shape == (2, 1024, 2, 2)
    ours.reset_classifier(3)
    assert ours(x).shape == (2, 3) and ours.get_classifier().out_features == 3
    parts = transfer.parts_of(ours)
    assert sum(p.numel() for part in parts for p in part.parameters()) == sum(
        p.numel() for p in ours.parameters()
    )
    with pytest.raises(UserError, match="unknown torchvision model 'resnet19'"):
        TorchvisionModel("resnet19")


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_torchvision_nets_with_auxiliary_heads_train_without_them(name: str) -> None:
    """In training torchvision's give several outputs; official files have the heads' weights."""
    from torchvision import models

    theirs = models.get_model(name, weights=None, transform_input=True, init_weights=False).eval()
    ours = load_torchvision_state(TorchvisionModel(name), theirs.state_dict())
    x = torch.rand(2, 3, 96, 96)
    assert torch.equal(ours.eval()(x), theirs(x))
    assert ours.train()(x).shape == (2, 1000)


def test_catalogue_knows_every_lesson_and_torchvision() -> None:
    catalogue = Catalogue()
    assert "resnet20" in catalogue and "densenet121" in catalogue and "resnet19" not in catalogue
    assert "torchvision:convnext_tiny" in catalogue


def test_settings_follow_from_the_size_of_the_data() -> None:
    asked = transfer.Config()
    config = asked.resolve("digits")
    small, large = (task.settings_for(asked, config, n, transfer.TABLE) for n in (30, 600))
    assert small.batch_size < large.batch_size and small.epochs > large.epochs
    assert small.lr / small.batch_size == pytest.approx(large.lr / large.batch_size)
    whole = task.settings_for(transfer.Config(batch_size=512), config, 30, transfer.TABLE)
    assert whole.lr == pytest.approx(config.base_lr * 30 / 256)  # of a step of all images
    steep = replace(config, base_lr=100.0, accumulate=4)
    assert task.settings_for(transfer.Config(), steep, 10**6, transfer.TABLE).lr == 100
    told = transfer.Config(epochs=3, batch_size=8, lr=0.5)
    same = task.settings_for(told, told.resolve("digits"), 30, transfer.TABLE)
    assert (same.epochs, same.batch_size, same.lr) == (3, 8, 0.5)
    few = replace(large, **task.as_many_steps(large, 600, 64))
    assert few.epochs * (64 // few.batch_size) == large.epochs * (600 // large.batch_size)


@pytest.mark.parametrize(("count", "epochs"), [(200, 30), (9_000, 20), (22_500, 8), (10**6, 8)])
def test_source_epochs_follow_from_the_images_and_the_rate_from_their_size(
    count: int, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = []

    def note(name: str, build: object, data: object, recipe: TrainConfig, device: object) -> object:
        recipes.append(recipe)
        return SimpleNamespace(model=None, test_top1=0.0)

    nothing = SimpleNamespace(describe=str, mean=None, std=None)
    monkeypatch.setattr(task, "make_data", lambda *parts: nothing)
    monkeypatch.setattr(task, "train_trial", note)
    source = SimpleNamespace(class_names=["a", "b"], train=range(count))
    for options in ({}, {"source_epochs": 3}, {"image_size": 224}):
        config = transfer.Config(dataset="folder", **options).resolve("folder", 32)
        task.pretrain(source, config, CPU, small_net)
    assert [recipe.epochs for recipe in recipes] == [epochs, 3, epochs]
    assert [recipe.base_lr for recipe in recipes] == [0.4, 0.4, 0.1]


def test_a_folder_is_read_once_for_all_trainings(
    cli: Callable, image_folder: Callable, monkeypatch: pytest.MonkeyPatch, no_figures: None
) -> None:
    read = Counter()

    def counted(path: str) -> torch.Tensor:
        read[path] += 1
        return read_image(path)

    monkeypatch.setattr(file_loader, "read_image", counted)
    folder = image_folder(tuple("abcd"), per_class=10)
    code, out, err = cli(
        "08", "--dataset", str(folder), "--source-classes", "2", "--experiment", "schedules",
        "--seeds", "2", "--smoke", "--batch-size", "4", "--skip-broken",
    )  # fmt: skip
    assert code == 0 and out.count("seed 1 ") == 3, err
    assert set(read.values()) == {1} and len(read) == 40


# ------------------------------------------------------------------------------- export


@pytest.mark.parametrize("transformer", [False, True])
def test_exported_files_give_the_models_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transformer: bool
) -> None:
    """... for any number of images."""
    monkeypatch.delitem(deployment.WRITERS, "model.onnx")  # the next test reads that
    net = partial(lesson("07").MODELS["vit_xs_16"], num_classes=5, small_input=True)
    model, side = (net().eval(), 32) if transformer else (small_net().eval(), 8)
    mean_std = torch.tensor([0.4] * 3), torch.tensor([0.2] * 3)
    found = export_model(calibration.Trained(model, "abcde", mean_std, side), tmp_path)
    assert "model.pt2" in found and max(found.values()) < 1e-4
    x = torch.randn(5, 3, side, side)
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "model.json").read_text())["classes"] == list("abcde")


@pytest.mark.parametrize("pixels", [False, True])
def test_a_script_without_the_course_says_of_a_picture_what_predict_says(
    tmp_path: Path, pixels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures that are not square, two of them turned by their EXIF tag, a transparent one and a
    grey one of 12 bits; with the preprocessing in the script, and in the file.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from PIL import Image

    generator = np.random.default_rng(0)
    paths = []
    for i, size in enumerate([(61, 40, 3), (130, 257, 3), (90, 33, 3)]):
        coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize(size[:2], Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = (1, 6, 3)[i]
        picture.save(tmp_path / f"{i}.jpg", quality=95, exif=exif)
        paths.append(str(tmp_path / f"{i}.jpg"))
    coarse = generator.integers(0, 256, (80, 120, 4), dtype=np.uint8)
    coarse[:, 30:, 3] = 0  # most of it is not seen
    odd = {
        "clear": Image.fromarray(coarse),
        "grey": Image.fromarray(coarse[..., 0] * np.uint16(16)),
    }
    for name, picture in odd.items():
        picture.save(tmp_path / f"{name}.png")
        paths.append(str(tmp_path / f"{name}.png"))
    if not pixels:
        monkeypatch.delitem(deployment.WRITERS, "model.pt2")  # the test before has made that
    model, side = small_net().eval(), 96
    mean_std = torch.tensor([0.3, 0.4, 0.5]), torch.tensor([0.2] * 3)
    knows = calibration.Calibration(temperature=0.05)  # so that a small difference shows
    net = calibration.Trained(model, "abcde", mean_std, side, knows)
    export_model(net, tmp_path, pixels)
    ours = predict_files(net, paths, tmp_path)
    about = json.loads((tmp_path / "model.json").read_text(encoding="utf-8"))
    assert ({"resize", "crop", "mean"} <= set(about["preprocessing"])) == (not pixels)
    command = [sys.executable, "classify.py", *paths]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    theirs = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[1] for line in theirs] == [answer["class"] for answer in ours]
    for (_, _, share), answer in zip(theirs, ours):
        assert float(share) == pytest.approx(answer["probability"], abs=0.02)
    assert len((tmp_path / "classify.py").read_text().splitlines()) < 60


@pytest.mark.parametrize(("side", "size"), [(96, (200, 131)), (96, (40, 97)), (32, (33, 50))])
def test_pictures_are_scaled_and_cut_in_the_file_as_they_are_here(
    tmp_path: Path, side: int, size: tuple[int, int]
) -> None:
    """Made larger and smaller; an odd and an even rest of the crop. Rounding moves no pixel by more
    than one of 255.
    """
    from PIL import Image

    seen: list[torch.Tensor] = []

    class Looks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x.flatten(1)

    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (theirs,), _ = load_images([str(tmp_path / "a.png")], side)
    mean, std = torch.tensor([0.3, 0.4, 0.5]), torch.tensor([0.2, 0.3, 0.4])
    net = calibration.Trained(Looks(), (), (mean, std), side)
    deployment.FromPixels(net)(torch.from_numpy(pixels)[None])
    ours = 255 * (seen[0][0] * std.view(3, 1, 1) + mean.view(3, 1, 1))
    off = (ours - theirs).abs()
    assert off.max() < 1.01 and (off > 0.5).float().mean() < 0.1


def test_an_export_to_a_full_disk_is_one_line_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "model.pt2").write_bytes(b"of before")
    monkeypatch.setattr(os, "fsync", full)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    with pytest.raises(UserError, match=r"model\.pt2 can't be written \(No space left"):
        export_model(calibration.Trained(net, "abcde", (torch.ones(3),) * 2, 8), tmp_path)
    assert (tmp_path / "model.pt2").read_bytes() == b"of before"


def test_export_refuses_a_file_that_says_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"model.pt2": lambda model, x, path, _: path.touch() or (lambda x: model(x) + 0.01)}
    monkeypatch.setattr(deployment, "WRITERS", wrong)
    net = calibration.Trained(small_net(), "abcde", (torch.ones(3),) * 2, 8)
    with pytest.raises(UserError, match="answers otherwise"):
        export_model(net, tmp_path)


# ------------------------------------------------------------------------------- how sure


def test_temperature_is_found_again_and_the_threshold_keeps_its_promise() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (5000, 4))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([generator.choice(4, p=p) for p in shares])
    assert calibration.temperature_of(3 * logits, labels) == pytest.approx(3, rel=0.05)

    confidence, right = shares.max(1), shares.argmax(1) == labels
    threshold = calibration.threshold_of(confidence, right)
    assert right[confidence >= threshold].mean() >= 0.95
    lower = np.sort(confidence[confidence < threshold])[::-1]
    assert all(right[confidence >= t].mean() < 0.95 for t in lower)
    assert calibration.threshold_of(confidence, np.zeros(5000, bool)) > 1


def test_predictions_of_a_folder_pass_over_broken_files(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.new("L", (20, 30), 100 * i).save(tmp_path / "in" / f"{i}.png")
    (tmp_path / "in" / "1.png").write_bytes(b"no picture")
    model, mean_std = small_net(), (torch.zeros(3), torch.ones(3))
    net = calibration.Trained(model, "abcde", mean_std, 8)
    (tmp_path / "out").mkdir()
    where = [str(tmp_path / "in")], tmp_path / "out"
    with pytest.raises(UserError, match=r"1\.png can't be read as an image"):
        predict_files(net, *where)
    knows = calibration.Calibration(2.0, threshold=0.5, images=9)
    answers = predict_files(replace(net, calibration=knows), *where, skip_broken=True)
    with (tmp_path / "out" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    saved = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [Path(row["path"]).name for row in rows] == ["0.png", "2.png"]
    assert saved["threshold"] == 0.5 and len(saved["predictions"]) == len(answers) == 2
    x = torch.full((1, 3, 8, 8), 200 / 255)
    shares = (model.eval()(x) / 2).softmax(1)[0].sort(descending=True).values.tolist()
    assert float(rows[1]["probability"]) == pytest.approx(shares[0], rel=1e-5)
    assert float(rows[1]["margin"]) == pytest.approx(shares[0] - shares[1], abs=1e-5)
    assert rows[1]["unsure"] == str(shares[0] < 0.5)
    for name in ("0.png", "2.png"):
        (tmp_path / "in" / name).write_bytes(b"no picture either")
    with pytest.raises(UserError, match="none of the files"):
        predict_files(net, *where, skip_broken=True)


def test_baselines_know_no_features() -> None:
    config = TrainConfig(dataset="digits").resolve("digits")
    digits = load_digits()
    found = baselines(make_data(digits, config, CPU))
    assert found["chance"] == 0.1 and 0.93 < found["logistic_regression"] < 0.99
    few = replace(digits, train=digits.train.take(torch.arange(len(digits.train)) % 40 < 39))
    labels = make_data(few, config, CPU).train.labels
    common = torch.bincount(labels).argmax()
    assert baselines(make_data(few, config, CPU))["majority"] == pytest.approx(
        float((digits.test.labels == common).float().mean())
    )


# ------------------------------------------------------------------------------- experiments


def a_task(**settings: object) -> tuple[task.Task, object]:
    config = transfer.Config(strategy="full", **settings).resolve("digits")
    origin = origins.Origin("a net", small_net(), class_names=list("01234"))
    images = load_digits()
    return task.Task(config, CPU, small_net, origin, images, range(5, 10), transfer), config


def test_strategies_are_compared_under_the_loss_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    monkeypatch.setattr(transfer, "transfer", lambda model, data, config, loss: losses.append(loss))
    monkeypatch.setattr(task, "tested", lambda *parts: None)
    here, config = a_task(label_smoothing=0.2, fraction=0.05)
    arm = here.arm("full")
    arm.train(arm, here.data(here.images, config, CPU), config, CPU)
    assert losses[0].label_smoothing == 0.2


def designs() -> dict[str, object]:
    here, config = a_task()
    with_weights = "compare", "fractions", "schedules", "imbalance"
    found = {name: getattr(transfer, name)(here, config) for name in with_weights}
    return {**found, "domain-adaptation": transfer.domain_adaptation(config)}


@pytest.mark.parametrize("name", transfer.EXPERIMENTS)
def test_each_claim_can_hold_fail_and_stay_open_and_equal_arms_stay_equal(name: str) -> None:
    experiment = designs()[name]
    for i, claim in enumerate(experiment.claims):
        high, low, middle = [0.98, 0.985, 0.99], [0.5, 0.505, 0.5], [0.6, 0.8, 0.7]
        for values, outcome in (
            ((high, low), "holds"), ((low, high), "fails"), ((middle, middle[::-1]), "undecided"),
        ):  # fmt: skip
            arms = {arm.name: middle for arm in experiment.arms}
            arms |= {claim.higher: values[0], claim.lower: values[1]}
            assert results_of(experiment, arms, 359).verdicts()[i].outcome == outcome, claim
    assert_calm(experiment)


# ------------------------------------------------------------------------------- whole runs


def test_default_run_goes_on_with_the_winner_in_one_folder(
    cli: Callable, tmp_path: Path, no_figures: None
) -> None:
    code, out, err = cli("08", "--smoke", "--seeds", "2", "--device", "cpu")
    assert code == 0, err
    assert "verdict" in out
    (folder,) = (tmp_path / "runs" / transfer.LESSON).iterdir()
    result, tried = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("result", "experiment")
    )
    assert result["labels"] == 32 and result["source_top1"] > 0
    assert [row["name"] for row in result["strategies"]] == list(transfer.STRATEGIES)
    assert result["baselines"]["chance"] == 0.2 and result["calibration"]["images"] == 71
    val = {name: [] for name in transfer.STRATEGIES}
    for training in tried["trainings"]:
        val[training["arm"]].append(training["val_top1"])
    assert sum(val[result["strategy"]]) == max(map(sum, val.values()))
    rates = {t["lr"] for t in tried["trainings"] if t["arm"] == result["strategy"]}
    assert f"at rate {rates.pop():.3g}" in out and not rates
    assert {p.name for p in folder.glob("*.png")} == {"comparison.png", "features.png"}

    page = (folder / "report.html").read_text()
    assert "progressive" in page and "logistic regression" in page and "every picture gets" in page

    code, out, err = cli("08", "--resume", str(folder))  # all is there
    assert code == 0 and "results read" in out and "seed 0  " not in out, err
    again = json.loads((folder / "result.json").read_text())
    assert again["test_top1"] == result["test_top1"] and again["strategy"] == result["strategy"]

    from PIL import Image

    for i in range(2):
        Image.new("L", (20, 30), 60 * i).save(tmp_path / f"{i}.png")
    pictures = [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    code, out, err = cli("08", "--from", str(folder), "--predict", *pictures)
    assert code == 0, err
    assert out.count("predict ") == 2 and (folder / "predictions.png").is_file()
    assert "set on 71 validation images" in out and "every picture gets one of" in out
    shares = [float(s.rstrip("%,")) for s in out.splitlines()[0].split()[3:12:2]]
    assert len(shares) == 5 and sum(shares) == pytest.approx(100, abs=0.5)


def test_own_folder_from_a_run_of_lesson_1(
    cli: Callable, image_folder: Callable, tmp_path: Path, no_figures: None
) -> None:
    code, _, err = cli("01", "--smoke", "--model", "resnet20", "--dataset", "digits")
    assert code == 0, err
    (best,) = (tmp_path / "runs").rglob("best.pt")
    images = str(image_folder(name="meine Bilder"))
    code, out, err = cli(
        "08", "--dataset", images, "--from", str(best.parent), "--smoke", "--strategy", "features"
    )
    assert code == 0, err
    assert "features, from resnet20 of" in out and "3 classes, 8 px" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--dataset", "no/such/folder"], "no such folder"),
        (["--dataset", "digitz"], "did you mean digits?"),
        (["--model", "resnet19"], "did you mean resnet"),
        (["--model", "torchvision:resnet19"], "unknown torchvision model"),
        (["--from", "runs/none"], "no run folder"),
        (["--fractions", "0.1,2"], "--fractions 0.1,2"),
        (["--optimizer", "adamw"], "optimizer"),
        (["--predict", os.pathsep], "--predict"),
        (["--predict", "none.jpg"], "--predict none.jpg: no such file"),
        (["--source-classes", "9"], "two must stay"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], said: str, cli: Callable) -> None:
    code, _, err = cli("08", "--smoke", *argv)
    assert code == 2 and said in err and err.count("\n") == 1


def test_a_folder_needs_weights_to_start_from(
    cli: Callable, image_folder: Callable, no_figures: None
) -> None:
    images = str(image_folder())
    code, _, err = cli("08", "--dataset", images, "--smoke")
    assert code == 2 and "--pretrained, or --from RUN" in err and err.count("\n") == 1
    code, out, err = cli("08", "--dataset", images, "--smoke", "--source-classes", "2")
    assert code == 2 and "two must stay" in err
    code, out, err = cli("08", "--dataset", images, "--smoke", "--strategy", "scratch")
    assert code == 0 and "scratch, from random weights" in out, err


def test_official_weights_into_a_model_for_ones_own_classes(
    cli: Callable,
    image_folder: Callable,
    monkeypatch: pytest.MonkeyPatch,
    no_figures: None,
    tmp_path: Path,
) -> None:
    """The download replaced by a checkpoint of torchvision's own making."""
    from torchvision import models

    torch.manual_seed(0)
    name = "mobilenet_v3_small"
    official = models.get_model(name).state_dict()
    monkeypatch.setattr("common.pretrained.official_state", lambda name: official)
    pictures = str(image_folder(size=100, per_class=6))
    for model in (name, f"torchvision:{name}"):
        code, out, err = cli(
            "08", "--dataset", pictures, "--pretrained", "--model", model, "--smoke",
            "--strategy", "features", "--batch-size", "4", "--workers", "0", "--device", "cpu",
        )  # fmt: skip
        assert code == 0, err
        assert f"features, from official weights of {model}" in out and "96 px" in out
    for best in (tmp_path / "runs").rglob("best.pt"):
        state = checkpoint.load(best)["model"]
        *body, weight, bias = zip(state.values(), official.values())  # both in one order
        assert all(torch.equal(ours, theirs) for ours, theirs in body)
        assert [len(ours) for ours, _ in (weight, bias)] == [3, 3]
        assert [len(theirs) for _, theirs in (weight, bias)] == [1000, 1000]


@pytest.mark.parametrize(
    ("experiment", "argv", "rows"),
    [
        ("compare", [], 5),
        ("fractions", ["--fractions", "0.05,0.2"], 4),
        ("schedules", [], 3),
        ("imbalance", [], 5),
        ("domain-adaptation", ["--shift", "noisy"], 7),
    ],
)
def test_experiments_in_miniature(
    experiment: str, argv: list[str], rows: int, cli: Callable, tmp_path: Path
) -> None:
    code, _, err = cli("08", "--experiment", experiment, "--smoke", "--seeds", "1", *argv)
    assert code == 0, err
    (outcome,) = (tmp_path / "runs").rglob("experiment.json")
    found = json.loads(outcome.read_text())
    assert len(found["rows"]) == rows and len(found["claims"]) == len(designs()[experiment].claims)
    assert any(p.stat().st_size > 10_000 for p in outcome.parent.glob("*.png"))


def test_files_normalise_as_the_net_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inception's own scaling, set after official weights came in, is no part of the state."""
    inception = lesson("03")
    net = inception.MODELS["googlenet"](num_classes=3, small_input=True, aux=False).eval()
    build = partial(inception.MODELS["googlenet"], small_input=True, aux=False)
    net.transform_input = True
    exported: list[nn.Module] = []
    monkeypatch.setattr(deployment, "export_model", lambda net, *rest: exported.append(net.model))
    config = SimpleNamespace(predict="", export=True, export_pixels=False)
    known = calibration.Trained(net, "abc", (), 32)
    deployment.deploy(config, tmp_path, known, lambda n: build(num_classes=n))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(exported[0].eval()(x), net(x))


def test_recalls_of_a_class_without_test_images_and_of_what_diverged() -> None:
    labels = torch.tensor([0, 0, 2])  # of class 1 there were two images in all
    train = SimpleNamespace(labels=torch.tensor([0, 0, 1, 2]))
    names = ["cat", "dog", "eel"]
    data = SimpleNamespace(
        train=train, test=SimpleNamespace(labels=labels), num_classes=3, class_names=names
    )
    known = {"lost": [None, None], "found": [[0.5, 1.0], None]}
    results = SimpleNamespace(records=known, values=lambda name, key: known[name])
    axes = arms.recall_figure(data, results).axes[0]
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert shown == ["cat (2)", "eel (1)"]
    assert "50" in " ".join(text.get_text() for text in axes.texts)


def test_embedding_keeps_clusters_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(20)
    features = 20 * torch.eye(3, 16)[labels] + torch.randn(60, 16, generator=generator)
    points, method = embedding.embed(features.numpy())
    assert method == "t-SNE" and points.shape == (60, 2)
    from sklearn.neighbors import KNeighborsClassifier

    assert KNeighborsClassifier(3).fit(points, labels).score(points, labels) == 1
    assert embedding.embed(features[:10].numpy())[1] == "PCA"


def test_schedules_of_the_flag_reach_the_optimizer() -> None:
    data, config = few_digits()
    optimizer, schedule = transfer.set_up(
        small_net(), replace(config, schedule="onecycle"), data.train
    )
    plain = make_schedule(optimizer, replace(config, schedule="onecycle"), data.train)
    assert schedule.kind == plain.kind == "onecycle" and schedule.factor(0) == pytest.approx(1 / 25)


@pytest.mark.parametrize("name", ["/nowhere", "nowhere", "digits2"])
def test_a_missing_target_is_blamed_on_its_own_flag(name: str) -> None:
    config = transfer.Config(dataset=name)
    with pytest.raises(UserError, match=f"^--target-dir {name}: no such folder"):
        flags.locate(config, "--target-dir")
