"""Lesson 5: MobileNet, a convolution in two cheap steps."""

# %%
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.profiling import macs_by_module

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
# A standard convolution does two jobs at once: it filters in space and it mixes channels. Each of
# the C_out outputs looks at k x k pixels of all C_in channels. A **depthwise separable**
# convolution does the jobs one after the other: a k x k filter per channel (`groups` equals the
# number of channels, so no channel sees another), then a 1x1 convolution that mixes. For each
# output pixel that is
#
#     k*k*C_in + C_in*C_out   multiply-adds instead of   k*k*C_in*C_out
#
# and the share that is left is 1/C_out + 1/(k*k). With 3x3 kernels and many channels that is about
# one eighth to one ninth.


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
# clamp and a shift, and swish, x * sigmoid(x), by **h-swish**, x * ReLU6(x + 3) / 6. Nearly the
# same curves, cheap on a phone, and exact in 8-bit integers.


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
        """He initialisation, small random weights in the linear layers."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # In a depthwise layer an input channel reaches one output channel, not all of them.
                # Without the division by `groups` its weights would start sqrt(C) times too small.
                fan_out = module.weight[:, 0].numel() // module.groups
                nn.init.normal_(module.weight, 0, (2 / fan_out) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

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
# Table 2 of the first paper: after the separation nearly all the work is in 1x1 convolutions, which
# are plain matrix products and need no rearranging of memory. That is why V2 and V3 work on the 1x1
# layers.


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
