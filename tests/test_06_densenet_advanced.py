"""Lesson 6: DenseNet against torchvision, against hand counts, and with and without checkpointing."""

from __future__ import annotations

import importlib
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.profiling import count_macs, count_parameters
from tests.parity import PUBLISHED, largest_difference, torchvision_twin

lesson = importlib.import_module("06_densenet_advanced")
TORCHVISION_NAMES = ["densenet121", "densenet161", "densenet169", "densenet201"]


def on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return lesson.MODELS[name](**options)


# Against torchvision and the paper's tables


@pytest.mark.parametrize("name", TORCHVISION_NAMES)
def test_parameters_and_macs_are_the_published_ones(name: str) -> None:
    model, published = on_meta(name), PUBLISHED[name]
    assert count_parameters(model) == int(published["params"])
    pixels = int(published["input_px"])
    gmacs = count_macs(model, (3, pixels, pixels)) / 1e9
    assert gmacs == pytest.approx(float(published["gmacs"]), rel=0.005)


@pytest.mark.parametrize("name", TORCHVISION_NAMES)
def test_logits_are_torchvisions(name: str) -> None:
    ours = on_meta(name).to_empty(device="cpu")
    assert largest_difference(ours, torchvision_twin(name, image_size=64), image_size=64) < 1e-4


def hand_count(
    n: int, k: int, bottleneck: bool, compression: float, stem: int, classes: int
) -> int:
    """Parameters of a CIFAR DenseNet, written down from the paper's section 3 without a module in sight."""
    total, channels = 3 * 3 * 3 * stem, stem
    for block in range(3):
        for _ in range(n):
            total += 2 * channels  # the norm's scale and shift
            if bottleneck:
                total += channels * 4 * k + 2 * 4 * k + 3 * 3 * 4 * k * k
            else:
                total += 3 * 3 * channels * k
            channels += k
        if block < 2:
            kept = int(channels * compression)
            total += 2 * channels + channels * kept
            channels = kept
    return total + 2 * channels + channels * classes + classes


def test_cifar_forms_have_the_papers_parameters() -> None:
    plain = count_parameters(on_meta("densenet40_k12", num_classes=10))
    assert plain == hand_count(12, 12, False, 1.0, stem=16, classes=10)
    assert plain / 1e6 == pytest.approx(1.0, abs=0.05)  # table 2
    bc = count_parameters(on_meta("densenet_bc100_k12", num_classes=10))
    assert bc == hand_count(16, 12, True, 0.5, stem=24, classes=10)
    assert bc / 1e6 == pytest.approx(0.8, abs=0.05)  # table 2


@pytest.mark.parametrize(
    ("depth", "growth_rate", "options", "millions"),
    [  # Huang et al. 2017, table 2, all of its DenseNets
        (40, 12, {}, 1.0),
        (100, 12, {}, 7.0),
        (100, 24, {}, 27.2),
        (100, 12, {"bottleneck": True, "compression": 0.5}, 0.8),
        (250, 24, {"bottleneck": True, "compression": 0.5}, 15.3),
        (190, 40, {"bottleneck": True, "compression": 0.5}, 25.6),
    ],
)
def test_table_2(depth: int, growth_rate: int, options: dict, millions: float) -> None:
    with torch.device("meta"):
        model = lesson.cifar_densenet(depth, growth_rate, num_classes=10, **options)
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", lesson.MODELS)
def test_the_number_in_a_name_counts_the_layers_with_weights(name: str) -> None:
    model = on_meta(name)
    layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    assert layers == int("".join(c for c in name.split("_k")[0] if c.isdigit()))


@pytest.mark.parametrize(("depth", "bottleneck"), [(41, False), (4, False), (40 + 3, True)])
def test_a_depth_that_does_not_divide_is_refused(depth: int, bottleneck: bool) -> None:
    with pytest.raises(ValueError, match=f"not {depth}"):
        lesson.cifar_densenet(depth, bottleneck=bottleneck)


# What dense connection means


def test_every_layer_reads_every_earlier_map_of_its_block() -> None:
    block = lesson.DenseBlock(8, depth=4, growth_rate=4)
    seen: list[int] = []
    for layer in block.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    block(torch.randn(2, 8, 4, 4))
    assert seen == [1, 2, 3, 4]
    assert [layer.conv1.in_channels for layer in block.layers] == [8, 12, 16, 20]
    assert sum(seen) == 4 * 5 // 2  # L(L+1)/2 direct connections: the paper's abstract


def test_without_dense_connections_a_layer_reads_its_neighbour_alone() -> None:
    block = lesson.DenseBlock(8, depth=4, growth_rate=4, dense=False)
    assert [layer.conv1.in_channels for layer in block.layers] == [8, 4, 4, 4]
    assert block(torch.randn(2, 8, 4, 4)).shape == (2, 4, 4, 4)


@pytest.mark.parametrize("name", ["densenet121", "densenet40_k12", "densenet_bc100_k12"])
@pytest.mark.parametrize("pixels", [32, 8])
def test_small_input(name: str, pixels: int) -> None:
    model = on_meta(name, num_classes=10, small_input=True)
    x = torch.zeros(2, 3, pixels, pixels, device="meta")
    halvings = len(model.stages) - 1
    assert model.forward_features(x).shape[2:] == (pixels >> halvings, pixels >> halvings)
    assert model(x).shape == (2, 10)


def test_every_parameter_gets_a_gradient() -> None:
    model = lesson.cifar_densenet(
        22, growth_rate=4, bottleneck=True, compression=0.5, num_classes=10
    )
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# Checkpointing: less memory, the same numbers


def trained_one_step(
    checkpointing: bool, dropout: float = 0.0, **options: object
) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = lesson.cifar_densenet(
        16, growth_rate=4, num_classes=10, checkpointing=checkpointing, dropout=dropout, **options
    )
    x, labels = torch.randn(6, 3, 8, 8) + 1, torch.arange(6)
    torch.manual_seed(1)
    logits = model(x)
    nn.functional.cross_entropy(logits, labels).backward()
    return model, logits.detach()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_checkpointing_changes_no_number(bottleneck: bool, dropout: float) -> None:
    plain, logits = trained_one_step(False, dropout, bottleneck=bottleneck)
    checkpointed, same_logits = trained_one_step(True, dropout, bottleneck=bottleneck)
    assert torch.equal(logits, same_logits)
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters()):
        assert p.grad.abs().sum() > 0, name
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-7, msg=name)
    for (name, b), c in zip(plain.named_buffers(), checkpointed.buffers()):
        assert torch.equal(b, c), f"{name} moved twice"
    norms = [m for m in checkpointed.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.num_batches_tracked == 1 and m.momentum == 0.1 for m in norms)


def test_without_the_context_the_statistics_would_move_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test above can fail: this is what checkpointing does to BatchNorm when nobody cares."""
    monkeypatch.setattr(lesson, "running_statistics_held", lambda module: nullcontext())
    model, _ = trained_one_step(True)
    first_layer = model.stages[0][0].layers[0]
    assert first_layer.norm1.num_batches_tracked == 2


class CountConvolutions(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def test_backward_recomputes_no_convolution() -> None:
    model = lesson.cifar_densenet(
        16, growth_rate=4, bottleneck=True, checkpointing=True, num_classes=10
    )
    with CountConvolutions() as forward:
        loss = model(torch.randn(2, 3, 8, 8)).sum()
    assert forward.count == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    with CountConvolutions() as backward:
        loss.backward()
    assert backward.count == 0


def saved_bytes(checkpointing: bool) -> int:
    """Bytes that stay alive between forward and backward: each storage once, parameters aside."""
    model = lesson.cifar_densenet(40, growth_rate=12, checkpointing=checkpointing, num_classes=10)
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    mine |= {b.untyped_storage().data_ptr() for b in model.buffers()}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in mine:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    def keep_inputs(module: nn.Module, args: tuple) -> None:
        for x in args[0]:  # a checkpoint holds its inputs itself
            pack(x)

    for module in model.modules():
        if isinstance(module, lesson.DenseLayer):
            module.register_forward_pre_hook(keep_inputs)
    x = torch.randn(2, 3, 16, 16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(x).sum()
    del loss
    return sum(kept.values())


def test_checkpointing_keeps_far_less() -> None:
    assert saved_bytes(True) < saved_bytes(False) / 4
