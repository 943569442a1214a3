"""Lesson 5, advanced: MobileNet, a convolution in two cheap steps.

Howard et al., "MobileNets: efficient convolutional neural networks for mobile vision
applications", 2017 (arXiv 1704.04861); Sandler et al., "MobileNetV2: inverted residuals and linear
bottlenecks", 2018 (arXiv 1801.04381); Howard et al., "Searching for MobileNetV3", 2019 (arXiv
1905.02244).

The idea in one sentence: filter each channel by itself, then mix the channels pixel by pixel, and
a network does what a standard one does with about an eighth of the multiply-adds.

    python 05_mobilenet_advanced.py                            # trains; digits on a CPU
    python 05_mobilenet_advanced.py --experiment separable     # against standard convolutions
    python 05_mobilenet_advanced.py --experiment multipliers   # thinner, or smaller images?
    python 05_mobilenet_advanced.py --experiment quantize      # 8-bit integers after training
    python 05_mobilenet_advanced.py --model mobilenet_v3_large --summary

Measured on digits (8 px, 15 epochs, seed 0, torch 2.15, float32 on two cores of an Intel Xeon):

    default, mobilenet_v3_small    test 98.05%, 15 s of training
    separable, two seeds           test 99.6% standard, 96.4% separable, 99.0% standard and as thin
                                   as the same multiply-adds allow; V1's blocks on 224 px: 8.7 times
                                   fewer multiply-adds, 4.5 times the speed; 93 s
    multipliers                    test 99.2% whole, 96.4% at half the width, 82.2% at half the
                                   resolution; 130 s
    quantize                       6.24 MB to 1.83 MB with a scale per channel, test 98.9% to 99.2%;
                                   on 224 px 1.1 times the speed; 29 s
"""

# %% [markdown]
# ## The problem, and the one equation
#
# A phone has a fraction of the power of a GPU. Where do the multiply-adds go? A standard
# convolution does two jobs at once: it filters in space, and it mixes channels. With a $k \times k$
# kernel each of its $D$ outputs reads $k^2$ pixels of all $C$ inputs. MobileNet does one job after
# the other, and at each place that takes
#
# $$k^2 C + C D \quad\text{multiply-adds instead of}\quad k^2 C D,
# \quad\text{a share of}\quad \frac{1}{D} + \frac{1}{k^2}$$
#
#         standard     C ───── 3x3 over all channels ───── D
#
#         separable    C ── 3x3, each channel alone ── C ── 1x1 over all channels ── D
#                              depthwise                         pointwise
#
# With 3x3 kernels and a few hundred channels one eighth to one ninth is left. What does it cost in
# accuracy, and does the clock agree?

# %%
from common.cli import in_notebook, main, parse_flags
from common.config import TrainConfig, knob

from dataclasses import dataclass


@dataclass(frozen=True)
class Config(TrainConfig):
    """What this lesson can be told; every field is a flag, and `--help` prints them all."""

    model: str = knob(
        "mobilenet_v3_small",
        "a name of MODELS: mobilenet_v1, mobilenet_v2, mobilenet_v3_small, mobilenet_v3_large",
    )
    width_mult: float = knob(1.0, "factor on the channels of every layer", low=0.05, high=8)
    trial_width: float = knob(
        0.5, "width_mult of the nets that --experiment separable trains", low=0.05, high=8
    )
    seeds: int = knob(2, "runs of each net that --experiment separable averages", low=1, high=100)
    width_mults: str = knob(
        "0.25,0.5,1", "columns of the grid of --experiment multipliers", low=0.05, high=4
    )
    resolution_mults: str = knob(
        "0.5,0.75,1", "its rows, factors on the side of the image", low=0.05, high=4
    )
    backend: str = knob(
        "",
        "integer kernels for --experiment quantize (default: the first that torch has here)",
        ("x86", "fbgemm", "onednn", "qnnpack", ""),
    )
    latency_px: int = knob(
        224,
        "side of the images of ImageNet's form that experiments time, in pixels",
        low=32,
        high=4096,
    )
    clock: float = knob(0.3, "seconds for which experiments time each net or block", low=0, high=60)

    # What differs from the defaults of common/config.py; the record at the top was measured with
    # these.
    RECIPES = {"digits": {"image_size": 8, "epochs": 15, "batch_size": 64, "base_lr": 0.2}}


# Flags are read before torch is imported, so that --help answers at once; a notebook gets the
# defaults.
config = parse_flags(Config) if __name__ == "__main__" else Config()

# %%
import importlib
import inspect
import io
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import islice
from statistics import mean, median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common import plotting
from common.data import Loader, load_data
from common.engine.errors import UserError
from common.evaluation import evaluate
from common.experiments import Trial, conclude, mean_and_spread, train_trial
from common.pretrained import load_pretrained, weights_mean_std
from common.profiling import count_macs, macs_by_module, profile
from common.runs import Run, banner, draw_figures, prepare
from common.training import fit, make_optimizer, make_schedule, train_one_epoch

LESSON = "05_mobilenet_advanced"

# %% [markdown]
# ## Convolution, BatchNorm, activation: the unit that everything below is made of


# %%
class ConvBN(nn.Sequential):
    """A convolution without bias, its BatchNorm and, unless it's None, an activation.

    (N, C_in, H, W) -> (N, C_out, H/stride, W/stride)

    >>> ConvBN(3, 32, kernel=3, stride=2)(torch.zeros(1, 3, 8, 8)).shape
    torch.Size([1, 32, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: type[nn.Module] | None = nn.ReLU,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        layers = [
            # With an odd kernel this padding keeps the resolution.
            nn.Conv2d(
                in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False
            ),
            norm(out_channels),
        ]
        layers += [activation()] if activation else []
        super().__init__(*layers)
        self.stride = stride


# %% [markdown]
# ## V1, 2017: filter each channel alone, then mix the channels
#
# `groups` equal to the number of channels is all it takes: each filter then reads one channel, and
# no channel sees another until the 1x1 convolution mixes them. Both halves have their own BatchNorm
# and ReLU.


# %%
class DepthwiseSeparable(nn.Module):
    """A 3x3 filter per channel, then a 1x1 convolution across channels.

    (N, C_in, H, W) -> (N, C_out, H/stride, W/stride).  Howard et al. 2017, sec. 3.1 and fig. 3.

    >>> block = DepthwiseSeparable(64, 128, stride=2)
    >>> block(torch.zeros(1, 64, 8, 8)).shape
    torch.Size([1, 128, 4, 4])
    >>> [tuple(p.shape) for p in block.parameters() if p.dim() == 4]
    [(64, 1, 3, 3), (128, 64, 1, 1)]
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = ConvBN(in_channels, in_channels, 3, stride, groups=in_channels)
        self.pointwise = ConvBN(in_channels, out_channels, 1)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(x)  # (N, C_in, H/stride, W/stride)
        return self.pointwise(x)  # (N, C_out, H/stride, W/stride)


class StandardConv(ConvBN):
    """What the block above replaces: one full 3x3 convolution.

    (N, C_in, H, W) -> (N, C_out, H/stride, W/stride).  Howard et al. 2017, table 4, first line.

    >>> StandardConv(64, 128, stride=2)(torch.zeros(1, 64, 8, 8)).shape
    torch.Size([1, 128, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride)


# %% [markdown]
# ## Squeeze-and-excitation, for V3, with a gate made of straight lines
#
# A sigmoid needs an exponential. V3 replaces it by the hard sigmoid, ReLU6(x + 3) / 6, which is a
# clamp and a shift, and swish, x * sigmoid(x), by **h-swish**, x * ReLU6(x + 3) / 6 (sec. 5.2).
# Nearly the same curves, cheap on a phone, and integers need no approximation of them.


# %%
class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate in [0, 1] computed from all channels' means.

    (N, C, H, W) -> (N, C, H, W).  Howard et al. 2019, sec. 5.3: squeezed to a quarter of the width.

    >>> SqueezeExcitation(72)(torch.zeros(1, 72, 8, 8)).shape
    torch.Size([1, 72, 8, 8])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = make_divisible(channels / 4)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),  # (N, C, 1, 1)
            nn.Conv2d(channels, squeezed, 1),
            nn.ReLU(),
            nn.Conv2d(squeezed, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


def make_divisible(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of 8, which hardware likes, but at least 8 and 90% of what was asked.

    >>> [make_divisible(c) for c in (3, 24, 18, 11.9, 100)]
    [8, 24, 24, 16, 104]
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


# %% [markdown]
# ## V2, 2018, and V3, 2019: the inverted residual
#
# ResNet's bottleneck is wide at the ends and narrow where the 3x3 works, because its 3x3 is the
# expensive part. A depthwise 3x3 is nearly free, so V2 turns the shape inside out: narrow at the
# ends, where the shortcut connects, and several times wider in the middle.
#
#     ResNet   256 -1x1-> 64 -3x3-> 64 -1x1-> 256              the shortcut joins the wide ends
#     V2        24 -1x1-> 144 -3x3 depthwise-> 144 -1x1-> 24   the shortcut joins the narrow ends
#
# The last 1x1 has **no activation** (a "linear bottleneck"): in a space this narrow a ReLU would
# destroy information that nothing later can bring back. V3 keeps the block and adds 5x5 kernels,
# squeeze-and-excitation and h-swish where an architecture search found that they pay.


# %%
class InvertedResidual(nn.Module):
    """Expand, filter each channel, project back without activation; add the input if shapes allow.

    (N, C_in, H, W) -> (N, C_out, H/stride, W/stride).  Sandler et al. 2018, table 1 and fig. 3b;
    with `se`, a 5x5 kernel or h-swish, Howard et al. 2019, fig. 4.

    >>> InvertedResidual(24, 24, expanded=144)(torch.zeros(1, 24, 8, 8)).shape
    torch.Size([1, 24, 8, 8])
    >>> block = InvertedResidual(24, 40, expanded=72, stride=2, kernel=5, se=True)
    >>> block(torch.zeros(1, 24, 8, 8)).shape
    torch.Size([1, 40, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expanded: int,
        stride: int = 1,
        kernel: int = 3,
        se: bool = False,
        activation: type[nn.Module] = nn.ReLU6,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        conv = partial(ConvBN, activation=activation, norm=norm)
        layers = [conv(in_channels, expanded)] if expanded != in_channels else []
        layers += [conv(expanded, expanded, kernel, stride, groups=expanded)]
        layers += [SqueezeExcitation(expanded)] if se else []
        layers += [conv(expanded, out_channels, activation=None)]
        self.layers = nn.Sequential(*layers)
        self.stride = stride
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        residual = self.layers(x)  # (N, C_out, H/stride, W/stride)
        return x + residual if self.has_shortcut else residual


# %% [markdown]
# ## The papers' tables as data
#
# One line per row of the paper, in the paper's columns and order. The stem before the first line is
# a 3x3 convolution of stride 2 with 32 channels in V1 and V2, 16 in V3. V1 has only two columns, V2
# repeats a row `depth` times and gives the stride to the first, and V3, found by search, has no
# pattern left to fold.


# %%
class V1Row(NamedTuple):
    """Howard et al. 2017, table 1, a depthwise and a pointwise line in one."""

    channels: int
    stride: int


V1 = (
    V1Row(64, 1),
    V1Row(128, 2),
    V1Row(128, 1),
    V1Row(256, 2),
    V1Row(256, 1),
    V1Row(512, 2),
    *[V1Row(512, 1)] * 5,
    V1Row(1024, 2),
    # NOTE: the table prints stride 2 here, with a 7x7 input and a 7x7 output. That is stride 1.
    V1Row(1024, 1),
)


class V2Row(NamedTuple):
    """Sandler et al. 2018, table 2, whose columns are called t, c, n, s."""

    expansion: int
    channels: int
    depth: int
    stride: int


V2 = (
    V2Row(1, 16, 1, 1),
    V2Row(6, 24, 2, 2),
    V2Row(6, 32, 3, 2),
    V2Row(6, 64, 4, 2),
    V2Row(6, 96, 3, 1),
    V2Row(6, 160, 3, 2),
    V2Row(6, 320, 1, 1),
)


class V3Row(NamedTuple):
    """Howard et al. 2019, tables 1 and 2, with columns bneck, exp size, #out, SE, NL, s."""

    kernel: int
    expanded: int
    channels: int
    se: bool
    activation: type[nn.Module]
    stride: int


RE, HS = nn.ReLU, nn.Hardswish
V3_LARGE = (
    V3Row(3, 16, 16, False, RE, 1),
    V3Row(3, 64, 24, False, RE, 2),
    V3Row(3, 72, 24, False, RE, 1),
    V3Row(5, 72, 40, True, RE, 2),
    V3Row(5, 120, 40, True, RE, 1),
    V3Row(5, 120, 40, True, RE, 1),
    V3Row(3, 240, 80, False, HS, 2),
    V3Row(3, 200, 80, False, HS, 1),
    V3Row(3, 184, 80, False, HS, 1),
    V3Row(3, 184, 80, False, HS, 1),
    V3Row(3, 480, 112, True, HS, 1),
    V3Row(3, 672, 112, True, HS, 1),
    V3Row(5, 672, 160, True, HS, 2),
    V3Row(5, 960, 160, True, HS, 1),
    V3Row(5, 960, 160, True, HS, 1),
)
V3_SMALL = (
    V3Row(3, 16, 16, True, RE, 2),
    V3Row(3, 72, 24, False, RE, 2),
    V3Row(3, 88, 24, False, RE, 1),
    V3Row(5, 96, 40, True, HS, 2),
    V3Row(5, 240, 40, True, HS, 1),
    V3Row(5, 240, 40, True, HS, 1),
    V3Row(5, 120, 48, True, HS, 1),
    V3Row(5, 144, 48, True, HS, 1),
    V3Row(5, 288, 96, True, HS, 2),
    V3Row(5, 576, 96, True, HS, 1),
    V3Row(5, 576, 96, True, HS, 1),
)

# %% [markdown]
# ## The model: stem, stages, head


# %%
class MobileNet(nn.Module):
    """(N, 3, H, W) -> (N, num_classes): what the three versions share.

    Args:
        stem: the first convolution.
        blocks: everything between stem and pooling, each with its `stride`. A stage is a run of
            blocks that work at one resolution.
        head: what follows the average pooling, a list whose last layer is the classifier.
    """

    def __init__(self, stem: ConvBN, blocks: list[nn.Module], head: list[nn.Module]) -> None:
        super().__init__()
        self.stem = stem
        stages: list[list[nn.Module]] = []
        for block in blocks:
            if block.stride == 2 or not stages:
                stages.append([])
            stages[-1].append(block)
        self.stages = nn.Sequential(*(nn.Sequential(*stage) for stage in stages))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)
        self.init_weights()

    def init_weights(self) -> None:
        """He initialisation; each block with a shortcut starts as the identity.

        NOTE: the zeros are not the papers' but those of Goyal et al. (2017, sec. 5.1), and linear
        layers start as PyTorch's do, not with a standard deviation of 0.01. On digits V3-small
        then validates at 96.5% after a run of 6 epochs, instead of 83.9% (seed 0).
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # In a depthwise layer an input channel reaches one output channel, not all of them.
                # Without the division by `groups` its weights would start sqrt(C) times too small.
                fan_out = module.weight[:, 0].numel() // module.groups
                nn.init.normal_(module.weight, 0, (2 / fan_out) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, InvertedResidual) and module.has_shortcut:
                _, last_norm = module.layers[-1]
                nn.init.zeros_(last_norm.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, H/32, W/32), the last feature map; H/8 and W/8 if small."""
        return self.stages(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))

    def get_classifier(self) -> nn.Linear:
        return self.head[-1]

    def reset_classifier(self, num_classes: int) -> None:
        old = self.head[-1]
        self.head[-1] = nn.Linear(old.in_features, num_classes).to(old.weight)


# %% [markdown]
# ## The builders: one loop over one table each
#
# `width_mult` makes every layer thinner by the same factor, and the cost falls with its square,
# because a 1x1 convolution costs C_in times C_out. `small_input` is for 32 pixels and less: five
# halvings would leave one pixel of a CIFAR image, so the stem and the first row that halves the
# resolution get stride 1 instead.
# NOTE: none of the three papers has this form.


# %%
def skip_first_halving(table: tuple) -> tuple:
    """The table with the first stride 2 replaced by 1.

    >>> skip_first_halving(V1)[:3]
    (V1Row(channels=64, stride=1), V1Row(channels=128, stride=1), V1Row(channels=128, stride=1))
    """
    first = [row.stride for row in table].index(2)
    return (*table[:first], table[first]._replace(stride=1), *table[first + 1 :])


def mobilenet_v1(
    num_classes: int = 1000,
    small_input: bool = False,
    width_mult: float = 1.0,
    block: type[nn.Module] = DepthwiseSeparable,
) -> MobileNet:
    """MobileNet, 4.2M parameters and 569M multiply-adds at 224 px.  Howard et al. 2017, table 1.

    `block=StandardConv` gives the same net with full convolutions: 29.3M and 4.9G (table 4).
    """
    stem_stride, table = (1, skip_first_halving(V1)) if small_input else (2, V1)
    channels = make_divisible(32 * width_mult)
    stem = ConvBN(3, channels, 3, stem_stride)
    blocks = []
    for row in table:
        in_channels, channels = channels, make_divisible(row.channels * width_mult)
        blocks.append(block(in_channels, channels, row.stride))
    return MobileNet(stem, blocks, head=[nn.Linear(channels, num_classes)])


def mobilenet_v2(
    num_classes: int = 1000,
    small_input: bool = False,
    width_mult: float = 1.0,
    dropout: float = 0.2,
) -> MobileNet:
    """MobileNetV2, 3.5M parameters, 301M multiply-adds at 224 px.  Sandler et al. 2018, table 2."""
    stem_stride, table = (1, skip_first_halving(V2)) if small_input else (2, V2)
    channels = make_divisible(32 * width_mult)
    stem = ConvBN(3, channels, 3, stem_stride, activation=nn.ReLU6)
    blocks = []
    for row in table:
        for i in range(row.depth):
            in_channels, channels = channels, make_divisible(row.channels * width_mult)
            stride = row.stride if i == 0 else 1
            expanded = in_channels * row.expansion
            blocks.append(InvertedResidual(in_channels, channels, expanded, stride))
    # A thinner net keeps its last layer: the classifier needs the 1280 features (sec. 4.1).
    features = make_divisible(1280 * max(1.0, width_mult))
    blocks.append(ConvBN(channels, features, activation=nn.ReLU6))
    return MobileNet(stem, blocks, head=[nn.Dropout(dropout), nn.Linear(features, num_classes)])


def mobilenet_v3(
    rows: tuple[V3Row, ...],
    hidden: int,
    num_classes: int = 1000,
    small_input: bool = False,
    width_mult: float = 1.0,
    dropout: float = 0.2,
) -> MobileNet:
    """MobileNetV3 of one table, with a hidden layer in its head.  Howard et al. 2019, tables 1, 2.

    The 1x1 convolution to `hidden` channels stands after the pooling, where it costs one pixel and
    not 49 (sec. 5.1): there it is a linear layer.
    """
    stem_stride, table = (1, skip_first_halving(rows)) if small_input else (2, rows)
    # The authors smooth BatchNorm's statistics over thousands of steps.
    # NOTE: a small run has only hundreds, so the small form keeps PyTorch's faster 0.1.
    norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.1 if small_input else 0.01)
    channels = make_divisible(16 * width_mult)
    stem = ConvBN(3, channels, 3, stem_stride, activation=nn.Hardswish, norm=norm)
    blocks = []
    for row in table:
        in_channels, channels = channels, make_divisible(row.channels * width_mult)
        expanded = make_divisible(row.expanded * width_mult)
        extras = (row.kernel, row.se, row.activation, norm)
        blocks.append(InvertedResidual(in_channels, channels, expanded, row.stride, *extras))
    features = 6 * channels
    blocks.append(ConvBN(channels, features, activation=nn.Hardswish, norm=norm))
    hidden = make_divisible(hidden * width_mult)
    return MobileNet(
        stem,
        blocks,
        head=[
            nn.Linear(features, hidden),
            nn.Hardswish(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        ],
    )


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3_small": partial(mobilenet_v3, V3_SMALL, 1024),
    "mobilenet_v3_large": partial(mobilenet_v3, V3_LARGE, 1280),
}


# %% [markdown]
# ## Where the multiply-adds are
#
# Table 2 of the first paper: once separated, nearly all the work is in 1x1 convolutions. They are
# plain matrix products, and they are what V2 and V3 go on to save.


# %%
def cost_by_kind(
    model: nn.Module, input_size: tuple[int, int, int]
) -> dict[str, tuple[float, float]]:
    """{kind of layer: (its share of the multiply-adds, its share of the parameters)}.

    `input_size` is (3, H, W). Parameters of BatchNorm count towards no kind.

    >>> with torch.device("meta"):
    ...     model = mobilenet_v1()
    >>> [f"{kind} {macs:.1%}" for kind, (macs, _) in cost_by_kind(model, (3, 224, 224)).items()]
    ['3x3 1.9%', '3x3 depthwise 3.1%', '1x1 94.9%', 'linear 0.2%']
    """
    macs_of, sums = macs_by_module(model, input_size), {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            kind = "x".join(map(str, layer.kernel_size)) + " depthwise" * (layer.groups > 1)
        elif isinstance(layer, nn.Linear):
            kind = "linear"
        else:
            continue
        macs, parameters = sums.get(kind, (0, 0))
        macs += sum(macs_of[f"{type(model).__name__}.{name}"].values())
        sums[kind] = macs, parameters + sum(p.numel() for p in layer.parameters())
    all_macs = sum(macs for macs, _ in sums.values())
    all_parameters = sum(parameters for _, parameters in sums.values())
    return {kind: (m / all_macs, p / all_parameters) for kind, (m, p) in sums.items()}


# %% [markdown]
# ## First experiment: what does the separation cost, and what does it save?
#
# V1 is trained three times: with standard convolutions, with separable ones, and with standard ones
# again in a net so thin that it takes as many multiply-adds as the separable one. The clock has a
# word too: each block of V1 is timed in both forms on the maps of a large image.


# %%
def separable(config: Config) -> dict[str, object]:
    """Table 4 of the first paper, with a fair rival and a clock added; prints a verdict, draws a
    figure.
    """
    config, device = prepare(config)
    data = load_data(config, device)
    run = Run.open(config, LESSON)
    net = partial(
        mobilenet_v1,
        num_classes=data.num_classes,
        small_input=config.small_input,
        width_mult=config.trial_width,
    )
    standard = partial(net, block=StandardConv)
    with torch.device("meta"):
        budget = count_macs(net(), data.input_size)
    thin = width_for_macs(standard, budget, data.input_size)
    kinds = {
        "standard": standard,
        "separable": net,
        "thin standard": partial(standard, width_mult=thin),
    }
    trials: dict[str, list[Trial]] = {kind: [] for kind in kinds}
    for seed in range(config.seed, config.seed + config.seeds):
        for kind, build_kind in kinds.items():
            seeded = replace(config, seed=seed)
            trial = train_trial(f"{kind}, seed {seed}", build_kind, data, seeded, device)
            trials[kind].append(trial)
    costs = {
        kind: profile(first.model, data.input_size, seconds=config.clock)
        for kind, (first, *_) in trials.items()
    }
    blocks = time_blocks(config.latency_px, device, config.clock)

    figure, (learning, accuracy, saving) = plotting.panels(3, "The same net, convolved two ways")
    plotting.curves(
        {kind: [[r.val_top1 for r in t.history] for t in ts] for kind, ts in trials.items()},
        "epoch", "validation top-1", "Learning", percent=True, ax=learning,
    )  # fmt: skip
    tests = {kind: mean_and_spread([t.test_top1 for t in ts]) for kind, ts in trials.items()}
    plotting.bars(
        {kind: m for kind, (m, _) in tests.items()},
        "test top-1",
        f"Test accuracy, mean and deviation (n = {config.seeds})",
        {kind: s for kind, (_, s) in tests.items()} if config.seeds > 1 else None,
        percent=True,
        colors=plotting.PALETTE,
        ax=accuracy,
    )
    plotting.curves(
        {
            word: [b[f"{what} standard"] / b[f"{what} separable"] for b in blocks]
            for word, what in (("multiply-adds", "M MACs"), ("time", "ms"))
        },
        "block of V1, from the stem to the head",
        "times saved",
        f"What separating a block saves, {config.latency_px} px",
        colors=plotting.PALETTE[3:],
        ax=saving,
    )
    run.figure("separable", figure)
    rows = [
        {**t.row(), "ms, one image": round(costs[kind].latency_ms, 2)}
        for kind, ts in trials.items()
        for t in ts
    ]
    share = cost_by_kind(trials["separable"][0].model, data.input_size)["1x1"][0]
    verdict = separable_verdict(trials, blocks)
    verdict.append(f"{share:.0%} of the separable net's multiply-adds are in 1x1 convolutions")
    return conclude(run, rows, verdict, blocks=blocks, width_of_thin_standard=thin)


def width_for_macs(
    build: Callable[..., nn.Module], macs: int, input_size: tuple[int, int, int]
) -> float:
    """The least width_mult, in hundredths, whose net takes at least `macs` multiply-adds."""

    def cost(hundredths: int) -> int:
        with torch.device("meta"):
            return count_macs(build(width_mult=hundredths / 100), input_size)

    widths = range(5, 101)
    return widths[min(bisect_left(widths, macs, key=cost), len(widths) - 1)] / 100


def time_blocks(image_size: int, device: torch.device, clock: float) -> list[dict[str, float]]:
    """Multiply-adds and milliseconds of V1's blocks, standard and separable, one image of that
    size.
    """
    rows, in_channels, px = [], 32, image_size // 2
    for row in V1:
        line: dict[str, float] = {"channels in": in_channels, "px": px}
        for word, kind in (("standard", StandardConv), ("separable", DepthwiseSeparable)):
            block = kind(in_channels, row.channels, row.stride)
            block = block.to(device, memory_format=torch.channels_last)
            cost = profile(block, (in_channels, px, px), seconds=clock / 2)
            line[f"M MACs {word}"], line[f"ms {word}"] = cost.macs / 1e6, cost.latency_ms
        rows.append(line)
        in_channels, px = row.channels, px // row.stride
    return rows


def separable_verdict(trials: dict[str, list[Trial]], blocks: list[dict[str, float]]) -> list[str]:
    """What separation costs in accuracy and saves in multiply-adds, parameters and time."""
    verdict = []
    for rival in ("standard", "thin standard"):
        pairs = list(zip(trials["separable"], trials[rival]))
        gains = [ours.test_top1 - theirs.test_top1 for ours, theirs in pairs]
        ours, theirs = pairs[0]
        verdict.append(
            f"separable against {rival}: multiply-adds 1 to {theirs.macs / ours.macs:.1f}, "
            f"parameters 1 to {theirs.params / ours.params:.1f}; test accuracy "
            f"{100 * mean(gains):+.2f} points, {word_for(gains)}"
        )
    saved = {
        what: sum(b[f"{what} standard"] for b in blocks)
        / sum(b[f"{what} separable"] for b in blocks)
        for what in ("M MACs", "ms")
    }
    word = "less" if saved["ms"] < saved["M MACs"] else "no less"
    verdict.append(
        f"V1's blocks on a large image: {saved['M MACs']:.1f} times fewer multiply-adds, "
        f"{saved['ms']:.1f} times the speed; the clock saves {word} than the count promises"
    )
    return verdict


def word_for(gains: list[float]) -> str:
    """What differences of pairs of runs, one pair a seed, allow to say."""
    ahead, behind = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    if len(gains) == 1:
        return "and one pair cannot tell chance from effect: try --seeds 3"
    if ahead == len(gains):
        return f"ahead in all of {ahead} pairs"
    if behind == len(gains):
        return f"behind in all of {behind} pairs"
    return f"ahead in {ahead} and behind in {behind} of {len(gains)} pairs: no difference shown"


# %% [markdown]
# ## Second experiment: thinner, or smaller images?
#
# The two knobs of the first paper (sec. 3.3 and 3.4): a width multiplier on the channels and a
# resolution multiplier on the image. Both cut multiply-adds by about their square. Which one costs
# less accuracy? Every net of the grid is trained; multiply-adds and milliseconds are shown for
# ImageNet's form of it, because images of a few pixels time little but the calls of the kernels.


# %%
class Cell(NamedTuple):
    """One net of the grid: its two multipliers, how it tested, what ImageNet's form of it costs."""

    width: float
    resolution: float
    px: int  # it was trained and tested with
    trial: Trial
    macs: int  # of ImageNet's form, on an image of latency_px x resolution
    latency_ms: float

    @property
    def name(self) -> str:
        return f"{self.width:g} at {self.px}"


def multipliers(config: Config) -> dict[str, object]:
    """Tables 6 and 7 of the first paper as one grid; prints a verdict, draws a figure."""
    widths = factors("width-mults", config.width_mults)
    resolutions = factors("resolution-mults", config.resolution_mults)
    config, device = prepare(config)
    if config.image_size * resolutions[0] < 4:
        raise UserError(
            f"--resolution-mults {resolutions[0]:g} of {config.image_size} px leaves less than 4 "
            "px: try a larger --image-size"
        )
    run = Run.open(config, LESSON)
    cells = []
    for resolution in resolutions:
        sized = replace(config, image_size=round(config.image_size * resolution))
        data = load_data(sized, device)
        large_px = round(config.latency_px * resolution)
        for width in widths:
            name = f"width {width:g} at {sized.image_size} px"
            net = partial(
                mobilenet_v1,
                num_classes=data.num_classes,
                small_input=config.small_input,
                width_mult=width,
            )
            trial = train_trial(name, net, data, sized, device)
            large = mobilenet_v1(width_mult=width).to(device, memory_format=torch.channels_last)
            cost = profile(large, (3, large_px, large_px), seconds=config.clock)
            px = sized.image_size
            cells.append(Cell(width, resolution, px, trial, cost.macs, cost.latency_ms))

    def grid(value: Callable[[Cell], float]) -> np.ndarray:
        values = [value(cell) for cell in cells]
        return np.array(values).reshape(len(resolutions), len(widths))

    figure, (accuracy, front, clock) = plotting.panels(
        3, 'Two ways to a cheaper MobileNet: "0.5 at 8" is half the width on 8 pixels'
    )
    columns = [f"{w:g}" for w in widths]
    plotting.heatmap(
        grid(lambda cell: 100 * cell.trial.test_top1),
        [f"{round(config.image_size * resolution)} px" for resolution in resolutions],
        columns,
        "Test accuracy",
        xlabel="width multiplier",
        ylabel="image",
        label="test top-1, %",
        fmt="{:.1f}",
        ax=accuracy,
    )
    best_so_far, on_front = -1.0, []
    for cell in sorted(cells, key=lambda cell: cell.trial.macs):
        if cell.trial.test_top1 > best_so_far:
            best_so_far = cell.trial.test_top1
            on_front.append(cell.name)
    plotting.scatter(
        [(cell.name, cell.trial.macs / 1e6, cell.trial.test_top1) for cell in cells],
        "million multiply-adds, as trained",
        "test top-1",
        "No net on the line is beaten by a cheaper one",
        log_x=True,
        front=on_front,
        percent=True,
        ax=front,
    )
    plotting.heatmap(
        grid(lambda cell: cell.latency_ms),
        [f"{round(config.latency_px * resolution)} px" for resolution in resolutions],
        columns,
        "Time of one image in ImageNet's form",
        xlabel="width multiplier",
        ylabel="image",
        label="ms",
        fmt="{:.1f}",
        ax=clock,
    )
    run.figure("multipliers", figure)
    rows = [
        {
            **cell.trial.row(),
            "M MACs, large": round(cell.macs / 1e6, 1),
            "ms, large": round(cell.latency_ms, 2),
        }
        for cell in cells
    ]
    return conclude(run, rows, multipliers_verdict(cells, len(data.test.labels)))


def factors(flag: str, text: str) -> list[float]:
    """Numbers between commas, in ascending order, each above 0 and at most 4.

    Raises:
        UserError: it is something else.
    """
    try:
        values = sorted({float(part) for part in text.split(",")})
    except ValueError:
        values = []
    if not values or not 0 < values[0] <= values[-1] <= 4:
        raise UserError(f"--{flag} {text}: give factors between commas, such as 0.5,0.75,1")
    return values


def multipliers_verdict(cells: list[Cell], images: int) -> list[str]:
    """What each multiplier alone saves and costs, which of them is the better saving, and the
    cheapest net that is as good as the best.

    Args:
        images: of the test set; two accuracies p closer than two standard errors of their
            difference, 2 sqrt(2 p (1 - p) / images), count as equal.
    """
    whole = max(cells, key=lambda cell: (cell.width, cell.resolution))
    alone = {
        "width": {cell.width: cell for cell in cells if cell.resolution == whole.resolution},
        "resolution": {cell.resolution: cell for cell in cells if cell.width == whole.width},
    }

    def noise(p: float) -> float:
        return 2 * (2 * p * (1 - p) / images) ** 0.5

    verdict = []
    for knob_name, line in alone.items():
        for factor, cell in line.items():
            if cell is not whole:
                verdict.append(
                    f"{knob_name} {factor:g} alone: {whole.macs / cell.macs:.1f} times fewer "
                    f"multiply-adds and {whole.latency_ms / cell.latency_ms:.1f} times the speed "
                    f"on large images; test accuracy "
                    f"{100 * (cell.trial.test_top1 - whole.trial.test_top1):+.1f} points"
                )
    for factor in sorted(alone["width"].keys() & alone["resolution"].keys()):
        thin, small = alone["width"][factor].trial, alone["resolution"][factor].trial
        gap = thin.test_top1 - small.test_top1
        if thin is small:
            continue
        if abs(gap) < noise((thin.test_top1 + small.test_top1) / 2):
            word = f"make no difference that {images} test images could show"
        else:
            word = "differ: " + ("cut the width" if gap > 0 else "cut the resolution")
        verdict.append(
            f"a factor of {factor:g} on width or on resolution: {thin.test_top1:.1%} or "
            f"{small.test_top1:.1%}; they {word}"
        )
    best = max(cells, key=lambda cell: cell.trial.test_top1)
    level = best.trial.test_top1 - noise(best.trial.test_top1)
    cheapest = min(
        (cell for cell in cells if cell.trial.test_top1 >= level), key=lambda c: c.trial.macs
    )
    told = f"best is width {best.name} px with {best.trial.test_top1:.1%}; "
    if cheapest is best:
        verdict.append(told + "these images can tell every cheaper one from it")
    else:
        verdict.append(
            f"{told}the cheapest that these images cannot tell from it is width {cheapest.name} px "
            f"with {cheapest.trial.test_top1:.1%} and "
            f"{best.trial.macs / cheapest.trial.macs:.1f} times fewer multiply-adds"
        )
    return verdict


# %% [markdown]
# ## Third experiment: 8-bit integers after training
#
# Post-training quantisation stores a number $w$ as an integer $q$ with $w \approx s\,q$: a scale
# $s$ shared by a whole tensor, or by one output channel. First BatchNorm disappears, because in
# eval mode it is only a factor and an offset per channel, which the convolution before it can
# carry:
#
# $$w' = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}\, w, \qquad
# b' = \beta - \frac{\gamma \mu}{\sqrt{\sigma^2 + \epsilon}}$$
#
# Then some training images run through the net while observers note the range of every activation,
# and kernels that multiply 8-bit integers take over. The factors that were folded in differ from
# channel to channel, most of all in depthwise layers, where one scale for all has to stretch to the
# widest of them: see Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient
# inference", sec. 3.


# %%
PRECISIONS = ("FP32", "FP32 folded", "INT8 tensor", "INT8 channel")


def choose_backend(asked: str) -> str:
    """The kernels to multiply integers with: what was asked for, else the first that is there.

    Raises:
        UserError: this build of torch has none, or has lost the API.
    """
    try:
        importlib.import_module("torch.ao.quantization.quantize_fx")
    except ImportError:
        raise UserError(
            f"--experiment quantize: torch {torch.__version__} no longer has "
            "torch.ao.quantization.quantize_fx, which torch 2.6 and 2.15 have"
        ) from None
    here = [e for e in torch.backends.quantized.supported_engines if e != "none"]
    wanted = [asked] if asked else ["x86", "fbgemm", "qnnpack", "onednn"]
    found = [engine for engine in wanted if engine in here]
    if not found:
        raise UserError(
            f"--experiment quantize: torch {torch.__version__} has no {' or '.join(wanted)} "
            f"kernels for 8-bit integers on this machine (it has: {', '.join(here) or 'none'})"
        )
    return found[0]


def quantized_versions(model: nn.Module, images: Tensor, backend: str) -> dict[str, nn.Module]:
    """The same net in each of PRECISIONS, on the CPU, in eval mode.

    Args:
        images: (N, 3, H, W), from the training set, to find the activations' ranges with.
    """
    from torch.ao.quantization import (
        QConfig,
        default_per_channel_weight_observer,
        default_weight_observer,
        get_default_qconfig_mapping,
    )
    from torch.ao.quantization.quantize_fx import convert_fx, fuse_fx, prepare_fx

    model = model.cpu().eval()
    torch.backends.quantized.engine = backend
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # newer versions of torch call this API deprecated
        versions = [model, fuse_fx(deepcopy(model))]
        for weight in (default_weight_observer, default_per_channel_weight_observer):
            mapping = get_default_qconfig_mapping(backend)
            activation = mapping.global_qconfig.activation
            mapping.set_global(QConfig(activation=activation, weight=weight))
            observed = prepare_fx(deepcopy(model), mapping, example_inputs=(images[:1],))
            observed(images)
            versions.append(convert_fx(observed))
    return dict(zip(PRECISIONS, versions))


def megabytes(model: nn.Module) -> float:
    """Size of the file that the weights make, in 10^6 bytes."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getbuffer().nbytes / 1e6


@torch.inference_mode()
def milliseconds(versions: dict[str, nn.Module], x: Tensor, clock: float) -> dict[str, float]:
    """Median time of one pass of each, in turns, so that a busy machine is unfair to none."""
    times: dict[str, list[float]] = {name: [] for name in versions}
    for model in versions.values():
        model(x)
    began = time.perf_counter()
    while len(times["FP32"]) < 5 or time.perf_counter() - began < clock * len(versions):
        for name, model in versions.items():
            start = time.perf_counter()
            model(x)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: median(values) for name, values in times.items()}


@torch.inference_mode()
def logits_of(model: nn.Module, loader: Loader) -> Tensor:
    """(images, classes) on the CPU, where the integer kernels are."""
    return torch.cat([model(x.cpu()) for x, _ in loader.batches()])


def weight_errors(folded: nn.Module, quantized: nn.Module) -> dict[str, float]:
    """Per convolution, by name: |rounded weights - weights| / |weights|, Euclidean norms."""
    convs = {n: m for n, m in folded.named_modules() if isinstance(m, nn.Conv2d)}
    errors = {}
    for name, layer in quantized.named_modules():
        # A fused convolution and activation is called by the name of the pair.
        conv = convs.get(name) or convs.get(f"{name}.0")
        if conv is not None and callable(getattr(layer, "weight", None)):
            rounded = layer.weight().dequantize()
            errors[name] = ((rounded - conv.weight).norm() / conv.weight.norm()).item()
    return errors


def quantize(config: Config) -> dict[str, object]:
    """Train in float32, quantise, and measure size, time and accuracy; prints a verdict, draws a
    figure.
    """
    backend = choose_backend(config.backend)
    config, device = prepare(config)
    data = load_data(config, device)
    run = Run.open(config, LESSON)

    def start() -> nn.Module:
        model = build(config, data.num_classes)
        return load_pretrained(model, config.model) if config.pretrained else model

    model = train_trial(config.model, start, data, config, device).model
    calibration = torch.cat([x.cpu() for x, _ in islice(data.train.batches(), 4)])
    trained = quantized_versions(model, calibration, backend)
    # Random weights take as long as trained ones.
    large = MODELS[config.model](width_mult=config.width_mult)
    noise = torch.randn(4, 3, config.latency_px, config.latency_px)
    noise = noise.contiguous(memory_format=torch.channels_last)
    large = large.to(memory_format=torch.channels_last)
    large = quantized_versions(large, noise, backend)

    logits = {name: logits_of(version, data.test) for name, version in trained.items()}
    answers = {name: values.argmax(1) for name, values in logits.items()}
    labels = torch.cat([y.cpu() for _, y in data.test.batches()])

    def distance(name: str) -> Tensor:
        return (logits[name] - logits["FP32"]).norm()

    batch = calibration[:64]
    one = milliseconds(trained, calibration[:1], config.clock)
    many = milliseconds(trained, batch, config.clock)
    one_large = milliseconds(large, noise[:1], config.clock)
    rows = [
        {
            "weights": name,
            "MB": round(megabytes(trained[name]), 2),
            "test top-1": round((answers[name] == labels).double().mean().item(), 4),
            "answers changed": int((answers[name] != answers["FP32"]).sum()),
            "logits moved": float(f"{distance(name) / logits['FP32'].norm():.2g}"),
            "ms, one image": round(one[name], 2),
            f"ms, {len(batch)} images": round(many[name], 2),
            f"ms, {config.latency_px} px": round(one_large[name], 2),
            f"MB, {config.latency_px} px": round(megabytes(large[name]), 2),
        }
        for name in PRECISIONS
    ]
    errors = {name: weight_errors(trained["FP32 folded"], trained[name]) for name in PRECISIONS[2:]}

    figure, axes = plotting.panels(4, f"{config.model} in 8 bits, {backend} kernels", columns=2)
    plotting.bars(
        {row["weights"]: row["MB"] for row in rows},
        "MB", "Size of the weights", colors=plotting.PALETTE, ax=axes[0],
    )  # fmt: skip
    plotting.bars(
        {row["weights"]: row["test top-1"] for row in rows},
        "test top-1", "Test accuracy", percent=True, colors=plotting.PALETTE, ax=axes[1],
    )  # fmt: skip
    plotting.bars(
        one_large,
        "ms",
        f"Time of one image of {config.latency_px} px, threads: {torch.get_num_threads()}",
        colors=plotting.PALETTE,
        ax=axes[2],
    )
    plotting.curves(
        {name: list(by_layer.values()) for name, by_layer in errors.items()},
        "convolution, from the stem to the head",
        "relative error",
        "Weights lost by rounding to 8 bits",
        log_y=True,
        colors=plotting.PALETTE[2:],
        ax=axes[3],
    )
    run.figure("quantize", figure)
    gap = (logits["FP32 folded"] - logits["FP32"]).abs().max().item()
    verdict = quantize_verdict(rows, errors, gap, len(labels))
    return conclude(run, rows, verdict, backend=backend, weight_errors=errors)


def quantize_verdict(
    rows: list[dict[str, object]], errors: dict[str, dict[str, float]], gap: float, images: int
) -> list[str]:
    """What folding and integers save and cost, and whether a scale per channel was needed."""
    plain, folded, tensor, channel = rows
    (large,) = (c for c in plain if c.startswith("ms,") and c.endswith("px"))

    def times(row: dict[str, object], column: str) -> str:
        ratio = plain[column] / row[column]
        return f"{ratio:.1f} times the speed"

    verdict = [
        f"folding BatchNorm moves no logit by more than {gap:.1g}; "
        f"{times(folded, large)} on a large image"
    ]
    for row in (tensor, channel):
        change = row["test top-1"] - plain["test top-1"]
        verdict.append(
            f"{row['weights']}: {plain['MB'] / row['MB']:.1f} times smaller; "
            f"{times(row, large)} on a large image, {times(row, 'ms, one image')} on one of the "
            f"dataset; {row['answers changed']} of {images} answers change, accuracy by "
            f"{100 * change:+.2f} points"
        )
    middle = {name: median(by_layer.values()) for name, by_layer in errors.items()}
    worst = max(errors[tensor["weights"]], key=errors[tensor["weights"]].get)
    verdict.append(
        f"rounding loses {middle[tensor['weights']]:.1%} of the weights in the median layer with a "
        f"scale per tensor ({errors[tensor['weights']][worst]:.1%} in the worst, {worst}) and "
        f"{middle[channel['weights']]:.1%} with one per channel"
    )
    # A few answers more or less are chance; the distance of all logits is not.
    before, after = tensor["logits moved"], channel["logits moved"]
    word = "pays" if after < before else "does not pay"
    verdict.append(
        f"a scale per channel {word} here: it moves the logits by {after:.1%} where a scale per "
        f"tensor moves them by {before:.1%}"
    )
    return verdict


EXPERIMENTS: dict[str, Callable[[Config], object]] = {
    "separable": separable,
    "multipliers": multipliers,
    "quantize": quantize,
}

# %% [markdown]
# ## One run, from data to report
#
# Flat and explicit: this is the whole recipe. `fit` repeats `train_one_epoch`, whose source is in
# the last cell.


# %%
def build(config: Config, num_classes: int) -> nn.Module:
    """The model that the flags ask for."""
    return MODELS[config.model](
        num_classes=num_classes, small_input=config.small_input, width_mult=config.width_mult
    )


def run(config: Config) -> dict[str, object]:
    """Train, test once with the best epoch's weights, profile, draw, save; what result.json holds
    comes back.
    """
    config, device = prepare(config)
    # Trained weights bring the mean and deviation that they were trained with.
    mean_std = weights_mean_std(config.model) if config.pretrained else None
    data = load_data(config, device, mean_std)
    # A pixel's channels side by side: a CPU's depthwise convolutions are then twice as fast.
    model = build(config, data.num_classes).to(device, memory_format=torch.channels_last)
    if config.pretrained:
        load_pretrained(model, config.model)

    loss_fn = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, data.train)

    run = Run.open(config, LESSON)
    banner(config, device, data, model, run)
    history = fit(model, data, loss_fn, optimizer, schedule, config, run)

    # The only time that the test images are seen.
    test = evaluate(model, data.test, data.class_names)
    cost = profile(model, data.input_size)
    draw_figures(run, model, data, history, test)
    return run.finish(model, data, history, test, cost)


# %% [markdown]
# ## The loop itself
#
# Nothing is hidden behind `fit`: this is what runs for every batch.

# %%
if in_notebook():
    print(inspect.getsource(train_one_epoch))

# %% [markdown]
# ## What to notice
#
# - `--summary`: the depthwise layers hold few of the parameters and few of the multiply-adds, the
#   1x1 layers nearly all. With 1000 classes V1's classifier is a quarter of its parameters.
# - V2 at 224 px takes half of V1's multiply-adds, and V3-small a tenth. `--experiment quantize
#   --model ...` also times them at 224 px: does the clock follow the count?
# - The blocks of V2 and V3 look like ResNet's bottleneck with the waist on the outside.
#
# ## Exercises
#
# 1. Write `DepthwiseSeparable` without looking. By how much is it cheaper than a standard 3x3 with
#    64 channels in and 128 out? Check with `count_macs`.
# 2. Write `SqueezeExcitation` with the hard sigmoid. What share of V3-small's parameters is it?
# 3. Write `InvertedResidual`. Put a ReLU6 after its last 1x1 and train: what does the linear
#    bottleneck give on digits?
# 4. Fold a BatchNorm into its convolution by hand, with the formula of the third experiment, and
#    compare the outputs.
# 5. Quantise `mobilenet_v1` beside V3-small (`--experiment quantize --model mobilenet_v1`). Which
#    gains more speed from integers, and which layers stand in the way of the other?

# %%
if __name__ == "__main__":
    main(config, MODELS, build, run, EXPERIMENTS)
