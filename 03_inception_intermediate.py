"""Lesson 3, intermediate: Inception, several filter sizes side by side.

Szegedy et al., "Going deeper with convolutions", 2015 (GoogLeNet, arXiv 1409.4842), and
Szegedy et al., "Rethinking the Inception architecture for computer vision", 2016 (Inception-v3,
arXiv 1512.00567).

The idea in one sentence: do not choose a filter size, use them all at once and let the next layer
choose, and pay for it with 1x1 convolutions that first narrow what the large filters read.

    python 03_inception_intermediate.py                            # trains; digits on a CPU
    python 03_inception_intermediate.py --experiment auxiliary     # do side classifiers help?
    python 03_inception_intermediate.py --experiment branches      # which branch does the work?
    python 03_inception_intermediate.py --experiment bottleneck    # what the 1x1 convolutions save
    python 03_inception_intermediate.py --model inception_v3 --summary

Measured on digits (8 px, 10 epochs, seed 0, torch 2.15, float32 on two cores of an Intel Xeon):

    default, googlenet    test 99.44%, 88 s of training
    auxiliary, two seeds  test without BatchNorm 34.3%, with auxiliary classifiers 51.0%; with
                          BatchNorm 98.7% and 99.0%; the first gradients are 1.61 and 0.95 times as
                          large; 166 s
    branches              the 3x3 branch gives most, 44% of the output from 44% of the channels, and
                          38% of the gradient; without that of 3a the loss rises by 3.64; 112 s
    bottleneck            without the 1x1 reductions 3.6 times the multiply-adds, in the naive form
                          10.9 times; in time 2.4 and 11.4 times; 16 s
"""

# %% [markdown]
# ## The problem, and the one equation
#
# A dog may fill the image or a corner of it: which filter size is right? VGG stacks 3x3 and pays
# 138 million parameters. Inception runs 1x1, 3x3, 5x5 and a pool side by side and concatenates:
#
#         input ─┬─ 1x1 ─────────────────┬─ concatenate ── output
#                ├─ 1x1 reduce ── 3x3 ───┤
#                ├─ 1x1 reduce ── 5x5 ───┤
#                └─ 3x3 max-pool ── 1x1 ─┘
#
# That is affordable only because a 1x1 convolution first reduces $C$ channels to $r$. At each place
# a $k \times k$ convolution with $D$ outputs then takes, in multiply-adds,
#
# $$C r + k^2 r D \quad\text{instead of}\quad k^2 C D$$
#
# With GoogLeNet's first 5x5 ($C = 192$, $r = 16$, $D = 32$): 15,872 instead of 153,600.

# %%
from common.cli import in_notebook, main, parse_flags
from common.config import TrainConfig, knob

from dataclasses import dataclass


@dataclass(frozen=True)
class Config(TrainConfig):
    """What this lesson can be told; every field is a flag, and `--help` prints them all."""

    model: str = knob("googlenet", "a name of MODELS: googlenet, inception_v3")
    aux: bool = knob(True, "train with auxiliary classifiers on the side")
    five_by_five: bool = knob(False, "GoogLeNet: a real 5x5 branch, as in the paper")
    batch_norm: bool = knob(True, "GoogLeNet: off gives the net of 2014")
    width_mult: float = knob(1.0, "GoogLeNet: factor on all channels", low=0.05, high=8)
    trial_width: float = knob(
        0.25, "width_mult of the nets that --experiment auxiliary trains", low=0.05, high=8
    )
    seeds: int = knob(2, "runs of each kind that --experiment auxiliary averages", low=1, high=100)
    clock: float = knob(
        0.5, "seconds that --experiment bottleneck times each module", low=0, high=60
    )

    # What differs from the defaults of common/config.py; the record at the top was measured with
    # these.
    RECIPES = {"digits": {"image_size": 8, "epochs": 10, "batch_size": 64, "base_lr": 0.2}}


# Flags are read before torch is imported, so that --help answers at once; a notebook gets the
# defaults.
config = parse_flags(Config) if __name__ == "__main__" else Config()

# %%
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import mean
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import plotting
from common.engine.device import memory_format
from common.data import Loader, load_data
from common.engine.errors import UserError
from common.evaluation import evaluate
from common.experiments import Trial, conclude, mean_and_spread, train_trial
from common.pretrained import load_pretrained, weights_mean_std
from common.profiling import profile
from common.runs import Run, banner, draw_figures, prepare
from common.evaluation import score
from common.training import fit, make_optimizer, make_schedule, train_one_epoch

LESSON = "03_inception_intermediate"

# %% [markdown]
# ## The convolution: every one is followed by BatchNorm and ReLU


# %%
class ConvBnReLU(nn.Sequential):
    """Convolution, BatchNorm, ReLU; the resolution stays unless stride or padding change it.

    (N, C_in, H, W) -> (N, C_out, H/stride, W/stride)

    NOTE: GoogLeNet of 2014 predates BatchNorm and had a bias instead: `batch_norm=False`. Everyone,
    torchvision included, has trained it with BatchNorm since Ioffe and Szegedy 2015; epsilon 0.001
    is the authors'.

    >>> ConvBnReLU(64, 96, (1, 7))(torch.zeros(2, 64, 8, 8)).shape
    torch.Size([2, 96, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        padding: int | None = None,
        batch_norm: bool = True,
    ) -> None:
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        super().__init__(
            nn.Conv2d(
                in_channels,
                out_channels,
                (height, width),
                stride,
                padding=(height // 2, width // 2) if padding is None else padding,
                bias=not batch_norm,
            ),
            nn.BatchNorm2d(out_channels, eps=0.001) if batch_norm else nn.Identity(),
            nn.ReLU(),
        )


# %% [markdown]
# ## The idea: do not choose a filter size, use them all


# %%
class Branches(nn.Module):
    """Run every branch on the same input and concatenate what they give along the channels.

    (N, C_in, H, W) -> (N, sum of the branches' C_out, h, w)

    >>> Branches(ConvBnReLU(16, 8, 1), ConvBnReLU(16, 24, 3))(torch.zeros(2, 16, 8, 8)).shape
    torch.Size([2, 32, 8, 8])
    """

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


# %%
class Widths(NamedTuple):
    """The channels of one GoogLeNet module, in the order of the paper's table 1.

    >>> Widths(64, 96, 128, 16, 32, 32).out_channels
    256
    """

    conv1x1: int
    reduce3x3: int
    conv3x3: int
    reduce5x5: int
    conv5x5: int
    pool_proj: int

    @property
    def out_channels(self) -> int:
        return self.conv1x1 + self.conv3x3 + self.conv5x5 + self.pool_proj

    def times(self, width_mult: float) -> "Widths":
        return Widths(*(round(width * width_mult) for width in self))


class Inception(Branches):
    """GoogLeNet's module.  Szegedy et al. 2015, fig. 2(b).

    (N, C_in, H, W) -> (N, widths.out_channels, H, W)

        input ─┬─ 1x1 ─────────────────┬─ concatenate
               ├─ 1x1 reduce ── 3x3 ───┤
               ├─ 1x1 reduce ── 5x5 ───┤
               └─ 3x3 max-pool ── 1x1 ─┘

    NOTE: torchvision's third branch has a 3x3 where the paper has a 5x5, a slip that its published
    weights have made permanent. The default matches it; `five_by_five=True` builds the paper's.

    >>> Inception(192, Widths(64, 96, 128, 16, 32, 32))(torch.zeros(2, 192, 28, 28)).shape
    torch.Size([2, 256, 28, 28])
    """

    def __init__(
        self,
        in_channels: int,
        widths: Widths,
        five_by_five: bool = False,
        conv: Callable[..., nn.Module] = ConvBnReLU,
    ) -> None:
        super().__init__(
            conv(in_channels, widths.conv1x1, 1),
            nn.Sequential(
                conv(in_channels, widths.reduce3x3, 1),
                conv(widths.reduce3x3, widths.conv3x3, 3),
            ),
            nn.Sequential(
                conv(in_channels, widths.reduce5x5, 1),
                conv(widths.reduce5x5, widths.conv5x5, 5 if five_by_five else 3),
            ),
            nn.Sequential(
                nn.MaxPool2d(3, stride=1, padding=1),
                conv(in_channels, widths.pool_proj, 1),
            ),
        )


# %% [markdown]
# ## Inception-v3: the same idea with factorised filters
#
# Two 3x3 convolutions see as much as one 5x5 and cost 18/25 of it; a 1x7 and a 7x1 see as much as a
# 7x7 and cost 14/49. Each resolution has its own module (A, C, E), and between them a module that
# halves the resolution without losing channels (B, D). The letters are torchvision's.


# %%
class InceptionA(Branches):
    """35x35: 1x1, 5x5, two 3x3, pool.  Szegedy et al. 2016, fig. 5.

    (N, C_in, H, W) -> (N, 224 + pool_proj, H, W)

    NOTE: the paper's figure replaces every 5x5 by two 3x3; the authors' code kept one 5x5 branch
    beside them.

    >>> InceptionA(192, pool_proj=32)(torch.zeros(2, 192, 35, 35)).shape
    torch.Size([2, 256, 35, 35])
    """

    def __init__(self, in_channels: int, pool_proj: int) -> None:
        super().__init__(
            ConvBnReLU(in_channels, 64, 1),
            nn.Sequential(ConvBnReLU(in_channels, 48, 1), ConvBnReLU(48, 64, 5)),
            nn.Sequential(
                ConvBnReLU(in_channels, 64, 1), ConvBnReLU(64, 96, 3), ConvBnReLU(96, 96, 3)
            ),
            nn.Sequential(
                nn.AvgPool2d(3, stride=1, padding=1), ConvBnReLU(in_channels, pool_proj, 1)
            ),
        )


# %%
class InceptionB(Branches):
    """Halve 35x35: strided convolutions beside a strided pool.  Szegedy et al. 2016, fig. 10.

    (N, C_in, H, W) -> (N, 480 + C_in, (H-1)/2, (W-1)/2)

    >>> InceptionB(288)(torch.zeros(2, 288, 35, 35)).shape
    torch.Size([2, 768, 17, 17])
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__(
            ConvBnReLU(in_channels, 384, 3, stride=2, padding=0),
            nn.Sequential(
                ConvBnReLU(in_channels, 64, 1),
                ConvBnReLU(64, 96, 3),
                ConvBnReLU(96, 96, 3, stride=2, padding=0),
            ),
            nn.MaxPool2d(3, stride=2),
        )


# %%
class InceptionC(Branches):
    """17x17: 7x7 as 1x7 and 7x1, once and twice.  Szegedy et al. 2016, fig. 6 with n = 7.

    (N, C_in, H, W) -> (N, 768, H, W); `width` is that of the factorised convolutions.

    >>> InceptionC(768, width=128)(torch.zeros(2, 768, 17, 17)).shape
    torch.Size([2, 768, 17, 17])
    """

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__(
            ConvBnReLU(in_channels, 192, 1),
            nn.Sequential(
                ConvBnReLU(in_channels, width, 1),
                ConvBnReLU(width, width, (1, 7)),
                ConvBnReLU(width, 192, (7, 1)),
            ),
            nn.Sequential(
                ConvBnReLU(in_channels, width, 1),
                ConvBnReLU(width, width, (7, 1)),
                ConvBnReLU(width, width, (1, 7)),
                ConvBnReLU(width, width, (7, 1)),
                ConvBnReLU(width, 192, (1, 7)),
            ),
            nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), ConvBnReLU(in_channels, 192, 1)),
        )


# %%
class InceptionD(Branches):
    """Halve 17x17, with one 7x7 in factors on the way.  Szegedy et al. 2016, fig. 10.

    (N, C_in, H, W) -> (N, 512 + C_in, (H-1)/2, (W-1)/2)

    >>> InceptionD(768)(torch.zeros(2, 768, 17, 17)).shape
    torch.Size([2, 1280, 8, 8])
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__(
            nn.Sequential(
                ConvBnReLU(in_channels, 192, 1),
                ConvBnReLU(192, 320, 3, stride=2, padding=0),
            ),
            nn.Sequential(
                ConvBnReLU(in_channels, 192, 1),
                ConvBnReLU(192, 192, (1, 7)),
                ConvBnReLU(192, 192, (7, 1)),
                ConvBnReLU(192, 192, 3, stride=2, padding=0),
            ),
            nn.MaxPool2d(3, stride=2),
        )


# %%
class InceptionE(Branches):
    """8x8: branches that split once more; a small map affords it.  Szegedy et al. 2016, fig. 7.

    (N, C_in, H, W) -> (N, 2048, H, W)

    >>> InceptionE(1280)(torch.zeros(2, 1280, 8, 8)).shape
    torch.Size([2, 2048, 8, 8])
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__(
            ConvBnReLU(in_channels, 320, 1),
            nn.Sequential(
                ConvBnReLU(in_channels, 384, 1),
                Branches(ConvBnReLU(384, 384, (1, 3)), ConvBnReLU(384, 384, (3, 1))),
            ),
            nn.Sequential(
                ConvBnReLU(in_channels, 448, 1),
                ConvBnReLU(448, 384, 3),
                Branches(ConvBnReLU(384, 384, (1, 3)), ConvBnReLU(384, 384, (3, 1))),
            ),
            nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), ConvBnReLU(in_channels, 192, 1)),
        )


# %% [markdown]
# ## Auxiliary classifiers: let the middle of the net feel the loss too
#
# A deep net of 2014 passed little gradient to its first layers. The remedy: a small classifier
# half-way, whose loss is added during training and which is thrown away afterwards.


# %%
class AuxiliaryHead(nn.Sequential):
    """GoogLeNet's side classifier.  Szegedy et al. 2015, sec. 5.

    (N, C_in, H, W) -> (N, num_classes), from a map of any size.

    NOTE: the paper pools 14x14 to 4x4 with windows of 5 and stride 3, which only fits that map.
    Adaptive pooling, torchvision's choice, gives 4x4 from every size.

    >>> AuxiliaryHead(512, 10)(torch.zeros(2, 512, 14, 14)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        conv: Callable[..., nn.Module] = ConvBnReLU,
    ) -> None:
        super().__init__(
            nn.AdaptiveAvgPool2d(4),
            conv(in_channels, 128, 1),
            nn.Flatten(),  # (N, 128 * 4 * 4)
            nn.Linear(128 * 4 * 4, 1024),
            nn.ReLU(),
            nn.Dropout(0.7),
            nn.Linear(1024, num_classes),
        )


# %%
class AuxiliaryHeadV3(nn.Sequential):
    """Inception-v3's side classifier.  Szegedy et al. 2016, fig. 8.

    (N, C_in, H, W) -> (N, num_classes), from a map of any size.

    >>> AuxiliaryHeadV3(768, 10)(torch.zeros(2, 768, 17, 17)).shape
    torch.Size([2, 10])
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(
            ConvBnReLU(in_channels, 128, 1),
            ConvBnReLU(128, 768, 5, padding=0),  # a 5x5 map becomes 1x1
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(768, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) >= 17:
            x = F.avg_pool2d(x, 5, stride=3)  # 17x17 -> 5x5, as published
        else:
            # NOTE: images below 299 pixels leave too small a map for that; pool it to the same 5x5.
            x = F.adaptive_avg_pool2d(x, 5)
        return super().forward(x)


# %%
class AuxiliaryLoss(nn.Module):
    """The loss of the last classifier, plus `weight` times that of each auxiliary one.

    Takes what the model returns: a tuple (logits, aux logits, ...) in training, the logits alone
    otherwise.

    >>> loss_fn = AuxiliaryLoss(nn.CrossEntropyLoss(), weight=0.3)
    >>> logits, targets = torch.zeros(4, 10), torch.zeros(4, dtype=torch.long)
    >>> (loss_fn((logits, logits, logits), targets) / loss_fn(logits, targets)).item()
    1.600000023841858
    """

    def __init__(self, criterion: nn.Module, weight: float) -> None:
        super().__init__()
        self.criterion = criterion
        self.weight = weight

    def forward(self, outputs: Tensor | tuple[Tensor, ...], targets: Tensor) -> Tensor:
        if isinstance(outputs, Tensor):
            return self.criterion(outputs, targets)
        logits, *aux_logits = outputs
        aux_losses = [self.criterion(aux, targets) for aux in aux_logits]
        return self.criterion(logits, targets) + self.weight * sum(aux_losses)


# %% [markdown]
# ## The model: stem, stages, head, and auxiliary heads on the side


# %%
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class InceptionNet(nn.Module):
    """(N, 3, H, W) -> (N, num_classes); in training with auxiliary heads (logits, aux logits, ...).

    Args:
        stem: the plain convolutions that come first.
        stages: per stage its modules by the papers' names ("3a", "3b", ...), a pool or a reduction
            first.
        head: from the last feature map to logits; its last layer is the classifier.
        aux_heads: auxiliary heads by the name of the module whose output they read; empty for none.
        aux_weight: what an auxiliary loss counts beside the main one, see `AuxiliaryLoss`.
        transform_input: the image arrives normalised with ImageNet's mean and deviation, and the
            weights expect it scaled to -1 ... 1: rescale it. The official checkpoints need it.
            Plain attribute, may be set later.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: list[dict[str, nn.Module]],
        head: nn.Sequential,
        aux_heads: dict[str, nn.Sequential],
        aux_weight: float,
        transform_input: bool,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential(*(nn.Sequential(OrderedDict(stage)) for stage in stages))
        self.head = head
        self.aux_heads = nn.ModuleDict(aux_heads)
        self.aux_weight = aux_weight
        self.transform_input = transform_input
        self.init_weights()

    def init_weights(self) -> None:
        """He initialisation by fan-in, so that a reduction keeps the scale of what it reads."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def rescale(self, x: Tensor) -> Tensor:
        """From ImageNet's normalisation to -1 ... 1, if `transform_input`.  The shape stays."""
        if not self.transform_input:
            return x
        channels = zip(x.split(1, dim=1), IMAGENET_MEAN, IMAGENET_STD)
        return torch.cat([(c * std + mean - 0.5) / 0.5 for c, mean, std in channels], dim=1)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, h, w), the last map: 1/32 of the resolution, 1/4 if small."""
        return self.stages(self.stem(self.rescale(x)))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        if not self.training or not self.aux_heads:
            return self.head(self.forward_features(x))
        x = self.stem(self.rescale(x))
        aux_logits = []
        for stage in self.stages:
            for name, module in stage.named_children():
                x = module(x)
                if name in self.aux_heads:
                    aux_logits.append(self.aux_heads[name](x))
        return self.head(x), *aux_logits

    def get_classifier(self) -> nn.Linear:
        return self.head[-1]

    def reset_classifier(self, num_classes: int) -> None:
        """A new last layer, in the auxiliary heads too: all of them name the same classes."""
        for head in (self.head, *self.aux_heads.values()):
            old = head[-1]
            head[-1] = nn.Linear(old.in_features, num_classes).to(old.weight)

    def arrange_torchvision_state(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Auxiliary tensors last, where we register them, or left out if we have no such heads.

        torchvision calls them aux1, aux2 and AuxLogits.
        """
        aux = {
            name: tensor for name, tensor in state_dict.items() if name.lower().startswith("aux")
        }
        rest = {name: tensor for name, tensor in state_dict.items() if name not in aux}
        return {**rest, **aux} if self.aux_heads else rest


# %% [markdown]
# ## The papers' tables as data

# %%
# Szegedy et al. 2015, table 1:  #1x1, #3x3 reduce, #3x3, #5x5 reduce, #5x5, pool proj
GOOGLENET: list[dict[str, Widths]] = [
    {  # 28x28 on 224x224 images
        "3a": Widths(64, 96, 128, 16, 32, 32),
        "3b": Widths(128, 128, 192, 32, 96, 64),
    },
    {  # 14x14
        "4a": Widths(192, 96, 208, 16, 48, 64),
        "4b": Widths(160, 112, 224, 24, 64, 64),
        "4c": Widths(128, 128, 256, 24, 64, 64),
        "4d": Widths(112, 144, 288, 32, 64, 64),
        "4e": Widths(256, 160, 320, 32, 128, 128),
    },
    {  # 7x7
        "5a": Widths(256, 160, 320, 32, 128, 128),
        "5b": Widths(384, 192, 384, 48, 128, 128),
    },
]

# Szegedy et al. 2016, table 1, as the authors' code has it: each module and the channels it reads
INCEPTION_V3: list[dict[str, Callable[[], nn.Module]]] = [
    {  # 35x35 on 299x299 images
        "5b": partial(InceptionA, 192, pool_proj=32),
        "5c": partial(InceptionA, 256, pool_proj=64),
        "5d": partial(InceptionA, 288, pool_proj=64),
    },
    {  # 17x17
        "6a": partial(InceptionB, 288),
        "6b": partial(InceptionC, 768, width=128),
        "6c": partial(InceptionC, 768, width=160),
        "6d": partial(InceptionC, 768, width=160),
        "6e": partial(InceptionC, 768, width=192),
    },
    {  # 8x8
        "7a": partial(InceptionD, 768),
        "7b": partial(InceptionE, 1280),
        "7c": partial(InceptionE, 2048),
    },
]


def googlenet(
    num_classes: int = 1000,
    small_input: bool = False,
    aux: bool = True,
    transform_input: bool = False,
    five_by_five: bool = False,
    batch_norm: bool = True,
    width_mult: float = 1.0,
    dropout: float = 0.4,
) -> InceptionNet:
    """GoogLeNet.  Szegedy et al. 2015, table 1.

    `width_mult` thins the stem and the modules; the auxiliary heads keep their width.

    `small_input` keeps the layers of the stem but drops its strides and pools, for images of 32
    pixels and less.
    NOTE: the paper has no such form. Its response normalisation is left out, as in torchvision.

    >>> googlenet(aux=False).stages[1](torch.zeros(1, 480, 28, 28)).shape
    torch.Size([1, 832, 14, 14])
    """
    conv = partial(ConvBnReLU, batch_norm=batch_norm)
    width, in_channels = round(64 * width_mult), round(192 * width_mult)
    if small_input:
        stem = nn.Sequential(conv(3, width, 3), conv(width, width, 1), conv(width, in_channels, 3))
    else:
        stem = nn.Sequential(
            conv(3, width, 7, stride=2),  # 224x224 -> 112x112
            nn.MaxPool2d(3, stride=2, ceil_mode=True),  # 56x56
            conv(width, width, 1),
            conv(width, in_channels, 3),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),  # 28x28
        )
    # NOTE: the last pool has torchvision's window of 2; the paper's has 3.
    pools = [
        {},
        {"pool3": nn.MaxPool2d(3, 2, ceil_mode=True)},
        {"pool4": nn.MaxPool2d(2, 2, ceil_mode=True)},
    ]
    stages, aux_heads = [], {}
    for stage, rows in zip(pools, GOOGLENET):
        for name, row in rows.items():
            widths = row.times(width_mult)
            stage[name] = Inception(in_channels, widths, five_by_five, conv)
            in_channels = widths.out_channels
            if aux and name in ("4a", "4d"):
                aux_heads[name] = AuxiliaryHead(in_channels, num_classes, conv)
        stages.append(stage)
    head = nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(in_channels, num_classes),
    )
    return InceptionNet(
        stem, stages, head, aux_heads, aux_weight=0.3, transform_input=transform_input
    )


def inception_v3(
    num_classes: int = 1000,
    small_input: bool = False,
    aux: bool = True,
    transform_input: bool = False,
    dropout: float = 0.2,
) -> InceptionNet:
    """Inception-v3.  Szegedy et al. 2016, table 1 and sec. 6, as in the authors' code.

    The auxiliary loss counts 0.4 and a fifth of the last features is dropped: the paper says
    neither, its authors' training code (TensorFlow models, inception_model.py) both.

    `small_input` keeps the layers of the stem but drops its strides and pools, for images of 32
    pixels and less.
    NOTE: the paper has no such form; its sec. 8 drops one stride and one pool for 79 pixels.

    >>> inception_v3(aux=False).forward_features(torch.zeros(1, 3, 107, 107)).shape
    torch.Size([1, 2048, 2, 2])
    """
    if small_input:
        stem = nn.Sequential(
            ConvBnReLU(3, 32, 3),
            ConvBnReLU(32, 32, 3),
            ConvBnReLU(32, 64, 3),
            ConvBnReLU(64, 80, 1),
            ConvBnReLU(80, 192, 3),
        )
    else:
        stem = nn.Sequential(
            ConvBnReLU(3, 32, 3, stride=2, padding=0),  # 299x299 -> 149x149
            ConvBnReLU(32, 32, 3, padding=0),  # 147x147
            ConvBnReLU(32, 64, 3),
            nn.MaxPool2d(3, stride=2),  # 73x73
            ConvBnReLU(64, 80, 1),
            ConvBnReLU(80, 192, 3, padding=0),  # 71x71
            nn.MaxPool2d(3, stride=2),  # 35x35
        )
    stages = [{name: build() for name, build in rows.items()} for rows in INCEPTION_V3]
    head = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(2048, num_classes)
    )
    aux_heads = {"6e": AuxiliaryHeadV3(768, num_classes)} if aux else {}
    return InceptionNet(
        stem, stages, head, aux_heads, aux_weight=0.4, transform_input=transform_input
    )


MODELS: dict[str, Callable[..., nn.Module]] = {"googlenet": googlenet, "inception_v3": inception_v3}


# %% [markdown]
# ## First experiment: do the auxiliary classifiers help?
#
# The paper of 2015 adds them against vanishing gradients; that of 2016 (section 4) finds that they
# change little early on and act as a regulariser at the end. Between the two came BatchNorm. So
# train four nets: with and without it, with and without auxiliary classifiers. Compare what both
# kinds have: the loss of the *last* classifier on the validation images, its test accuracy, and the
# gradient that reaches the first layer.


# %%
KINDS: dict[str, dict[str, bool]] = {
    "2014": {"batch_norm": False, "aux": False},
    "2014 + aux": {"batch_norm": False, "aux": True},
    "BN": {"batch_norm": True, "aux": False},
    "BN + aux": {"batch_norm": True, "aux": True},
}


def trial_net(config: Config, num_classes: int, batch_norm: bool, aux: bool) -> InceptionNet:
    """A thin GoogLeNet whose weights at the start do not depend on `aux`."""
    model = googlenet(
        num_classes,
        config.small_input,
        batch_norm=batch_norm,
        width_mult=config.trial_width,
    )
    if not aux:
        model.aux_heads.clear()  # drawn all the same, so that both of a pair start alike
    return model


def auxiliary(config: Config) -> dict[str, object]:
    """Section 5 of the paper of 2015 and section 4 of that of 2016, at the size of the dataset."""
    config, device = prepare(config)
    data = load_data(config, device)
    run = Run.open(config, LESSON)
    loss_fn = AuxiliaryLoss(nn.CrossEntropyLoss(), weight=0.3)
    trials: dict[str, list[Trial]] = {kind: [] for kind in KINDS}
    for seed in range(config.seed, config.seed + config.seeds):
        for kind, options in KINDS.items():
            net = partial(trial_net, config, data.num_classes, **options)
            name, seeded = f"{kind}, seed {seed}", replace(config, seed=seed)
            trials[kind].append(train_trial(name, net, data, seeded, device, loss_fn))

    figure, (loss, accuracy, gradient) = plotting.panels(3, "Auxiliary classifiers")
    plotting.curves(
        {k: [[r.val_loss for r in t.history] for t in ts] for k, ts in trials.items()},
        "epoch", "validation loss", "Loss of the last classifier", log_y=True, ax=loss,
    )  # fmt: skip
    accuracies = {kind: mean_and_spread([t.test_top1 for t in ts]) for kind, ts in trials.items()}
    plotting.bars(
        {kind: average for kind, (average, _) in accuracies.items()},
        "test top-1",
        f"Test accuracy, mean and deviation of {config.seeds} seeds",
        errors={kind: spread for kind, (_, spread) in accuracies.items()},
        percent=True,
        colors=plotting.PALETTE,
        ax=accuracy,
    )
    norms = {k: np.mean([t.first_layer_gradient for t in ts], axis=0) for k, ts in trials.items()}
    steps = max(1, len(norms["2014"]) // 20)
    plotting.curves(
        norms, "step", "gradient norm", "Gradient at the first layer",
        log_y=True, smooth=steps, ax=gradient,
    )  # fmt: skip
    run.figure("auxiliary", figure)
    early = {kind: float(np.median(norm[: len(norm) // 4 + 1])) for kind, norm in norms.items()}
    rows = [
        {
            "net": kind,
            "seeds": len(ts),
            "validation loss": round(mean(t.history[-1].val_loss for t in ts), 4),
            "test top-1": f"{accuracies[kind][0]:.2%}",
            "deviation": f"{accuracies[kind][1]:.2%}",
            "early gradient": f"{early[kind]:.3g}",
            "seconds": round(sum(t.seconds for t in ts), 1),
        }
        for kind, ts in trials.items()
    ]
    return conclude(run, rows, auxiliary_verdict(trials, early))


def auxiliary_verdict(trials: dict[str, list[Trial]], early: dict[str, float]) -> list[str]:
    """What the numbers say of the two papers' claims, whichever way they fall.

    Args:
        early: by kind the gradient norm at the first layer, early in training.
    """
    verdict = []
    for base in ("2014", "BN"):
        ratio = early[f"{base} + aux"] / early[base]
        verdict.append(
            f"{base}: in the first quarter of training the first layer's gradient is {ratio:.2f} "
            "times as large with auxiliary classifiers as without (medians)"
        )
    for base in ("2014", "BN"):
        without, with_aux = ([t.test_top1 for t in trials[k]] for k in (base, f"{base} + aux"))
        # Both nets of a pair start from the same weights: what counts is their difference.
        gains = [b - a for a, b in zip(without, with_aux)]
        ahead, behind = sum(g > 0 for g in gains), sum(g < 0 for g in gains)
        if len(gains) == 1:
            word = "one pair cannot tell chance from effect: try --seeds 3"
        elif ahead == len(gains):
            word = f"they help in all of {ahead} pairs"
        elif behind == len(gains):
            word = f"they hurt in all of {behind} pairs"
        else:
            word = f"ahead in {ahead} and behind in {behind} of {len(gains)} pairs: no effect shown"
        verdict.append(f"{base}: test accuracy changes by {100 * mean(gains):+.2f} points; {word}")
    return verdict


# %% [markdown]
# ## Second experiment: which branch does the work?
#
# Train GoogLeNet, then look into each module on images that it has not seen. Four shares per
# branch: of the *channels*, which the table fixed; of the *output*, as sum of squares; of the
# *gradient* that comes back to the module's input; and, the only one that is about cause, the
# validation loss when the branch is *silenced*.


# %%
BRANCHES = ("1x1", "3x3", "5x5", "pool")


def branch_shares(model: InceptionNet, x: Tensor, y: Tensor) -> dict[str, np.ndarray]:
    """Shares of each branch in each module of the same net, (modules, branches), rows sum to 1.

    Args:
        x: (N, 3, H, W)
        y: (N,)
    """
    model.eval()
    taps: list[tuple[list[Tensor], list[Tensor]]] = []  # per module its branches' inputs, outputs
    x = model.stem(model.rescale(x))
    for stage in model.stages:
        for module in stage:
            if not isinstance(module, Branches):
                x = module(x)
                continue
            # A copy of the input for each branch, so that what flows back can be told apart.
            copies = [x.clone() for _ in module.branches]
            for copy in copies:
                copy.retain_grad()
            outputs = [branch(copy) for branch, copy in zip(module.branches, copies)]
            taps.append((copies, outputs))
            x = torch.cat(outputs, dim=1)
    F.cross_entropy(model.head(x), y).backward()
    model.zero_grad(set_to_none=True)

    def shares(amounts: list[list[float]]) -> np.ndarray:
        table = np.array(amounts)
        return table / table.sum(axis=1, keepdims=True)

    return {
        "channels": shares([[out.shape[1] for out in outputs] for _, outputs in taps]),
        "output": shares([[out.square().sum().item() for out in outputs] for _, outputs in taps]),
        "gradient": shares([[c.grad.square().sum().item() for c in copies] for copies, _ in taps]),
    }


def silenced_losses(model: InceptionNet, loader: Loader) -> tuple[float, dict[str, list[float]]]:
    """The loss on a split, and per module what it becomes when one branch gives only zeros."""
    losses: dict[str, list[float]] = {}
    for stage in model.stages:
        for name, module in stage.named_children():
            if isinstance(module, Branches):
                losses[name] = []
                for branch in module.branches:
                    hook = branch.register_forward_hook(lambda *args: torch.zeros_like(args[-1]))
                    losses[name].append(score(model, loader)[0])
                    hook.remove()
    return score(model, loader)[0], losses


def branches(config: Config) -> dict[str, object]:
    """Where the output and the gradient of each module of a trained GoogLeNet come from."""
    config, device = prepare(config)
    data = load_data(config, device)
    run = Run.open(config, LESSON)
    # With torchvision's two 3x3 branches there would be less to tell apart.
    paper_form = replace(config, model="googlenet", five_by_five=True)
    net = partial(build, paper_form, data.num_classes)
    loss_fn = AuxiliaryLoss(nn.CrossEntropyLoss(), weight=0.3)
    model = train_trial("googlenet", net, data, config, device, loss_fn).model

    tables = branch_shares(model, *next(iter(data.val.batches())))
    intact, silenced = silenced_losses(model, data.val)
    tables["loss"] = np.array(list(silenced.values())) - intact
    titles = {
        "channels": "Share of the channels",
        "output": "Share of the output",
        "gradient": "Share of the gradient",
        "loss": f"Loss added by silencing the branch (intact: {intact:.3f})",
    }
    figure, axes = plotting.panels(4, "Where a module's output comes from", columns=2)
    for (what, title), ax in zip(titles.items(), axes):
        share = what != "loss"
        plotting.heatmap(
            tables[what],
            list(silenced),
            BRANCHES,
            title,
            fmt="{:+.2f}",
            percent=share,
            limits=(0, 1) if share else None,
            ax=ax,
        )
    run.figure("branches", figure)
    rows = [
        {
            "module": name,
            "branch": branch,
            **{k: f"{tables[k][i, j]:.1%}" for k in ("channels", "output", "gradient")},
            "loss added": round(tables["loss"][i, j], 4),
        }
        for i, name in enumerate(silenced)
        for j, branch in enumerate(BRANCHES)
    ]
    return conclude(run, rows, branches_verdict(tables, list(silenced)))


def branches_verdict(tables: dict[str, np.ndarray], modules: list[str]) -> list[str]:
    """Which branch leads in what, and whether a branch's energy tells what it is worth."""
    verdict = []
    for what in ("output", "gradient"):
        average, width = tables[what].mean(axis=0), tables["channels"].mean(axis=0)
        most, dense = average.argmax(), (average / width).argmax()
        verdict.append(
            f"{what}: the {BRANCHES[most]} branch gives most, {average[most]:.0%} on average from "
            f"{width[most]:.0%} of the channels; per channel the {BRANCHES[dense]} branch does, "
            f"{average[dense] / width[dense]:.1f} times its share"
        )
    module, branch = np.unravel_index(tables["loss"].argmax(), tables["loss"].shape)
    verdict.append(
        f"most missed is the {BRANCHES[branch]} of {modules[module]}: without it "
        f"the loss rises by {tables['loss'][module, branch]:.2f}"
    )
    for what in ("channels", "output", "gradient"):
        verdict.append(
            f"rank correlation of a branch's share of the {what} with the loss added by silencing "
            f"it: {rank_correlation(tables[what], tables['loss']):+.2f}"
        )
    return verdict


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: 1 if both order their entries alike, -1 if in reverse, near 0 if unrelated."""
    ranks = [values.ravel().argsort().argsort() for values in (a, b)]
    return float(np.corrcoef(ranks)[0, 1])


# %% [markdown]
# ## Third experiment: what do the 1x1 convolutions save?
#
# No training, only arithmetic and a clock. Three forms of every module of the paper's table, on the
# maps of a 224x224 image: *reduced* as published; *direct*, with the 3x3 and 5x5 on the module's
# whole input; and *naive*, the paper's figure 2(a), where the pool is not projected either, so that
# each module is wider than the last.


# %%
class Direct(Branches):
    """The module without reductions.  Szegedy et al. 2015, fig. 2(a), if not `project_pool`.

    (N, C_in, H, W) -> (N, widths.out_channels, H, W); unprojected, the pool gives all C_in instead
    of pool_proj.

    >>> widths = Widths(64, 96, 128, 16, 32, 32)
    >>> Direct(192, widths, project_pool=False)(torch.zeros(2, 192, 28, 28)).shape
    torch.Size([2, 416, 28, 28])
    """

    def __init__(self, in_channels: int, widths: Widths, project_pool: bool = True) -> None:
        pool = [nn.MaxPool2d(3, stride=1, padding=1)]
        if project_pool:
            pool += [ConvBnReLU(in_channels, widths.pool_proj, 1)]
        super().__init__(
            ConvBnReLU(in_channels, widths.conv1x1, 1),
            ConvBnReLU(in_channels, widths.conv3x3, 3),
            ConvBnReLU(in_channels, widths.conv5x5, 5),
            nn.Sequential(*pool),
        )


FORMS: dict[str, Callable[[int, Widths], nn.Module]] = {
    "reduced": partial(Inception, five_by_five=True),
    "direct": Direct,
    "naive": partial(Direct, project_pool=False),
}


def bottleneck(config: Config) -> dict[str, object]:
    """Multiply-adds and milliseconds of GoogLeNet's nine modules with and without reductions."""
    config, device = prepare(config)
    run = Run.open(config, LESSON)
    rows: list[dict[str, object]] = []
    for form, make in FORMS.items():
        in_channels = round(192 * config.width_mult)
        for stage, px in zip(GOOGLENET, (28, 14, 7)):
            for name, row in stage.items():
                widths = row.times(config.width_mult)
                module = make(in_channels, widths).to(device, memory_format=torch.channels_last)
                cost = profile(module, (in_channels, px, px), seconds=config.clock)
                rows.append(
                    {
                        "module": name,
                        "form": form,
                        "channels in": in_channels,
                        "parameters": cost.params,
                        "M MACs": round(cost.macs / 1e6, 1),
                        "ms": round(cost.latency_ms, 2),
                    }
                )
                unprojected = in_channels - widths.pool_proj if form == "naive" else 0
                in_channels = widths.out_channels + unprojected

    def column(form: str, what: str) -> list[float]:
        return [row[what] for row in rows if row["form"] == form]

    names = [name for stage in GOOGLENET for name in stage]
    figure, (widths_ax, macs_ax, total_ax) = plotting.panels(3, "GoogLeNet without its reductions")
    plotting.curves(
        {form: column(form, "channels in") for form in FORMS},
        "module", "channels", "Channels that each module reads", ax=widths_ax,
    )  # fmt: skip
    plotting.curves(
        {form: column(form, "M MACs") for form in FORMS},
        "module", "million multiply-adds", "Multiply-adds of each module", log_y=True, ax=macs_ax,
    )  # fmt: skip
    for ax in (widths_ax, macs_ax):
        ax.set_xticks(range(1, len(names) + 1), names)
    total = {what: {f: sum(column(f, what)) for f in FORMS} for what in ("M MACs", "ms")}
    plotting.bars(
        {
            f"{form}: {word}": total[what][form] / total[what]["reduced"]
            for what, word in (("M MACs", "multiply-adds"), ("ms", "time"))
            for form in FORMS
        },
        "times the reduced form",
        "All nine modules",
        fmt="{:.1f}",
        colors=plotting.PALETTE[:3],
        ax=total_ax,
    )
    run.figure("bottleneck", figure)
    return conclude(run, rows, bottleneck_verdict(rows, total))


def bottleneck_verdict(
    rows: list[dict[str, object]], total: dict[str, dict[str, float]]
) -> list[str]:
    """What the reductions save on paper and on the clock, and where they save most."""
    verdict = []
    for form in ("direct", "naive"):
        macs, ms = (total[what][form] / total[what]["reduced"] for what in ("M MACs", "ms"))
        verdict.append(
            f"{form}: {macs:.1f} times the multiply-adds of the reduced form, {ms:.1f} times the "
            f"time here ({total['M MACs'][form]:,.0f} M, {total['ms'][form]:.1f} ms)"
        )
        word = "less" if ms < macs else "no less"
        verdict.append(f"{form}: the clock charges {word} than the multiply-adds say")
    macs = {(row["form"], row["module"]): row["M MACs"] for row in rows}
    saved = {module: macs["direct", module] / macs["reduced", module] for _, module in macs}
    most, least = max(saved, key=saved.get), min(saved, key=saved.get)
    verdict.append(
        f"the reductions save most in {most} ({saved[most]:.1f} times) and least in {least} "
        f"({saved[least]:.1f} times)"
    )
    return verdict


EXPERIMENTS: dict[str, Callable[[Config], object]] = {
    "auxiliary": auxiliary,
    "branches": branches,
    "bottleneck": bottleneck,
}

# %% [markdown]
# ## One run, from data to report
#
# Flat and explicit: this is the whole recipe. What is new to this lesson is the loss: in training
# the model returns a tuple, and `AuxiliaryLoss` adds it up.


# %%
GOOGLENET_KNOBS = ("five_by_five", "batch_norm", "width_mult")


def build(config: Config, num_classes: int) -> InceptionNet:
    """The model that the flags ask for.

    Raises:
        UserError: a flag of GoogLeNet with another model.
    """
    options = {"aux": config.aux}
    for name in GOOGLENET_KNOBS:
        if config.model == "googlenet":
            options[name] = getattr(config, name)
        elif getattr(config, name) != getattr(Config, name):
            raise UserError(f"--{name.replace('_', '-')}: only googlenet has it")
    return MODELS[config.model](num_classes=num_classes, small_input=config.small_input, **options)


def run(config: Config) -> dict[str, object]:
    """Train, test once with the best epoch's weights, profile, draw, save; what result.json holds
    comes back.
    """
    config, device = prepare(config)
    # Trained weights bring the mean and deviation that they were trained with.
    mean_std = weights_mean_std(config.model) if config.pretrained else None
    data = load_data(config, device, mean_std)
    model = build(config, data.num_classes).to(
        device, memory_format=memory_format(config.image_size)
    )
    if config.pretrained:
        load_pretrained(model, config.model)

    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    loss_fn = AuxiliaryLoss(criterion, model.aux_weight)
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
# - The training loss starts near $1.6 \ln 10 = 3.7$ and not near $\ln 10 = 2.3$: three classifiers
#   pay, two of them 0.3. The validation loss is that of the last one alone.
# - The first validation losses can be absurd while training goes well: in eval mode BatchNorm uses
#   running averages, and these lag behind weights that move fast.
# - BatchNorm gives every channel about the same scale: a branch's share of the output follows its
#   share of the channels (`branches`). The gradient and the silenced branch say more.
# - Auxiliary heads hold almost half of GoogLeNet's 13 million parameters, and none of them is there
#   when it predicts (`--no-aux --summary` beside `--summary`).
# - torchvision's GoogLeNet has a 3x3 in place of the 5x5: a published result may rest on a slip.
#
# ## Exercises
#
# 1. Write `Inception` without looking, from the drawing at the top.
# 2. By hand: how many multiply-adds has the 5x5 branch of 3a on a 28x28 map, with the reduction and
#    without? Check with `--experiment bottleneck`.
# 3. Replace the 5x5 of `five_by_five` by two 3x3. What becomes of the parameters, and what of the
#    receptive field?
# 4. Let the weight of `AuxiliaryLoss` fall to zero over the epochs. Does the accuracy notice?
# 5. Write `InceptionC` for n = 3, and find the map size below which 1x7 mostly reads padding.

# %%
if __name__ == "__main__":
    main(config, MODELS, build, run, EXPERIMENTS)
