"""Counts against hand counts; the layer table adds up; memory to the byte."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common import profiling
from common.inspection import layer_table, thop_macs
from common.profiling import count_macs, count_parameters, profile
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
    assert profiling.peak_memory(net, x) == weights + 4 * 2 * 32 * 32 * (3 + 8 + 16)


def test_profile_measures_on_the_device_at_hand() -> None:
    cost = profile(small_net(), (3, 16, 16), batch_size=4, seconds=0.05)
    assert (cost.params, cost.macs, cost.batch_size) == (PARAMS, MACS, 4)
    assert cost.latency_ms > 0 and cost.latency_iqr_ms >= 0 and cost.dtype == "float32"


def test_thop_counts_batchnorm_too_and_leaves_no_trace() -> None:
    net = small_net()
    before = set(net.state_dict())
    assert thop_macs(net, (3, 16, 16)) > MACS
    assert set(net.state_dict()) == before


def with_statistics(net: nn.Module) -> nn.Module:
    """BatchNorms as training leaves them, not as they are born."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2)
    return net.eval()


def test_folded_weights_are_those_of_the_formula() -> None:
    net = with_statistics(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)))
    conv, norm = net
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    (folded,) = profiling.fold_batchnorm(net).children()
    assert torch.allclose(folded.weight, conv.weight * scale[:, None, None, None], atol=1e-6)
    assert torch.allclose(folded.bias, norm.bias - norm.running_mean * scale, atol=1e-6)
    assert isinstance(net[1], nn.BatchNorm2d), "the model itself keeps its norm"


@pytest.mark.parametrize(
    ("number", "model", "kept"),
    [
        ("01", "resnet20", 0),
        (
            "01",
            "preact_resnet18",
            9,
        ),  # the first norm of 8 blocks, and the one in front of the head
        ("02", "vgg11_bn", 0),
        ("03", "googlenet", 0),
        ("04", "efficientnet_mini", 0),
        ("05", "mobilenet_v3_small", 0),
        ("06", "densenet40_k12", 39),
    ],
)
def test_folding_keeps_the_logits(number: str, model: str, kept: int) -> None:
    net = lesson(number).MODELS[model](num_classes=10, small_input=True)
    net = with_statistics(net).double()
    folded = profiling.fold_batchnorm(net)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == kept
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = net(x)
        assert torch.allclose(folded(x), expected, atol=1e-9 * expected.abs().max().item())


def test_a_fold_that_changes_the_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.fx.experimental import optimization

    monkeypatch.setattr(optimization, "fuse_conv_bn_eval", lambda conv, norm: conv)
    with pytest.raises(ValueError, match="without its BatchNorms gives logits that are"):
        profiling.fold_batchnorm(with_statistics(nn.Sequential(*list(small_net())[:2])))


def test_a_folded_profile_has_the_counts_of_the_model() -> None:
    net = with_statistics(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    plain, folded = (profile(net, (3, 96, 96), seconds=0, fold=fold) for fold in (False, True))
    assert (folded.params, folded.macs) == (plain.params, plain.macs)
    assert folded.peak_memory_mb < plain.peak_memory_mb, "no output of a norm is held"
