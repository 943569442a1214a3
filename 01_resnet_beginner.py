"""Lesson 1, beginner: ResNet, learning the difference.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2015 (arXiv 1512.03385).

The idea in one sentence: let a block of layers learn what to add to its input instead of its whole
output, and a network of a hundred layers trains as easily as one of ten.

    python 01_resnet_beginner.py                               # trains: digits, on a GPU CIFAR-10
    python 01_resnet_beginner.py --experiment skip-connections # the paper's claim, measured
    python 01_resnet_beginner.py --model resnet50 --summary    # what is inside

Measured on two cores of an Intel Xeon with AMX, torch 2.15, seed 0:

    default, resnet18            digits at 8 px, 12 epochs: test 98.61%, 26 s of training
    skip-connections             the same, 56 layers: plain 25.35%, residual 98.05%, pre-activation
                                 98.61%; all six nets in 72 s
    resnet20, CIFAR-10           JPEG copy, 8 epochs, bfloat16: test 80.53%, 380 s of training
"""

# %% [markdown]
# ## The problem, and the one equation
#
# A deeper network contains the shallower one: let the extra layers copy their input, and it
# computes the same. So it should never do worse. Before 2015 it did, on the *training* set too: 56
# plain layers ended above 20 (the paper's figure 1). Solvers find it hard to make a stack of layers
# copy. ResNet makes copying the default:
#
# $$y = x + F(x)$$
#
# With $F = 0$ the block is the identity, and the gradient reaches $x$ undiminished, whatever $F$
# does: $\partial y / \partial x = 1 + F'(x)$.
#
#         x ──────────────┬── conv ── BN ── ReLU ── conv ── BN ──(+)── ReLU ── y
#                         └──────────── shortcut ─────────────────┘

# %%
from common.cli import in_notebook, main, parse_flags
from common.config import TrainConfig, knob

from dataclasses import dataclass


@dataclass(frozen=True)
class Config(TrainConfig):
    """What this lesson can be told; every field is a flag, and `--help` prints them all."""

    model: str = knob(
        "resnet18", "a name of MODELS: resnet18, resnet50, resnext50_32x4d, resnet20, ..."
    )
    shortcut: str = knob(
        "",
        "where the shape changes: A pads with zeros, B projects (default: as in the paper)",
        ("A", "B", ""),
    )
    zero_init_residual: bool = knob(True, "start each residual branch at zero")
    depths: str = knob(
        "20,56", "layers of the nets that --experiment skip-connections compares", low=8, high=1202
    )

    # What differs from the defaults of common/config.py; the record at the top was measured with
    # these.
    RECIPES = {"digits": {"image_size": 8, "epochs": 12, "batch_size": 64, "base_lr": 0.2}}


# Flags are read before torch is imported, so that --help answers at once; a notebook gets the
# defaults.
config = parse_flags(Config) if __name__ == "__main__" else Config()

# %%
import inspect
from collections.abc import Callable
from functools import partial
from statistics import mean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import plotting
from common.engine.device import memory_format
from common.augmentation import Views
from common.data import load_data
from common.engine.errors import UserError
from common.evaluation import evaluate
from common.experiments import Trial, conclude, run_experiment, train_trial
from common.pretrained import load_pretrained, weights_mean_std
from common.profiling import profile
from common.resnet9 import ResNet9, bag_of_tricks
from common.runs import Run, banner, draw_figures, prepare
from common.training import (
    fit,
    make_optimizer,
    make_schedule,
    measure_layers,
    train_one_epoch,
)

# %% [markdown]
# ## The shortcut: three ways to carry the input past the block
#
# Where a block keeps its shape the shortcut is the identity. Where it halves the resolution and
# widens the channels, something has to give. The paper's options: **A** subsamples and pads with
# zeros (no parameters), **B** projects with a 1x1 convolution.


# %%
class PadShortcut(nn.Module):
    """Option A: every `stride`-th pixel, missing channels filled with zeros.  He et al. 2015, sec.
    3.3.

    (N, C_in, H, W) -> (N, C_out, H/stride, W/stride), no parameters.

    >>> PadShortcut(16, 32, stride=2)(torch.ones(1, 16, 8, 8)).shape
    torch.Size([1, 32, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        # F.pad lists (before, after) from the last dimension backwards: width, height, channels.
        return F.pad(x, (0, 0, 0, 0, 0, self.extra_channels))


def make_shortcut(option: str, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The identity where the shape stays; else option "A" (pad) or "B" (project)."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if option == "A":
        return PadShortcut(in_channels, out_channels, stride)
    if option != "B":
        raise ValueError(f"shortcut is 'A' (pad) or 'B' (project), not {option!r}")
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


# %% [markdown]
# ## Squeeze-and-excitation: let each channel ask the whole image how much it matters


# %%
class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate in (0, 1) computed from all channels' means.  Hu et al. 2018,
    sec. 3.

    (N, C, H, W) -> (N, C, H, W). 1x1 convolutions are linear layers that keep the last two
    dimensions.

    >>> SqueezeExcitation(64)(torch.zeros(1, 64, 8, 8)).shape
    torch.Size([1, 64, 8, 8])
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // reduction, 1)
        self.excite = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean(dim=(2, 3), keepdim=True)  # (N, C, 1, 1)
        gate = F.relu(self.squeeze(gate))  # (N, C/reduction, 1, 1)
        gate = torch.sigmoid(self.excite(gate))  # (N, C, 1, 1)
        return x * gate


# %% [markdown]
# ## The basic block: learn the difference, add it to the input


# %%
class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.  He et al. 2015, fig. 5 left.

    (N, C_in, H, W) -> (N, channels, H/stride, W/stride)

    >>> BasicBlock(64, 128, stride=2)(torch.zeros(1, 64, 8, 8)).shape
    torch.Size([1, 128, 4, 4])
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        shortcut: str = "B",
        se_reduction: int = 0,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.se = SqueezeExcitation(channels, se_reduction) if se_reduction else nn.Identity()
        self.shortcut = make_shortcut(shortcut, in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = self.se(self.bn2(self.conv2(residual)))
        return F.relu(residual + self.shortcut(x))


# %% [markdown]
# ## The bottleneck: squeeze, convolve, expand
#
# At 50 layers and more, two 3x3 convolutions at full width cost too much. A 1x1 first narrows the
# channels by four, so that the 3x3 in the middle is cheap, and a second 1x1 widens them again. With
# `groups` the middle convolution becomes ResNeXt's set of parallel paths; with a larger
# `base_width` the net becomes a Wide ResNet.


# %%
class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut.  He et al. 2015, fig. 5 right.

    (N, C_in, H, W) -> (N, 4 * channels, H/stride, W/stride)

    NOTE: the stride sits on the 3x3 and not, as in the paper, on the first 1x1, which would skip
    three pixels of four unseen. torchvision and ResNeXt do the same ("ResNet v1.5").

    >>> Bottleneck(64, 64)(torch.zeros(1, 64, 8, 8)).shape
    torch.Size([1, 256, 8, 8])
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        shortcut: str = "B",
        se_reduction: int = 0,
        groups: int = 1,
        base_width: int = 64,
    ) -> None:
        super().__init__()
        width = channels * base_width // 64 * groups
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.se = SqueezeExcitation(out_channels, se_reduction) if se_reduction else nn.Identity()
        self.shortcut = make_shortcut(shortcut, in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)))  # (N, width, H, W)
        residual = F.relu(self.bn2(self.conv2(residual)))  # (N, width, H/stride, W/stride)
        residual = self.se(self.bn3(self.conv3(residual)))  # (N, 4 * channels, H/stride, W/stride)
        return F.relu(residual + self.shortcut(x))


# %% [markdown]
# ## Two relatives for the experiment: no shortcut, and a shortcut that nothing touches


# %%
class PlainBlock(nn.Module):
    """The basic block without its shortcut: what everyone stacked before 2015.  He et al. 2015,
    fig. 3 middle.

    (N, C_in, H, W) -> (N, channels, H/stride, W/stride)

    >>> PlainBlock(64, 128, stride=2)(torch.zeros(1, 64, 8, 8)).shape
    torch.Size([1, 128, 4, 4])
    """

    expansion = 1

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, shortcut: str = ""
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class PreActBlock(nn.Module):
    """BatchNorm and ReLU before each convolution, so that the sum is never rectified and the
    identity runs from the stem to the head.  He et al. 2016, fig. 4(e).

    (N, C_in, H, W) -> (N, channels, H/stride, W/stride)

    >>> PreActBlock(64, 128, stride=2)(torch.zeros(1, 64, 8, 8)).shape
    torch.Size([1, 128, 4, 4])
    """

    expansion = 1

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, shortcut: str = "B"
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = make_shortcut(shortcut, in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        residual = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        if isinstance(self.shortcut, nn.Identity):
            return residual + x
        # A projection starts from the activated input, as in the authors' code.
        return residual + self.shortcut(activated)


# %% [markdown]
# ## The model: stem, stages, head


# %%
class ResNet(nn.Module):
    """(N, 3, H, W) -> (N, num_classes).  He et al. 2015, table 1.

    A 7x7 stem and a max-pool quarter the resolution, each stage after the first halves it and
    widens the channels, and the head averages what is left.

    Args:
        block: the class that every stage repeats.
        depths: blocks per stage.
        channels: width of each stage, before the block's `expansion`.
        stem_channels: width of the stem; 64 on ImageNet, 16 on CIFAR.
        small_input: a 3x3 stem of stride 1 and no max-pool, for images of 32 pixels and less.
            NOTE: the paper has no such form of ResNet-18 to -152; it's the one of the CIFAR
                literature.
        zero_init_residual: start the last BatchNorm of each residual branch at zero, so that each
            block starts as the identity.  Goyal et al. 2017, sec. 5.1.
        **block_options: handed to each block: `shortcut`, `se_reduction`, `groups`, `base_width`.
    """

    def __init__(
        self,
        block: type[nn.Module],
        depths: tuple[int, ...],
        channels: tuple[int, ...] = (64, 128, 256, 512),
        stem_channels: int = 64,
        num_classes: int = 1000,
        small_input: bool = False,
        zero_init_residual: bool = True,
        **block_options: int | str,
    ) -> None:
        super().__init__()
        if small_input:
            stem = [nn.Conv2d(3, stem_channels, 3, padding=1, bias=False)]
        else:
            stem = [nn.Conv2d(3, stem_channels, 7, stride=2, padding=3, bias=False)]
        preact = block is PreActBlock  # its blocks bring their own BatchNorm and ReLU
        if not preact:
            stem += [nn.BatchNorm2d(stem_channels), nn.ReLU()]
        if not small_input:
            stem += [nn.MaxPool2d(3, stride=2, padding=1)]
        self.stem = nn.Sequential(*stem)

        stages, in_channels = [], stem_channels
        for i, (depth, width) in enumerate(zip(depths, channels)):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(in_channels, width, stride, **block_options))
                in_channels = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        last = [nn.BatchNorm2d(in_channels), nn.ReLU()] if preact else []
        self.head = nn.Sequential(
            *last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes)
        )
        self.init_weights(zero_init_residual)

    def init_weights(self, zero_init_residual: bool) -> None:
        """He initialisation keeps the variance through ReLUs.  He et al. 2015, "Delving deep"."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            # A plain net has no shortcut to fall back on, and a pre-activation branch ends in a
            # convolution.
            elif zero_init_residual and isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif zero_init_residual and isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, H/32, W/32), the last feature map; H/8, W/8 if small."""
        return self.stages(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))

    def get_classifier(self) -> nn.Linear:
        return self.head[-1]

    def reset_classifier(self, num_classes: int) -> None:
        old = self.head[-1]
        self.head[-1] = nn.Linear(old.in_features, num_classes).to(old.weight)


# %% [markdown]
# ## The paper's tables as data


# %%
class Row(NamedTuple):
    """One line of the table: which block, how many per stage, and what the block is told."""

    block: type[nn.Module]
    depths: tuple[int, ...]
    options: dict[str, int | str] = {}


TABLE: dict[str, Row] = {
    # He et al. 2015, table 1
    "resnet18": Row(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Row(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Row(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Row(Bottleneck, (3, 4, 23, 3)),
    "resnet152": Row(Bottleneck, (3, 8, 36, 3)),
    # Zagoruyko and Komodakis 2016; Xie et al. 2017, table 1
    "wide_resnet50_2": Row(Bottleneck, (3, 4, 6, 3), {"base_width": 128}),
    "resnext50_32x4d": Row(Bottleneck, (3, 4, 6, 3), {"groups": 32, "base_width": 4}),
    "resnext101_32x8d": Row(Bottleneck, (3, 4, 23, 3), {"groups": 32, "base_width": 8}),
    # Hu et al. 2018, table 1
    "se_resnet18": Row(BasicBlock, (2, 2, 2, 2), {"se_reduction": 16}),
    "se_resnet50": Row(Bottleneck, (3, 4, 6, 3), {"se_reduction": 16}),
    # He et al. 2016; He et al. 2015, fig. 3 middle
    "preact_resnet18": Row(PreActBlock, (2, 2, 2, 2)),
    "plainnet18": Row(PlainBlock, (2, 2, 2, 2)),
    "plainnet34": Row(PlainBlock, (3, 4, 6, 3)),
}


def resnet(
    name: str, num_classes: int = 1000, small_input: bool = False, **options: int | str | bool
) -> ResNet:
    """The model of one row of the table; further options are `zero_init_residual`, `shortcut`."""
    row = TABLE[name]
    options = {**row.options, **options}
    return ResNet(
        row.block, row.depths, num_classes=num_classes, small_input=small_input, **options
    )


def cifar_resnet(
    depth: int,
    block: type[nn.Module] = BasicBlock,
    num_classes: int = 1000,
    small_input: bool = False,
    **options: int | str | bool,
) -> ResNet:
    """The nets of section 4.2: depth = 6n + 2, three stages of n blocks, 16, 32 and 64 wide.

    They have one form, for 32x32 images, whatever `small_input` says. `shortcut` is "A" by
    default, as in the paper; "B" projects.

    >>> sum(p.numel() for p in cifar_resnet(20, num_classes=10).parameters())
    269722
    """
    n, rest = divmod(depth - 2, 6)
    if rest or n < 1:
        raise ValueError(f"a CIFAR ResNet has depth 6n + 2 (8, 14, 20, ...), not {depth}")
    options = {"shortcut": "A", "num_classes": num_classes, **options}
    return ResNet(block, (n, n, n), (16, 32, 64), stem_channels=16, small_input=True, **options)


MODELS: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(resnet, name) for name in TABLE},
    **{f"resnet{depth}": partial(cifar_resnet, depth) for depth in (20, 32, 44, 56, 110)},
    "resnet9": ResNet9,  # nine layers that learn CIFAR-10 on a laptop: common/resnet9.py
}


# %% [markdown]
# ## The experiment: does the shortcut do it?
#
# Three families at equal depth, with the same parameters but for a few norms, the same seeds and
# the same recipe: no shortcut, the shortcut of 2015, the clean shortcut of 2016. Watch three
# things: whether the deeper net *trains* worse than the shallower one, how they test, and how much
# gradient reaches the first layer.


# %%
FAMILIES: dict[str, type[nn.Module]] = {
    "plain": PlainBlock,
    "residual": BasicBlock,
    "pre-activation": PreActBlock,
}


def skip_connections(config: Config) -> dict[str, object]:
    """Figures 1 and 6 of the paper at the size of the dataset: a figure and a verdict."""
    depths = parse_depths(config.depths)
    config, device = prepare(config)
    data = load_data(config, device)
    run = Run.open(config, "01_resnet_beginner")
    trials: dict[tuple[str, int], Trial] = {}
    for depth in depths:
        for family, block in FAMILIES.items():
            # Branches that start at zero came later and would help one family only.
            build = partial(
                cifar_resnet, depth, block, num_classes=data.num_classes, zero_init_residual=False
            )
            trials[family, depth] = train_trial(f"{family}-{depth}", build, data, config, device)

    named = {t.name: t for t in trials.values()}
    figure, (loss, accuracy, gradient) = plotting.panels(3, "Skip connections at equal depth")
    losses = {n: [r.train_loss for r in t.history] for n, t in named.items()}
    plotting.curves(losses, "epoch", "training loss", "Training loss", ax=loss)
    tests = {n: t.test_top1 for n, t in named.items()}
    plotting.bars(
        tests, "test top-1", "Test accuracy", percent=True, colors=plotting.PALETTE, ax=accuracy
    )
    norms = {n: t.first_layer_gradient for n, t in named.items()}
    steps = max(1, len(norms[f"plain-{depths[0]}"]) // 20)
    plotting.curves(
        norms, "step", "norm", "Gradient at the first layer", log_y=True, smooth=steps, ax=gradient
    )
    run.figure("skip_connections", figure)
    rows = [
        {**t.row(), "first gradient": f"{mean(t.first_layer_gradient[:steps]):.3g}"}
        for t in named.values()
    ]
    return conclude(run, rows, skip_verdict(trials, depths))


def parse_depths(text: str) -> list[int]:
    """The depths of a text such as 20,56; each must be of the form 6n + 2."""
    try:
        depths = [int(part) for part in text.split(",")]
    except ValueError:
        depths = []
    if not depths or any(depth < 8 or (depth - 2) % 6 for depth in depths):
        raise UserError(f"--depths {text}: wants depths of the form 6n + 2, such as 20,56")
    return depths


def skip_verdict(trials: dict[tuple[str, int], Trial], depths: list[int]) -> list[str]:
    """What the numbers say of the paper's two claims, whichever way they fall."""
    shallow, deep = min(depths), max(depths)

    def loss(family: str, depth: int) -> float:
        return trials[family, depth].history[-1].train_loss

    verdict = []
    if shallow != deep:
        for family in FAMILIES:
            before, after = loss(family, shallow), loss(family, deep)
            change = "train worse" if after > before else "train better"
            verdict.append(
                f"{family}: {deep} layers {change} than {shallow} (final training loss "
                f"{after:.4f} against {before:.4f})"
            )
    for family in ("residual", "pre-activation"):
        gap = trials[family, deep].test_top1 - trials["plain", deep].test_top1
        word = "ahead of" if gap > 0 else "behind" if gap < 0 else "level with"
        verdict.append(
            f"at {deep} layers {family} is {word} plain in test accuracy, by {abs(gap):.2%}"
        )
    degrades = shallow != deep and loss("plain", deep) > loss("plain", shallow)
    cured = degrades and loss("residual", deep) - loss("residual", shallow) < loss(
        "plain", deep
    ) - loss("plain", shallow)
    if not degrades:
        verdict.append(
            "the degradation of plain nets did not show here: try more depth (--depths 20,110)"
        )
    elif cured:
        verdict.append(
            "the claim holds here: depth hurts the plain net, and less so with the shortcut"
        )
    else:
        verdict.append("the claim fails here: the shortcut does not undo the harm that depth does")
    return verdict


EXPERIMENTS: dict[str, Callable[[Config], object]] = {
    "skip-connections": skip_connections,
    "bag-of-tricks": partial(run_experiment, "01_resnet_beginner", bag_of_tricks),
}

# %% [markdown]
# ## One run, from data to report
#
# Flat and explicit: this is the whole recipe. `fit` repeats `train_one_epoch`, whose source is in
# the last cell.


# %%
def build(config: Config, num_classes: int) -> nn.Module:
    """The model that the flags ask for."""
    options: dict[str, object] = {}
    if config.model != "resnet9":
        options["zero_init_residual"] = config.zero_init_residual
    if config.shortcut:
        options["shortcut"] = config.shortcut
    return MODELS[config.model](num_classes=num_classes, small_input=config.small_input, **options)


def run(config: Config) -> dict[str, object]:
    """Train, test once with the best epoch's weights, profile, draw, save."""
    config, device = prepare(config)
    # Trained weights bring the mean and deviation that they were trained with.
    mean_std = weights_mean_std(config.model) if config.pretrained else None
    data = load_data(config, device, mean_std)
    model = build(config, data.num_classes).to(
        device, memory_format=memory_format(config.image_size)
    )
    if config.pretrained:
        load_pretrained(model, config.model, data.class_names)
    else:
        measure_layers(model, data)  # the filters of ResNet-9's stem

    loss_fn = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, data.train)

    run = Run.open(config, "01_resnet_beginner")
    banner(config, device, data, model, run)
    history = fit(model, data, loss_fn, optimizer, schedule, config, run)

    # The only time that the test images are seen.
    test = evaluate(model, data.test, data.class_names)
    cost = profile(model, data.input_size)
    draw_figures(run, model, data, history, test)
    views = {}
    if config.views:  # the same images from six sides: never mixed with plain accuracy
        seen = evaluate(Views(model, data.test.part.flips), data.test, data.class_names)
        views = {"test_top1_views": seen.top1}
        print(f"views      top-1 {seen.top1:.2%}, shifted and mirrored views averaged")
    return run.finish(model, data, history, test, cost, **views)


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
# - The training loss starts near $\ln 10 = 2.3$, that of a guess among ten classes.
# - `most_wrong.png` shows digits that people get wrong too, `grad_cam.png` where the net looked.
# - ResNet-34 takes a quarter of VGG-16's multiply-adds (`--model resnet34 --image-size 224
#   --summary`).
#
# ## Exercises
#
# 1. Write `BasicBlock` without looking. With its last BatchNorm at zero, what does it compute?
# 2. Write option A of the shortcut. Why does ResNet-20 lose 2,752 parameters by it?
# 3. Write `Bottleneck`. How many multiply-adds does it take at 256 channels, and how many would
#    two 3x3 convolutions at that width?
# 4. Add squeeze-and-excitation to the basic block (`se_resnet18`). What share of the parameters
#    is it?
# 5. Repeat the experiment at 110 layers. From which step on does the plain net's gradient fall
#    behind?

# %%
if __name__ == "__main__":
    main(config, MODELS, build, run, EXPERIMENTS)
