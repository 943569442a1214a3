"""Lesson 6: DenseNet. Every layer reads everything that was found before it.

Huang, Liu, van der Maaten, Weinberger 2017, "Densely Connected Convolutional Networks"
(https://arxiv.org/abs/1608.06993).
"""

# %%
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# %% [markdown]
# ## Recompute, but count once: gradient checkpointing beside BatchNorm
#
# Backward needs each convolution's input. For layer $l$ of a dense block that input is a fresh copy of all
# $l$ maps before it, so that a block of $L$ layers keeps about $L^2/2$ copies although it only ever made $L$
# maps. Checkpointing throws the copies away and computes them again when backward asks.
#
# Computing twice must not count twice. A BatchNorm in training mode does two things in its forward pass: it
# normalises by the batch, which the recomputation needs, and it moves its running statistics, which has
# already happened. The second pass therefore runs with the statistics held still.


# %%
@contextmanager
def running_statistics_held(module: nn.Module) -> Iterator[None]:
    """Inside, each BatchNorm of `module` normalises by its batch as always and learns nothing from it.

    >>> norm = nn.BatchNorm2d(3)
    >>> with running_statistics_held(norm):
    ...     y = norm(torch.randn(8, 3, 4, 4) + 5)
    >>> norm.running_mean, int(norm.num_batches_tracked)
    (tensor([0., 0., 0.]), 0)
    """
    norms = [m for m in module.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # running = (1 - momentum) * running + momentum * batch, and the step counter has nothing to count.
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, num_batches_tracked) in zip(norms, saved):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked


def forward_and_recomputation(module: nn.Module) -> tuple[object, object]:
    """What `checkpoint(context_fn=...)` asks for: a context for the forward pass, one for the second time."""
    return nullcontext(), running_statistics_held(module)


# %% [markdown]
# ## The dense layer: read everything, write a little


# %%
class DenseLayer(nn.Module):
    """From all earlier feature maps, `growth_rate` new ones.  Huang et al. 2017, sec. 3, "composite function".

    [(N, C_0, H, W), (N, C_1, H, W), ...] -> (N, growth_rate, H, W), where in_channels = C_0 + C_1 + ...

    BatchNorm, ReLU and a 3x3 convolution, in this order: the same map is read by many layers, and each gives
    it a scale of its own. With `bottleneck` (the "B" of DenseNet-B) a 1x1 convolution comes first and narrows
    the wide input to 4 * growth_rate channels, so that the 3x3 costs the same however deep the layer sits.

    Args:
        dropout: probability of zeroing a new value in training; 0.2 in the paper where it doesn't augment.
        checkpointing: keep only the earlier maps for backward, and concatenate and normalise them again
            there.  Pleiss et al. 2017, "Memory-efficient implementation of DenseNets".

    >>> earlier = [torch.zeros(2, 24, 8, 8), torch.zeros(2, 12, 8, 8)]
    >>> DenseLayer(24 + 12, growth_rate=12)(earlier).shape
    torch.Size([2, 12, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        bottleneck: bool = True,
        dropout: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        if bottleneck:
            self.conv1 = nn.Conv2d(in_channels, 4 * growth_rate, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(4 * growth_rate)
            self.conv2 = nn.Conv2d(4 * growth_rate, growth_rate, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, growth_rate, 3, padding=1, bias=False)
        self.bottleneck = bottleneck
        self.dropout = nn.Dropout(dropout)
        self.checkpointing = checkpointing

    def read(self, *features: Tensor) -> Tensor:
        x = torch.cat(features, dim=1)  # (N, in_channels, H, W)
        return self.conv1(F.relu(self.norm1(x)))  # (N, 4 * growth_rate or growth_rate, H, W)

    def forward(self, features: list[Tensor]) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            # The recomputation stops as soon as backward has what it needs. The last thing it needs is the
            # input of conv1, so the concatenation and the norm run twice, and no convolution does.
            x = checkpoint(
                self.read,
                *features,
                use_reentrant=False,
                context_fn=partial(forward_and_recomputation, self),
                preserve_rng_state=False,  # nothing in `read` is random
            )
        else:
            x = self.read(*features)
        if self.bottleneck:
            x = self.conv2(F.relu(self.norm2(x)))  # (N, growth_rate, H, W)
        return self.dropout(x)


# %% [markdown]
# ## The dense block: the list only grows


# %%
class DenseBlock(nn.Module):
    """`depth` dense layers, each fed with the outputs of all before it.  Huang et al. 2017, fig. 1 and eq. 2.

    (N, C, H, W) -> (N, C + depth * growth_rate, H, W)

    Nothing is ever overwritten: the input itself is the first part of the output.

    Args:
        dense: False cuts all connections but those between neighbours, for the experiment on gradients: each
            layer reads the preceding one alone, and the last layer's output is the block's,
            (N, C, H, W) -> (N, growth_rate, H, W).
        **layer_options: handed to each layer: `bottleneck`, `dropout`, `checkpointing`.

    >>> x = torch.randn(2, 24, 8, 8)
    >>> y = DenseBlock(24, depth=3, growth_rate=12)(x)
    >>> y.shape, torch.equal(y[:, :24], x)
    (torch.Size([2, 60, 8, 8]), True)
    """

    def __init__(
        self,
        in_channels: int,
        depth: int,
        growth_rate: int,
        dense: bool = True,
        **layer_options: bool | float,
    ) -> None:
        super().__init__()
        # What lies in the list that `forward` grows: channels of the block's input, then of each layer.
        self.channels = [in_channels]
        self.layers = nn.ModuleList()
        self.dense = dense
        for _ in range(depth):
            in_channels = sum(self.visible(self.channels))
            self.layers.append(DenseLayer(in_channels, growth_rate, **layer_options))
            self.channels.append(growth_rate)
        self.out_channels = sum(self.visible(self.channels))

    def visible(self, items: list) -> list:
        return items if self.dense else items[-1:]

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(self.visible(features)))
        return torch.cat(self.visible(features), dim=1)


# %% [markdown]
# ## The transition: the only place that forgets


# %%
class Transition(nn.Sequential):
    """Between two blocks: mix the channels, halve the resolution.  Huang et al. 2017, sec. 3, "pooling layers".

    (N, C_in, H, W) -> (N, C_out, H/2, W/2). Concatenation needs equal resolutions, so that a block can't
    halve inside. Out of C_in channels the "C" of DenseNet-C keeps C_in * compression.

    NOTE: the paper's text names BatchNorm, the 1x1 convolution and the pooling; the authors' code has a ReLU
    after the norm, as everywhere else, and so have torchvision and this lesson.

    >>> Transition(60, 30)(torch.zeros(1, 60, 8, 8)).shape
    torch.Size([1, 30, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.BatchNorm2d(in_channels),
            nn.ReLU(),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.AvgPool2d(2),
        )


# %% [markdown]
# ## The model: stem, stages, head


# %%
class DenseNet(nn.Module):
    """(N, 3, H, W) -> (N, num_classes).  Huang et al. 2017, table 1.

    Args:
        depths: layers in each dense block.
        growth_rate: new channels per layer, the paper's k.
        bottleneck: a 1x1 convolution before each 3x3 (DenseNet-B).
        compression: the share of channels that a transition keeps, the paper's theta; 1.0 keeps all, less
            than 1 makes a DenseNet-C.
        stem_channels: width of the stem; twice the growth rate where None.
        dense, dropout, checkpointing: see `DenseBlock` and `DenseLayer`.
        small_input: the stem of the paper's CIFAR nets, a bare 3x3 convolution, for images of 32 pixels and
            less.  NOTE: DenseNet-121 to -201 have no such form in the paper; they keep their four blocks.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        growth_rate: int,
        bottleneck: bool = True,
        compression: float = 0.5,
        stem_channels: int | None = None,
        dense: bool = True,
        dropout: float = 0.0,
        checkpointing: bool = False,
        num_classes: int = 1000,
        small_input: bool = False,
    ) -> None:
        super().__init__()
        channels = stem_channels or 2 * growth_rate
        if small_input:
            # No norm here: each layer that reads the stem brings its own.
            self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False))
        else:
            self.stem = nn.Sequential(
                nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.MaxPool2d(3, stride=2, padding=1),
            )

        stages = []
        for i, depth in enumerate(depths):
            stage = nn.Sequential()
            if i > 0:
                compressed = int(channels * compression)
                stage.append(Transition(channels, compressed))
                channels = compressed
            block = DenseBlock(
                channels,
                depth,
                growth_rate,
                dense,
                bottleneck=bottleneck,
                dropout=dropout,
                checkpointing=checkpointing,
            )
            stage.append(block)
            channels = block.out_channels
            stages.append(stage)
        self.stages = nn.Sequential(*stages)
        self.head = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, num_classes),
        )
        self.init_weights()

    def init_weights(self) -> None:
        """He initialisation (He et al. 2015, "Delving deep"): the variance survives the ReLUs."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, h, w), the last block's output before its norm: 1/32 of the input's
        resolution; small, 1/8 after four blocks and 1/4 after three."""
        return self.stages(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))

    def get_classifier(self) -> nn.Linear:
        return self.head[-1]

    def reset_classifier(self, num_classes: int) -> None:
        old = self.head[-1]
        self.head[-1] = nn.Linear(old.in_features, num_classes).to(old.weight)


# %% [markdown]
# ## The paper's table as data
#
# The number in a name counts layers with weights: the stem, two for each dense layer (1x1 and 3x3), one for
# each transition, the classifier. $121 = 1 + 2 \cdot (6 + 12 + 24 + 16) + 3 + 1$.


# %%
class Row(NamedTuple):
    """One column of table 1: layers per dense block, and the channels that each layer adds."""

    depths: tuple[int, int, int, int]
    growth_rate: int


TABLE: dict[str, Row] = {
    # Huang et al. 2017, table 1; the wide DenseNet-161 is from sec. 4.4 and the authors' code.
    "densenet121": Row((6, 12, 24, 16), 32),
    "densenet161": Row((6, 12, 36, 24), 48),
    "densenet169": Row((6, 12, 32, 32), 32),
    "densenet201": Row((6, 12, 48, 32), 32),
}


def densenet(name: str, **options: float | bool) -> DenseNet:
    """The model of one row of the table.

    Options: `num_classes`, `small_input`, `growth_rate`, `bottleneck`, `compression`, `dropout`,
    `checkpointing`.
    """
    return DenseNet(**{**TABLE[name]._asdict(), **options})


def cifar_densenet(
    depth: int,
    growth_rate: int = 12,
    bottleneck: bool = False,
    compression: float = 1.0,
    small_input: bool = True,
    **options: float | bool,
) -> DenseNet:
    """The nets of sections 3 and 4.2: three dense blocks of equal depth on 32x32 images.

    depth = 3n + 4 for n layers per block, 6n + 4 with bottlenecks: the stem, two transitions and the
    classifier are the 4. The stem is 16 channels wide, twice the growth rate in DenseNet-BC. Their one form is
    the 32x32 form, whatever `small_input` says.

    >>> bc100 = cifar_densenet(100, bottleneck=True, compression=0.5, num_classes=10)
    >>> sum(p.numel() for p in bc100.parameters())
    769162
    """
    convolutions = 2 if bottleneck else 1
    n, rest = divmod(depth - 4, 3 * convolutions)
    if rest or n < 1:
        raise ValueError(f"a CIFAR DenseNet has depth {3 * convolutions}n + 4, not {depth}")
    is_bc = bottleneck and compression < 1
    return DenseNet(
        (n, n, n),
        growth_rate,
        bottleneck,
        compression,
        stem_channels=2 * growth_rate if is_bc else 16,
        small_input=True,
        **options,
    )


MODELS: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(densenet, name) for name in TABLE},
    # Huang et al. 2017, table 2
    "densenet40_k12": partial(cifar_densenet, 40),
    "densenet_bc100_k12": partial(cifar_densenet, 100, bottleneck=True, compression=0.5),
}
