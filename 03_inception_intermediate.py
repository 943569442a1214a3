"""Lesson 3, intermediate: Inception, several filter sizes side by side.

Szegedy et al., "Going deeper with convolutions", 2014 (arXiv 1409.4842), here "GoogLeNet", and
"Rethinking the Inception architecture for computer vision", 2015 (1512.00567): "Inception-v3".

The idea in one sentence: do not choose a filter size, use them all at once and let the next layer
choose; 1x1 convolutions narrow what the large filters read, and so make it affordable.

    python 03_inception_intermediate.py                            # trains: digits on a CPU
    python 03_inception_intermediate.py --experiment auxiliary     # do side classifiers help?
    python 03_inception_intermediate.py --experiment branches      # which branch does the work?
    python 03_inception_intermediate.py --experiment bottleneck    # what the 1x1 convolutions save
    python 03_inception_intermediate.py --model inception_v3 --summary

Measured on one thread of an AMD EPYC that others used too, torch 2.14: googlenet on digits (8 px,
10 epochs, seeds 0 to 2) tests at 99.16, 98.61 and 98.89%, 147 s of training. What the experiments
gave stands at the end of the file, so that you can guess first.
"""

# %% [markdown]
# **You will** write the Inception module and the loss of a net with several classifiers, and test
# what reductions, branches and side classifiers are worth. **You need** lessons 1 and 2. **Time**:
# 30 minutes to read, 3 to run, 11 for the experiments, about 90 for the exercises.
#
# <details><summary>1. What is a 1x1 convolution?</summary>A linear layer at each place.</details>
# <details><summary>2. Why a 1x1 before the 5x5?</summary>It narrows what the 5x5 reads.</details>
# <details><summary>3. Two 3x3 see as much as one 5x5. What do they cost?</summary>18/25.</details>
# <details><summary>4. And the auxiliary classifiers in a test?</summary>Not used.</details>
# <details><summary>5. Targets for ten classes, smoothed by 0.1?</summary>0.91 and 0.01.</details>

# %% [markdown]
# ## The problem, and the one equation
#
# A $k \times k$ convolution from $C$ to $D$ channels is a linear layer that reads the $k \times k$
# places around each place of a map. Its $k^2 C D$ weights are the same at all places, so each place
# takes $k^2 C D$ multiply-adds. A max-pool gives the largest value that it reads.
#
# A dog may fill the image or a corner of it: which filter size is right? VGG-16 stacks 3x3 and pays
# 15.5 billion multiply-adds an image. GoogLeNet runs 1x1, 3x3, 5x5 and a pool side by side,
# concatenates what they give, and pays 1.5 billion:
#
#         input ─┬─ 1x1 ─────────────────┬─ concatenate ── output
#                ├─ 1x1 reduce ── 3x3 ───┤
#                ├─ 1x1 reduce ── 5x5 ───┤
#                └─ 3x3 max-pool ── 1x1 ─┘
#
#         image ─ stem ─ [3a 3b] ─ pool ─ [4a 4b 4c 4d 4e] ─ pool ─ [5a 5b] ─ head
#                 H/8              H/16    └ aux    └ aux    H/32
#
# For that a 1x1 first reduces $C$ channels to $r$. The two take, in multiply-adds at each place,
#
# $$C r + k^2 r D \quad\text{instead of}\quad k^2 C D$$
#
# By hand, for GoogLeNet's first 5x5 ($C = 192$, $r = 16$, $D = 32$): 192 x 16 + 25 x 16 x 32 =
# 15,872 instead of 25 x 192 x 32 = 153,600.

# %%
from common.cli import main, parse_flags
from common.config import TrainConfig, knob

from dataclasses import dataclass

LESSON = "03_inception_intermediate"


@dataclass(frozen=True)
class Config(TrainConfig):
    """What this lesson can be told; every field is a flag, and `--help` prints them all."""

    model: str = knob("googlenet", "a name of MODELS: googlenet, inception_v3")
    aux: bool = knob(True, "train with auxiliary classifiers on the side")
    five_by_five: bool = knob(False, "a real 5x5 branch, as in the paper", without=("inception",))
    batch_norm: bool = knob(True, "off gives the net of 2014", without=("inception",))
    width_mult: float = knob(1.0, "factor on all channels", (), 0.05, 8, without=("inception",))
    trial_width: float = knob(0.25, "width_mult of the nets", (), 0.05, 8,
                              only="auxiliary, branches")  # fmt: skip
    clock: float = knob(0.5, "seconds for each module", (), 0, 60, only="bottleneck")
    # What differs from the defaults of common/config.py; the record was measured with these.
    RECIPES = {"digits": {"image_size": 8, "epochs": 10, "batch_size": 64, "base_lr": 0.2}}


# Flags are read before torch is imported, so that --help answers at once.
config = parse_flags(Config) if __name__ == "__main__" else Config()

# %%
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import plotting
from common.branches import draw_branches, gradients, look_at_branches
from common.classifier import SideClassifiers  # nn.Module; last layers are replaceable
from common.data import load_data
from common.engine.device import memory_format
from common.evaluation import evaluate
from common.experiments import Arm, Claim, Experiment, conclude, run_experiment
from common.live import digits, live, show
from common.pretrained import load_pretrained, weights_mean_std
from common.profiling import count_macs, count_parameters, profile
from common.runs import Run, banner, draw_figures, prepare
from common.training import fit, make_optimizer, make_schedule, train_one_epoch

# %% [markdown]
# ## The convolution: every one is followed by BatchNorm and ReLU
#
# BatchNorm gives each channel mean 0 and deviation 1 over the batch, then a scale and a shift that
# are learned. ReLU replaces what is negative by zero.


# %%
class ConvBnReLU(nn.Sequential):
    """Convolution, BatchNorm, ReLU; the resolution stays unless stride or padding change it.
    (N, C_in, H, W) -> (N, C_out, H/stride, W/stride)

    NOTE: GoogLeNet predates BatchNorm and has a bias instead: `batch_norm=False`. The weights that
    were published later have BatchNorm (Ioffe and Szegedy 2015), with an epsilon of 0.001.

    >>> ConvBnReLU(64, 96, (1, 7))(torch.zeros(2, 64, 8, 8)).shape
    torch.Size([2, 96, 8, 8])
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
                 stride: int = 1, padding: int | None = None,
                 batch_norm: bool = True) -> None:  # fmt: skip
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        padding = tuple(k // 2 for k in kernel) if padding is None else padding  # keeps H and W
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=not batch_norm)
        norm = nn.BatchNorm2d(out_channels, eps=0.001) if batch_norm else nn.Identity()
        super().__init__(conv, norm, nn.ReLU())


# %% [markdown]
# **Say it first**: a 1x1 convolution from 192 to 16 channels with its BatchNorm. How many
# parameters? And can a 1x1 blur or sharpen an image?

# %%
if live():
    print(count_parameters(ConvBnReLU(192, 16, 1)), 192 * 16 + 2 * 16)
    show(digits(4), ConvBnReLU(3, 4, 1)(digits(4))[:, :1])  # no: it sees no neighbours

# %% [markdown]
# ## The idea: do not choose a filter size, use them all
#
# First without reductions: the large filters read all channels. The paper calls this naive: a 5x5
# on many channels is expensive, and the pool passes on all that it reads, so that each module is
# wider than the one before. Then with them, the module of GoogLeNet.


# %%
class Branches(nn.Module):
    """Concatenate what each branch makes of x: (N, C_in, H, W) -> (N, sum of their C_out, h, w).

    >>> Branches(ConvBnReLU(16, 8, 1), ConvBnReLU(16, 24, 3))(torch.zeros(2, 16, 8, 8)).shape
    torch.Size([2, 32, 8, 8])
    """

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class Widths(NamedTuple):
    """The channels of one GoogLeNet module, in the order of the paper's table 1."""

    conv1x1: int
    reduce3x3: int
    conv3x3: int
    reduce5x5: int
    conv5x5: int
    pool_proj: int


class Direct(Branches):
    """The module without reductions; if not `project_pool`, the naive one of GoogLeNet, fig. 2(a).
    (N, C_in, H, W) -> (N, C_out, H, W), of which the unprojected pool gives C_in.

    >>> Direct(192, Widths(64, 96, 128, 16, 32, 32), False)(torch.zeros(2, 192, 8, 8)).shape
    torch.Size([2, 416, 8, 8])
    """

    def __init__(self, in_channels: int, widths: Widths, project_pool: bool = True) -> None:
        ones, _, threes, _, fives, project = widths
        conv, pool = partial(ConvBnReLU, in_channels), nn.MaxPool2d(3, stride=1, padding=1)
        last = nn.Sequential(pool, conv(project, 1)) if project_pool else pool
        super().__init__(conv(ones, 1), conv(threes, 3), conv(fives, 5), last)


class Inception(Branches):
    """GoogLeNet, fig. 2(b): (N, C_in, H, W) -> (N, conv1x1 + conv3x3 + conv5x5 + pool_proj, H, W).

    NOTE: the published weights, torchvision's too, have by a slip a 3x3 where the paper has a 5x5.
    The default matches them; `five_by_five=True` builds the paper's.

    >>> module = Inception(192, Widths(64, 96, 128, 16, 32, 32), five_by_five=True)
    >>> module(torch.zeros(2, 192, 28, 28)).shape
    torch.Size([2, 256, 28, 28])
    >>> sum(p.numel() for p in module.branches[2].parameters() if p.dim() == 4)  # by hand, above
    15872
    """

    def __init__(self, in_channels: int, widths: Widths, five_by_five: bool = False,
                 conv: Callable[..., nn.Module] = ConvBnReLU) -> None:  # fmt: skip
        ones, reduce3, threes, reduce5, fives, project = widths
        third, pool = 5 if five_by_five else 3, nn.MaxPool2d(3, stride=1, padding=1)
        super().__init__(
            conv(in_channels, ones, 1),
            nn.Sequential(conv(in_channels, reduce3, 1), conv(reduce3, threes, 3)),
            nn.Sequential(conv(in_channels, reduce5, 1), conv(reduce5, fives, third)),
            nn.Sequential(pool, conv(in_channels, project, 1)),
        )


# %% [markdown]
# **Say it first**: 192 channels of 28x28 go through a module of widths (64, 96, 128, 16, 32, 32).
# How many channels come out, and how many from each branch? And of the naive form?

# %%
if live():
    x, widths = torch.zeros(1, 192, 28, 28), Widths(64, 96, 128, 16, 32, 32)
    for module in (Inception(192, widths), Direct(192, widths, project_pool=False)):
        print([branch(x).shape[1] for branch in module.branches], count_macs(module, (192, 28, 28)))

# %% [markdown]
# ## Inception-v3: the same idea with factorised filters
#
# Two 3x3 convolutions see as much as one 5x5 and cost 18/25 of it; a 1x7 and a 7x1 see as much as a
# 7x7 and cost 14/49. Each resolution has its own module: A, C, or E, with the most channels.
# Between them a reduction (B, D) halves the map and adds channels. Letters are torchvision's.


# %%
def chain(in_channels: int, *rows: tuple | nn.Module) -> nn.Sequential:
    """Layers in a row; a tuple is a convolution: (out_channels, kernel_size, stride, padding)."""
    layers = nn.Sequential()
    for row in rows:
        layers.append(ConvBnReLU(in_channels, *row) if isinstance(row, tuple) else row)
        in_channels = row[0] if isinstance(row, tuple) else in_channels
    return layers


class Reduction(Branches):
    """Halve the map: strided convolutions beside a strided pool.  Inception-v3, fig. 10.
    (N, C_in, H, W) -> (N, last widths of the two chains + C_in, (H-1)/2, (W-1)/2)

    >>> Reduction(288, [(384, 3, 2, 0)], [(64, 1), (96, 3, 2, 0)])(torch.zeros(2, 288, 9, 9)).shape
    torch.Size([2, 768, 4, 4])
    """

    def __init__(self, in_channels: int, short: list[tuple], long: list[tuple]) -> None:
        branches = short, long, [nn.MaxPool2d(3, stride=2)]
        super().__init__(*(chain(in_channels, *branch) for branch in branches))


class InceptionA(Branches):
    """35x35.  Inception-v3, fig. 5.  (N, C_in, H, W) -> (N, 224 + pool_proj, H, W)"""

    def __init__(self, in_channels: int, pool_proj: int) -> None:
        five = [(48, 1), (64, 5)]  # NOTE: as in the authors' code; the figure has a 3x3
        pool = [nn.AvgPool2d(3, stride=1, padding=1), (pool_proj, 1)]
        branches = [(64, 1)], five, [(64, 1), (96, 3), (96, 3)], pool
        super().__init__(*(chain(in_channels, *branch) for branch in branches))


class InceptionC(Branches):
    """17x17: 7x7 as 1x7 and 7x1, once and twice.  Inception-v3, fig. 6 with n = 7.
    (N, C_in, H, W) -> (N, 768, H, W); `width` is that of the factorised convolutions.

    >>> InceptionC(768, width=128)(torch.zeros(2, 768, 17, 17)).shape
    torch.Size([2, 768, 17, 17])
    """

    def __init__(self, in_channels: int, width: int) -> None:
        first, wide, tall = (width, 1), (width, (1, 7)), (width, (7, 1))
        once, twice = [first, wide, (192, (7, 1))], [first, tall, wide, tall, (192, (1, 7))]
        branches = [(192, 1)], once, twice, [nn.AvgPool2d(3, stride=1, padding=1), (192, 1)]
        super().__init__(*(chain(in_channels, *branch) for branch in branches))


class InceptionE(Branches):
    """8x8: two branches split.  Inception-v3, fig. 7.  (N, C_in, H, W) -> (N, 2048, H, W)"""

    def __init__(self, in_channels: int) -> None:
        conv, pool = partial(ConvBnReLU, 384, 384), nn.AvgPool2d(3, stride=1, padding=1)
        split, again = (Branches(conv((1, 3)), conv((3, 1))) for _ in range(2))
        branches = [(320, 1)], [(384, 1), split], [(448, 1), (384, 3), again], [pool, (192, 1)]
        super().__init__(*(chain(in_channels, *branch) for branch in branches))


# %% [markdown]
# **Say it first**: how many weights have a 1x7 and a 7x1 of 128 channels, and how many one 7x7? And
# which of the modules change the size of the map?

# %%
if live():
    print(2 * 7 * 128**2, 49 * 128**2)
    halve = Reduction(768, [(384, 3, 2, 0)], [(64, 1), (96, 3, 2, 0)])
    for module in (InceptionA(768, 64), InceptionC(768, 128), InceptionE(768), halve):
        print(type(module).__name__, tuple(module(torch.zeros(1, 768, 17, 17)).shape))

# %% [markdown]
# ## Auxiliary classifiers: let the middle of the net feel the loss too
#
# Before BatchNorm it was in doubt whether enough gradient reaches the first of 22 layers. The
# remedy of 2014: two small classifiers on the way, whose losses, times 0.3, are added in training
# only. A loss is the cross-entropy $-\ln p$, with $p$ the probability given to the right class.


# %%
class AuxiliaryHead(nn.Sequential):
    """GoogLeNet's side classifier, sec. 5: (N, C_in, H, W) -> (N, num_classes), of any H and W.

    NOTE: the paper makes 4x4 of 14x14, by windows of 5; here, as in torchvision, of any size.

    >>> AuxiliaryHead(512, 10)(torch.zeros(2, 512, 14, 14)).shape
    torch.Size([2, 10])
    """

    def __init__(self, in_channels: int, num_classes: int,
                 conv: Callable[..., nn.Module] = ConvBnReLU) -> None:  # fmt: skip
        super().__init__(
            nn.AdaptiveAvgPool2d(4), conv(in_channels, 128, 1), nn.Flatten(),  # (N, 128 * 4 * 4)
            nn.Linear(128 * 4 * 4, 1024), nn.ReLU(), nn.Dropout(0.7), nn.Linear(1024, num_classes),
        )  # fmt: skip


class AuxiliaryHeadV3(nn.Sequential):
    """Inception-v3's side classifier, fig. 8: (N, C_in, H, W) -> (N, num_classes), of any size.

    >>> AuxiliaryHeadV3(768, 10)(torch.zeros(2, 768, 17, 17)).shape
    torch.Size([2, 10])
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        convs = chain(in_channels, (128, 1), (768, 5, 1, 0))  # a 5x5 map becomes 1x1
        super().__init__(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(768, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        # NOTE: the published pooling makes 5x5 of 17x17. Images below 299 pixels have smaller maps.
        large = min(x.shape[2:]) >= 17
        return super().forward(F.avg_pool2d(x, 5, 3) if large else F.adaptive_avg_pool2d(x, 5))


class AuxiliaryLoss(nn.Module):
    """The loss of the last classifier, plus `weight` times that of each auxiliary one, of what the
    model returns: a tuple (logits, aux logits, ...) in training, the logits alone otherwise.

    >>> loss_fn = AuxiliaryLoss(nn.CrossEntropyLoss(), weight=0.3)
    >>> logits, targets = torch.zeros(4, 10), torch.zeros(4, dtype=torch.long)
    >>> (loss_fn((logits, logits, logits), targets) / loss_fn(logits, targets)).item()
    1.600000023841858
    """

    def __init__(self, criterion: nn.Module, weight: float) -> None:
        super().__init__()
        self.criterion, self.weight = criterion, weight

    def forward(self, outputs: Tensor | tuple[Tensor, ...], targets: Tensor) -> Tensor:
        if isinstance(outputs, Tensor):
            return self.criterion(outputs, targets)
        loss, *aux_losses = (self.criterion(logits, targets) for logits in outputs)
        return loss + self.weight * sum(aux_losses)


# %% [markdown]
# **Say it first**: ten classes, one last classifier and two auxiliary ones of weight 0.3, and all
# three only guess. From which loss does training start?

# %%
if live():
    guess = torch.zeros(4, 10)
    print(AuxiliaryLoss(nn.CrossEntropyLoss(), 0.3)((guess, guess, guess), torch.arange(4)))

# %% [markdown]
# ## Label smoothing: not quite so sure
#
# It came with Inception-v3 (sec. 7). For a probability of 1 the logit, what the last layer gives,
# must grow without end. So a share $\epsilon$ of the label is spread evenly over all $K$ classes:
#
# $$\text{loss} = -\sum_k q_k \ln p_k \qquad q_k = (1 - \epsilon)\,[k = y] + \epsilon / K$$
#
# By hand, $\epsilon = 0.1$ and $K = 10$: the right class has the target 0.91, each other 0.01. A
# net that answers just so pays the least, $-0.91 \ln 0.91 - 9 \cdot 0.01 \ln 0.01 = 0.50$. One that
# is far surer, 0.9991 and nine times 0.0001, pays 0.83; without smoothing it would pay 0.001. The
# paper gained 0.2 points with it; try `--label-smoothing 0.1`. **Say it first**: what does the net
# that answers 0.91 pay without smoothing?

# %%
if live():
    for others in (0.01, 0.0001):
        answer = torch.full((1, 10), others)
        answer[0, 3], target = 1 - 9 * others, torch.tensor([3])
        print([F.cross_entropy(answer.log(), target, label_smoothing=e).item() for e in (0.1, 0)])

# %% [markdown]
# ## The papers' tables as data

# %%
TABLE: dict[str, dict[str, Widths | Callable[[], nn.Module]]] = {
    # GoogLeNet, table 1:  #1x1, #3x3 reduce, #3x3, #5x5 reduce, #5x5, pool proj
    "googlenet": {
        "3a": Widths(64, 96, 128, 16, 32, 32),  # 28x28 on 224x224 images
        "3b": Widths(128, 128, 192, 32, 96, 64),
        "4a": Widths(192, 96, 208, 16, 48, 64),  # 14x14
        "4b": Widths(160, 112, 224, 24, 64, 64),
        "4c": Widths(128, 128, 256, 24, 64, 64),
        "4d": Widths(112, 144, 288, 32, 64, 64),
        "4e": Widths(256, 160, 320, 32, 128, 128),
        "5a": Widths(256, 160, 320, 32, 128, 128),  # 7x7
        "5b": Widths(384, 192, 384, 48, 128, 128),
    },
    # Inception-v3, table 1, as the authors' code has it: each module and the channels it reads
    "inception_v3": {
        "5b": partial(InceptionA, 192, pool_proj=32),  # 35x35 on 299x299 images
        "5c": partial(InceptionA, 256, pool_proj=64),
        "5d": partial(InceptionA, 288, pool_proj=64),
        "6a": partial(Reduction, 288, [(384, 3, 2, 0)], [(64, 1), (96, 3), (96, 3, 2, 0)]),  # B
        "6b": partial(InceptionC, 768, width=128),  # 17x17
        "6c": partial(InceptionC, 768, width=160),
        "6d": partial(InceptionC, 768, width=160),
        "6e": partial(InceptionC, 768, width=192),
        "7a": partial(Reduction, 768, [(192, 1), (320, 3, 2, 0)],
                      [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, 0)]),  # D
        "7b": partial(InceptionE, 1280),  # 8x8
        "7c": partial(InceptionE, 2048),
    },
}  # fmt: skip

# %% [markdown]
# ## The model: stem, stages, head, and auxiliary heads on the side
#
# `small_input`, for up to 64 pixels: the stem has no strides and no pools, GoogLeNet's 7x7 is a
# 3x3. NOTE: ours; for 79 pixels Inception-v3 (sec. 9) drops one stride and one pool.


# %%
class InceptionNet(SideClassifiers):
    """(N, 3, H, W) -> (N, num_classes); in training with auxiliary heads (logits, aux logits, ...).

    The digit of a module's name ("3a", "3b", ...) is that of its stage, and an auxiliary head has
    the name of the module that it reads. `dropout` is the share of the last `features` that is
    dropped; `transform_input` rescales images to -1 ... 1, as the official checkpoints need it.
    """

    def __init__(self, stem: nn.Module, modules: dict[str, nn.Module], features: int,
                 num_classes: int, dropout: float, aux_heads: dict[str, nn.Sequential],
                 aux_weight: float, transform_input: bool) -> None:  # fmt: skip
        super().__init__()
        stages = {name[0]: nn.Sequential() for name in modules}
        for name, module in modules.items():
            stages[name[0]].add_module(name, module)
        self.stem, self.stages = stem, nn.Sequential(*stages.values())
        pool, classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(features, num_classes)
        self.head = nn.Sequential(pool, nn.Flatten(), nn.Dropout(dropout), classifier)
        self.aux_heads, self.aux_weight = nn.ModuleDict(aux_heads), aux_weight
        self.transform_input = transform_input
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv2d)):  # He et al. 2015
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")  # fan-in keeps the scale
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, h, w), the last map: 1/32 of the resolution, 1/4 if small."""
        return self.stages(self.stem(self.rescale(x)))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        if not self.training or not self.aux_heads:
            return self.head(self.forward_features(x))
        x, aux_logits = self.stem(self.rescale(x)), []
        for name, module in (pair for stage in self.stages for pair in stage.named_children()):
            x = module(x)
            if name in self.aux_heads:
                aux_logits.append(self.aux_heads[name](x))
        return self.head(x), *aux_logits


def googlenet(num_classes: int = 1000, small_input: bool = False, aux: bool = True,
              transform_input: bool = False, five_by_five: bool = False, batch_norm: bool = True,
              width_mult: float = 1.0, dropout: float = 0.4) -> InceptionNet:  # fmt: skip
    """GoogLeNet, table 1. `width_mult` thins the stem and the modules, not the auxiliary heads.

    NOTE: as torchvision's, no response normalisation, and a last pool of 2x2; the paper's is 3x3.

    >>> googlenet(aux=False).stages[1](torch.zeros(1, 480, 28, 28)).shape
    torch.Size([1, 832, 14, 14])
    """
    conv = partial(ConvBnReLU, batch_norm=batch_norm)
    pool = partial(nn.MaxPool2d, stride=2, ceil_mode=True)
    width, in_channels = round(64 * width_mult), round(192 * width_mult)
    stem = [conv(3, width, 3)] if small_input else [conv(3, width, 7, 2), pool(3)]  # 112x112, 56x56
    stem += [conv(width, width, 1), conv(width, in_channels, 3)]
    stem += [] if small_input else [pool(3)]  # 28x28
    modules, aux_heads = {}, {}
    for name, row in TABLE["googlenet"].items():
        if name in ("4a", "5a"):
            modules[f"{name[0]}pool"] = pool(3 if name == "4a" else 2)
        widths = Widths(*(round(width * width_mult) for width in row))
        modules[name] = Inception(in_channels, widths, five_by_five, conv)
        in_channels = widths.conv1x1 + widths.conv3x3 + widths.conv5x5 + widths.pool_proj
        if aux and name in ("4a", "4d"):
            aux_heads[name] = AuxiliaryHead(in_channels, num_classes, conv)
    head = in_channels, num_classes, dropout
    return InceptionNet(nn.Sequential(*stem), modules, *head, aux_heads, 0.3, transform_input)


def inception_v3(num_classes: int = 1000, small_input: bool = False, aux: bool = True,
                 transform_input: bool = False, dropout: float = 0.2) -> InceptionNet:  # fmt: skip
    """Inception-v3, table 1 and sec. 6, as in the authors' code (TensorFlow models). Only the code
    says that the auxiliary loss counts 0.4 and that a fifth of the last features is dropped.

    >>> inception_v3(aux=False).forward_features(torch.zeros(1, 3, 107, 107)).shape
    torch.Size([1, 2048, 2, 2])
    """
    if small_input:
        stem = chain(3, (32, 3), (32, 3), (64, 3), (80, 1), (192, 3))
    else:  # 299x299 -> 149, 147, 147, 73; 73, 71, 35
        stem = chain(3, (32, 3, 2, 0), (32, 3, 1, 0), (64, 3), nn.MaxPool2d(3, stride=2),
                     (80, 1), (192, 3, 1, 0), nn.MaxPool2d(3, stride=2))  # fmt: skip
    modules = {name: module() for name, module in TABLE["inception_v3"].items()}
    aux_heads = {"6e": AuxiliaryHeadV3(768, num_classes)} if aux else {}
    return InceptionNet(stem, modules, 2048, num_classes, dropout, aux_heads, 0.4, transform_input)


MODELS: dict[str, Callable[..., nn.Module]] = {"googlenet": googlenet, "inception_v3": inception_v3}

# %% [markdown]
# **Say it first**: a picture of 32 pixels goes through GoogLeNet in its small form. Which shape has
# it after each stage? And how many tensors does the net return in training, and how many in a test?

# %%
if live():
    net, x = googlenet(num_classes=10, small_input=True), digits(2, size=32)
    print([len(net.train()(x)), net.eval()(x).shape])
    x = net.stem(x)
    for stage in net.stages:
        x = stage(x)
        print(tuple(x.shape))

# %% [markdown]
# ## One run, from data to report
#
# Flat and explicit: this is the whole recipe. New is the loss: in training the model returns a
# tuple, and `AuxiliaryLoss` adds it up. `fit` repeats the loop of lesson 1 once an epoch.
#
# **Say it first**: at which line of that loop does the tuple of logits become one number?


# %%
def build(config: Config, num_classes: int) -> InceptionNet:
    """The model that the flags ask for."""
    options = {name: getattr(config, name) for name in ("five_by_five", "batch_norm", "width_mult")}
    options = options if config.model == "googlenet" else {}
    return MODELS[config.model](num_classes, config.small_input, config.aux, **options)


def run(config: Config) -> dict[str, object]:
    """Train, test once with the best epoch's weights, profile, draw, save."""
    config, device = prepare(config)
    # Trained weights bring the mean and deviation that they were trained with.
    mean_std = weights_mean_std(config.model) if config.pretrained else None
    data = load_data(config, device, mean_std)
    model = build(config, data.num_classes)
    model = model.to(device, memory_format=memory_format(config.image_size))
    if config.pretrained:
        load_pretrained(model, config.model, data.class_names)

    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    loss_fn = AuxiliaryLoss(criterion, model.aux_weight)
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, data.train)

    run = Run.open(config, LESSON)
    banner(config, device, data, model, run)
    history = fit(model, data, loss_fn, optimizer, schedule, config, run)

    test = evaluate(model, data.test, data.class_names)  # the only look at the test images
    cost = profile(model, data.input_size)
    draw_figures(run, model, data, history, test)
    return run.finish(model, data, history, test, cost)


# %%
if live():
    show(train_one_epoch)

# %% [markdown]
# ## Three experiments
#
# **`auxiliary`: do the side classifiers help?** GoogLeNet has them to bring gradient to its first
# layers, and against overfitting. Inception-v3 (sec. 4) finds no gain early in training and a small
# one at the end: they only regularise. Between the two came BatchNorm. So train four thin nets,
# with and without it, with and without such heads, each at its own best of the same three rates.
# The last classifier alone is judged. Three losses bring more gradient than one, so gradients are
# divided by the loss. Beforehand: two points of accuracy matter without BatchNorm, where seeds
# differ much, one with it, and a tenth more gradient (0.1 in its logarithm).
#
# **`branches`: which one does the work?** Look into each module of a trained thin GoogLeNet, on
# images that it has not learned from. Each branch has a share of the *channels*, which the table
# fixed; of the *output*, as a sum of squares; and of the *gradient* that comes back to the input.
# Only a fourth measure is about cause: the validation loss that is added when the branch is
# *silenced*, giving zeros. Beforehand: a share tells a branch's worth if its rank correlation with
# that loss is above 0.5 (1: the same order, 0: no relation). The 3x3 branches are missed most if
# silencing one adds 0.1 more, on average over the modules, than silencing any other kind. **Say
# it first**: on average they have 44% of a module's channels. Which share of its output?
#
# **`bottleneck`: what do the 1x1 convolutions save?** Nothing is trained: arithmetic and a clock,
# for every module of the paper's table on the maps of a 224x224 image: *reduced*, as published;
# *direct*, with the 3x3 and 5x5 on the module's whole input; *naive*, with an unprojected pool too.


# %%
def trial_net(config: Config, batch_norm: bool = True, aux: bool = True,
              num_classes: int = 10) -> InceptionNet:  # fmt: skip
    """A thin GoogLeNet with real 5x5 branches. Its weights at the start don't depend on `aux`."""
    options = {"five_by_five": True, "batch_norm": batch_norm, "width_mult": config.trial_width}
    model = googlenet(num_classes, config.small_input, **options)
    if not aux:
        model.aux_heads.clear()  # drawn all the same, so that both of a pair start alike
    return model


def trial_loss(config: Config) -> AuxiliaryLoss:
    return AuxiliaryLoss(nn.CrossEntropyLoss(label_smoothing=config.label_smoothing), weight=0.3)


def auxiliary(config: Config) -> Experiment:
    """Section 5 of GoogLeNet and section 4 of Inception-v3, at the size of the dataset."""
    nets = {"no norm": False, "no norm + aux": False, "BatchNorm": True, "BatchNorm + aux": True}
    arm = partial(Arm, loss=trial_loss, rates=(0.005, 0.02, 0.08))
    arms = [arm(n, partial(trial_net, config, norm, "aux" in n)) for n, norm in nets.items()]
    more = "at the start they bring more gradient to the first layer without BatchNorm"
    claims = [
        Claim("they help the net without BatchNorm", "no norm + aux", "no norm", margin=0.02),
        Claim("they help the net with BatchNorm", "BatchNorm + aux", "BatchNorm", margin=0.01),
        Claim(more, "no norm + aux", "no norm", "log gradient", margin=0.1),
    ]
    before = partial(gradients, loss_fn=trial_loss(config))
    return Experiment("Auxiliary classifiers, each net at its best rate", arms, claims, before)


def branches(config: Config) -> Experiment:
    """Where the output and the gradient of each module of a trained GoogLeNet come from."""
    net, names = "GoogLeNet", ("1x1", "3x3", "5x5", "pool")
    claims = [
        Claim("the 3x3 branches are missed most", net, 0.0, "3x3 missed more", margin=0.1),
        Claim("the output's shares tell a branch's worth", net, 0.0, "rank by output", margin=0.5),
        Claim("those of the gradient do", net, 0.0, "rank by gradient", margin=0.5),
    ]
    arms = [Arm(net, partial(trial_net, config), loss=trial_loss)]
    look = partial(look_at_branches, branches=names, watched="3x3")
    draw = partial(draw_branches, modules=[*TABLE["googlenet"]], branches=names)
    return Experiment("Which branch does the work?", arms, claims, after=look, figure=draw, seeds=7)


FORMS: dict[str, Callable[[int, Widths], nn.Module]] = {
    "reduced": partial(Inception, five_by_five=True),
    "direct": Direct,
    "naive": partial(Direct, project_pool=False),
}


def bottleneck(config: Config) -> dict[str, object]:
    """Multiply-adds and milliseconds of GoogLeNet's nine modules with and without reductions."""
    config, device = prepare(config)
    run, rows, times = Run.open(config, LESSON), [], {}
    for form, make in FORMS.items():
        channels = round(192 * config.width_mult)
        for name, row in TABLE["googlenet"].items():
            widths = Widths(*(round(width * config.width_mult) for width in row))
            module = make(channels, widths).to(device, memory_format=torch.channels_last)
            px = {"3": 28, "4": 14, "5": 7}[name[0]]  # of a 224x224 image
            cost = profile(module, (channels, px, px), seconds=config.clock)
            macs, ms = round(cost.macs / 1e6, 1), round(cost.latency_ms, 2)
            rows.append({"module": name, "form": form, "channels in": channels,
                         "parameters": cost.params, "M MACs": macs, "ms": ms})  # fmt: skip
            channels = module(torch.zeros(1, channels, px, px, device=device)).shape[1]
        for what, key in (("multiply-adds", "M MACs"), ("time", "ms")):
            spent, reduced = (sum(row[key] for row in nine) for nine in (rows[-9:], rows[:9]))
            times[f"{form}: {what}"] = spent / reduced
    heading, unit = "GoogLeNet's nine modules without their reductions", "times the reduced form"
    run.figure("bottleneck", plotting.bars(times, unit, heading, fmt="{:.1f}"))
    facts = [f"{what}: {value:.1f} {unit}" for what, value in list(times.items())[2:]]
    saved = [direct["M MACs"] / row["M MACs"] for row, direct in zip(rows[:9], rows[9:18])]
    saves = f"a module's reductions save {min(saved):.1f} to {max(saved):.1f} times"
    return conclude(run, rows, [*facts, f"{saves} the multiply-adds"])


EXPERIMENTS: dict[str, Callable[[Config], object]] = {
    "auxiliary": partial(run_experiment, LESSON, auxiliary),
    "branches": partial(run_experiment, LESSON, branches),
    "bottleneck": bottleneck,
}

# %% [markdown]
# ## What to notice
#
# - The training loss starts near $1.6 \ln 10 = 3.7$ and not near $\ln 10 = 2.3$: three classifiers
#   pay, two of them 0.3. The validation loss is that of the last one alone. At first it can be
#   absurd: in eval mode BatchNorm uses running averages, which lag behind weights that move fast.
# - Auxiliary heads hold 4.35 of the 9.96 million parameters of GoogLeNet for ten classes
#   (`--summary`), and of 1000 classes 6.38 of 13.00. None is used when the net predicts.
# - `bottleneck`, multiply-adds, the same on every machine: the nine modules take 1,104 million as
#   published, 3,948 (3.6 times) with the large filters on the whole input, and 12,085 (10.9 times)
#   in the naive form, whose last module gives 4,944 channels instead of 1,024. The reductions save
#   least in 3a (2.4 times) and most in 5a (5.2 times), which reads 832 channels. Time need not
#   follow: a few large convolutions use a chip better than many small ones.
# - `auxiliary` (digits, one thread of an AMD EPYC, six seeds: three, 415 s, leave all undecided):
#   test 84.5% without norm, with heads 84.3%, -0.2 points (97.5% interval -4.0 to 3.7), undecided;
#   with BatchNorm 97.0%, with both 98.7%, +1.7 (0.6 to 2.8): they help, but not surely by the point
#   asked. That they bring more gradient to the first layer *fails*: over the loss it is 0.8 times
#   as large (0.7 to 0.9): each head brings a loss too. A gain beside BatchNorm fits a regulariser.
# - `branches` (digits, seven seeds, 240 s): all three claims hold. Without its 3x3 branch a module
#   loses more than without any other, by 0.66 in loss (0.27 to 1.05), nearly all of it in 3a and
#   3b. The shares of output and of gradient order the branches much as the loss does, with rank
#   correlations of 0.69 (0.63 to 0.76) and 0.65 (0.60 to 0.69), but so does the mere number of
#   channels, 0.68: a share of the output tells little that the table had not told.
#
# ## Exercises
#
# `python -m common.starter 03 --out DIR` makes a copy of this file without the parts that you write
# and says how to mark it. In order of difficulty:
#
# - **3.1** `ConvBnReLU`. Why does it need no bias? **3.2** `Branches`.
# - **3.6** `AuxiliaryLoss`. Then let its weight fall to zero over the epochs: does accuracy change?
# - **3.3** `Inception`, from the drawing at the top. Replace the 5x5 of `five_by_five` by two 3x3:
#   what becomes of the parameters, and what of the receptive field?
# - **3.5** `AuxiliaryHead`. Which of its layers has most of the parameters?
# - **3.4** `InceptionC`. Below which size of the map does a 1x7 mostly read padding?

# %%
if __name__ == "__main__":
    main(config, MODELS, build, run, EXPERIMENTS)
