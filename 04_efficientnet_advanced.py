"""Lesson 4, advanced: EfficientNet, growing depth, width and resolution together.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019
(arXiv 1905.11946).

The idea in one sentence: take a small net that is good for its cost, and grow its depth, its width
and its input resolution in fixed proportion instead of one of them alone.

    python 04_efficientnet_advanced.py                                # digits, on a GPU CIFAR-10
    python 04_efficientnet_advanced.py --experiment compound-scaling  # the paper's claim, measured
    python 04_efficientnet_advanced.py --experiment search            # evolution against chance
    python 04_efficientnet_advanced.py --model efficientnet_b0 --summary

Measured on digits (16 px, 8 epochs, seeds 0 to 2, torch 2.14, float32 on two cores of an Intel
Xeon): efficientnet_mini tests at 98.33%, 98.05% and 97.77%, 22 s of training.

What the experiments gave stands at the end of the file, so that you can guess first.
"""

# %% [markdown]
# **You will** build MBConv, the block of mobile nets, with squeeze-and-excitation and stochastic
# depth; turn the paper's table into eight nets; test its claim; let evolution search for a net.
# **You need** lesson 1: convolution, BatchNorm, the shortcut. **Time**: 45 minutes to read, 7 to
# run, 90 for the exercises.
#
# <details><summary>1. Why does twice the width cost four times as much, twice the depth only
# twice?</summary>A wider layer has more filters, and each filter reads more channels.</details>
# <details><summary>2. Why does MBConv's shortcut join the narrow ends?</summary>Few channels pass
# from block to block; the wide middle is cheap, because its filters are depthwise.</details>
# <details><summary>3. What does squeeze-and-excitation see that a depthwise filter does
# not?</summary>All channels and all pixels.</details>
# <details><summary>4. Why does stochastic depth divide by the share that it keeps?</summary>So that
# the mean over many draws is what evaluation computes.</details>
# <details><summary>5. One step of the rule should double the cost. Why does B2 cost 2.8 times B0?
# </summary>Layers are rounded up, and its images are larger than the rule says.</details>

# %% [markdown]
# ## The problem, and the one equation
#
# You have a net, and may spend twice its cost. Make it deeper? Wider? Show it larger images? Each
# alone helps less and less. A larger image also needs more layers to see all of it, and more
# channels for its details. So scale all three, by one number $\phi$:
#
# $$\text{depth} = \alpha^\phi, \quad \text{width} = \beta^\phi, \quad
# \text{resolution} = \gamma^\phi, \quad \alpha \cdot \beta^2 \cdot \gamma^2 \approx 2$$
#
# Multiply-adds grow with the depth, with the square of the width (channels in times channels out)
# and with the square of the resolution (rows times columns). So raising $\phi$ by 1 doubles the
# cost. The paper found $\alpha = 1.2$, $\beta = 1.1$ and $\gamma = 1.15$ by a grid search on its
# smallest net, B0 (sec. 4, step 1), and grew B1 to B7 out of it (step 2). By hand:
# $1.2 \cdot 1.1^2 \cdot 1.15^2 = 1.2 \cdot 1.21 \cdot 1.3225 = 1.92$.
#
#     image ── stem ── stage 1 ── stage 2 ── ... ── stage 7 ── 1x1 ── mean ── linear ── classes
#      224     112       112        56                7         7       1     pixels a side, B0

# %%
from common.cli import main, parse_flags
from common.config import TrainConfig, knob

from dataclasses import dataclass, replace

LESSON = "04_efficientnet_advanced"


@dataclass(frozen=True)
class Config(TrainConfig):
    """What this lesson can be told; every field is a flag, and `--help` prints them all."""

    model: str = knob("efficientnet_mini", "a name of MODELS; also efficientnet_b0 to b7")
    width_mult: float = knob(1.0, "makes the model so many times as wide", low=0.05, high=8)
    depth_mult: float = knob(1.0, "makes the model so many times as deep", low=0.05, high=8)
    stochastic_depth: float = knob(0.2, "drop rate of blocks at the net's end", low=0, high=0.95)
    nets: int = knob(16, "nets that each way trains on a proxy task", (), 7, 1000, only="search")
    proxy_epochs: int = knob(3, "epochs of such a training", (), 1, 1000, only="search")
    budget: float = knob(1.0, "target cost, over that of B0's rows", (), 0.05, 100, only="search")
    # At 8 px, the digits' own size, most stages would make maps of 2x2 or 1x1.
    RECIPES = {"digits": {"image_size": 16, "epochs": 8, "batch_size": 64, "base_lr": 0.2}}


# Flags are read before torch is imported, so that --help answers at once.
config = parse_flags(Config) if __name__ == "__main__" else Config()

# %%
import math
import random
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.classifier import Classifier  # nn.Module; head[-1] is the last layer, replaceable
from common.data import Data, load_data
from common.evaluation import evaluate
from common.experiments import Arm, Claim, Experiment, Trial, run_experiment, train_trial, trained
from common.live import digits, live, show
from common.pretrained import load_pretrained, weights_mean_std
from common.profiling import count_macs, count_parameters, profile
from common.runs import Run, banner, draw_figures, prepare
from common.training import fit, make_optimizer, make_schedule, train_one_epoch

Norm = Callable[[int], nn.Module]  # from a number of channels

# %% [markdown]
# ## One convolution, one norm, one activation
#
# EfficientNet activates with SiLU, $x \cdot \sigma(x)$ with $\sigma(x) = 1 / (1 + e^{-x})$, also
# called swish: smooth, and a little below zero for negative inputs, where ReLU is flat and sends no
# gradient. With as many `groups` as channels a convolution is *depthwise*: each channel has one
# filter, which reads that channel alone.


# %%
def conv_norm_act(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1,
                  groups: int = 1, norm: Norm = nn.BatchNorm2d,
                  activation: Callable[[], nn.Module] = nn.SiLU) -> nn.Sequential:  # fmt: skip
    """(N, in_channels, H, W) -> (N, out_channels, ceil(H/stride), ceil(W/stride)), for odd kernels.

    >>> conv_norm_act(3, 32, 3, stride=2)(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 32, 4, 4])
    """
    shape, padding = (in_channels, out_channels, kernel_size, stride), kernel_size // 2
    conv = nn.Conv2d(*shape, padding, groups=groups, bias=False)  # the norm has a bias of its own
    return nn.Sequential(conv, norm(out_channels), activation())


# %% [markdown]
# **Say it first**: how many parameters has a 3x3 convolution from 32 to 32 channels, and how many
# if it is depthwise? (The norm adds 2 x 32.) Is SiLU(-1) below or above zero?

# %%
if live():
    show(*(count_parameters(conv_norm_act(32, 32, 3, groups=groups)) for groups in (1, 32)))
    show(nn.functional.silu(torch.tensor([-4.0, -1.0, 0.0, 1.0, 4.0])))

# %% [markdown]
# ## Squeeze-and-excitation: let each channel ask the whole image how much it matters
#
# A depthwise filter sees a few pixels of one channel. The gate sees all, with two small matrices.


# %%
class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate in (0, 1) that saw all channels' means.  Hu et al. 2018, sec. 3.
    (N, C, H, W) -> (N, C, H, W).  NOTE: Hu et al. have a ReLU where EfficientNet has SiLU.

    >>> SqueezeExcitation(96, reduction=24)(torch.zeros(1, 96, 8, 8)).shape
    torch.Size([1, 96, 8, 8])
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        squeezed = max(1, channels // reduction)
        # 1x1 convolutions are linear layers that keep the last two dimensions.
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean(dim=(2, 3), keepdim=True)  # (N, C, 1, 1)
        gate = nn.functional.silu(self.squeeze(gate))  # (N, C/reduction, 1, 1)
        gate = torch.sigmoid(self.excite(gate))  # (N, C, 1, 1)
        return x * gate


# %% [markdown]
# **Say it first**: 16 channels of 8x8 are multiplied by how many factors, between which bounds?

# %%
if live():
    x = torch.rand(1, 16, 8, 8) + 0.1
    show((SqueezeExcitation(16, reduction=4)(x) / x).round(decimals=4).unique())

# %% [markdown]
# ## Stochastic depth: train a random shallower net at every step
#
# A block with a shortcut computes $x + f(x)$. Training leaves $f(x)$ out now and then; evaluation
# always adds it. A branch that stays is scaled up, so that the mean over many draws is the same.


# %%
class StochasticDepth(nn.Module):
    """Zero an image's residual branch with probability `rate`.  Huang et al. 2016, eq. 2.
    (N, C, H, W) -> (N, C, H, W).  NOTE: Huang et al. draw once per mini-batch, and scale down in
    evaluation. One draw per image, scaled up in training, is the form of EfficientNet's authors.

    >>> sorted(set(StochasticDepth(rate=0.5)(torch.ones(64, 3, 2, 2)).flatten().tolist()))
    [0.0, 2.0]
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"a stochastic depth rate lies in [0, 1), not {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = x.new_empty(len(x), 1, 1, 1).bernoulli_(1 - self.rate)  # one draw per image
        return x * (kept / (1 - self.rate))


# %% [markdown]
# **Say it first**: eight images of ones, rate 0.25. Which values come out, about how often each?

# %%
if live():
    show(StochasticDepth(rate=0.25)(torch.ones(8, 3, 2, 2))[:, 0, 0, 0])

# %% [markdown]
# ## MBConv: widen, look around, choose channels, narrow
#
#     x ── 1x1 ── k x k depthwise ── SE ── 1x1 ── drop ── + ──
#     │    C -> 6C       6C          6C    6C -> C         │
#     └────────────────────────────────────────────────────┘
#
# A ResNet bottleneck is wide at its ends and narrow in the middle. This one is inverted: the
# shortcut joins the narrow ends, and the filters of the wide middle are cheap: depthwise. The
# narrow output has no activation: in few channels, what an activation sets to zero is lost (Sandler
# et al. 2018, sec. 3.2). **By hand**, the parameters of `MBConv(24, 40, 5)`: its middle has
# $6 \cdot 24 = 144$ channels, squeezed to $24 / 4 = 6$; a norm has two for each channel:
#
#     expand     24 * 144 + 2 * 144                3,744
#     depthwise  5 * 5 * 144 + 2 * 144             3,888
#     SE         (144 * 6 + 6) + (6 * 144 + 144)   1,878
#     project    144 * 40 + 2 * 40                 5,840   together 15,350


# %%
class MBConv(nn.Module):
    """Inverted bottleneck (Sandler et al. 2018, fig. 4d) with SE: Tan and Le 2019, table 1.
    (N, in_channels, H, W) -> (N, out_channels, ceil(H/stride), ceil(W/stride))

    Args:
        expansion: width of the middle over `in_channels`; with 1 the first 1x1 is left out.
        drop_rate: stochastic depth of the residual branch, where the block has a shortcut.

    >>> MBConv(16, 24, kernel_size=3, stride=2, expansion=6)(torch.zeros(2, 16, 8, 8)).shape
    torch.Size([2, 24, 4, 4])
    >>> count_parameters(MBConv(24, 40, kernel_size=5))
    15350
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1,
                 expansion: int = 6, drop_rate: float = 0.0,
                 norm: Norm = nn.BatchNorm2d) -> None:  # fmt: skip
        super().__init__()
        middle, widens = in_channels * expansion, expansion > 1
        self.expand = conv_norm_act(in_channels, middle, 1, norm=norm) if widens else nn.Identity()
        self.depthwise = conv_norm_act(middle, middle, kernel_size, stride, middle, norm)
        # To a quarter of the narrow input, not of the wide middle: a sixth of the weights.
        self.se = SqueezeExcitation(middle, reduction=4 * expansion)
        self.project = conv_norm_act(middle, out_channels, 1, norm=norm, activation=nn.Identity)
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.drop = StochasticDepth(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.expand(x)  # (N, middle, H, W)
        branch = self.se(self.depthwise(branch))  # (N, middle, H/stride, W/stride)
        branch = self.project(branch)  # (N, out_channels, H/stride, W/stride)
        return x + self.drop(branch) if self.has_shortcut else branch


# %% [markdown]
# **Say it first**: a block from 3 to 24 channels with stride 2 reads four digits of 16x16 pixels.
# Which shape has the output of its depthwise layer, and which that of the block? Has it a shortcut?

# %%
if live():
    block, x = MBConv(3, 24, kernel_size=3, stride=2), digits(4, size=16)
    middle = block.depthwise(block.expand(x))
    show(middle.shape, block(x).shape, block.has_shortcut, middle[:1])

# %% [markdown]
# ## The paper's tables as data
#
# B0 came out of a search (sec. 4; the second experiment has a small one). The larger nets have more
# channels (times the width, rounded to multiples of 8) and layers (times the depth, rounded up).


# %%
class Stage(NamedTuple):
    """A line of table 1: `layers` MBConv blocks, of which only the first has the `stride`."""

    expansion: int
    kernel_size: int
    stride: int
    channels: int
    layers: int


Stages = tuple[Stage, ...]
STEM_CHANNELS = 32
B0: Stages = (
    #     expansion  kernel  stride  channels  layers    output at 224 px
    Stage(1, 3, 1, 16, 1),  # 112 x 112
    Stage(6, 3, 2, 24, 2),  # 56 x 56
    Stage(6, 5, 2, 40, 2),  # 28 x 28
    Stage(6, 3, 2, 80, 3),  # 14 x 14
    Stage(6, 5, 1, 112, 3),  # 14 x 14
    Stage(6, 5, 2, 192, 4),  # 7 x 7
    Stage(6, 3, 1, 320, 1),  # 7 x 7
)


def round_channels(channels: float, divisor: int = 8) -> int:
    """To the nearest multiple of 8, which suits the hardware, but never down by more than a tenth.

    >>> [round_channels(c) for c in (24, 24 * 1.1, 16 * 0.7, 3)]
    [24, 24, 16, 8]
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


def scale_stages(stages: Stages, width_mult: float = 1.0, depth_mult: float = 1.0) -> Stages:
    """The same table, `width_mult` times as wide and `depth_mult` times as deep.

    >>> scale_stages((Stage(6, 5, 2, 40, 2),), width_mult=1.4, depth_mult=1.8)
    (Stage(expansion=6, kernel_size=5, stride=2, channels=56, layers=4),)
    """
    channels = [round_channels(stage.channels * width_mult) for stage in stages]
    layers = [math.ceil(stage.layers * depth_mult) for stage in stages]
    return tuple(s._replace(channels=c, layers=n) for s, c, n in zip(stages, channels, layers))


class Row(NamedTuple):
    """One member of the family: three multipliers, and the regularisation that grows with them."""

    width_mult: float
    depth_mult: float
    image_size: int  # pixels, square
    dropout: float
    norm: Norm = nn.BatchNorm2d


tf_norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)  # TensorFlow's, of B5 to B7
# NOTE: the authors rounded the multipliers by hand. The sizes are torchvision's: B2's was 260 px.
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
# **Say it first**: B2 is 1.1 times as wide as B0 and 1.2 times as deep. What becomes of the stage
# of 40 channels and 2 layers?

# %%
if live():
    show(scale_stages(B0, width_mult=1.1, depth_mult=1.2)[2])

# %% [markdown]
# ## The model: stem, stages, head


# %%
class EfficientNet(Classifier):
    """(N, 3, H, W) -> (N, num_classes).  Tan and Le 2019, table 1.

    Args:
        small_input: for up to 64 pixels; the last map has 1/8 of the resolution, not 1/32.
            NOTE: ours. The stem and the first stage with a stride keep the resolution.
        stochastic_depth: the rate at the net's end; the blocks' rates rise to it in equal steps.
        zero_init_residual: as in lesson 1.  NOTE: from Goyal et al. 2017, sec. 5.1, not this paper.
    """

    def __init__(self, stages: Stages = B0, stem_channels: int = STEM_CHANNELS,
                 num_classes: int = 1000, small_input: bool = False, dropout: float = 0.2,
                 stochastic_depth: float = 0.2, norm: Norm = nn.BatchNorm2d,
                 zero_init_residual: bool = False) -> None:  # fmt: skip
        super().__init__()
        if small_input:
            halving = next((i for i, stage in enumerate(stages) if stage.stride == 2), 0)
            stages = (*stages[:halving], stages[halving]._replace(stride=1), *stages[halving + 1 :])
        self.stem = conv_norm_act(3, stem_channels, 3, stride=1 if small_input else 2, norm=norm)

        # NOTE: Huang et al. 2016, eq. 4, count blocks from 1, EfficientNet's authors from 0.
        depth = sum(stage.layers for stage in stages)
        rates = iter(stochastic_depth * block / depth for block in range(depth))
        self.stages, in_channels = nn.Sequential(), stem_channels
        for expansion, kernel_size, stride, channels, layers in stages:
            self.stages.append(nn.Sequential())
            for _ in range(layers):
                shape = (in_channels, channels, kernel_size, stride)
                self.stages[-1].append(MBConv(*shape, expansion, next(rates), norm))
                in_channels, stride = channels, 1
        self.head_conv = conv_norm_act(in_channels, 4 * in_channels, 1, norm=norm)
        pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout)]
        self.head = nn.Sequential(*pooled, nn.Linear(4 * in_channels, num_classes))
        self.init_weights(zero_init_residual)

    def init_weights(self, zero_init_residual: bool) -> None:
        """He initialisation by fan-out, like the authors'.  NOTE: the head keeps PyTorch's own."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # An input pixel of a depthwise filter reaches k * k outputs. PyTorch's "fan_out"
                # doesn't know groups: it would count C times as many. Its "fan_in" is k * k.
                depthwise = module.groups == module.in_channels > 1
                nn.init.kaiming_normal_(module.weight, mode="fan_in" if depthwise else "fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif zero_init_residual and isinstance(module, MBConv) and module.has_shortcut:
                nn.init.zeros_(module.project[1].weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, h, w), the last map: 1/32 of the resolution, 1/8 if small."""
        x = self.stem(x)  # (N, 32, H/2, W/2)
        x = self.stages(x)  # (N, 320, H/32, W/32)
        return self.head_conv(x)  # (N, 1280, H/32, W/32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


def efficientnet(row: Row, width_mult: float = 1, depth_mult: float = 1,
                 **options: Any) -> nn.Module:  # fmt: skip
    """B0's table stretched by a row and by `width_mult` and `depth_mult`; options: EfficientNet's.

    >>> count_parameters(efficientnet(TABLE["efficientnet_b0"]))
    5288548
    """
    width_mult, depth_mult = row.width_mult * width_mult, row.depth_mult * depth_mult
    stages, stem = scale_stages(B0, width_mult, depth_mult), round_channels(32 * width_mult)
    return EfficientNet(stages, stem, **{"dropout": row.dropout, "norm": row.norm, **options})


MODELS = {name: partial(efficientnet, row) for name, row in TABLE.items()}

# %% [markdown]
# **Say it first**: how large is the map after each stage, from 224 pixels? And does B2 ($\phi = 1$)
# cost twice as much as B0 ($\phi = 0$), less, or more, if its images have 288 pixels?

# %%
if live():
    with torch.device("meta"):  # which knows shapes, and computes nothing
        b0, b2 = MODELS["efficientnet_b0"](), MODELS["efficientnet_b2"]()
        x = b0.stem(torch.zeros(1, 3, 224, 224))
    for stage in b0.stages:
        x = stage(x)
        show(x.shape)
    show(count_macs(b2, (3, 288, 288)) / count_macs(b0, (3, 224, 224)))

# %% [markdown]
# ## One run, from data to report
#
# Flat and explicit. NOTE: the authors train with RMSProp; here it's SGD, or `--optimizer adamw`.


# %%
def build(config: Config, num_classes: int) -> nn.Module:
    """The model that the flags ask for."""
    flags = ("small_input", "width_mult", "depth_mult", "stochastic_depth")
    options = {name: getattr(config, name) for name in flags}
    return MODELS[config.model](num_classes=num_classes, **options)


def run(config: Config) -> dict[str, object]:
    """Train, test once with the best epoch's weights, profile, draw, save."""
    config, device = prepare(config)
    # Trained weights bring the mean and deviation that they were trained with.
    mean_std = weights_mean_std(config.model) if config.pretrained else None
    data = load_data(config, device, mean_std)
    # A pixel's channels side by side: a CPU's depthwise convolutions are then twice as fast.
    model = build(config, data.num_classes).to(device, memory_format=torch.channels_last)
    if config.pretrained:
        load_pretrained(model, config.model, data.class_names)

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
# **Say it first**: `fit` repeats the loop of lesson 1 once an epoch. Stochastic depth changes no
# line of it. Where is a block dropped?

# %%
if live():
    show(train_one_epoch)

# %% [markdown]
# ## Experiment: depth, width, resolution, or all three?
#
# Start from a small net on small images, B0's table at a quarter of its width and depth, and spend
# four times its cost in four ways. The paper did so with B0 and 4.6 times its cost (table 7): depth
# 79.0%, width 78.9%, resolution 79.1%, all three 81.1%. Beforehand: all three must beat each alone
# by more than half a point, two of the 359 test images.
#
# All have the same recipe, no dropout and no stochastic depth, whose best rates depend on the size
# of the net. Residual branches start at zero: else many layers slow down the first epochs. A larger
# digit is interpolated from its 8x8 pixels: **it has no new detail**. CIFAR-10 from 16 to 32 px has
# real pixels to add (`--dataset cifar10`).

# %%
# By the formula 4, 2, 2, phi = 2; in whole layers 3.9 to 4.2 times the cost (32 px: 3.5 to 4.0).
GROWTH: dict[str, tuple[float, float, float]] = {
    #        depth  width  resolution    blocks, side in pixels where the start has 8
    "start": (1.0, 1.0, 1.0),  # 7, 8
    "depth": (5.8, 1.0, 1.0),  # 26, 8
    "width": (1.0, 2.56, 1.0),  # 7, 8
    "resolution": (1.0, 1.0, 2.0),  # 7, 16
    "compound": (1.2**2.3, 1.1**2.3, 1.15**2.3),  # 10, 12
}


def compound_scaling(config: Config) -> Experiment:
    """Table 7 of the paper in small: the same cost spent on depth, width, resolution, all three."""
    plain = {"small_input": config.small_input, "stochastic_depth": 0.0, "zero_init_residual": True}
    arms = []
    for name, (depth, width, resolution) in GROWTH.items():
        side = 4 * round(config.image_size / 2 * resolution / 4)
        net = partial(efficientnet, Row(0.25 * width, 0.25 * depth, side, dropout=0.0), **plain)
        # One precision for all: a CPU with bfloat16 would use it from 32 px on, for one arm alone.
        arms.append(Arm(name, net, {"image_size": side, "amp": False}))
    claim, axes = "all three together beat {} alone", ("depth", "width", "resolution")
    claims = [Claim(claim.format(axis), "compound", axis, margin=0.005) for axis in axes]
    with torch.device("meta"):
        sides = [(arm, arm.changes["image_size"]) for arm in arms]
        start, *more = (count_macs(arm.build(num_classes=10), (3, s, s)) for arm, s in sides)
    times = f"{min(more) / start:.1f} to {max(more) / start:.1f} times the multiply-adds"
    return Experiment(f"{times}, spent in four ways", arms, claims, seeds=6)


# %% [markdown]
# **Say it first**: which way adds no parameters? Has the net of all three more than the wide one?

# %%
if live():
    for arm in compound_scaling(Config().resolve("digits")).arms:
        show(f"{arm.name:<10} {count_parameters(arm.build(num_classes=10)):>9,}")

# %% [markdown]
# ## Experiment: does a search find better nets than chance?
#
# A small search: four stages with fixed channels and strides have three genes each, of 3, 2 and 3
# values, so there are $18^4$ nets. A net is trained on a *proxy task*, here at half the resolution
# for a few epochs, and gets the paper's reward (sec. 4):
#
# $$\text{accuracy} \cdot (\text{multiply-adds} / \text{target})^{-0.07}$$
#
# NOTE: in the paper a recurrent net proposes some 8,000 nets, and rewards train it: reinforcement
# learning (Tan et al. 2019). Here *regularised evolution* proposes (Real et al. 2019, algorithm 1).
# Three of the six youngest nets are drawn; the best of the three has a child that differs by one
# gene, or by more until it is new. So the oldest net dies, even the best: luck doesn't last.
#
# Evolution and the random search begin with the same six nets. Beforehand: what evolution proposes
# after them has a higher mean reward, by more than 0.01, one or two of the 143 validation images;
# and its best net, trained in full, tests better by more than half a point.

# %%
CHOICES = {"expansion": (1, 3, 6), "kernel_size": (3, 5), "layers": (1, 2, 3)}
ROWS = scale_stages(B0[:4], width_mult=0.5)
POPULATION, TOURNAMENT = 6, 3


def reward(accuracy: float, macs: float, target: float) -> float:
    """Twice the cost must bring 1.05 times the accuracy to be as good.

    >>> round(reward(0.900, macs=1, target=1), 3), round(reward(0.945, macs=2, target=1), 3)
    (0.9, 0.9)
    """
    return accuracy * (macs / target) ** -0.07


def random_stages(rng: random.Random) -> Stages:
    """Every gene at random."""
    return tuple(row._replace(**{g: rng.choice(v) for g, v in CHOICES.items()}) for row in ROWS)


def mutate(stages: Stages, rng: random.Random) -> Stages:
    """One gene of one stage changed to another value."""
    i, gene = rng.randrange(len(stages)), rng.choice(list(CHOICES))
    others = [value for value in CHOICES[gene] if value != getattr(stages[i], gene)]
    return (*stages[:i], stages[i]._replace(**{gene: rng.choice(others)}), *stages[i + 1 :])


def search(evolve: bool, judge: Callable, nets: int, rng: random.Random) -> dict[Stages, float]:
    """So many different nets and their rewards, in the order of their birth."""
    found: dict[Stages, float] = {}
    while len(found) < nets:
        if evolve and len(found) >= POPULATION:
            rivals = rng.sample(list(found)[-POPULATION:], TOURNAMENT)  # of the youngest
            stages = mutate(max(rivals, key=found.get), rng)
        else:
            stages = random_stages(rng)
        while stages in found:  # changed until it is new
            stages = mutate(stages, rng)
        found[stages] = judge(stages)
    return found


def train_found(evolve: bool | None, arm: Arm, data: Data, config: Config, device: Any) -> Trial:
    """Search on the proxy task, and train the best net in full; None takes B0's own rows."""
    net = partial(EfficientNet, stem_channels=STEM_CHANNELS // 2, dropout=0, stochastic_depth=0)
    net = partial(net, num_classes=data.num_classes, small_input=config.small_input)
    half, short = nn.AvgPool2d(2), replace(config, epochs=config.proxy_epochs, warmup=0)

    def judge(stages: Stages) -> float:
        _, history = trained(lambda: nn.Sequential(half, net(stages)), data, short, device)
        macs, target = (count_macs(net(rows), data.input_size) for rows in (stages, ROWS))
        return reward(history[-1].val_top1, macs, config.budget * target)

    rng = random.Random(config.seed)
    found = {ROWS: judge(ROWS)} if evolve is None else search(evolve, judge, config.nets, rng)
    best, rewards = max(found, key=found.get), list(found.values())
    genes = " ".join(f"e{s.expansion}k{s.kernel_size}x{s.layers}" for s in best)
    trial = train_trial(f"{arm.name} {genes}", partial(net, best), data, config, device)
    proposed = {} if evolve is None else {"proposed_reward": mean(rewards[POPULATION:])}
    so_far = {"best reward by nets trained": list(accumulate(rewards, max))}
    trial.model.found = {"best_reward": max(rewards), **proposed, **so_far}
    return trial


def architecture_search(config: Config) -> Experiment:
    """Evolution against chance at the same number of nets; B0's own rows for comparison."""
    ways = {"evolution": True, "random": False, "B0's rows": None}
    arms = [Arm(n, EfficientNet, train=partial(train_found, way)) for n, way in ways.items()]
    rivals = "evolution", "random"
    claims = [
        Claim("evolution proposes better nets than chance", *rivals, "proposed_reward", 0.01),
        Claim("its best net, trained in full, tests better", *rivals, margin=0.005),
    ]
    heading = f"{config.nets} nets each: does evolution beat chance?"
    return Experiment(heading, arms, claims, after=lambda trial, data: trial.model.found)


EXPERIMENTS: dict[str, Callable[[Config], object]] = {
    "compound-scaling": partial(run_experiment, LESSON, compound_scaling),
    "search": partial(run_experiment, LESSON, architecture_search),
}

# %% [markdown]
# **Say it first**: a net of half the target's cost reaches 90%. With which accuracy has a net of
# the target's cost the same reward? And what does a child have in common with its parent?

# %%
if live():
    show(reward(0.90, macs=0.5, target=1), *zip(ROWS, mutate(ROWS, random.Random(0))))

# %% [markdown]
# ## What to notice
#
# - In B0 the 1x1 convolutions inside the blocks take 83% of the multiply-adds, the depthwise ones
#   9%. The gates of squeeze-and-excitation take 0.2%, and hold 12% of the parameters.
# - B0 has a tenth of ResNet-50's multiply-adds and a fifth of its parameters. torchvision's
#   weights reach 77.7% on ImageNet, against 76.1% (its first recipe for ResNet-50).
# - B2 ($\phi = 1$) costs 2.82 times as much as B0: its 16 blocks become 23, because layers are
#   rounded up, and it sees 288 px. At the formula's 258 px it would be 2.57 times.
#
# **What `compound-scaling` gave** (digits, six seeds, one thread of an AMD EPYC, torch 2.14):
#
#     test           start 96.0%   depth 96.1%   width 97.1%   resolution 97.8%   all three 96.4%
#     training loss        0.203         0.182         0.128              0.098             0.140
#
# That all three beat resolution alone *fails*: -1.4 points (98.3% interval -2.6 to -0.3). Against
# depth (+0.3, -1.6 to 2.2) and width (-0.7, -2.7 to 1.2) it is undecided. The larger digits hold no
# new detail, and still do best: at 8 px most blocks make maps of 2x2 or 1x1, at 16 px two of seven
# do. In eight epochs the deep net has not finished learning. The paper's images have details that
# are worth their pixels, and its nets many more epochs. On CIFAR-10 (JPEG copy, 1,000 images a
# class, from 16 px, ten epochs, three seeds) resolution is ahead again: 48.9%, all three 46.8%,
# width 46.0%, depth 44.3%, start 43.3%; all three claims are undecided.
#
# **What `search` gave** (digits, three seeds, 16 nets each, 209 s): both claims are undecided.
# Evolution's later nets have a mean reward of 0.823, random ones 0.779: +0.044 (97.5% interval
# -0.13 to 0.22). The best nets test at 92.7% and 91.9%, and B0's own rows, which cost more, at
# 96.4%. Ten children are few, and after three epochs the reward depends much on luck.
#
# ## Exercises
#
# `python -m common.starter 04 --out DIR` makes a copy of this file without the parts that you write
# and says how to mark it. In order of difficulty:
#
# - **4.1** `round_channels`. **4.2** `scale_stages`: what becomes of one layer at depth 1.1?
# - **4.3** `StochasticDepth`. Test it: the mean of many draws must be the input. What does the net
#   compute in evaluation if you forget to divide by the share that is kept?
# - **4.4** `MBConv`. Count the multiply-adds of `MBConv(24, 40, 5, stride=2)` on a 56 x 56 map, and
#   of a plain 5x5 convolution from 24 to 40 channels.
# - Let the rate of stochastic depth be the same in all blocks, at the same mean. Is it worse?
# - Repeat `compound-scaling` without `zero_init_residual`. Which axis suffers, and why? Repeat it
#   with your own proportions in `GROWTH`, at the same cost. Are the paper's the best here?
# - Run the search with `--proxy-epochs 1` and with 6. When does the higher reward go with the
#   better test accuracy in full? A search finds what its proxy rewards.

# %%
if __name__ == "__main__":
    main(config, MODELS, build, run, EXPERIMENTS)
