"""Corners of the lessons: other flags, odd nets and files, what starts from what."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models

from common import experiments, inspection, plotting
from common.engine import device
from common.engine.errors import UserError
from common.engine.sources import load_digits
from common.lessons import Models
from common.profiling import count_macs
from common.transfer import deployment, embedding, flags, origins, parts, prediction, task
from common.transfer.calibration import Trained
from tests.conftest import lesson

CPU = torch.device("cpu")
transfer = lesson("08")


def test_a_transformers_tokens_are_drawn_as_maps() -> None:
    torch.manual_seed(0)
    net = Models()["vit_xs_16"](num_classes=5, small_input=True)
    nn.init.normal_(net.get_classifier().weight)  # zeros at the start
    x = torch.randn(3, 3, 32, 32)
    maps = inspection.stage_activations(net, x[:1])
    assert {m.shape for m in maps.values()} == {(128, 8, 8)}
    tokens = net.stages[0](net.stem(x[:1]))
    by_place = tokens[0, 1:].T.reshape(128, 8, 8).detach()
    np.testing.assert_allclose(maps["stage 1"], by_place, atol=1e-5)
    plotting.activations(np.zeros((32, 32, 3)), maps)
    heat = inspection.grad_cam(net, x)
    assert heat.shape == (3, 8, 8) and heat.any()


def test_torchvisions_transformer_shows_where_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tiny = models.VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=5)
    nn.init.normal_(tiny.heads[-1].weight)  # zeros at the start
    monkeypatch.setattr(models, "get_model", lambda *args, **options: tiny)
    net = origins.TorchvisionModel("vit_b_16", num_classes=5)
    heat = inspection.grad_cam(net, torch.randn(3, 3, 32, 32))
    assert heat.shape == (3, 4, 4) and heat.any()


def test_a_transformer_is_transferred(cli: Callable, tmp_path: Path) -> None:
    flags = ["--smoke", "--no-compare", "--model", "vit_xs_16", "--device", "cpu"]
    code, _, err = cli("08", *flags, "--dataset", "digits")
    assert code == 0, err
    (outcome,) = (tmp_path / "runs").rglob("result.json")
    assert {"activations.png", "grad_cam.png"} <= {p.name for p in outcome.parent.glob("*.png")}


def test_a_net_with_side_classifiers_is_transferred(
    cli: Callable, tmp_path: Path, image_folder: Callable, no_figures: None
) -> None:
    code, _, err = cli("03", "--smoke", "--dataset", "digits", "--width-mult", "0.1")
    assert code == 0, err
    (best,) = (tmp_path / "runs").rglob("best.pt")
    code, _, err = cli("08", "--smoke", "--dataset", str(image_folder()), "--from", str(best))
    assert code == 0, err


def test_what_was_learned_from_a_run_is_read_again_in_the_same_form(
    cli: Callable, tmp_path: Path, image_folder: Callable, no_figures: None
) -> None:
    """A thin net of small images, moved to larger ones: neither follows from lesson 8's flags."""
    code, _, err = cli("05", "--smoke", "--dataset", "digits", "--width-mult", "0.25")
    assert code == 0, err
    (best,) = (tmp_path / "runs").rglob("best.pt")
    moved = ["--dataset", str(image_folder(size=96)), "--image-size", "96", "--workers", "0"]
    code, _, err = cli("08", "--smoke", *moved, "--from", str(best))
    assert code == 0, err
    (outcome,) = (tmp_path / "runs" / transfer.LESSON).rglob("result.json")
    past = origins.open_run(str(outcome.parent), transfer)
    assert count_macs(past.origin.model, (3, 96, 96)) == json.loads(outcome.read_text())["macs"]
    assert past.config.image_size == 96


@pytest.mark.parametrize("number", ["01", "05"])
def test_an_experiment_does_not_pretend_to_be_pretrained(number: str, cli: Callable) -> None:
    name = next(iter(lesson(number).EXPERIMENTS))
    flags = ["--experiment", name, "--pretrained", "--smoke", "--seeds", "1"]
    code, _, err = cli(number, *flags, "--dataset", "digits")
    assert code == 2 and "random weights" in err and err.count("\n") == 1


@pytest.mark.parametrize("more", [["--model", "torchvision:resnet18"], ["--from", "resnet20"]])
def test_a_domain_adaptation_refuses_weights(more: list[str], cli: Callable) -> None:
    code, _, err = cli("08", "--experiment", "domain-adaptation", "--smoke", "--seeds", "1", *more)
    assert code == 2 and err.count("\n") == 1


@pytest.mark.parametrize("name", ["compare", "domain-adaptation"])
@pytest.mark.parametrize("flag", ["--export", "--export-pixels", "--predict"])
def test_an_experiment_keeps_no_net_to_deploy(name: str, flag: str, cli: Callable) -> None:
    more = [flag, "cat.png"] if flag == "--predict" else [flag]
    code, _, err = cli("08", "--experiment", name, "--smoke", *more)
    assert code == 2 and err.count("\n") == 1
    assert f"{flag}: --experiment {name} keeps no net" in err


@pytest.mark.parametrize("more", [[], ["--export"]])
def test_the_run_of_from_has_a_model_of_its_own(more: list[str], cli: Callable) -> None:
    code, _, err = cli("08", "--from", "resnet20", "--model", "vgg11_bn", "--smoke", *more)
    assert code == 2 and "--model vgg11_bn: resnet20 has a resnet20" in err


def test_what_is_only_put_to_use_is_not_trained(cli: Callable, tmp_path: Path) -> None:
    code, _, err = cli("08", "--from", "resnet20", "--export", "--dataset", "mnist")
    assert code == 2 and "--dataset mnist: with --from" in err
    assert not list(tmp_path.rglob("*.pt2"))


def test_a_base_rate_that_was_asked_for_is_taken() -> None:
    vgg = lesson("02")
    asked = vgg.parse_flags(vgg.Config, ["--model", "vgg11", "--base-lr", "0.1"]).resolve("digits")
    assert asked.lr == pytest.approx(0.1 * 64 / 256)


def test_multipliers_train_in_one_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cpu_has_bfloat16", lambda: True)
    mobilenet = lesson("05")
    config = mobilenet.Config(device="cpu").resolve("cifar10")
    own = [replace(config, **arm.changes) for arm in mobilenet.multipliers(config).arms]
    assert len({c.image_size for c in own}) == 2
    assert len({device.amp_dtype(CPU, c.amp, c.image_size) for c in own}) == 1


def test_torchvisions_transformer_gets_images_of_its_size() -> None:
    named = transfer.Config(model="torchvision:vit_b_32")
    assert flags.locate(named).image_size == 224
    assert flags.locate(replace(named, strategy="scratch")).image_size == 224
    with pytest.raises(UserError, match="--image-size 96: torchvision:vit_b_32"):
        flags.locate(replace(named, image_size=96))


def test_focal_loss_of_mixed_labels_lies_between() -> None:
    logits, alpha = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([0.5, 1.0, 1.5])
    loss = transfer.FocalLoss(0.0, alpha)
    whole = [loss(logits, torch.tensor([c])).item() for c in (0, 1)]
    assert loss(logits, torch.tensor([[1.0, 0.0, 0.0]])).item() == pytest.approx(whole[0])
    mixed = loss(logits, torch.tensor([[0.5, 0.5, 0.0]])).item()
    assert min(whole) < mixed < max(whole)


def test_a_choice_among_nets_without_accuracy_is_answered(cli: Callable) -> None:
    models = ["--model", "lenet5,simple_cnn", "--dataset", "digits", "--smoke"]
    code, out, err = cli("07", *models, "--choose", "params<1M")
    assert code == 0, err
    assert "params<1M: no accuracy is known" in out


def test_one_test_image_has_a_place_in_the_plane() -> None:
    points, _ = embedding.embed(np.ones((1, 64)))
    assert points.shape == (1, 2)


def test_scratch_measures_the_stem_that_is_not_trained() -> None:
    config = transfer.Config(dataset="digits", model="resnet9", strategy="scratch", compare=False)
    found = task.open_task(replace(config, smoke=True, device="cpu"), transfer)
    data = found.data(found.images, found.config, CPU)
    arm = found.arm("scratch", strategy="scratch")
    trial = arm.train(arm, data, replace(found.config, strategy="scratch"), CPU)
    filters = trial.model.stem[0].weight
    assert torch.equal(filters[:12], -filters[12:])


def test_the_last_stage_has_something_to_learn() -> None:
    for name in ("lenet5", "resnet20", "vgg11_bn"):
        with torch.device("meta"):
            _, *body = parts.parts_of(transfer.MODELS[name](num_classes=5, small_input=True))
        assert all(list(part.parameters()) for part in body), name


@pytest.mark.parametrize("flag", ["--predict", "--from"])
def test_an_empty_variable_starts_no_training(flag: str, cli: Callable) -> None:
    code, _, err = cli("08", "--smoke", "--no-compare", flag, "")
    assert code == 2 and flag in err and err.count("\n") == 1


def test_a_picture_with_the_separator_in_its_name(tmp_path: Path) -> None:
    odd, plain = tmp_path / f"a{os.pathsep}b.png", tmp_path / "c.png"
    for path in (odd, plain):
        Image.new("L", (8, 8)).save(path)
    assert prediction.paths_of(f"{plain}{os.pathsep}{odd}") == [str(plain), str(odd)]
    assert prediction.paths_of(f"none{os.pathsep}{odd}") == ["none", str(odd)]
    address = "https://example.org/a.jpg"
    assert prediction.paths_of(f"none{os.pathsep}{address}") == ["none", address]


def test_forgetting_counts_steps_and_knows_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    densenet, decays = lesson("06"), []
    monkeypatch.setattr(
        densenet, "train_trial", lambda name, build, data, config, d: decays.append(config)
    )
    config = densenet.Config(device="cpu", lr=0.1).resolve("digits")
    for accumulate in (1, 4):
        one = replace(config, accumulate=accumulate)
        data = experiments.make_data(load_digits(), one, CPU)
        (arm,) = densenet.reuse(one).arms
        arm.train(arm, data, one, CPU)
    assert decays[1].weight_decay == pytest.approx(4 * decays[0].weight_decay, rel=0.1)
    adamw = densenet.forgetting_weight_decay(replace(config, optimizer="adamw"), 100)
    w = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([w], lr=config.lr / 2, weight_decay=adamw)
    for _ in range(100):
        w.grad = torch.zeros(1)
        optimizer.step()
    assert w.item() == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize("width", [0.25, 4])
def test_a_net_of_equal_cost_costs_as_much(width: float) -> None:
    mobilenet = lesson("05")
    config = mobilenet.Config(device="cpu", trial_width=width).resolve("digits")
    arms = {arm.name: arm for arm in mobilenet.separable(config).arms}
    with torch.device("meta"):
        nets = [arms[name].build(num_classes=10) for name in ("thin standard", "separable")]
    thin, separable = (count_macs(net, (3, 8, 8)) for net in nets)
    assert 1 <= thin / separable < 1.1


def test_no_standard_net_is_as_thin_as_that() -> None:
    mobilenet = lesson("05")
    with pytest.raises(UserError, match="--trial-width"):
        mobilenet.separable(mobilenet.Config(device="cpu", trial_width=0.05).resolve("digits"))


def test_pictures_that_can_be_trained_on_are_found_in_a_folder(tmp_path: Path) -> None:
    from PIL import features

    if not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.avif")
    assert prediction.find_images([str(tmp_path)]) == [str(tmp_path / "x.avif")]


def test_a_range_test_knows_torchvisions_names(
    cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def refuse(name: str, *more: object) -> None:
        asked.append(name)
        raise ValueError

    monkeypatch.setattr("torchvision.models.get_model_weights", refuse)
    cli("08", "--model", "torchvision:resnet18", "--find-lr", "--smoke")
    assert asked == ["resnet18"]
    code, _, err = cli("08", "--from", "resnet20", "--find-lr", "--smoke")
    assert code == 2 and "leave out --from" in err


def test_no_script_without_the_file_that_it_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment.importlib.util, "find_spec", lambda name: None)
    net = lesson("01").cifar_resnet(8, num_classes=3)
    known = Trained(net, "abc", (torch.zeros(3), torch.ones(3)), 8)
    deployment.export_model(known, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.pt2"]


def test_one_share_of_labels_is_not_compared_with_itself() -> None:
    found = SimpleNamespace(labelled=lambda share: 32, arm=lambda name, *a, **k: name, data=None)
    config = transfer.Config(fractions="0.05", lr=0.1, batch_size=16, epochs=2, warmup=0.0)
    assert len(transfer.fractions(found, config).claims) == 1


def test_the_heading_says_what_is_spent() -> None:
    efficientnet = lesson("04")
    headings = [
        efficientnet.compound_scaling(efficientnet.Config(image_size=s).resolve("digits")).heading
        for s in (16, 48)
    ]
    assert headings[0].startswith("3.9 to 4.2 times") and headings[1].startswith("2.8 to 4.0")


def test_maxvit_keeps_its_form_and_its_size() -> None:
    with torch.device("meta"):
        net = origins.TorchvisionModel("maxvit_t", 5)
        assert net.get_classifier().bias is None
        assert net.forward_features(torch.zeros(1, 3, 224, 224)).shape == (1, 512, 7, 7)
    assert flags.locate(transfer.Config(model="torchvision:maxvit_t")).image_size == 224


def test_many_pictures_are_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, asked = [str(tmp_path / f"{i}.png") for i in range(300)], []
    monkeypatch.setattr(os.path, "exists", lambda path: asked.append(path) or path in files)
    found = prediction.paths_of(os.pathsep.join(files))
    monkeypatch.undo()
    assert found == files and len(asked) <= 600
