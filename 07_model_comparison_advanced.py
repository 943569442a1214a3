"""Lesson 7, advanced: one table and one picture that choose a model.

LeNet-5 (LeCun et al. 1998), AlexNet (Krizhevsky et al. 2012), lessons 1 to 6, and Dosovitskiy et
al., "An Image is Worth 16x16 Words", 2021 (arXiv 2010.11929), the Vision Transformer.

The idea in one sentence: no network is the best, but on the plane of accuracy and cost a few are
not beaten by any other, and a constraint picks one of them.

    python 07_model_comparison_advanced.py                    # counts, measures, trains, compares
    python 07_model_comparison_advanced.py --profile-only     # without the training
    python 07_model_comparison_advanced.py --fold             # timed without BatchNorm, as deployed
    python 07_model_comparison_advanced.py --choose "params<5M,latency<20ms"
    python 07_model_comparison_advanced.py --experiment matched-size
    python 07_model_comparison_advanced.py --eval-imagenet DIR --pretrained

Measured on one thread of an AMD EPYC that others used too, torch 2.14: ten networks on digits
(8 px, 6 epochs, seeds 0 to 2), all of it in 590 s. What it gave: at the end, so guess first.
"""

# %% [markdown]
# **You will** count and time networks, train them side by side, and choose one under a constraint.
# **You need** lessons 1 to 6, or their ideas. **Time**: 40 minutes to read, 10 to run, 2 hours for
# the exercises.
#
# <details><summary>1. When does one network beat another?</summary>If it is better in accuracy or
# in cost, and not worse in the other.</details>
# <details><summary>2. Why are there three fronts?</summary>Parameters, multiply-adds and latency
# are three costs, and they order the networks differently.</details>
# <details><summary>3. What does attention compute?</summary>For each token a mean of all values,
# weighted by how well its query fits their keys.</details>
# <details><summary>4. Why does one seed decide nothing?</summary>Another seed gives another
# accuracy, and one number does not show how far away.</details>
# <details><summary>5. What does --experiment matched-size take away?</summary>What a network gains
# only because it is larger.</details>

# %% [markdown]
# ## The problem, and the one definition
#
# A network beats another if it is better in accuracy or in cost, and not worse in the other. Often
# neither beats the other: one is more accurate, the other cheaper. Those that no network beats are
# the **Pareto front**:
#
# $$\text{front} = \{a : \text{there is no } b \text{ with } \text{cost}_b \le \text{cost}_a,\
#   \text{acc}_b \ge \text{acc}_a, \text{ and one of them strictly}\}$$
#
#     accuracy
#        |            o b     o c        c is dearer than b and no better: beaten
#        |    o a             o d        d is dearer than b and worse: beaten
#        +-------------------------> cost        a and b are the front
#
# What is the cost? Parameters take memory, multiply-adds energy, latency the user's time, and the
# three do not agree. So there are three fronts.

# %%
from common.cli import main, parse_flags
from common.config import TrainConfig, knob, numbers_of

from dataclasses import dataclass

LESSON = "07_model_comparison_advanced"


@dataclass(frozen=True)
class Config(TrainConfig):
    """What this lesson can be told; every field is a flag, and `--help` prints them all."""

    model: str = knob("all", "models to compare, separated by commas; all: see FAMILIES")
    profile_only: bool = knob(False, "count and measure, but train nothing")
    budget: str = knob("", "training of each: epochs (10) or time (90s, 2m); default: --epochs")
    seeds: int = knob(3, "trainings of each model, with seeds SEED, SEED + 1, ...", low=1, high=100)
    choose: str | None = knob(None, 'rank what fits, such as "params<5M,latency<20ms"')
    match: str = knob("params", "what --experiment matched-size makes equal", ("params", "macs"))
    match_to: str = knob("", "the size to match, such as 0.3M (default: 0.3M parameters)")
    eval_imagenet: str = knob("", "folder of ImageNet's validation images, DIR/CLASS/*")
    pass_limit: float | None = knob(None, "most GMACs of a timed pass, 0: any (default: 5 on CPUs)",
                                    low=0, high=1e6)  # fmt: skip
    rates: str = knob("0.25,1,4", "factors on the learning rate that each tries; 1: no search",
                      low=0.001, high=1000)  # fmt: skip
    one_optimizer: bool = knob(False, "the Transformer takes SGD too, as all others do")
    fold: bool = knob(False, "time networks with BatchNorm folded in, as they are deployed")

    # One recipe for all, gentle enough for nets without BatchNorm.
    clip: float = knob(1.0, "largest gradient norm; 0: no limit", low=0, high=1e6)
    RECIPES = {
        "digits": {"image_size": 8, "epochs": 6, "batch_size": 64, "base_lr": 0.4, "warmup": 1},
        "cifar10": {"epochs": 15, "base_lr": 0.2},
    }

    # A stopped comparison may go on with more seeds or other models, and be asked other questions.
    MAY_CHANGE = {"model", "seeds", "choose", "profile_only", "fold"}
    FREE_ON_RESUME = TrainConfig.FREE_ON_RESUME | MAY_CHANGE


config = parse_flags(Config) if __name__ == "__main__" else Config()

# %%
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.classifier import Classifier  # nn.Module; head[-1] is the last layer, replaceable
from common.comparison.conclusion import conclude, reproduce
from common.comparison.entries import (
    Family,
    chosen_names,
    count_by_thop,
    counted,
    default_model,
    imagenet_entries,
    settled,
    small_entries,
    steps,
)
from common.comparison.results import Candidate, Table
from common.comparison.sweeps import Bench, Entry
from common.comparison.training import train_all
from common.engine.device import describe
from common.engine.errors import UserError
from common.engine.progress import Bar
from common.engine.signals import stop_says
from common.engine.sources import load_source
from common.experiments import Arm, open_store
from common.lessons import Models, get_model
from common.live import digits, live, show
from common.profiling import count_parameters
from common.runs import Run

# %% [markdown]
# ## The front, written out
#
# Sort by cost, and of equal costs the more accurate first. Go through the list, and keep each
# network that is more accurate than the last one kept, or its equal in both. By hand, for a, b, c
# and d with costs 1, 2, 3, 3 and accuracies 70, 90, 90, 70: a is kept; b is better than a and kept;
# c is no better than b; d is worse. The front is a, b.


# %%
def pareto_front(candidates: Iterable[Candidate], cost: str) -> list[Candidate]:
    """Those that no other beats, by rising cost. Of two that are equal in both, both stay.

    Args:
        cost: the field to keep low, such as "macs"; whoever has none, or no `top1`, is left out.
    """
    point = attrgetter(cost, "top1")
    known = [c for c in candidates if None not in point(c)]
    front: list[Candidate] = []
    for c in sorted(known, key=lambda c: (point(c)[0], -c.top1)):
        if not front or c.top1 > front[-1].top1 or point(c) == point(front[-1]):
            front.append(c)
    return front


# %% [markdown]
# **Say it first**: of the four points of the drawing, which are on the front, and which would be if
# b cost as much as d?

# %%
if live():
    for cost_of_b in (2, 3):
        drawn = {"a": (1, 0.7), "b": (cost_of_b, 0.9), "c": (3, 0.9), "d": (3, 0.7)}
        points = [Candidate("", n, "", None, 0, 0, macs=m, top1=t) for n, (m, t) in drawn.items()]
        show([c.model for c in pareto_front(points, "macs")])

# %% [markdown]
# ## The ends of the timeline: LeNet-5, the lab's net, AlexNet
#
# The timeline is twenty-two years long, and lessons 1 to 6 cover five of them, 2014 to 2019. Here
# is what came before: LeNet-5 (1998), which read cheques for banks, and AlexNet (2012), which won
# ImageNet's contest by more than ten points; the small net that a first lab builds by hand; and
# what came after: the Vision Transformer (2020), which does without convolutions. Like every model
# of the course they have a stem, stages and a head.


# %%
class ConvNet(Classifier):
    """(N, 3, H, W) -> (N, num_classes): what the three plain nets below share.

    LeNet-5 and the lab's net have one form, that for 32x32, whatever `small_input` says.
    """

    def init_weights(self) -> None:
        """He initialisation (He et al. 2015, "Delving deep").

        NOTE: younger than two of these nets. With PyTorch's smaller weights, as in torchvision's
        AlexNet, the signal nearly vanishes in eight layers without a norm.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, h, w), the last feature map."""
        return self.stages(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


def scaled(channels: int, width_mult: float) -> int:
    """A layer's width times `width_mult`, rounded, and at least one channel."""
    return max(1, round(channels * width_mult))


# %%
class LeNet5(ConvNet):
    """(N, 3, 32, 32) -> (N, num_classes).  LeCun et al. 1998, fig. 2.

    Smaller images are framed with zeros to 32 pixels, as the paper frames MNIST's 28 with
    background; the map of larger ones is averaged down to the 5x5 that the head expects.

    NOTE: the paper has one input channel, a C3 that leaves 36 of 96 connections to S2's maps out
    (table 1), a weight and a bias for each map in its pools, a stretched tanh, and an output
    layer that measures distances to drawings of the digits. Here there are three channels, all
    connections, plain averages and tanh, and a linear classifier with cross-entropy.

    >>> LeNet5(num_classes=10).forward_features(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 16, 5, 5])
    """

    def __init__(self, num_classes: int = 1000, small_input: bool = False,
                 width_mult: float = 1.0) -> None:  # fmt: skip
        super().__init__()
        c1, c3, c5, f6 = (scaled(width, width_mult) for width in (6, 16, 120, 84))
        self.stem = nn.Sequential(nn.Conv2d(3, c1, 5), nn.Tanh(), nn.AvgPool2d(2))  # 14x14
        self.stages = nn.Sequential(nn.Conv2d(c1, c3, 5), nn.Tanh(), nn.AvgPool2d(2))  # 5x5
        layers = [nn.Linear(c3 * 5 * 5, c5), nn.Tanh(), nn.Linear(c5, f6), nn.Tanh()]
        flat = nn.AdaptiveAvgPool2d(5), nn.Flatten()
        self.head = nn.Sequential(*flat, *layers, nn.Linear(f6, num_classes))
        self.init_weights()

    def forward_features(self, x: Tensor) -> Tensor:
        dh, dw = (max(0, 32 - size) for size in x.shape[-2:])
        x = F.pad(x, (dw // 2, dw - dw // 2, dh // 2, dh - dh // 2))  # left, right, top, bottom
        return super().forward_features(x)


# %% [markdown]
# **Say it first**: a digit of 8 pixels is framed to 32. Which shape does the head of LeNet-5 get?

# %%
if live():
    show(LeNet5(num_classes=10).forward_features(digits(1)).shape)


# %%
class SimpleCNN(ConvNet):
    """(N, 3, H, W) -> (N, num_classes): what one writes on the first day. No paper.

    Three convolutions and two linear layers. With 10 classes it has 1,147,466 parameters, nine
    tenths of them in the first linear layer. The last map is brought to 4x4, its own size at 32x32,
    so that the net takes images of any size from 8 pixels on.

    >>> SimpleCNN(num_classes=10).forward_features(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 128, 4, 4])
    """

    def __init__(self, num_classes: int = 1000, small_input: bool = False,
                 width_mult: float = 1.0) -> None:  # fmt: skip
        super().__init__()
        widths = [scaled(width, width_mult) for width in (32, 64, 128)]
        hidden = scaled(512, width_mult)
        stages = [
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
            for a, b in zip([3, *widths], widths)
        ]
        self.stem, self.stages = stages[0], nn.Sequential(*stages[1:])
        flat = nn.AdaptiveAvgPool2d(4), nn.Flatten()
        layers = nn.Linear(widths[-1] * 4 * 4, hidden), nn.ReLU(), nn.Dropout(0.5)
        self.head = nn.Sequential(*flat, *layers, nn.Linear(hidden, num_classes))
        self.init_weights()


# %% [markdown]
# **Say it first**: three poolings halve 32 pixels. How many numbers enter the first linear layer?

# %%
if live():
    show(SimpleCNN(num_classes=10).forward_features(digits(1, 32)).flatten(1).shape)


# %%
class AlexNet(ConvNet):
    """(N, 3, H, W) -> (N, num_classes).  Krizhevsky 2014, "One weird trick", sec. 5, footnote 1;
    first in Krizhevsky et al. 2012.

    NOTE: the net of 2012 has two groups of filters, to fit on two cards; this is the one-tower net
    of 2014, in torchvision's form: the fourth convolution is 256 wide (the paper has 384), dropout
    stands before the first two linear layers, not behind them, and response normalisation is out.

    Args:
        small_input: for images of up to 64 pixels.  NOTE: the first layer is 5x5 with stride 1,
            not 11x11 with 4, pools are 2x2, the linear layers 1024 wide on 2x2, not 4096 on 6x6.
        width_mult: scales every layer but the classifier.

    >>> AlexNet().forward_features(torch.zeros(1, 3, 224, 224)).shape
    torch.Size([1, 256, 6, 6])
    """

    def __init__(self, num_classes: int = 1000, small_input: bool = False,
                 width_mult: float = 1.0) -> None:  # fmt: skip
        super().__init__()
        w1, w2, w3, w4, w5 = (scaled(width, width_mult) for width in (64, 192, 384, 256, 256))
        size, stride, side, hidden = (5, 1, 2, 1024) if small_input else (11, 4, 6, 4096)
        hidden = scaled(hidden, width_mult)
        pool = partial(nn.MaxPool2d, 2) if small_input else partial(nn.MaxPool2d, 3, stride=2)
        self.stem = nn.Sequential(nn.Conv2d(3, w1, size, stride, padding=2), nn.ReLU(), pool())
        self.stages = nn.Sequential(
            nn.Sequential(nn.Conv2d(w1, w2, 5, padding=2), nn.ReLU(), pool()),
            nn.Sequential(nn.Conv2d(w2, w3, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(w3, w4, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(w4, w5, 3, padding=1), nn.ReLU(), pool()),
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(side), nn.Flatten(),
            nn.Dropout(0.5), nn.Linear(w5 * side**2, hidden), nn.ReLU(),
            nn.Dropout(0.5), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )  # fmt: skip
        self.init_weights()


# %% [markdown]
# **Say it first**: which part of AlexNet holds most of its 61 million parameters?

# %%
if live():
    show({part: count_parameters(net) for part, net in AlexNet().named_children()})

# %% [markdown]
# ## The Vision Transformer: an image is worth 16x16 words
#
# Cut the image into patches, make each a vector of D numbers, a *token*, and let every token look
# at all of them:
#
# $$\text{attention}(Q, K, V) = \text{softmax}\left(\frac{QK^\top}{\sqrt{d}}\right) V$$
#
# Each token makes a query, a key and a value. They are split into heads, and $d$ is the length of a
# query in one head: D divided by the number of heads. Products of random vectors grow with
# $\sqrt{d}$; undivided they would make the softmax all or nothing. One more token is learned, the
# class token: the classifier reads what it has gathered. LayerNorm is BatchNorm's equation over the
# D numbers of one token, GELU a smooth ReLU. That two patches are neighbours can only be learned,
# from their positions: a Transformer needs more data, to learn what is built into a convolution.


# %%
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V, written out: three times (N, heads, T, d) -> (N, heads, T, d).
    `F.scaled_dot_product_attention` computes the same without storing the T x T weights:

    >>> q, k, v = torch.randn(3, 2, 4, 10, 16)
    >>> torch.allclose(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-5)
    True
    """
    weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)  # (N, heads, T, T)
    return weights @ v


class Attention(nn.Module):
    """(N, T, D) -> (N, T, D): every token asks every token.  Vaswani et al. 2017, sec. 3.2;
    Dosovitskiy et al. 2021, appendix A.

    >>> Attention(64, heads=4)(torch.zeros(1, 10, 64)).shape
    torch.Size([1, 10, 64])
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(dim, 3 * dim)  # queries, keys and values in one product
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.in_proj(x).unflatten(-1, (3, self.heads, -1))  # (N, T, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, D/heads)
        x = F.scaled_dot_product_attention(q, k, v)  # as `attention`; (N, heads, T, D/heads)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (N, T, D)


class EncoderBlock(nn.Module):
    """(N, T, D) -> (N, T, D): attention between the tokens, then two linear layers on each alone;
    both are residual branches with the norm in front, as in lesson 1's pre-activation block.
    Dosovitskiy et al. 2021, fig. 1 right, eq. 2-3.

    >>> EncoderBlock(64, heads=4, mlp_dim=128)(torch.zeros(1, 10, 64)).shape
    torch.Size([1, 10, 64])
    """

    def __init__(self, dim: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nn.Module):
    """(N, 3, H, W) -> (N, 1 + H/patch * W/patch, D): cut into patches, project each, put the class
    token in front, add positions.  Dosovitskiy et al. 2021, eq. 1. Positions are learned on the
    grid of `image_size`; on another grid they are interpolated (sec. 3.2).

    >>> PatchEmbedding(64, patch_size=4, image_size=32)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 65, 64])
    """

    def __init__(self, dim: int, patch_size: int, image_size: int) -> None:
        super().__init__()
        self.grid = image_size // patch_size
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        # A convolution whose stride is its kernel is one linear layer, applied to each patch.
        self.projection = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.position = nn.Parameter(torch.randn(1, 1 + self.grid**2, dim) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.projection(x)  # (N, D, h, w)
        patches = x.flatten(2).transpose(1, 2)  # (N, h * w, D)
        tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), patches], dim=1)
        return tokens + self.position_for(*x.shape[-2:])

    def position_for(self, height: int, width: int) -> Tensor:
        """(1, 1 + height * width, D): the learned positions, interpolated for another grid."""
        if (height, width) == (self.grid, self.grid):
            return self.position
        of_class, of_patches = self.position[:, :1], self.position[:, 1:]
        of_patches = of_patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        of_patches = F.interpolate(of_patches, (height, width), mode="bicubic", align_corners=True)
        return torch.cat([of_class, of_patches.flatten(2).transpose(1, 2)], dim=1)


class VisionTransformer(Classifier):
    """(N, 3, H, W) -> (N, num_classes).  Dosovitskiy et al. 2021, fig. 1.

    NOTE: no dropout, and a head of one linear layer, which in the paper is for fine-tuning only.

    Args:
        patch_size, depth, heads, dim, mlp_dim: a row of TABLE.
        small_input: for images of up to 64 pixels.  NOTE: patches a quarter as wide, in ViT-B/16
            64 of 4x4 pixels for an image of 32x32; the paper enlarges CIFAR's images instead.
        width_mult: scales `dim` in steps of the number of heads, and `mlp_dim` with it.
        image_size: what positions are learned for; by default 224, or 32 with `small_input`.
    """

    def __init__(self, patch_size: int, depth: int, heads: int, dim: int, mlp_dim: int,
                 num_classes: int = 1000, small_input: bool = False, width_mult: float = 1.0,
                 image_size: int | None = None) -> None:  # fmt: skip
        super().__init__()
        wide = heads * scaled(dim // heads, width_mult)
        dim, mlp_dim = wide, wide * mlp_dim // dim
        patch_size = patch_size // 4 if small_input else patch_size
        self.stem = PatchEmbedding(dim, patch_size, image_size or (32 if small_input else 224))
        self.stages = nn.Sequential(*[EncoderBlock(dim, heads, mlp_dim) for _ in range(depth)])
        self.head = nn.Sequential(nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, num_classes))
        self.init_weights()

    def init_weights(self) -> None:
        """As in the authors' code: Xavier, biases near zero, the classifier at zero.  NOTE: query,
        key and value are one matrix, as in torchvision; three would start 1.4 times as large.
        """
        for module in self.stages.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.normal_(module.bias, std=1e-6)
        nn.init.zeros_(self.head[-1].weight)
        nn.init.zeros_(self.head[-1].bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, D, h, w): the last patch tokens, laid out as a map again."""
        grid = [side // self.stem.projection.stride[0] for side in x.shape[-2:]]
        tokens = self.stages(self.stem(x))  # (N, 1 + h * w, D), the class token first
        return tokens[:, 1:].transpose(1, 2).unflatten(2, grid)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x))[:, 0])  # what the class token has gathered

    def arrange_torchvision_state(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """torchvision keeps queries, keys and values as bare parameters, and the positions in the
        encoder, after the projection.
        """
        renamed = {name.replace("in_proj_", "in_proj."): v for name, v in state_dict.items()}
        position = renamed.pop("encoder.pos_embedding")
        return {"class_token": renamed.pop("class_token"), "position": position, **renamed}


# %% [markdown]
# **Say it first**: an image of 48 pixels in patches of 4, and the class token: how many tokens? How
# do positions that were learned for 32 pixels fit them?

# %%
if live():
    net = PatchEmbedding(64, patch_size=4, image_size=32)
    show(net.position.shape, net.position_for(12, 12).shape, net(digits(1, 48)).shape)

# %% [markdown]
# ## The paper's table, and the timeline, as data


# %%
class Row(NamedTuple):
    """One line of the table: what the image is cut into, and the size of the encoder."""

    patch_size: int
    depth: int
    heads: int
    dim: int
    mlp_dim: int


TABLE: dict[str, Row] = {
    # Dosovitskiy et al. 2021, table 1; the number after the last underscore is the patch size
    "vit_b_16": Row(16, 12, 12, 768, 3072),
    "vit_b_32": Row(32, 12, 12, 768, 3072),
    "vit_l_16": Row(16, 24, 16, 1024, 4096),
    # NOTE: no paper's. Small enough for a CPU: 0.8M parameters in the small form.
    "vit_xs_16": Row(16, 6, 4, 128, 256),
}

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet5": LeNet5,
    "simple_cnn": SimpleCNN,
    "alexnet": AlexNet,
    **{name: partial(VisionTransformer, *row) for name, row in TABLE.items()},
}


class Era(NamedTuple):
    """When a family was published (the preprint, where there is one), and what it brought."""

    year: int | None
    idea: str


# By the beginning of a model's name; the longest that fits counts.
ERAS: dict[str, Era] = {
    "lenet": Era(1998, "convolve, pool, repeat"),
    "alexnet": Era(2012, "the same, large, on GPUs, with ReLU and dropout"),
    "vgg": Era(2014, "nothing but 3x3"),
    "googlenet": Era(2014, "several kernels side by side"),
    "inception": Era(2015, "large kernels factorised"),
    "resnet": Era(2015, "learn the difference"),
    "plainnet": Era(2015, "the control: no shortcut"),
    "preact": Era(2016, "a shortcut without a ReLU on it"),
    "wide_resnet": Era(2016, "wider instead of deeper"),
    "densenet": Era(2016, "keep every feature"),
    "resnext": Era(2016, "parallel paths inside the block"),
    "mobilenet_v1": Era(2017, "depthwise, then pointwise"),
    "se_resnet": Era(2017, "channels weigh each other"),
    "mobilenet_v2": Era(2018, "thin between, wide inside"),
    "mobilenet_v3": Era(2019, "searched by machine"),
    "efficientnet": Era(2019, "scale everything together"),
    "vit": Era(2020, "no convolution at all"),
    "simple": Era(None, "the first lab"),
}


def era(name: str) -> Era:
    """Where a model of the course stands on the timeline.

    >>> era("mobilenet_v3_small").year, era("resnext50_32x4d").idea
    (2019, 'parallel paths inside the block')
    """
    return ERAS[max((prefix for prefix in ERAS if name.startswith(prefix)), key=len)]


# %% [markdown]
# ## What a network costs, before it has any weights
#
# Parameters and multiply-adds follow from the definition: they are counted on the meta device, on
# shapes without numbers, so that EfficientNet-B7 costs nothing. Latency has to be measured: all
# models in turn, with random weights, four times over (`common/comparison/sweeps.py`). The lowest
# counts, because a disturbed machine is never faster than an idle one.
#
# We count twice. thop, the counter of many papers' repositories, hooks each layer of a type that it
# knows. So it counts BatchNorm and pooling, which the papers' tables leave out, and misses what is
# no layer: the two products of attention. We count operators as they are called. On convolutions
# both agree to the last digit.
#
# **Say it first**: a 3x3 convolution from 3 to 8 channels on 10x10 pixels, without padding, then
# BatchNorm. How many multiply-adds do we count? Does thop count more, or fewer?

# %%
if live():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    ours = 8 * 8 * 8 * 27  # 8x8 places, 8 filters, 27 weights in each
    show(ours, count_by_thop(model, (3, 10, 10), ours))

# %% [markdown]
# ## The families, and how to make each as large as the others
#
# Lessons 1 to 6 take part with their default models (lesson 1 with ResNet-18; GoogLeNet at half its
# width), this one with four. But a small DenseNet against a large VGG compares sizes, not designs.
# `--experiment matched-size` scales each family by its own knob, until all have about the same
# parameters (or multiply-adds).

# %%
FAMILIES: tuple[Family, ...] = (  # lesson, model (else its default), the knob (else width_mult)
    Family("07", "lenet5"),
    Family("07", "simple_cnn"),
    Family("07", "alexnet"),
    Family("02", "", lambda w: {"channels": [scaled(c, w) for c in (64, 128, 256, 512, 512)]}),
    Family("03", width=0.5),  # whole, it takes two fifths of all the time
    Family("01", "resnet18", lambda w: {"stem_channels": scaled(64, w),
                                        "channels": [scaled(c, w) for c in (64, 128, 256, 512)]}),
    Family("06", "", lambda w: {"growth_rate": scaled(12, w)}),
    Family("05"),
    Family("04"),
    Family("07", "vit_xs_16"),
)  # fmt: skip

# %% [markdown]
# ## Trained side by side: one budget, several seeds, each at its own rate
#
# The same images, the same schedule, the same number of epochs (or seconds), and the weights of the
# last epoch, so that none is picked. All take SGD but the Vision Transformer, which takes AdamW, as
# is usual: it gives each weight a rate of its own.
#
# One rate for all would rank the rates and not the designs: LeNet-5, with no norm, wants another
# than a ResNet. So each network first tries the same three factors on the usual rate, with a seed
# that does not count, and keeps the best on *validation* images. The search is as long as the
# comparison: in half the epochs, and with 16 as a fourth factor, the Transformer learned fastest
# with 0.004, and ended at 73.0% (seeds 0 to 2); with 0.001, which the whole search chooses, 83.4%.
#
# Equally good networks seldom get the same number. So the verdict pairs the seeds, for one seed
# gives all networks the same images in the same order. Student's t makes an interval of the
# differences, and Holm's rule widens it, because many pairs are compared. A network is worse if the
# whole interval is beyond half a point (two of 359 images), level if it is below, else undecided.


# %%
def arm(entry: Entry, config: Config) -> Arm:
    """One network, what is its own in the recipe, and the peak rates that it tries."""
    rate, changes = config.lr, {}
    transformer = entry.candidate.model.startswith("vit")
    if transformer and config.optimizer == "sgd" and not config.one_optimizer:
        rate = TrainConfig.ADAMW["base_lr"] * config.batch_size * config.accumulate / 256
        changes = {"optimizer": "adamw", "weight_decay": TrainConfig.ADAMW["weight_decay"]}
    factors = numbers_of(config.rates, "--rates") or [1.0]
    rates = [min(rate * factor, 100.0) for factor in factors]  # what --lr may be at most
    return Arm(entry.candidate.model, entry.build, changes, rates=rates)


# %% [markdown]
# ## One comparison, from the counts to the report

# %%
entry = partial(counted, lambda name: era(name).year)  # a line of the table, not yet measured


def run(config: Config) -> list[Table]:
    """Count, measure, train, draw, choose; or test official weights, with `--eval-imagenet`."""
    config, device = settled(config)
    source = None if config.eval_imagenet else load_source(config)
    run = Run.open(config, LESSON)
    print(f"device     {device.type}: {describe(device)}\nfolder     {run.folder}", flush=True)
    with stop_says(run.farewell):
        if config.eval_imagenet:
            return reproduce(config, device, run, entry, pareto_front)
        everyone = [] if config.experiment else chosen_names(config.model, list(Models()))
        trained = chosen_names(config.model, [default_model(family) for family in FAMILIES])
        with Bar(steps(everyone, trained), "measuring", "steps", seconds=15) as bar:
            small = small_entries(trained, config, len(source.class_names), bar, FAMILIES, entry)
            large = imagenet_entries(everyone, entry, bar)
            bench = Bench.open(config, device, run, bar)
            measured, ways = bench.sweeps(large), bench.all_ways(large)
            own = bench.for_small().sweeps(small)
        results = None
        if not config.profile_only:
            store = open_store(run, LESSON, source.fingerprint, device)
            results = train_all([arm(e, config) for e in small], config, device, source, store)
        return conclude(config, run, measured, own, ways, results, bench.limit, pareto_front, era)


def build(config: Config, num_classes: int) -> nn.Module:
    """The model that `--summary` shows."""
    if config.model == "all":
        raise UserError("--summary shows one model: name it with --model")
    return get_model(config.model)(num_classes=num_classes, small_input=config.small_input)


EXPERIMENTS: dict[str, Callable[[Config], object]] = {"matched-size": run}

# %% [markdown]
# ## What to notice
#
# - The three fronts of `imagenet_cost.png` do not hold the same networks: look for one that is on
#   the front of multiply-adds and not on that of latency. What does it do that is no multiply-add?
# - `MACs by thop` is more than `MACs` by norms and pooling in every convolutional net, and less by
#   attention in every ViT. Which of the two would you put into a paper's table?
# - A row called folded does the same multiply-adds without BatchNorm. What did the norms cost? Why
#   must DenseNet-121 keep half of its own (`--fold`), and ResNet none?
# - The verdict names the networks that the best is shown to beat, those level with it, and those
#   undecided. `--seeds 1` decides nothing: it ranks the seeds too.
# - Which lines of `training_curves.png` still rise? What would ten epochs change, or other rates?
# - `--experiment matched-size` takes away what a net gained by its size alone: compare the order.
#
# **What the comparison gave** (digits, 8 px, six epochs; test accuracy, mean and deviation of seeds
# 0 to 5, and the peak rate that each chose):
#
#     densenet40_k12  98.4 ± 0.2 %  0.025     efficientnet_mini   95.9 ± 0.7 %  0.4
#     googlenet       98.0 ± 0.8 %  0.4       mobilenet_v3_small  95.8 ± 0.7 %  0.4
#     vgg11_bn        97.7 ± 0.7 %  0.4       lenet5              92.7 ± 1.6 %  0.1
#     resnet18        97.6 ± 0.6 %  0.4       alexnet             90.6 ± 1.8 %  0.1
#     simple_cnn      96.9 ± 0.4 %  0.1       vit_xs_16           85.2 ± 3.7 %  0.001
#
# With seeds 0 to 2 every pair is *undecided*: one of 45 differences may look large by chance, and
# Holm's rule asks for more. With six seeds (`--resume RUN --seeds 6`) the DenseNet is better by
# more than half a point than the last six. The three behind it are undecided; about 70 seeds would
# decide one of these. EfficientNet has 98% in its own lesson, at 16 px and with eight epochs.
#
# ## Exercises
#
# `python -m common.starter 07 --out DIR` makes a copy of this file without the parts that you write
# and says how to mark it. In order of difficulty:
#
# - **7.1** `SimpleCNN`, the lab's net. **7.2** The layers of `LeNet5`.
# - **7.6** `pareto_front`, as above or from the definition. What becomes of two equal networks?
# - **7.3** `AlexNet`, in both forms. **7.5** `EncoderBlock`. What changes if the norms stand behind
#   the sums? **7.4** `Attention`, first with the softmax written out.
# - Run `--choose "latency<20ms"` and then `--choose "macs<1G"`. Why are the winners not the same?
# - How many multiply-adds of ViT-B/16 are attention products at 224 pixels? At which image size do
#   they overtake the linear layers?
# - Compare the ViT with and without `--one-optimizer`. Is AdamW for it alone fair?
# - Add your own network to `FAMILIES`, with a knob for its width. Is it on the front?
# - Train with `--budget 5s` instead of epochs. Who gains, and what is being compared now?

# %%
if __name__ == "__main__":
    # The names in --model are checked one by one, in `chosen_names`.
    main(config, {config.model: None}, build, run, EXPERIMENTS)
