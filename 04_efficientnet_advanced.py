"""Lesson 4, advanced: EfficientNet, growing depth, width and resolution together.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019
(arXiv 1905.11946).

The idea in one sentence: find a small net that is good for its cost by search, then grow its depth,
its width and its input resolution in fixed proportion instead of one of them alone.

    python 04_efficientnet_advanced.py                                # digits, on a GPU CIFAR-10
    python 04_efficientnet_advanced.py --experiment compound-scaling  # the paper's claim, measured
    python 04_efficientnet_advanced.py --experiment search            # how its table was found
    python 04_efficientnet_advanced.py --model efficientnet_b0 --summary

Measured on digits (16 px, 8 epochs, seed 0, torch 2.15, float32 on two cores of an Intel Xeon):

    default, efficientnet_mini    test 98.33%, 21 s of training (our own small member of the family)
    compound-scaling, two seeds   4.5 times the multiply-adds, 96.94% at the start: width 98.89%,
                                  compound 98.05%, resolution 97.91%, depth 67.41% and still
                                  learning; the claim fails here; 151 s
    search, 20 nets each          proxy loss by evolution 0.64, by lot 0.69, of B0's rows 0.96; in
                                  full 97.35%, 96.94% and 95.54% with spreads up to 1.18%; 122 s
"""

# %% [markdown]
# ## The problem, and the one equation
#
# You have a net and twice the time to run it. Make it deeper? Wider? Show it larger images? Each
# alone helps less and less: depth stops paying beyond a point, a wide and shallow net finds no
# abstract features, and a large image is wasted on a net whose layers see a small part of it. The
# three depend on each other, so scale them together, by one number $\phi$:
#
# $$\text{depth} = \alpha^\phi, \quad \text{width} = \beta^\phi, \quad
# \text{resolution} = \gamma^\phi, \quad \alpha \cdot \beta^2 \cdot \gamma^2 \approx 2$$
#
# Multiply-adds grow with the depth, with the square of the width (channels in times channels out)
# and with the square of the resolution (rows times columns). So each step of $\phi$ doubles the
# cost. The paper found $\alpha = 1.2$, $\beta = 1.1$ and $\gamma = 1.15$ on its smallest net, B0,
# and grew B1 to B7 out of it.

# %%
from common.cli import in_notebook, main, parse_flags
from common.config import TrainConfig, knob
from common.engine.errors import UserError

from dataclasses import dataclass


@dataclass(frozen=True)
class Config(TrainConfig):
    """What this lesson can be told; every field is a flag, and `--help` prints them all."""

    model: str = knob(
        "efficientnet_mini", "a name of MODELS; beside this one, efficientnet_b0 to b7"
    )
    width_mult: float = knob(1.0, "makes the model so many times as wide", low=0.05, high=8)
    depth_mult: float = knob(1.0, "makes the model so many times as deep", low=0.05, high=8)
    stochastic_depth: float = knob(0.2, "rate at which the last block is dropped", low=0, high=0.95)

    seeds: int = knob(2, "runs of each net that an experiment compares", low=1, high=100)
    # For compound-scaling.
    start_width: float = knob(0.25, "width of the net to scale up, over B0's", low=0.05, high=8)
    start_depth: float = knob(0.25, "depth of the net to scale up, over B0's", low=0.05, high=8)
    start_size: int | None = knob(
        None, "pixels that it sees; default: half of image_size", low=4, high=4096
    )
    factor: float = knob(4.5, "scale up to so many times its multiply-adds", low=1, high=1000)
    # For search. The proxy task has half of image_size and few epochs.
    nets: int = knob(20, "nets that each search trains", low=2, high=10000)
    proxy_epochs: int = knob(3, "epochs of the proxy task", low=1, high=1000)
    budget: float = knob(
        0.75, "multiply-adds allowed, over those of B0's own rows", low=0.05, high=100
    )

    # What differs from the defaults of common/config.py; the record at the top was measured with
    # these. At 8 px, the digits' own size, most stages would see two pixels by two, or one.
    RECIPES = {
        "digits": {
            "image_size": 16,
            "epochs": 8,
            "batch_size": 64,
            "base_lr": 0.2,
            "start_size": 12,
        }
    }


# Flags are read before torch is imported, so that --help answers at once; a notebook gets the
# defaults.
config = parse_flags(Config) if __name__ == "__main__" else Config()

# %%
import inspect
import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from statistics import mean
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common import plotting
from common.engine.device import set_up_torch
from common.data import load_data
from common.evaluation import evaluate
from common.experiments import Trial, conclude, mean_and_spread, train_trial
from common.pretrained import load_pretrained, weights_mean_std
from common.profiling import count_macs, profile
from common.runs import Run, banner, draw_figures, prepare
from common.training import fit, make_optimizer, make_schedule, train_one_epoch

LESSON = "04_efficientnet_advanced"

# %% [markdown]
# ## One convolution, one norm, one activation
#
# EfficientNet activates with SiLU (`x * sigmoid(x)`, also called swish): smooth, and slightly
# negative for slightly negative inputs, where ReLU is flat and sends no gradient.


# %%
def conv_norm_act(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    groups: int = 1,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    activation: Callable[[], nn.Module] = nn.SiLU,
) -> nn.Sequential:
    """(N, in_channels, H, W) -> (N, out_channels, ceil(H/stride), ceil(W/stride)), for odd kernels.

    >>> conv_norm_act(3, 32, 3, stride=2)(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 32, 4, 4])
    """
    return nn.Sequential(
        nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,  # the norm that follows has its own
        ),
        norm(out_channels),
        activation(),
    )


# %% [markdown]
# ## Squeeze-and-excitation: let each channel ask the whole image how much it matters
#
# A depthwise convolution sees one channel and a few pixels. The gate below sees every channel and
# every pixel, for the price of two small matrices.


# %%
class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate in (0, 1) that saw all channels' means.  Hu et al. 2018, sec. 3.

    (N, C, H, W) -> (N, C, H, W)

    >>> SqueezeExcitation(96, squeeze_channels=4)(torch.zeros(1, 96, 8, 8)).shape
    torch.Size([1, 96, 8, 8])
    """

    def __init__(self, channels: int, squeeze_channels: int) -> None:
        super().__init__()
        # 1x1 convolutions are linear layers that keep the last two dimensions.
        self.squeeze = nn.Conv2d(channels, squeeze_channels, 1)
        self.excite = nn.Conv2d(squeeze_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean(dim=(2, 3), keepdim=True)  # (N, C, 1, 1)
        gate = nn.functional.silu(self.squeeze(gate))  # (N, squeeze_channels, 1, 1)
        gate = torch.sigmoid(self.excite(gate))  # (N, C, 1, 1)
        return x * gate


# %% [markdown]
# ## Stochastic depth: train a random shallower net at every step
#
# A block with a shortcut computes `x + f(x)`. Now and then, leave `f` out. Each image of the batch
# throws its own dice, and the branches that stay are scaled up, so that the expected sum is what
# evaluation computes.


# %%
class StochasticDepth(nn.Module):
    """Zero an image's residual branch with probability `rate`.  Huang et al. 2016, eq. 2.

    (N, C, H, W) -> (N, C, H, W)

    NOTE: the paper scales the branch down in evaluation. Scaling it up in training has the same
    mean and leaves evaluation untouched, as dropout is written today.

    >>> drop = StochasticDepth(rate=0.5)
    >>> sorted(set(drop(torch.ones(64, 3, 2, 2)).flatten().tolist()))
    [0.0, 2.0]
    >>> torch.equal(drop.eval()(torch.ones(64, 3, 2, 2)), torch.ones(64, 3, 2, 2))
    True
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"a stochastic depth rate lies in [0, 1), not {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        kept = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep)  # one draw per image
        return x * (kept / keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


# %% [markdown]
# ## MBConv: widen, look around, choose channels, narrow
#
#     x ── 1x1 ── k x k depthwise ── SE ── 1x1 ── drop ── + ──
#     │    C -> 6C       6C          6C    6C -> C         │
#     └────────────────────────────────────────────────────┘
#
# A ResNet bottleneck is wide at its ends and narrow in the middle. This one is inverted: the
# shortcut joins the narrow ends, and the wide middle is affordable because its convolution is
# depthwise. The narrow output gets no activation: a ReLU or SiLU there would throw away half of
# what little it can carry.


# %%
class MBConv(nn.Module):
    """Mobile inverted bottleneck (Sandler et al. 2018, fig. 4) with squeeze-and-excitation.

    The operator of all stages in Tan and Le 2019, table 1.

    (N, in_channels, H, W) -> (N, out_channels, ceil(H/stride), ceil(W/stride))

    Args:
        expansion: width of the middle over `in_channels`; with 1 there is nothing to widen, and the
            first 1x1 is left out.
        drop_rate: stochastic depth of the residual branch, where the block has a shortcut.

    >>> MBConv(16, 24, kernel_size=3, stride=2, expansion=6)(torch.zeros(2, 16, 8, 8)).shape
    torch.Size([2, 24, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        expansion: int = 6,
        drop_rate: float = 0.0,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        middle = in_channels * expansion
        self.expand = (
            conv_norm_act(in_channels, middle, 1, norm=norm) if expansion > 1 else nn.Identity()
        )
        self.depthwise = conv_norm_act(
            middle, middle, kernel_size, stride, groups=middle, norm=norm
        )
        # A quarter of the block's narrow input, not of its wide middle: six times fewer weights.
        self.se = SqueezeExcitation(middle, squeeze_channels=max(1, in_channels // 4))
        self.project = conv_norm_act(middle, out_channels, 1, norm=norm, activation=nn.Identity)
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.drop = StochasticDepth(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.expand(x)  # (N, middle, H, W)
        branch = self.se(self.depthwise(branch))  # (N, middle, H/stride, W/stride)
        branch = self.project(branch)  # (N, out_channels, H/stride, W/stride)
        return x + self.drop(branch) if self.has_shortcut else branch


# %% [markdown]
# ## The paper's table 1 as data
#
# B0 came out of a search over exactly these columns (the second experiment below runs a small one).
# Everything larger is this table, stretched.


# %%
class Stage(NamedTuple):
    """One line of the table: `layers` MBConv blocks, of which only the first has the `stride`."""

    expansion: int
    kernel_size: int
    stride: int
    channels: int
    layers: int


STEM_CHANNELS = 32
B0: tuple[Stage, ...] = (
    #     expansion  kernel  stride  channels  layers    output at 224 px
    Stage(1, 3, 1, 16, 1),  # 112 x 112
    Stage(6, 3, 2, 24, 2),  # 56 x 56
    Stage(6, 5, 2, 40, 2),  # 28 x 28
    Stage(6, 3, 2, 80, 3),  # 14 x 14
    Stage(6, 5, 1, 112, 3),  # 14 x 14
    Stage(6, 5, 2, 192, 4),  # 7 x 7
    Stage(6, 3, 1, 320, 1),  # 7 x 7
)


# %% [markdown]
# ## Compound scaling: stretch the table
#
# `depth = 1.2^phi`, `width = 1.1^phi`, `resolution = 1.15^phi`. Multiply-adds grow linearly with
# depth and with the square of width and of resolution, and `1.2 * 1.1^2 * 1.15^2` is about 2: each
# step of phi doubles the cost.


# %%
def round_channels(channels: float, divisor: int = 8) -> int:
    """To the nearest multiple of 8, which suits the hardware, but never down by more than a tenth.

    >>> [round_channels(c) for c in (24, 24 * 1.1, 16 * 0.7, 3)]
    [24, 24, 16, 8]
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


def scale_stages(
    stages: tuple[Stage, ...], width_mult: float = 1.0, depth_mult: float = 1.0
) -> tuple[Stage, ...]:
    """The same table, `width_mult` times as wide and `depth_mult` times as deep, both rounded.

    >>> scale_stages((Stage(6, 5, 2, 40, 2),), width_mult=1.4, depth_mult=1.8)
    (Stage(expansion=6, kernel_size=5, stride=2, channels=56, layers=4),)
    """
    return tuple(
        stage._replace(
            channels=round_channels(stage.channels * width_mult),
            layers=math.ceil(stage.layers * depth_mult),
        )
        for stage in stages
    )


class Row(NamedTuple):
    """One member of the family: three multipliers, and the regularisation that grows with them."""

    width_mult: float
    depth_mult: float
    image_size: int  # pixels, square
    dropout: float
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d


# The largest three were trained with TensorFlow's BatchNorm constants, and their weights expect
# them.
tf_norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)

# NOTE: the multipliers are the authors' own, rounded by hand from the formula. The image sizes are
# those of torchvision's weights: 288 px for B2, where the authors have 260.
TABLE: dict[str, Row] = {
    #                    width depth   px  dropout
    "efficientnet_b0": Row(1.0, 1.0, 224, 0.2),
    "efficientnet_b1": Row(1.0, 1.1, 240, 0.2),
    "efficientnet_b2": Row(1.1, 1.2, 288, 0.3),
    "efficientnet_b3": Row(1.2, 1.4, 300, 0.3),
    "efficientnet_b4": Row(1.4, 1.8, 380, 0.4),
    "efficientnet_b5": Row(1.6, 2.2, 456, 0.4, tf_norm),
    "efficientnet_b6": Row(1.8, 2.6, 528, 0.5, tf_norm),
    "efficientnet_b7": Row(2.0, 3.1, 600, 0.5, tf_norm),
    # NOTE: ours, not the paper's: the same formula run backwards, phi = -4, for a laptop.
    "efficientnet_mini": Row(0.7, 0.5, 128, 0.2),
}


# %% [markdown]
# ## The model: stem, stages, head


# %%
class EfficientNet(nn.Module):
    """(N, 3, H, W) -> (N, num_classes).  Tan and Le 2019, table 1.

    Args:
        stages: the table, already scaled.
        stem_channels: width of the first convolution.
        small_input: for images of 32 pixels and less: the resolution falls to 1/8, not to 1/32.
            NOTE: ours. The stem keeps the resolution, and so does the first stage with a stride.
        dropout: rate of dropout before the classifier.
        stochastic_depth: the rate where the net ends; it rises from 0 in proportion to the depth.
        norm: makes the normalisation of a given number of channels.
    """

    def __init__(
        self,
        stages: tuple[Stage, ...] = B0,
        stem_channels: int = STEM_CHANNELS,
        num_classes: int = 1000,
        small_input: bool = False,
        dropout: float = 0.2,
        stochastic_depth: float = 0.2,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if small_input:
            halving = next((i for i, stage in enumerate(stages) if stage.stride == 2), 0)
            stages = (*stages[:halving], stages[halving]._replace(stride=1), *stages[halving + 1 :])
        self.stem = conv_norm_act(3, stem_channels, 3, stride=1 if small_input else 2, norm=norm)

        # NOTE: Huang et al. 2016, eq. 4, count blocks from 1. As in the authors' code of
        # EfficientNet, the first block is number 0 and never dropped, and the last stays a step
        # below the full rate.
        depth = sum(stage.layers for stage in stages)
        rates = iter(stochastic_depth * block / depth for block in range(depth))
        in_channels, modules = stem_channels, []
        for stage in stages:
            blocks = []
            for layer in range(stage.layers):
                stride = stage.stride if layer == 0 else 1
                blocks.append(
                    MBConv(
                        in_channels,
                        stage.channels,
                        stage.kernel_size,
                        stride,
                        stage.expansion,
                        drop_rate=next(rates),
                        norm=norm,
                    )
                )
                in_channels = stage.channels
            modules.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*modules)

        self.head_conv = conv_norm_act(in_channels, 4 * in_channels, 1, norm=norm)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(4 * in_channels, num_classes),
        )
        self.init_weights()

    def init_weights(self) -> None:
        """He initialisation by fan-out, as in the authors' code; the head keeps PyTorch's own."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # One input pixel feeds k * k outputs of a depthwise filter. PyTorch's "fan_out"
                # ignores groups and would count C times as many; its "fan_in" is that number.
                depthwise = module.groups == module.in_channels > 1
                nn.init.kaiming_normal_(module.weight, mode="fan_in" if depthwise else "fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, h, w), the last map: 1/32 of the resolution, 1/8 if small."""
        x = self.stem(x)  # (N, 32, H/2, W/2)
        x = self.stages(x)  # (N, 320, H/32, W/32)
        return self.head_conv(x)  # (N, 1280, H/32, W/32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))

    def get_classifier(self) -> nn.Linear:
        return self.head[-1]

    def reset_classifier(self, num_classes: int) -> None:
        old = self.head[-1]
        self.head[-1] = nn.Linear(old.in_features, num_classes).to(old.weight)


# %% [markdown]
# ## The builders: a row of the family, applied to B0's table


# %%
def efficientnet(
    name: str, width_mult: float = 1.0, depth_mult: float = 1.0, **options: float | bool
) -> EfficientNet:
    """One row of the family, stretched further by `width_mult` and `depth_mult` where given.

    Options are those of EfficientNet: `num_classes`, `small_input`, `dropout`, `stochastic_depth`.

    >>> with torch.device("meta"):
    ...     sum(p.numel() for p in efficientnet("efficientnet_b0").parameters())
    5288548
    """
    row = TABLE[name]
    width_mult, depth_mult = row.width_mult * width_mult, row.depth_mult * depth_mult
    return EfficientNet(
        scale_stages(B0, width_mult, depth_mult),
        round_channels(STEM_CHANNELS * width_mult),
        **{"dropout": row.dropout, "norm": row.norm, **options},
    )


MODELS: dict[str, Callable[..., nn.Module]] = {name: partial(efficientnet, name) for name in TABLE}


# %% [markdown]
# ## Experiment 1: four ways to spend the same multiply-adds
#
# Start from a small net on small images. Every direction below doubles its cost when $\phi$ grows
# by one, because depth x width^2 x resolution^2 = 2. They differ in what the cost buys. Follow each
# to the same number of multiply-adds, train what comes out by the same recipe, and compare.
#
# Digits have 8 x 8 pixels. Larger images of them are interpolated: they hold nothing new, but give
# the layers more places to look at. CIFAR-10 (`--dataset cifar10`) has real pixels to add.


# %%
class Direction(NamedTuple):
    """What one step of phi multiplies depth, width and resolution by."""

    depth: float
    width: float
    resolution: float


DIRECTIONS: dict[str, Direction] = {
    "depth": Direction(2.0, 1.0, 1.0),
    "width": Direction(1.0, 2**0.5, 1.0),
    "resolution": Direction(1.0, 1.0, 2**0.5),
    # Tan and Le 2019, sec. 3.3: alpha, beta and gamma, found by a grid search on B0.
    "compound": Direction(1.2, 1.1, 1.15),
}


class Size(NamedTuple):
    """A point of the scaling space: multipliers of B0's table, and the image size in pixels."""

    width_mult: float
    depth_mult: float
    image_size: int


def stretch(start: Size, direction: Direction, phi: float) -> Size:
    """Follow `direction` for `phi` steps.

    >>> stretch(Size(1.0, 1.0, 224), DIRECTIONS["compound"], phi=1)
    Size(width_mult=1.1, depth_mult=1.2, image_size=258)
    """
    return Size(
        start.width_mult * direction.width**phi,
        start.depth_mult * direction.depth**phi,
        2 * round(start.image_size * direction.resolution**phi / 2),  # halves without a rest
    )


def build_size(size: Size, **options: float | bool) -> EfficientNet:
    """B0's table in that size."""
    return efficientnet("efficientnet_b0", size.width_mult, size.depth_mult, **options)


@cache
def macs_of_size(size: Size, **options: float | bool) -> int:
    """Multiply-adds of one image, counted on the meta device, where nothing is computed."""
    with torch.device("meta"):
        model = build_size(size, **options)
    return count_macs(model, (3, size.image_size, size.image_size))


def stretch_to(target: float, start: Size, direction: Direction, **options: float | bool) -> Size:
    """The size along `direction` whose multiply-adds come closest to the target.

    Found by bisection over phi: the cost never falls when phi grows. Layers are whole, channels
    come in eights and pixels in twos, so the real cost climbs in steps, and phi from the formula
    misses it.
    """
    low, high = 0.0, 2 * math.log2(target / macs_of_size(start, **options))
    for _ in range(7):
        middle = (low + high) / 2
        if macs_of_size(stretch(start, direction, middle), **options) < target:
            low = middle
        else:
            high = middle
    ends = stretch(start, direction, low), stretch(start, direction, high)
    return min(ends, key=lambda size: abs(macs_of_size(size, **options) - target))


# %%
def compound_scaling(config: Config) -> dict[str, object]:
    """Figure 8 of the paper in small: the same cost spent on depth, width, resolution or all
    three.
    """
    config, device = prepare(config)
    # Without dropout of either kind, whose best rate depends on the size of the net.
    options = {"small_input": config.small_input, "dropout": 0.0, "stochastic_depth": 0.0}
    options["num_classes"] = load_data(config, device).num_classes
    start_size = config.start_size or config.image_size // 2
    start = Size(config.start_width, config.start_depth, start_size)
    target = config.factor * macs_of_size(start, **options)
    sizes = {"start": start}
    for name, direction in DIRECTIONS.items():
        sizes[name] = stretch_to(target, start, direction, **options)

    run = Run.open(config, LESSON)
    trials: dict[str, list[Trial]] = {}
    for name, size in sizes.items():
        sized = replace(config, image_size=size.image_size)
        data = load_data(sized, device)
        make = partial(build_size, size, **options)
        trials[name] = [
            train_trial(name, make, data, replace(sized, seed=config.seed + i), device)
            for i in range(config.seeds)
        ]

    scores = {name: [t.test_top1 for t in runs] for name, runs in trials.items()}
    last_losses = {n: mean(t.history[-1].train_loss for t in runs) for n, runs in trials.items()}
    grown = np.array([growth(size, trials[name][0]) for name, size in sizes.items()])
    figure, (shape, loss, error) = plotting.panels(
        3, f"Four ways to spend {config.factor:g} times the multiply-adds on {data.name}"
    )
    plotting.heatmap(
        grown / grown[0],
        list(sizes),
        ["blocks", "width", "pixels", "weights", "MACs"],
        "What the cost buys, over the start",
        fmt="{:.1f}x",
        label="times the start's",
        ax=shape,
    )
    plotting.curves(
        {n: [[r.train_loss for r in t.history] for t in runs] for n, runs in trials.items()},
        "epoch", "training loss", "Training loss", ax=loss,
    )  # fmt: skip
    draw_errors(scores, "Test error", error)
    run.figure("compound_scaling", figure)
    rows = [
        {
            "name": name,
            "blocks": blocks_of(size),
            "width": round(size.width_mult, 2),
            "px": size.image_size,
            "parameters": trials[name][0].params,
            "M MACs": round(trials[name][0].macs / 1e6, 2),
            "train loss": f"{last_losses[name]:.4f}",
            "test top-1": f"{mean(scores[name]):.2%}",
            "spread": f"{mean_and_spread(scores[name])[1]:.2%}",
            "seconds": round(mean(t.seconds for t in trials[name]), 1),
        }
        for name, size in sizes.items()
    ]
    return conclude(run, rows, scaling_verdict(scores, last_losses))


def blocks_of(size: Size) -> int:
    """MBConv blocks in all stages."""
    return sum(stage.layers for stage in scale_stages(B0, depth_mult=size.depth_mult))


def growth(size: Size, trial: Trial) -> tuple[float, ...]:
    """Blocks, width, pixels (rows times columns), weights and multiply-adds."""
    return blocks_of(size), size.width_mult, size.image_size**2, trial.params, trial.macs


def draw_errors(scores: dict[str, list[float]], title: str, ax: object) -> None:
    """Test errors as bars, of test accuracies by name; with more than one seed, mean and spread."""
    seeds = len(next(iter(scores.values())))
    plotting.bars(
        {name: 1 - mean(values) for name, values in scores.items()},
        "test error",
        f"{title}, mean and spread of {seeds} seeds" if seeds > 1 else title,
        {n: mean_and_spread(v)[1] for n, v in scores.items()} if seeds > 1 else None,
        percent=True,
        colors=plotting.PALETTE,
        ax=ax,
    )


def scaling_verdict(scores: dict[str, list[float]], last_losses: dict[str, float]) -> list[str]:
    """Whether all three together beat each alone.

    Args:
        scores: test accuracies of the same seeds, by name.
        last_losses: mean training losses of the last epoch, by name.
    """
    average = {name: mean(values) for name, values in scores.items()}
    start = average.pop("start")
    verdict = [
        f"{name}: {value:.2%}, {'up' if value > start else 'not up'} from the start's {start:.2%}"
        for name, value in sorted(average.items(), key=lambda item: -item[1])
    ]
    compound = average.pop("compound")
    best = max(average, key=average.get)
    gap = compound - average[best]
    noise = max(mean_and_spread(scores[name])[1] for name in ("compound", best))
    if gap > 0:
        claim = (
            f"the claim holds here: compound scaling is {gap:.2%} ahead of the best axis, {best}"
        )
    elif gap == 0:
        claim = f"no decision here: compound scaling is level with the best axis, {best}"
    else:
        claim = f"the claim fails here: {best} alone is {-gap:.2%} ahead of compound scaling"
    verdict.append(claim)
    if len(scores["compound"]) == 1:
        verdict.append("one seed says nothing of chance: try --seeds 3")
    elif abs(gap) <= 2 * noise:
        verdict.append(
            f"the gap is within twice the spread over seeds ({noise:.2%}), so chance could turn it"
        )
    behind = [n for n, loss in last_losses.items() if loss > 2 * min(last_losses.values())]
    if behind:
        verdict.append(
            f"{', '.join(behind)}: training loss still over twice the lowest, so that the speed of "
            "learning decides as much as what a net can learn; try --epochs 30"
        )
    return verdict


# %% [markdown]
# ## Experiment 2: let a search find the rows of the table
#
# Where did B0's kernels, expansions and layers come from? From a search like that of MnasNet (Tan
# et al. 2019), which trained about 8,000 nets for five epochs each. In small: four stages of three
# genes each, and a budget of multiply-adds. A candidate is trained on a *proxy task*, at half the
# resolution and for a few epochs, and judged by its validation loss.
#
# The hard question of every such search is whether it beats drawing nets by lot at the same cost.


# %%
CHOICES: dict[str, tuple[int, ...]] = {
    "expansion": (1, 3, 6),
    "kernel_size": (3, 5),
    "layers": (1, 2, 3),
}
ROWS = scale_stages(B0[:4], width_mult=0.5)  # channels and strides stay, and B0's own genes compete
POPULATION, TOURNAMENT = 8, 3


class Candidate(NamedTuple):
    """A net of the space, and how the proxy task judged it."""

    stages: tuple[Stage, ...]
    macs: int
    val_loss: float


def spell(stages: tuple[Stage, ...]) -> str:
    """The genes in short: expansion, kernel, layers.

    >>> spell(ROWS)
    'e1k3x1 e6k3x2 e6k5x2 e6k3x3'
    """
    return " ".join(f"e{s.expansion}k{s.kernel_size}x{s.layers}" for s in stages)


def random_stages(rng: random.Random) -> tuple[Stage, ...]:
    """Every gene by lot."""
    return tuple(
        row._replace(**{gene: rng.choice(values) for gene, values in CHOICES.items()})
        for row in ROWS
    )


def mutate(stages: tuple[Stage, ...], rng: random.Random) -> tuple[Stage, ...]:
    """One gene of one stage changed to another value."""
    i, gene = rng.randrange(len(stages)), rng.choice(list(CHOICES))
    others = [value for value in CHOICES[gene] if value != getattr(stages[i], gene)]
    changed = stages[i]._replace(**{gene: rng.choice(others)})
    return (*stages[:i], changed, *stages[i + 1 :])


# %% [markdown]
# Both searches have the same proxy, the same budget and the same number of nets to train, and share
# the first few, drawn by lot. Then evolution breeds: a few members of the population meet, and the
# best of them has a child that differs by one gene. The oldest member dies, however good it was, so
# that a lucky training run can't rule for ever (Real et al. 2019, algorithm 1).


# %%
class Proxy:
    """The cheap task by which nets are judged, and the multiply-adds that they may cost.

    Args:
        config: resolved; the proxy takes half of its image size, and `proxy_epochs`.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.full_size = (3, config.image_size, config.image_size)
        self.small_input, self.device = config.small_input, device
        self.config = replace(
            config, image_size=config.image_size // 2, epochs=config.proxy_epochs, warmup=0
        )
        self.data = load_data(self.config, device)
        self.limit = config.budget * self.macs(ROWS)

    def build(self, stages: tuple[Stage, ...], num_classes: int) -> EfficientNet:
        return EfficientNet(
            stages,
            round_channels(STEM_CHANNELS / 2),
            num_classes,
            self.small_input,
            dropout=0.0,
            stochastic_depth=0.0,
        )

    def macs(self, stages: tuple[Stage, ...]) -> int:
        """Of one image at the full size."""
        with torch.device("meta"):
            return count_macs(self.build(stages, self.data.num_classes), self.full_size)

    def judge(self, stages: tuple[Stage, ...]) -> float:
        """Validation loss after a few epochs, always from the same seed."""
        set_up_torch(self.device, self.config.seed, self.config.deterministic)
        model = self.build(stages, self.data.num_classes)
        model = model.to(self.device, memory_format=torch.channels_last)
        optimizer = make_optimizer(model, self.config)
        schedule = make_schedule(optimizer, self.config, self.data.train)
        loss_fn = nn.CrossEntropyLoss()
        history = fit(model, self.data, loss_fn, optimizer, schedule, self.config, label="proxy")
        return history[-1].val_loss


def by_lot(found: list[Candidate], rng: random.Random) -> tuple[Stage, ...]:
    """Random search: what came before doesn't matter."""
    return random_stages(rng)


def by_evolution(found: list[Candidate], rng: random.Random) -> tuple[Stage, ...]:
    """The child of the best of a few; the youngest candidates are the population."""
    population = found[-POPULATION:]
    rivals = rng.sample(population, min(TOURNAMENT, len(population)))
    parent = min(rivals, key=lambda candidate: candidate.val_loss)
    return mutate(parent.stages, rng)


PATIENCE = 500  # proposals in vain, before the budget is called too small


def search(
    name: str,
    propose: Callable[[list[Candidate], random.Random], tuple[Stage, ...]],
    proxy: Proxy,
    first: list[Candidate],
    nets: int,
    rng: random.Random,
) -> list[Candidate]:
    """Propose and judge until there are `nets` candidates, of which `first` are given.

    A proposal that is over the budget, or was seen before, is made again; only training costs.
    """
    found, vain = list(first), 0
    while len(found) < nets:
        stages = propose(found, rng)
        macs = proxy.macs(stages)
        if macs > proxy.limit or any(stages == candidate.stages for candidate in found):
            vain += 1
            if vain == PATIENCE:
                raise UserError(
                    f"--budget {proxy.config.budget}: {len(found)} nets were found within it, "
                    f"not --nets {nets}"
                )
            continue
        candidate, vain = Candidate(stages, macs, proxy.judge(stages)), 0
        if not found or candidate.val_loss < min(c.val_loss for c in found):
            print(
                f"{name:<10} net {len(found) + 1:>3} of {nets}  val loss {candidate.val_loss:.4f}  "
                f"{macs / 1e6:.2f} M MACs  {spell(stages)}",
                flush=True,
            )
        found.append(candidate)
    return found


# %%
SEARCHES = {"evolution": by_evolution, "random": by_lot}


def architecture_search(config: Config) -> dict[str, object]:
    """Evolution against chance on the proxy task; then the winners, and B0's own rows, in full."""
    config, device = prepare(config)
    proxy = Proxy(config, device)
    run = Run.open(config, LESSON)
    first = search(
        "first", by_lot, proxy, [], min(POPULATION, config.nets), random.Random(config.seed)
    )
    found = {
        name: search(name, propose, proxy, first, config.nets, random.Random(config.seed + 1))
        for name, propose in SEARCHES.items()
    }
    finalists = {n: min(f, key=lambda candidate: candidate.val_loss) for n, f in found.items()}
    finalists["B0's rows"] = Candidate(ROWS, proxy.macs(ROWS), proxy.judge(ROWS))

    data = load_data(config, device)
    trials: dict[str, list[Trial]] = {}
    for name, finalist in finalists.items():
        make = partial(proxy.build, finalist.stages, data.num_classes)
        trials[name] = [
            train_trial(name, make, data, replace(config, seed=config.seed + i), device)
            for i in range(config.seeds)
        ]
    scores = {name: [t.test_top1 for t in runs] for name, runs in trials.items()}

    figure, (best, proposed, genes, final) = plotting.panels(
        4, f"{config.nets} nets each, on {data.name}: does evolution beat chance?", columns=2
    )
    losses = {name: [c.val_loss for c in f] for name, f in found.items()}
    plotting.curves(
        {name: np.minimum.accumulate(values) for name, values in losses.items()},
        "nets trained", "validation loss", "The best net so far, on the proxy task", ax=best,
    )  # fmt: skip
    plotting.curves(
        losses, "nets trained", "validation loss", "Every net proposed", smooth=8, ax=proposed
    )
    labels, worth = gene_worth(found["evolution"] + found["random"][len(first) :])
    plotting.heatmap(
        worth,
        labels,
        [f"stage {i + 1}" for i in range(len(ROWS))],
        "What a gene is worth: how far it lowers the mean loss",
        label="validation loss saved",
        fmt="{:+.2f}",
        ax=genes,
    )
    draw_errors(scores, "Trained in full: test error", final)
    run.figure("search", figure)
    rows = [
        {
            "net": name,
            "genes": spell(finalist.stages),
            "parameters": trials[name][0].params,
            "M MACs": round(finalist.macs / 1e6, 2),
            "proxy loss": f"{finalist.val_loss:.4f}",
            "test top-1": f"{mean(scores[name]):.2%}",
            "spread": f"{mean_and_spread(scores[name])[1]:.2%}",
        }
        for name, finalist in finalists.items()
    ]
    verdict = search_verdict(found, len(first), scores)
    return conclude(run, rows, verdict, proxy_losses=losses)


def gene_worth(candidates: list[Candidate]) -> tuple[list[str], np.ndarray]:
    """By how much the candidates with each value of each gene are better, (values, stages)."""
    labels = [f"{gene} {value}" for gene, values in CHOICES.items() for value in values]
    worth = np.full((len(labels), len(ROWS)), np.nan)
    for row, (gene, value) in enumerate((g, v) for g, values in CHOICES.items() for v in values):
        for stage in range(len(ROWS)):
            having = [c.val_loss for c in candidates if getattr(c.stages[stage], gene) == value]
            if having:
                worth[row, stage] = mean(c.val_loss for c in candidates) - mean(having)
    return [label.replace("_size", "") for label in labels], worth


def search_verdict(
    found: dict[str, list[Candidate]], shared: int, scores: dict[str, list[float]]
) -> list[str]:
    """Evolution against chance: the best net, what was proposed, and what it was good for."""
    losses = {name: [c.val_loss for c in candidates] for name, candidates in found.items()}
    best = {name: min(values) for name, values in losses.items()}
    ahead = "evolution" if best["evolution"] < best["random"] else "random search"
    if best["evolution"] == best["random"]:
        ahead = "neither search"
    verdict = [
        f"on the proxy task {ahead} found the better net: validation loss {best['evolution']:.4f} "
        f"by evolution, {best['random']:.4f} by lot"
    ]
    bred, drawn = losses["evolution"][shared:], losses["random"][shared:]
    if len(bred) > 1:
        (low, low_spread), (high, high_spread) = mean_and_spread(bred), mean_and_spread(drawn)
        error = ((low_spread**2 + high_spread**2) / len(bred)) ** 0.5
        sure = "more" if abs(high - low) > 2 * error else "no more"
        verdict.append(
            f"the nets it bred have a mean loss of {low:.4f}, those drawn by lot {high:.4f}: "
            f"{'better' if low < high else 'no better'}, by {sure} than two standard errors"
        )
    for rival in ("random", "B0's rows"):
        gap = mean(scores["evolution"]) - mean(scores[rival])
        noise = max(mean_and_spread(scores[name])[1] for name in ("evolution", rival))
        word = "ahead of" if gap > 0 else "behind" if gap < 0 else "level with"
        chance = "" if len(scores[rival]) == 1 else f" (spread over seeds {noise:.2%})"
        verdict.append(
            f"trained in full, evolution's net is {word} {rival} by {abs(gap):.2%}{chance}"
        )
    return verdict


EXPERIMENTS: dict[str, Callable[[Config], object]] = {
    "compound-scaling": compound_scaling,
    "search": architecture_search,
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
        num_classes=num_classes,
        small_input=config.small_input,
        width_mult=config.width_mult,
        depth_mult=config.depth_mult,
        stochastic_depth=config.stochastic_depth,
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

    test = evaluate(model, data.test, data.class_names)  # the only look at the test images
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
# - In B0 the 1x1 convolutions inside the blocks take 83% of the multiply-adds, the depthwise ones
#   9% and the gates of squeeze-and-excitation 0.2%, for 12% of the parameters
#   (`--model efficientnet_b0 --dataset imagenet --summary` has the parts).
# - B0 has a tenth of ResNet-50's multiply-adds and a fifth of its parameters. torchvision's
#   weights reach 77.7% on ImageNet, against 76.1% (its first recipe for ResNet-50).
# - One step of $\phi$ from B0 is B2. It should cost twice as much and costs 2.6 times: layers are
#   rounded up, so that 20% more layers turn 16 blocks into 23.
# - A search finds what its proxy rewards. The genes that its figure calls worth most learn fast in
#   a few epochs at half the resolution, which is not quite what they were wanted for.
#
# ## Exercises
#
# 1. Write `SqueezeExcitation` without looking. Why does B0 lose 0.6 million parameters without it?
# 2. Write `StochasticDepth`. What does the net compute in evaluation if you forget to divide by
#    `keep`? Test it: the mean of many draws must be the input.
# 3. Count the multiply-adds of `MBConv(24, 40, 5, stride=2)` on a 56 x 56 map, then without
#    expansion. Compare with a 5x5 convolution from 24 to 40 channels.
# 4. Let the rate of stochastic depth be the same in all blocks, at the same mean. Is it worse?
# 5. Repeat `--experiment compound-scaling` with `--factor 8`, then with proportions of your own in
#    `DIRECTIONS`. Are the paper's the best for small nets on small images?
# 6. Depth alone learns slowly in a short run. Start the last norm of each residual branch at zero,
#    as lesson 1 does, and repeat the comparison. What changes, and for whom?
# 7. Run the search with `--proxy-epochs 1` and `--proxy-epochs 4`. When does its ranking of the
#    three finalists agree with theirs when trained in full?

# %%
if __name__ == "__main__":
    main(config, MODELS, build, run, EXPERIMENTS)
