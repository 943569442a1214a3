"""Counts against hand counts; the layer table adds up; memory to the byte."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common import profiling
from common.profiling import count_macs, count_parameters, layer_table, profile, thop_macs
from tests.conftest import lesson


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4, bias=False),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, 5),
    )


MACS = 16 * 16 * 8 * 3 * 9 + 8 * 8 * 8 * 2 * 9 + 8 * 8 * 8 * 5
PARAMS = (8 * 3 * 9 + 8) + 16 + 8 * 2 * 9 + (512 * 5 + 5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counts_are_the_hand_counts(device: str) -> None:
    with torch.device(device):
        net = small_net()
    assert count_parameters(net) == PARAMS
    assert count_macs(net, (3, 16, 16)) == MACS


def test_attention_products_count() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = x.flatten(2).transpose(1, 2)  # (N, 64, 16)
            q, k, v = self.qkv(tokens).unsqueeze(1).chunk(3, dim=-1)
            return nn.functional.scaled_dot_product_attention(q, k, v)

    expected = 64 * 16 * 48 + 2 * 64 * 64 * 16
    for device in ("cpu", "meta"):
        with torch.device(device):
            assert count_macs(Attention(), (16, 8, 8)) == expected


def test_counting_leaves_modes_alone() -> None:
    net = small_net().train()
    net[1].eval()  # a frozen BatchNorm stays frozen
    count_macs(net, (3, 16, 16))
    assert [m.training for m in net] == [True, False, True, True, True, True]


def test_layer_table_adds_up_with_heads_that_run_in_training_only() -> None:
    for number, model, options in (("01", "resnet18", {}), ("03", "googlenet", {"aux": True})):
        with torch.device("meta"):
            net = lesson(number).MODELS[model](num_classes=10, small_input=True, **options)
        rows = layer_table(net, (3, 32, 32))
        assert sum(r.params for r in rows) == count_parameters(net)
        assert sum(r.macs for r in rows) == count_macs(net, (3, 32, 32))
    assert any(r.output_shape == () for r in rows)


def test_peak_memory_by_hand() -> None:
    """Two convolutions: the worst moment holds the weights, the input and both outputs."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)).eval()
    x = torch.zeros(2, 3, 32, 32)
    weights = 4 * count_parameters(net)
    with torch.inference_mode():
        peak = profiling._peak_memory(net, x)
    assert peak == weights + 4 * 2 * 32 * 32 * (3 + 8 + 16)


def test_profile_measures_on_the_device_at_hand() -> None:
    cost = profile(small_net(), (3, 16, 16), batch_size=4, seconds=0.05)
    assert (cost.params, cost.macs, cost.batch_size) == (PARAMS, MACS, 4)
    assert cost.latency_ms > 0 and cost.latency_iqr_ms >= 0 and cost.dtype == "float32"
    assert cost.images_per_second == pytest.approx(4000 / cost.latency_ms)


def test_thop_counts_batchnorm_too_and_leaves_no_trace() -> None:
    net = small_net()
    before = set(net.state_dict())
    assert thop_macs(net, (3, 16, 16)) > MACS
    assert set(net.state_dict()) == before
