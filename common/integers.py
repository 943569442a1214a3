"""The machinery of rounding a trained net to integers; what rounding is stands in lesson 5."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn


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
    """`model` on the CPU in torch's own integer kernels.

    On x86 torch's default rounds weights to 8 bits and activations to 7: older chips add up
    products in 16 bits, which 8 bits times 8 bits can overflow.
    """
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        mapping = get_default_qconfig_mapping(torch.backends.quantized.engine)
        net = quantize_fx.prepare_fx(deepcopy(model).cpu().eval(), mapping, (images[:1].cpu(),))
        net(images.cpu())
        return quantize_fx.convert_fx(net)
