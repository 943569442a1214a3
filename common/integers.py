"""The machinery of rounding a trained net to integers; what rounding is stands in lesson 5."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from common.config import TrainConfig
from common.costs import milliseconds
from common.data import Data
from common.engine.device import pick_device
from common.evaluation import predict
from common.experiments import Arm, Trial, train_trial
from common.profiling import fold_batchnorm


@torch.no_grad()
def replace_layers(
    net: nn.Module, images: Tensor, make: Callable[[nn.Module, float, float], nn.Module]
) -> nn.Module:
    """Put `make(layer, low, high)` in the place of each convolution and linear layer of `net`.

    Args:
        images: (N, 3, H, W), which run through the net first: `low` and `high` are the least and
            the largest number that a layer reads then, and 0 lies between them.
    """
    layers = {n: m for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    ranges = dict.fromkeys(layers.values(), (0.0, 0.0))

    def watch(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        low, high = ranges[layer]
        ranges[layer] = min(low, inputs[0].min().item()), max(high, inputs[0].max().item())

    hooks = [layer.register_forward_hook(watch) for layer in layers.values()]
    net(images)
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, make(layer, *ranges[layer]))
    return net


def has_framework_integers() -> bool:
    """Whether torch has integer kernels for this chip. It has marked them for removal."""
    try:
        from torch.ao.quantization import quantize_fx  # noqa: F401
    except ImportError:
        return False
    return torch.backends.quantized.engine != "none"


def framework_integers(model: nn.Module, images: Tensor) -> nn.Module:
    """`model` on the CPU in torch's own integer kernels, by torch's default for this chip."""
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        mapping = get_default_qconfig_mapping(torch.backends.quantized.engine)
        net = quantize_fx.prepare_fx(deepcopy(model).cpu().eval(), mapping, (images[:1].cpu(),))
        net(images.cpu())
        return quantize_fx.convert_fx(net)


def time_kernels(model: nn.Module) -> str:
    """What torch's kernels gain, for one image of 224 px on the CPU."""
    if not has_framework_integers():
        return f"torch {torch.__version__} has no integer kernels here: nothing to time"
    size = (3, 224, 224)
    fast = framework_integers(model, torch.randn(4, *size))
    gain = milliseconds(fold_batchnorm(model), size) / milliseconds(fast, size)
    return f"torch's kernels on 224 px: {gain:.1f} times the speed of float32"


def trained_once(
    build: Callable[[int], nn.Module],
    ways: Mapping[str, Callable[[nn.Module, Tensor], nn.Module]],
    device: str,
) -> list[Arm]:
    """An arm for float32, for each way to change a trained net, `way(net, images)`, and for torch's
    kernels where they run. All change the same net, which is trained once a seed, and see the same
    training images.
    """
    ways = {"float32": lambda net, images: net, **ways}
    if has_framework_integers() and pick_device(device).type == "cpu":
        ways["torch's kernels"] = framework_integers
    nets: dict[int, Trial] = {}  # of the seed in hand

    def train(arm: Arm, data: Data, config: TrainConfig, device: torch.device) -> Trial:
        if config.seed not in nets:
            nets.clear()
            name, start = f"float32, seed {config.seed}", partial(build, data.num_classes)
            nets[config.seed] = train_trial(name, start, data, config, device)
        trial = nets[config.seed]
        images = torch.cat([x for x, _ in islice(data.train.batches(), 4)])
        net = ways[arm.name](trial.model, images)
        probabilities, labels = predict(net, data.test)
        right = (probabilities.argmax(1) == labels).numpy()
        return replace(trial, model=net, test_top1=float(right.mean()), right=right)

    return [Arm(name, build, train=train) for name in ways]
