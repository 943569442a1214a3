"""EfficientNet: grow depth, width and resolution together."""

# %%
from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.profiling import count_macs

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
    """Zero an image's residual branch with probability `rate` in training.  Huang et al. 2016, eq. 2.

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
# ## The paper's claim, before any training: four ways to spend the same multiply-adds
#
# Every row below doubles the cost when phi grows by one, because `depth * width^2 * resolution^2 =
# 2`. They differ in what the cost buys.


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


def stretch(base: Size, direction: Direction, phi: float) -> Size:
    """Follow `direction` for `phi` steps.

    >>> stretch(Size(1.0, 1.0, 224), DIRECTIONS["compound"], phi=1)
    Size(width_mult=1.1, depth_mult=1.2, image_size=258)
    """
    return Size(
        base.width_mult * direction.width**phi,
        base.depth_mult * direction.depth**phi,
        round(base.image_size * direction.resolution**phi),
    )


def build(size: Size, **options: float | bool) -> EfficientNet:
    """B0's table in that size."""
    return efficientnet("efficientnet_b0", size.width_mult, size.depth_mult, **options)


@cache
def macs(size: Size, **options: float | bool) -> int:
    """Multiply-adds of one image, counted on the meta device, where nothing is computed."""
    with torch.device("meta"):
        model = build(size, **options)
    return count_macs(model, (3, size.image_size, size.image_size))


def stretch_to(
    target_macs: float, base: Size, direction: Direction, **options: float | bool
) -> Size:
    """The size along `direction` whose multiply-adds come closest to the target.

    Found by bisection over phi: the cost never falls when phi grows.
    Layers are whole, channels come in eights and pixels in ones, so the real cost climbs in steps
    and phi from the formula misses it.
    """
    low, high = 0.0, 2 * math.log2(target_macs / macs(base, **options))
    for _ in range(7):
        middle = (low + high) / 2
        if macs(stretch(base, direction, middle), **options) < target_macs:
            low = middle
        else:
            high = middle
    ends = stretch(base, direction, low), stretch(base, direction, high)
    return min(ends, key=lambda size: abs(macs(size, **options) - target_macs))
