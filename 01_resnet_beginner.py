# placeholder head, replaced below

# %%
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# %%
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

# %% [markdown]
# ## The shortcut: three ways to carry the input past the block
#
# Where a block keeps its shape the shortcut is the identity. Where it halves the resolution and widens the
# channels, something has to give. The paper's options: **A** subsamples and pads with zeros (no parameters),
# **B** projects with a 1x1 convolution.


# %%
class PadShortcut(nn.Module):
    """Option A: every `stride`-th pixel, missing channels filled with zeros.  He et al. 2015, sec. 3.3.

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
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


# %% [markdown]
# ## Squeeze-and-excitation: let each channel ask the whole image how much it matters


# %%
class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate in (0, 1) computed from all channels' means.  Hu et al. 2018, sec. 3.

    (N, C, H, W) -> (N, C, H, W). 1x1 convolutions are linear layers that keep the last two dimensions.

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
# At 50 layers and more, two 3x3 convolutions at full width cost too much. A 1x1 first narrows the channels by
# four, so that the 3x3 in the middle is cheap, and a second 1x1 widens them again. With `groups` the middle
# convolution becomes ResNeXt's set of parallel paths; with a larger `base_width` the net becomes a Wide ResNet.


# %%
class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut.  He et al. 2015, fig. 5 right.

    (N, C_in, H, W) -> (N, 4 * channels, H/stride, W/stride)

    NOTE: the stride sits on the 3x3 and not, as in the paper, on the first 1x1, which would skip three pixels
    of four unseen. torchvision and ResNeXt do the same ("ResNet v1.5").

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
    """The basic block without its shortcut: what everyone stacked before 2015.  He et al. 2015, fig. 3 middle.

    (N, C_in, H, W) -> (N, channels, H/stride, W/stride)

    >>> PlainBlock(64, 128, stride=2)(torch.zeros(1, 64, 8, 8)).shape
    torch.Size([1, 128, 4, 4])
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1, shortcut: str = "") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class PreActBlock(nn.Module):
    """BatchNorm and ReLU before each convolution, so that the sum is never rectified and the identity runs
    from the stem to the head.  He et al. 2016, fig. 4(e).

    (N, C_in, H, W) -> (N, channels, H/stride, W/stride)

    >>> PreActBlock(64, 128, stride=2)(torch.zeros(1, 64, 8, 8)).shape
    torch.Size([1, 128, 4, 4])
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1, shortcut: str = "B") -> None:
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

    A 7x7 stem and a max-pool quarter the resolution, each stage after the first halves it and widens the
    channels, and the head averages what is left.

    Args:
        block: the class that every stage repeats.
        depths: blocks per stage.
        channels: width of each stage, before the block's `expansion`.
        stem_channels: width of the stem; 64 on ImageNet, 16 on CIFAR.
        small_input: a 3x3 stem of stride 1 and no max-pool, for images of 32 pixels and less.
            NOTE: the paper has no such form of ResNet-18 to -152; it's the one of the CIFAR literature.
        zero_init_residual: start the last BatchNorm of each residual branch at zero, so that each block starts
            as the identity.  Goyal et al. 2017, sec. 5.1.
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
        """He initialisation (He et al. 2015, "Delving deep"): variance kept from layer to layer through ReLU."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            # A plain net has no shortcut to fall back on, and a pre-activation branch ends in a convolution.
            elif zero_init_residual and isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif zero_init_residual and isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, h, w), the last feature map: 1/32 of the input's resolution, 1/8 if small."""
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


def resnet(name: str, **options: int | str | bool) -> ResNet:
    """The model of one row of the table: `num_classes`, `small_input`, `zero_init_residual`, `shortcut`."""
    row = TABLE[name]
    return ResNet(row.block, row.depths, **{**row.options, **options})


def cifar_resnet(
    depth: int, block: type[nn.Module] = BasicBlock, small_input: bool = True, **options: int | str | bool
) -> ResNet:
    """The nets of section 4.2: depth = 6n + 2, three stages of n blocks, 16, 32 and 64 channels wide.

    Their one form is the 32x32 form, whatever `small_input` says. `shortcut` is "A" by default, as in the
    paper; "B" projects.

    >>> sum(p.numel() for p in cifar_resnet(20, num_classes=10).parameters())
    269722
    """
    n, rest = divmod(depth - 2, 6)
    if rest or n < 1:
        raise ValueError(f"a CIFAR ResNet has depth 6n + 2 (8, 14, 20, ...), not {depth}")
    options = {"shortcut": "A", **options}
    return ResNet(block, (n, n, n), (16, 32, 64), stem_channels=16, small_input=True, **options)


MODELS: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(resnet, name) for name in TABLE},
    **{f"resnet{depth}": partial(cifar_resnet, depth) for depth in (20, 32, 44, 56, 110)},
}
