"""Torchvision's models with random weights, as the
independent word on what an architecture computes.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from common.pretrained import load_torchvision_state
from common.profiling import count_macs, count_parameters

PUBLISHED: dict[str, dict[str, str]] = {
    row["model"]: row
    for row in csv.DictReader(
        (Path(__file__).parent / "imagenet_models.csv").open(encoding="utf-8")
    )
}


def torchvision_twin(
    name: str, image_size: int = 64, seed: int = 0, **options: object
) -> nn.Module:
    """Torchvision's model `name` in eval mode, with random weights and BatchNorm statistics that
    matter.

    One pass in training mode fits the statistics to the weights, so that activations keep their
    scale through 152 layers; then each is shifted by its own random amount, so that a swapped,
    missing or differently smoothed BatchNorm shows in the logits. Built on the meta device first:
    torchvision's own initialisation takes seconds for the large models.
    """
    generator = torch.Generator().manual_seed(seed)
    # Drawn once; each weight is pieces of it from random places, in a fifth of the time.
    numbers = torch.randn(1_000_003, generator=generator)
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **options)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(1, parameter[0].numel())
            # std sqrt(2 / fan_in) keeps the variance through a ReLU; vectors are set below or stay
            # small.
            std = (2 / fan_in) ** 0.5 if parameter.dim() > 1 else 0.1
            for piece in parameter.view(-1).split(900_001):
                start = torch.randint(len(numbers) - len(piece) + 1, (), generator=generator)
                torch.mul(numbers[start : start + len(piece)], std, out=piece)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                module.weight.uniform_(0.7, 1.3, generator=generator)
        momenta = [m.momentum for m in norms]
        for m in norms:
            m.reset_running_stats()
            m.momentum = 1.0
        if norms:
            model.train()(torch.randn(4, 3, image_size, image_size, generator=generator))
        for m, momentum in zip(norms, momenta):
            m.momentum = momentum
            noise = torch.randn(m.running_mean.shape, generator=generator)
            m.running_mean += 0.2 * noise * m.running_var.sqrt()
            m.running_var *= torch.empty_like(m.running_var).uniform_(0.6, 1.6, generator=generator)
    return model.eval()


@torch.no_grad()
def largest_difference(ours: nn.Module, twin: nn.Module, image_size: int = 64) -> float:
    """Load the twin's weights into `ours`; the largest
    difference of their logits on one random batch.
    """
    load_torchvision_state(ours, twin.state_dict())
    x: Tensor = torch.randn(
        2, 3, image_size, image_size, generator=torch.Generator().manual_seed(1)
    )
    expected = twin(x)
    assert expected.std() > 0.1, "logits this small would agree whatever the model"
    return (ours.eval()(x) - expected).abs().max().item()


def assert_is_torchvisions(ours: nn.Module, name: str) -> None:
    """Parameters and multiply-adds as published, and torchvision's logits with the same weights.

    Args:
        ours: built on the meta device, in the form for 224 pixels.
    """
    row = PUBLISHED[name]
    assert count_parameters(ours) == int(row["params"])
    published = pytest.approx(1e9 * float(row["gmacs"]), rel=0.005)
    assert count_macs(ours, (3, 224, 224)) == published
    assert largest_difference(ours.to_empty(device="cpu"), torchvision_twin(name)) < 1e-4
