"""Lesson 3: Inception. Several filter sizes side by side, paid for by 1x1 convolutions.

Papers: Szegedy et al. 2015, "Going deeper with convolutions" (GoogLeNet), arXiv 1409.4842;
Szegedy et al. 2016, "Rethinking the Inception architecture for computer vision" (Inception-v3),
arXiv 1512.00567.
"""

# %%
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    return InceptionNet(stem, stages, head, aux_heads, 0.3, transform_input)


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
    return InceptionNet(stem, stages, head, aux_heads, 0.4, transform_input)


MODELS: dict[str, Callable[..., nn.Module]] = {"googlenet": googlenet, "inception_v3": inception_v3}
