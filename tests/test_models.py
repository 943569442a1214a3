"""Every entry of every lesson's MODELS keeps the contract that graders and instructors rely on."""

from __future__ import annotations

import csv
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.profiling import count_parameters
from tests.conftest import LESSONS, ROOT, lesson

ENTRIES = [
    (name[:2], model)
    for name in LESSONS
    if name[:2] < "08"
    for model in getattr(lesson(name[:2]), "MODELS", {})
]

with (ROOT / "tests" / "imagenet_models.csv").open(encoding="utf-8") as file:
    REFERENCE = list(csv.DictReader(file))


def builder(number: str, model: str) -> Callable[..., nn.Module]:
    return lesson(number).MODELS[model]


def first_logits(output: torch.Tensor | tuple) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.quick
@pytest.mark.parametrize("row", REFERENCE, ids=lambda row: row["model"])
def test_parameters_are_as_many_as_published(row: dict[str, str]) -> None:
    (build,) = [builder(*entry) for entry in ENTRIES if entry[1] == row["model"]]
    with torch.device("meta"):
        model = build()
    assert count_parameters(model) == int(row["params"]) + int(row["params_aux_heads"])


@pytest.mark.quick
@pytest.mark.parametrize(("number", "model"), ENTRIES)
def test_classifier_is_reached_and_replaced_alike(number: str, model: str) -> None:
    with torch.device("meta"):
        net = builder(number, model)(num_classes=7)
    assert isinstance(net.get_classifier(), nn.Linear)
    assert net.get_classifier().out_features == 7
    before = count_parameters(net)
    in_features = net.get_classifier().in_features
    net.reset_classifier(11)
    assert net.get_classifier().out_features == 11
    image = torch.empty(1, 3, 224, 224, device="meta")
    assert net.eval().to("meta")(image).shape == (1, 11)
    # Only the classifiers grow with the classes: (in_features + 1) parameters per class and head.
    grown = count_parameters(net) - before
    assert grown % 4 == 0 and grown >= 4 * (in_features + 1)


SMALL = [e for e in ENTRIES if e[0] != "07" and not e[1].startswith("efficientnet_b")]
SMALL += [("04", "efficientnet_b0")]


@pytest.mark.quick
@pytest.mark.parametrize(("number", "model"), SMALL)
def test_small_form_takes_32_and_8_pixels(number: str, model: str) -> None:
    with torch.device("meta"):
        net = builder(number, model)(num_classes=10, small_input=True).eval()
        assert net(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
        features = net.forward_features(torch.zeros(2, 3, 32, 32))
    assert features.dim() == 4 and features.shape[0] == 2 and features.shape[2] >= 1


# One of each kind is trained for real; the rest differ from these in depth and width only.
TRAINED = [
    ("01", "resnet18"),
    ("01", "resnext50_32x4d"),
    ("01", "se_resnet18"),
    ("01", "preact_resnet18"),
    ("01", "plainnet18"),
    ("01", "resnet20"),
    ("02", "vgg11"),
    ("02", "vgg11_bn"),
    ("03", "googlenet"),
    ("03", "inception_v3"),
    ("04", "efficientnet_b0"),
    ("05", "mobilenet_v1"),
    ("05", "mobilenet_v2"),
    ("05", "mobilenet_v3_small"),
    ("06", "densenet121"),
    ("06", "densenet_bc100_k12"),
]


@pytest.mark.parametrize(("number", "model"), [e for e in TRAINED if e in ENTRIES])
def test_every_parameter_gets_a_gradient(number: str, model: str) -> None:
    torch.manual_seed(0)
    net = builder(number, model)(num_classes=10, small_input=True).train()
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 3, 6, 9])
    # A last BatchNorm that starts at zero holds back what lies before it: let it go for the test.
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    output = net(x)
    every = output if isinstance(output, tuple) else (output,)
    sum(F.cross_entropy(logits, y) for logits in every).backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize(
    ("number", "model", "options"),
    [
        ("01", "resnet20", {}),
        ("02", "vgg11_bn", {}),
        ("03", "googlenet", {"width_mult": 0.25}),
    ],
)
def test_one_batch_can_be_overfitted(number: str, model: str, options: dict) -> None:
    torch.manual_seed(0)
    net = builder(number, model)(num_classes=4, small_input=True, **options).train()
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(30):
        loss = F.cross_entropy(first_logits(net(x)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
