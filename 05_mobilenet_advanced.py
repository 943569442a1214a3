"""Lesson 5, advanced: MobileNet, a convolution in two cheap steps.

Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications",
2017 (arXiv 1704.04861); Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
2018 (arXiv 1801.04381); Howard et al., "Searching for MobileNetV3", 2019 (arXiv 1905.02244).

The idea in one sentence: filter each channel by itself, then mix the channels pixel by pixel, and
a layer takes about an eighth of the multiply-adds of a standard one.

    python 05_mobilenet_advanced.py                                  # trains; digits on a CPU
    python 05_mobilenet_advanced.py --experiment separable           # against standard convolutions
    python 05_mobilenet_advanced.py --experiment inverted-residual   # V2 with and without its ideas
    python 05_mobilenet_advanced.py --experiment multipliers         # thinner, or smaller images?
    python 05_mobilenet_advanced.py --experiment quantize            # 8-bit integers after training
    python 05_mobilenet_advanced.py --model mobilenet_v3_large --summary

Measured on one thread of an AMD EPYC that others used too, torch 2.14: mobilenet_v3_small on digits
(8 px, 15 epochs, seeds 0 to 2) tests at 98.33, 98.61 and 98.05%, 20 s of training. What the
experiments gave stands at the end of the file, so that you can guess first.
"""

# %% [markdown]
# **You will** count what a depthwise separable convolution saves, write the inverted residual and
# say why its ends are narrow and linear, and turn a trained net into 8-bit integers by hand. **You
# need** lesson 1. **Time**: 45 minutes to read, 20 for the experiments, 2 hours for the exercises.
#
# <details><summary>1. A 3x3 convolution has 64 channels in, 128 out. How many multiply-adds a
# pixel, and how many if separated?</summary>9 x 64 x 128 = 73,728; 9 x 64 + 64 x 128 = 8,768.
# </details><details><summary>2. Where are a MobileNet's multiply-adds?</summary>95% of V1's are in
# the 1x1 convolutions, 3% in the depthwise ones.</details><details><summary>3. Why has the last 1x1
# of V2's block no activation?</summary>It has few channels: no spare one still holds what a ReLU
# sets to 0.</details><details><summary>4. What does a zero point do?</summary>It is the integer
# that stands for 0. So 0 is exact, and a range such as 0 to 6 can use all integers.</details>
# <details><summary>5. Why one scale per channel?</summary>With one for all, the channel of the
# largest weights sets the step, and one of small weights is left with few integers.</details>

# %% [markdown]
# ## The problem, and the one equation
#
# A phone has a fraction of the power of a GPU. A standard convolution filters in space and mixes
# channels at once: with a $k \times k$ kernel each of $D$ outputs reads $k^2$ pixels of all $C$
# inputs. MobileNet does one after the other, and at each pixel that takes
#
# $$k^2 C + C D \quad\text{multiply-adds instead of}\quad k^2 C D,
# \quad\text{a share of}\quad \frac{1}{D} + \frac{1}{k^2}$$
#
#     standard     C ───── 3x3 over all channels ───── D
#     separable    C ── 3x3, each channel alone ── C ── 1x1 over all channels ── D
#                          depthwise                         pointwise
#
# By hand, 64 channels in, 128 out, 8x8 pixels: 9 x 64 x 128 x 64 = 4,718,592 multiply-adds, and
# (9 x 64 + 64 x 128) x 64 = 561,152, 8.4 times fewer. What accuracy is lost? Is it as much faster?
#
#     image ── 3x3 stem ── 13 separable blocks (V2: 17 inverted residuals, a 1x1) ── pool ── linear

# %%
from common.cli import main, parse_flags
from common.config import TrainConfig, knob, numbers_of

from dataclasses import dataclass, replace

LESSON = "05_mobilenet_advanced"


@dataclass(frozen=True)
class Config(TrainConfig):
    """What this lesson can be told; every field is a flag, and `--help` prints them all."""

    model: str = knob("mobilenet_v3_small", "a name of MODELS: mobilenet_v1, mobilenet_v2, ...")
    width_mult: float = knob(1.0, "factor on the channels of every layer", low=0.05, high=8)
    trial_width: float = knob(0.25, "width_mult of compared nets", (), 0.05, 8,
                              only="separable, inverted-residual, multipliers")  # fmt: skip
    factors: str = knob("0.5", "on the width, or on the side", (), 0.05, 1, only="multipliers")
    # What differs from the defaults of common/config.py; the record was measured with these.
    RECIPES = {"digits": {"image_size": 8, "epochs": 15, "batch_size": 64, "base_lr": 0.2}}


# Flags are read before torch is imported, so that --help answers at once.
config = parse_flags(Config) if __name__ == "__main__" else Config()

# %%
from collections import namedtuple
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.classifier import Classifier  # nn.Module; head[-1] is the last layer, replaceable
from common.costs import cost_by_kind, time_saved, width_for_macs
from common.data import load_data
from common.evaluation import evaluate
from common.experiments import Arm, Claim, Experiment, run_experiment
from common.integers import replace_layers, time_kernels, trained_once
from common.live import digits, live, show
from common.pretrained import load_pretrained, weights_mean_std
from common.profiling import count_macs, count_parameters, fold_batchnorm, profile
from common.runs import Run, banner, draw_figures, prepare
from common.training import fit, make_optimizer, make_schedule, train_one_epoch

# %% [markdown]
# ## V1, 2017: filter each channel alone, then mix the channels
#
# All three versions are made of one unit: convolution, BatchNorm, activation. With as many `groups`
# as channels, each filter reads one channel. A 1x1 convolution is the first to mix them.


# %%
class ConvBN(nn.Sequential):
    """A convolution without bias, its BatchNorm and, unless it's None, an activation.
    (N, C_in, H, W) -> (N, C_out, H/stride, W/stride)

    >>> ConvBN(3, 32, kernel=3, stride=2)(torch.zeros(1, 3, 8, 8)).shape
    torch.Size([1, 32, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1,
                 groups: int = 1, activation: type[nn.Module] | None = nn.ReLU,
                 norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:  # fmt: skip
        size = kernel, stride, kernel // 2  # this padding keeps height and width at stride 1
        conv = nn.Conv2d(in_channels, out_channels, *size, groups=groups, bias=False)
        super().__init__(conv, norm(out_channels), *([activation()] if activation else []))
        self.stride = stride


class DepthwiseSeparable(nn.Module):
    """A 3x3 filter per channel, then a 1x1 convolution across channels.
    (N, C_in, H, W) -> (N, C_out, H/stride, W/stride).  Howard et al. 2017, sec. 3.1 and fig. 3.

    >>> DepthwiseSeparable(64, 128, stride=2)(torch.zeros(1, 64, 8, 8)).shape
    torch.Size([1, 128, 4, 4])
    >>> [count_macs(m, (64, 8, 8)) for m in (DepthwiseSeparable(64, 128), ConvBN(64, 128, 3))]
    [561152, 4718592]
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = ConvBN(in_channels, in_channels, 3, stride, groups=in_channels)
        self.pointwise = ConvBN(in_channels, out_channels, 1)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(x)  # (N, C_in, H/stride, W/stride)
        return self.pointwise(x)  # (N, C_out, H/stride, W/stride)


StandardConv = partial(ConvBN, kernel=3)  # what the block replaces: table 4, first line

# %% [markdown]
# **Say it first**: a depthwise layer with one filter per colour reads these images, whose three
# channels are equal. Are the three channels of what comes out equal too?

# %%
if live():
    show(digits(6), DepthwiseSeparable(3, 8).depthwise(digits(6)))  # colours: filters differ

# %% [markdown]
# ## Activations without an exponential
#
# **ReLU6**, $\min(\max(x, 0), 6)$, is a ReLU with a ceiling: 8-bit integers can share out a range
# that is known, in steps of 6/255 = 0.024, whatever the image (Sandler et al. 2018, sec. 4:
# "robustness when used with low-precision computation"). A sigmoid needs an exponential. V3 has the
# **hard sigmoid**, ReLU6(x + 3) / 6, as the gate of lesson 1's squeeze-and-excitation; instead of
# swish, x * sigmoid(x), it has **h-swish**, x * ReLU6(x + 3) / 6 (Howard et al. 2019, sec. 5.2).


# %%
def make_divisible(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of 8, which hardware likes, but at least 8 and 90% of what was asked.

    >>> [make_divisible(c) for c in (3, 24, 18, 11.9, 100)]
    [8, 24, 24, 16, 104]
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate in [0, 1] computed from all channels' means.
    (N, C, H, W) -> (N, C, H, W).  Howard et al. 2019, sec. 5.3: squeezed to a quarter of the width.

    >>> SqueezeExcitation(72)(torch.zeros(1, 72, 8, 8)).shape
    torch.Size([1, 72, 8, 8])
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        squeezed = make_divisible(channels / reduction)
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean(dim=(2, 3), keepdim=True)  # (N, C, 1, 1)
        gate = F.relu(self.squeeze(gate))  # (N, C/reduction, 1, 1)
        gate = F.hardsigmoid(self.excite(gate))  # (N, C, 1, 1)
        return x * gate


# %% [markdown]
# **Say it first**: a quarter of 72 is 18. To how many channels does a gate of 72 squeeze?
# Which numbers does h-swish leave as they are, and which does it set to zero?

# %%
if live():
    show(SqueezeExcitation(72).squeeze.out_channels)
    show(F.hardswish(torch.tensor([-4.0, -3.0, -1.5, 0.0, 1.5, 3.0, 8.0])))

# %% [markdown]
# ## V2, 2018, and V3, 2019: the inverted residual
#
# ResNet's bottleneck is narrow where the 3x3 works, because its 3x3 is the expensive part. A
# depthwise 3x3 is nearly free, so V2 turns the shape inside out: wide in the middle.
#
#     ResNet   256 -1x1-> 64 -3x3-> 64 -1x1-> 256              the shortcut joins the wide ends
#     V2        24 -1x1-> 144 -3x3 depthwise-> 144 -1x1-> 24   the shortcut joins the narrow ends
#
# The last 1x1 has **no activation** (a "linear bottleneck"): with so few channels a ReLU would
# throw away information that no other channel holds (sec. 3.2). V3 keeps the block. An architecture
# search decided where it has 5x5 kernels and squeeze-and-excitation; the authors put h-swish into
# the stem and the deeper half, where maps are small and an activation costs least (sec. 5.1, 5.2).


# %%
class InvertedResidual(nn.Module):
    """Expand, filter each channel, project back without activation; add the input if shapes allow.
    (N, C_in, H, W) -> (N, C_out, H/stride, W/stride).  Sandler et al. 2018, table 1 and fig. 3b;
    with `se`, a 5x5 kernel or h-swish, Howard et al. 2019, fig. 4.

    >>> InvertedResidual(24, 24, expanded=144)(torch.zeros(1, 24, 8, 8)).shape
    torch.Size([1, 24, 8, 8])
    """

    def __init__(self, in_channels: int, out_channels: int, expanded: int, stride: int = 1,
                 kernel: int = 3, se: bool = False, activation: type[nn.Module] = nn.ReLU6,
                 norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:  # fmt: skip
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
# **Say it first**: `InvertedResidual(24, 24, expanded=144)` works on 144 channels inside. Does it
# have more or fewer parameters than one standard 3x3 convolution from 24 to 24 channels?

# %%
if live():
    show([count_parameters(m) for m in (InvertedResidual(24, 24, 144), StandardConv(24, 24))])

# %% [markdown]
# ## The papers' tables as data, and the model: stem, stages, head
#
# The stem is a 3x3 convolution of stride 2 to 32 channels, in V3 16. After the last row V2 and V3
# have a 1x1 convolution. `width_mult` makes every layer thinner by the same factor, and the cost
# falls with about its square, because a 1x1 convolution costs C_in times C_out. `small_input` is
# for 64 pixels and less: five halvings would leave one pixel of a CIFAR image, so the stem and the
# first row that halves the resolution get stride 1. NOTE: none of the three papers has this form.

# %%
# V1 (Howard et al. 2017, table 1, a depthwise and a pointwise line in one): channels, stride.
# V2 (Sandler et al. 2018, table 2): expansion t, channels c, n blocks, stride s of the first.
# V3 (Howard et al. 2019, tables 1 and 2): kernel, exp size, #out, SE or not, activation, stride.
Row = tuple
SE, NO, RE, HS = True, False, nn.ReLU, nn.Hardswish
TABLE: dict[str, list[Row]] = {
    # NOTE: V1's table prints stride 2 in the last row, from 7x7 to 7x7 pixels. That is stride 1.
    "mobilenet_v1": [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5,
        (1024, 2), (1024, 1)],
    "mobilenet_v2": [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
        (6, 160, 3, 2), (6, 320, 1, 1)],
    # NOTE: table 2 has squeeze-and-excitation behind the last 1x1, the authors' code has not.
    "mobilenet_v3_small": [(3, 16, 16, SE, RE, 2), (3, 72, 24, NO, RE, 2), (3, 88, 24, NO, RE, 1),
        (5, 96, 40, SE, HS, 2), *[(5, 240, 40, SE, HS, 1)] * 2, (5, 120, 48, SE, HS, 1),
        (5, 144, 48, SE, HS, 1), (5, 288, 96, SE, HS, 2), *[(5, 576, 96, SE, HS, 1)] * 2],
    "mobilenet_v3_large": [(3, 16, 16, NO, RE, 1), (3, 64, 24, NO, RE, 2), (3, 72, 24, NO, RE, 1),
        (5, 72, 40, SE, RE, 2), *[(5, 120, 40, SE, RE, 1)] * 2, (3, 240, 80, NO, HS, 2),
        (3, 200, 80, NO, HS, 1), *[(3, 184, 80, NO, HS, 1)] * 2, (3, 480, 112, SE, HS, 1),
        (3, 672, 112, SE, HS, 1), (5, 672, 160, SE, HS, 2), *[(5, 960, 160, SE, HS, 1)] * 2],
}  # fmt: skip


# %%
class MobileNet(Classifier):
    """(N, 3, H, W) -> (N, num_classes). A stage has one resolution; `head` follows the pooling."""

    def __init__(self, stem: ConvBN, blocks: list[nn.Module], head: list[nn.Module]) -> None:
        super().__init__()
        self.stem, self.stages = stem, nn.Sequential()
        for block in blocks:
            if block.stride == 2 or not len(self.stages):
                self.stages.append(nn.Sequential())
            self.stages[-1].append(block)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)
        self.init_weights()

    def init_weights(self) -> None:
        """He initialisation. NOTE: unlike the papers', blocks with a shortcut start as the identity
        (Goyal et al. 2017, sec. 5.1), and linear layers as PyTorch's, not with torchvision's 0.01.
        V3-small then validates on digits at 96.5% after 6 epochs, instead of 83.9% (seed 0).
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # In a depthwise layer an input channel reaches one output channel, not all of them.
                # Without the division by `groups` its weights would start sqrt(C) times too small.
                fan_out = module.weight[:, 0].numel() // module.groups
                nn.init.normal_(module.weight, 0, (2 / fan_out) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, InvertedResidual) and module.has_shortcut:
                nn.init.zeros_(module.layers[-1][1].weight)  # the last BatchNorm

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, H/32, W/32), the last feature map; H/8 and W/8 if small."""
        return self.stages(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


def rows_of(name: str, small_input: bool) -> tuple[int, list[Row]]:
    """The stem's stride and the table; the first two strides of 2 become 1 if small."""
    rows = [*TABLE[name]]
    if small_input:
        first = [row[-1] for row in rows].index(2)
        rows[first] = (*rows[first][:-1], 1)
    return 1 if small_input else 2, rows


def mobilenet_v1(num_classes: int = 1000, small_input: bool = False, width_mult: float = 1.0,
                 block: Callable[..., nn.Module] = DepthwiseSeparable) -> MobileNet:  # fmt: skip
    """MobileNet, 4.2M parameters and 569M multiply-adds at 224 px.  Howard et al. 2017, table 1.
    `block=StandardConv` gives the same net with full convolutions: 29.3M and 4.9G (table 4).
    """
    stride, rows = rows_of("mobilenet_v1", small_input)
    width = make_divisible(32 * width_mult)
    stem, blocks = ConvBN(3, width, 3, stride), []
    for channels, stride in rows:
        in_channels, width = width, make_divisible(channels * width_mult)
        blocks.append(block(in_channels, width, stride=stride))
    return MobileNet(stem, blocks, head=[nn.Linear(width, num_classes)])


def mobilenet_v2(num_classes: int = 1000, small_input: bool = False,
                 width_mult: float = 1.0) -> MobileNet:  # fmt: skip
    """MobileNetV2, 3.5M parameters, 301M multiply-adds at 224 px.  Sandler et al. 2018, table 2."""
    stride, rows = rows_of("mobilenet_v2", small_input)
    width = make_divisible(32 * width_mult)
    stem, blocks = ConvBN(3, width, 3, stride, activation=nn.ReLU6), []
    for expansion, channels, depth, stride in rows:
        for s in (stride, *[1] * (depth - 1)):
            in_channels, width = width, make_divisible(channels * width_mult)
            blocks.append(InvertedResidual(in_channels, width, expansion * in_channels, s))
    # A net thinner than 1 keeps its last convolution as it is, which helps small nets (sec. 4).
    features = make_divisible(1280 * max(1.0, width_mult))
    blocks.append(ConvBN(width, features, activation=nn.ReLU6))
    return MobileNet(stem, blocks, head=[nn.Dropout(0.2), nn.Linear(features, num_classes)])


def mobilenet_v3(name: str, hidden: int, num_classes: int = 1000, small_input: bool = False,
                 width_mult: float = 1.0) -> MobileNet:  # fmt: skip
    """MobileNetV3 of one table.  Howard et al. 2019, tables 1 and 2.  The 1x1 convolution to
    `hidden` channels stands after the pooling, as a linear layer: it costs one pixel, not 49 (sec.
    5.1). BatchNorm averages its statistics over about a hundred steps (decay 0.99, sec. 6.1). NOTE:
    a run on digits has 300, so the small form keeps PyTorch's momentum of 0.1, about ten steps.
    """
    stride, rows = rows_of(name, small_input)
    norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.1 if small_input else 0.01)
    conv = partial(ConvBN, activation=nn.Hardswish, norm=norm)
    width = make_divisible(16 * width_mult)
    stem, blocks = conv(3, width, 3, stride), []
    for kernel, expanded, channels, se, activation, stride in rows:
        in_channels, width = width, make_divisible(channels * width_mult)
        extras = (make_divisible(expanded * width_mult), stride, kernel, se, activation, norm)
        blocks.append(InvertedResidual(in_channels, width, *extras))
    features, hidden = 6 * width, make_divisible(hidden * width_mult)
    blocks.append(conv(width, features))
    head = [nn.Linear(features, hidden), nn.Hardswish(), nn.Dropout(0.2)]
    return MobileNet(stem, blocks, head=[*head, nn.Linear(hidden, num_classes)])


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3_small": partial(mobilenet_v3, "mobilenet_v3_small", 1024),
    "mobilenet_v3_large": partial(mobilenet_v3, "mobilenet_v3_large", 1280),
}

# %% [markdown]
# ## Where the multiply-adds are
#
# Once separated, nearly all the work is in 1x1 convolutions (table 2 of the first paper). They are
# plain matrix products, and they are what V2 and V3 go on to save: at 224 px V2 takes half of V1's
# multiply-adds, V3-small a tenth. NOTE: the table prints 1.19% for the stem, and its column adds up
# to 99.29%; the stem's 10.8 of 569 million multiply-adds are 1.9%.
#
# **Say it first**: by which factor do V1's strides shrink 224 pixels? Which shape has its last map?
# Its classifier takes 0.2% of the multiply-adds, and what share of the parameters?

# %%
if live():
    show(mobilenet_v1().forward_features(torch.zeros(1, 3, 224, 224)).shape)

# %%
if live():
    for kind, (macs, parameters) in cost_by_kind(mobilenet_v1(), (3, 224, 224)).items():
        show(f"{kind:<14} {macs:6.1%} of the multiply-adds, {parameters:6.1%} of the parameters")

# %% [markdown]
# ## One run, from data to report
#
# `fit` repeats lesson 1's loop. NOTE: the papers train with RMSProp. **Say it first**: a dropout in
# V3's head sets a fifth of the numbers to 0, in training only. Which line of the loop starts it?


# %%
def build(config: Config, num_classes: int) -> nn.Module:
    """The model that the flags ask for."""
    return MODELS[config.model](num_classes, config.small_input, config.width_mult)


def run(config: Config) -> dict[str, object]:
    """Train, test once with the best epoch's weights, profile, draw, save."""
    config, device = prepare(config)
    # Trained weights bring the mean and deviation that they were trained with.
    mean_std = weights_mean_std(config.model) if config.pretrained else None
    data = load_data(config, device, mean_std)
    # A pixel's channels side by side: on a CPU a MobileNet then trains 1.5 to 2 times as fast.
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


# %%
if live():
    show(train_one_epoch)

# %% [markdown]
# ## After training: 8-bit integers
#
# An integer of 8 bits takes a quarter of the room of a float32, and most chips multiply it faster.
# With a scale $s$ and a zero point $z$, the integer that stands for 0, a number $x$ is stored as
#
# $$q = \text{clamp}(\text{round}(x / s) + z), \qquad x \approx s\,(q - z)$$
#
# So zeros are exact, and padding and ReLU make many (Krishnamoorthi 2018, sec. 2.1). By hand, for
# ReLU6: $s = 6/255$, $z = -128$; 1.5 becomes round(63.75) - 128 = -64: it means 64 x 6/255 = 1.506.
#
# First BatchNorm disappears (`fold_batchnorm`). In eval mode it multiplies each channel by
# $f = \gamma / \sqrt{\sigma^2 + \epsilon}$ and adds $\beta - f \mu$. The convolution before it can
# carry both: $w' = f w$, $b' = \beta - f \mu$. As $f$ differs from channel to channel, a scale per
# channel should matter (sec. 3.1; arXiv 1806.08342). Then some training images show the range of
# each layer's input. Integer kernels compute $s_w s_x \sum q_w (q_x - z)$. This is the sum over
# dequantized numbers, so a float layer can stand for an integer one (Jacob et al. 2018, sec. 3).


# %%
def quantize(x: Tensor, scale: Tensor | float, zero_point: int, bits: int = 8) -> Tensor:
    """Numbers to signed integers of 2 to 8 bits: scale, round, shift, clamp. Same shape, int8.

    >>> quantize(torch.tensor([-1.0, 0.0, 1.5, 9.0]), 6 / 255, zero_point=-128).tolist()
    [-128, -128, -64, 127]
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return (torch.round(x / scale) + zero_point).clamp(low, high).to(torch.int8)


def dequantize(q: Tensor, scale: Tensor | float, zero_point: int) -> Tensor:
    """The numbers that integers stand for, float32.

    >>> dequantize(torch.tensor([-64, 127], dtype=torch.int8), 6 / 255, zero_point=-128)
    tensor([1.5059, 6.0000])
    """
    return scale * (q.float() - zero_point)  # within int8, 127 + 128 would overflow


def fit_range(low: float, high: float, bits: int = 8) -> tuple[float, int]:
    """Scale and zero point of activations from `low` to `high`, stretched to include 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1) or 1.0
    return scale, -(2 ** (bits - 1)) - round(low / scale)


def fit_weights(weight: Tensor, bits: int = 8, per_channel: bool = True) -> Tensor:
    """Scale of weights, whose zero point is 0: (C_out, 1, 1, 1), or (1, 1, 1, 1) for the tensor."""
    dims = tuple(range(int(per_channel), weight.dim()))
    return weight.abs().amax(dims, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)


# %% [markdown]
# **Say it first**: one channel's weights reach 1, another's 0.01. With one scale for both, how many
# different integers are left for the second?

# %%
if live():
    weight = torch.linspace(-1, 1, 100) * torch.tensor([[1.0], [0.01]])
    for per_channel in (False, True):
        q = quantize(weight, fit_weights(weight, per_channel=per_channel), 0)
        show([len(row.unique()) for row in q])

# %%
# How to round; a scale per output channel, or one for all weights of a layer.
numbers = "weight_bits activation_bits per_channel"
Precision = namedtuple("Precision", numbers, defaults=(8, 8, True))


class IntegerLayer(nn.Module):
    """A convolution or linear layer of which weights and input are integers times a scale.
    NOTE: biases (32 bits in integer kernels), sums of shortcuts, activations and pooling stay
    float32; what they give is rounded where the next layer reads it.
    """

    def __init__(self, layer: nn.Module, low: float, high: float, precision: Precision) -> None:
        super().__init__()
        self.layer, self.bits = layer, precision.activation_bits
        self.scale, self.zero_point = fit_range(low, high, self.bits)
        scale = fit_weights(layer.weight, precision.weight_bits, precision.per_channel)
        q = quantize(layer.weight, scale, 0, precision.weight_bits)
        layer.weight.copy_(dequantize(q, scale, 0))

    def forward(self, x: Tensor) -> Tensor:
        q = quantize(x, self.scale, self.zero_point, self.bits)
        return self.layer(dequantize(q, self.scale, self.zero_point))


@torch.no_grad()
def to_integers(model: nn.Module, images: Tensor, precision: Precision) -> nn.Module:
    """A copy without BatchNorm, in integers; `images` (N, 3, H, W) show each input's range."""
    return replace_layers(fold_batchnorm(model), images, partial(IntegerLayer, precision=precision))


# %% [markdown]
# ## Four experiments
#
# - `separable`: **what does the separation cost?** On ImageNet 1.1 points (Howard et al. 2017,
#   table 4), which is the margin here. The harder rival is a standard net so thin that it takes as
#   many multiply-adds. And the paper puts "very little or no" weight decay on depthwise filters
#   (sec. 3.2): does that help? Here and in the next two each kind of net has its own best of three
#   rates, chosen on validation images with a seed that isn't counted.
# - `inverted-residual`: **what do V2's two ideas give?** Figure 6 of Sandler et al. (2018): a ReLU6
#   after the bottleneck; no shortcut; a shortcut between the wide maps instead. The margin is half
#   a point: two of the 359 test images of digits.
# - `multipliers`: **thinner, or smaller images?** The first paper's two knobs (sec. 3.3, 3.4) are a
#   factor on the channels and one on the side of the image. Both cut multiply-adds by about their
#   square. On ImageNet they were about equal: 63.7% at half the width (149M), 64.4% at 128 of 224
#   px (186M; tables 6, 7). The claim here is that the thinner net is better, by more than a point.
# - `quantize`: **what do 8-bit integers cost?** One trained net per seed, rounded in several ways.
#   8 bits should cost at most half a point; a scale per channel should gain more than half a point,
#   with weights of 8 bits and of 4. Torch's own kernels run too, where they are here: on x86 with 7
#   bits for activations, as older chips add products up in 16 bits, which 8 x 8 bits can overflow.


# %%
def without_decay(**options: object) -> nn.Module:
    """V1 whose depthwise filters `make_optimizer` doesn't decay."""
    model = mobilenet_v1(**options)
    for block in [m for m in model.modules() if isinstance(m, DepthwiseSeparable)]:
        block.depthwise[0].weight.no_decay = True
    return model


def separable(config: Config) -> Experiment:
    """Table 4 of the first paper, with a rival of equal cost at ten classes."""
    net = {"num_classes": 10, "small_input": config.small_input, "width_mult": config.trial_width}
    separated, size = partial(mobilenet_v1, **net), (3, config.image_size, config.image_size)
    standard = partial(separated, block=StandardConv)
    width = width_for_macs(standard, count_macs(separated(), size), size)
    thin = partial(standard, width_mult=width)
    rates = [config.lr * factor for factor in (1, 2.5, 6)]
    arms = [
        Arm("standard", standard, rate_of="thin standard"),
        Arm("thin standard", thin, rates=rates),
        Arm("separable", separated, rates=rates),
        Arm("no depthwise decay", partial(without_decay, **net), rate_of="separable"),
    ]
    cheap = "separable costs at most what it cost in the paper"
    claims = [
        Claim(cheap, "separable", "standard", margin=-0.011),
        Claim("separable beats a standard net of equal cost", "separable", "thin standard"),
        Claim("depthwise filters want no decay", "no depthwise decay", "separable"),
    ]
    return Experiment(
        "Separable convolutions", arms, claims, seeds=6,
        notes=lambda results: [time_saved("V1", mobilenet_v1(block=StandardConv), mobilenet_v1())],
    )  # fmt: skip


# %%
class WideShortcuts(nn.Module):
    """V2 with its shortcuts between the expanded maps.  Sandler et al. 2018, fig. 6b.  NOTE: the
    paper doesn't say where exactly; here the sum comes after the ReLU6.
    """

    def __init__(self, model: MobileNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        x, wide = self.model.stem(x), x
        *blocks, last = (block for stage in self.model.stages for block in stage)
        for block in blocks:
            before, wide = wide, block.layers[0](x)  # (N, 6 C_in, H, W)
            wide = wide + before if wide.shape == before.shape else wide
            x = block.layers[1:](wide)  # (N, C_out, H/stride, W/stride)
        return self.model.head(last(x))


def v2_variant(name: str, **options: object) -> nn.Module:
    """One of the nets of figure 6."""
    model = mobilenet_v2(**options)
    for block in [m for m in model.modules() if isinstance(m, InvertedResidual)]:
        nn.init.ones_(block.layers[-1][1].weight)  # zeros would help those with a shortcut only
        if name == "ReLU6 in the bottleneck":
            block.layers[-1].append(nn.ReLU6())
        block.has_shortcut &= name not in ("no shortcut", "wide shortcut")
    return WideShortcuts(model) if name == "wide shortcut" else model


def inverted_residual(config: Config) -> Experiment:
    """Figure 6 of the second paper."""
    options = {"small_input": config.small_input, "width_mult": config.trial_width}
    names = ("V2", "ReLU6 in the bottleneck", "no shortcut", "wide shortcut")
    rates = [config.lr * factor for factor in (0.25, 0.6, 1.5)]  # deeper nets, so lower ones
    longer = {"epochs": 2 * config.epochs}  # a net that only learns more slowly is not a worse one
    arms = [Arm(n, partial(v2_variant, n, **options), longer, rates=rates) for n in names]
    claims = [
        Claim("a linear bottleneck is better than a ReLU6", "V2", names[1], margin=0.005),
        Claim("the shortcut helps", "V2", names[2], margin=0.005),
        Claim("narrow ends are the better place for it", "V2", names[3], margin=0.005),
    ]
    return Experiment("The inverted residual", arms, claims)


# %%
def multipliers(config: Config) -> Experiment:
    """Tables 6 and 7 of the first paper, for each of `config.factors`."""
    net = partial(mobilenet_v1, small_input=config.small_input)
    whole = partial(net, width_mult=config.trial_width)
    rates = [config.lr * factor for factor in (1, 2.5, 6)]
    one = {"amp": False}  # a CPU with bfloat16 would use it from 32 px on, for large images alone
    arms, claims = [Arm("whole", whole, one, rates=rates)], []
    for factor in numbers_of(config.factors, "--factors"):
        thin, small = f"width x {factor:g}", f"side x {factor:g}"
        side = replace(config, image_size=round(config.image_size * factor)).image_size
        thinner = partial(net, width_mult=config.trial_width * factor)
        arms.append(Arm(thin, thinner, one, rates=rates))
        arms.append(Arm(small, whole, {"image_size": side, **one}, rates=rates))
        claims.append(Claim(f"{thin} is better than {small}", thin, small, margin=0.01))
    return Experiment("Thinner nets or smaller images", arms, claims)


# %%
PRECISIONS = {
    "8 bits, per tensor": Precision(8, 8, per_channel=False),
    "8 bits, per channel": Precision(8, 8),
    "7-bit activations": Precision(8, 7),
    "4-bit weights, per tensor": Precision(4, 8, per_channel=False),
    "4-bit weights, per channel": Precision(4, 8),
}


def integers(config: Config) -> Experiment:
    """A trained net in each of PRECISIONS, and in torch's kernels if they are here."""
    ways = {name: partial(to_integers, precision=p) for name, p in PRECISIONS.items()}
    arms = trained_once(partial(build, config), ways, config.device)
    claims = [Claim("8 bits cost at most half a point", "8 bits, per channel", "float32",
                    margin=-0.005)]  # fmt: skip
    for what in ("8 bits", "4-bit weights"):
        pair = f"{what}, per channel", f"{what}, per tensor"
        claims.append(Claim(f"{what}: a scale per channel is better", *pair, margin=0.005))
    return Experiment(
        "Integers after training", arms, claims, seeds=6,
        notes=lambda results: [time_kernels(MODELS[config.model](width_mult=config.width_mult))],
    )  # fmt: skip


EXPERIMENTS: dict[str, Callable[[Config], object]] = {
    "separable": partial(run_experiment, LESSON, separable),
    "inverted-residual": partial(run_experiment, LESSON, inverted_residual),
    "multipliers": partial(run_experiment, LESSON, multipliers),
    "quantize": partial(run_experiment, LESSON, integers),
}

# %% [markdown]
# ## What to notice
#
# - `separable` (digits, six seeds, one thread of an AMD EPYC, torch 2.14): standard 98.1%, a thin
#   standard net of equal cost 98.2%, separable 91.7%, without decay on its depthwise filters 91.5%.
#   That it costs at most the paper's 1.1 points *fails* (-6.4, 97.5% interval -10.0 to -2.7), that
#   it beats the thin net too (-6.5, 98.3% interval -9.0 to -4.0); decay is undecided (-0.2, -4.0 to
#   3.5). The separable net has not finished: its training loss is 0.33, theirs 0.06. With one seed
#   three times the epochs took it from 90.3 to 97.5%, the thin one from 98.6 to 98.9%. On CIFAR-10
#   (JPEG copy, 16 px, 1,000 images a class, 8 epochs) both fail again, 38.4% against 53.5% and
#   48.3%, with a training loss of 1.70 against 1.24 and 1.40. The paper counts the cost of use.
# - `inverted-residual` (digits, three seeds, 30 epochs): V2 91.7%; a ReLU6 in the bottleneck costs
#   17.4 points (4.9 to 29.8), no shortcut 39.0 (24.0 to 54.0): both claims hold; the two learn the
#   training images worse too. Shortcuts between the wide maps do as well, 92.0%, undecided (-0.3,
#   -3.1 to 2.5); in figure 6b, on ImageNet, they are about a point behind.
# - `multipliers` (digits, three seeds): half the width 80.0%, half the side 46.2%: the claim holds,
#   by 33.9 points (10.3 to 57.5). Digits of 4 pixels are hardly digits.
# - `quantize` (digits, six seeds): float32 97.82%; 8 bits 97.91% per channel, 97.82% per tensor;
#   7-bit activations 97.49%, torch's kernels 97.82%; 4-bit weights 96.80% and 95.26%. That 8 bits
#   cost at most half a point holds (+0.09, 98.3% interval -0.39 to 0.58). What a scale per channel
#   gains is undecided, with 8 bits (+0.09, -0.34 to 0.53) and with 4 (+1.53, -0.85 to 3.92): the
#   task is easy. On ImageNet V1's 70.9% fall to 59.1% with it, 0.1% without (Krishnamoorthi 2018).
#
# ## Exercises
#
# `python -m common.starter 05 --out DIR` makes a copy of this file without the parts that you write
# and says how to mark it. In order of difficulty:
#
# - **5.1** `DepthwiseSeparable`. By how much is it cheaper than a full convolution if both have 5x5
#   kernels, 64 channels in and 128 out? Build the three `ConvBN` and check with `count_macs`.
# - **5.2** `SqueezeExcitation`. What share of V3-small's parameters is it, with 1000 classes?
# - **5.4** `quantize` and `dequantize`. How far is $s\,(q - z)$ from $x$ if nothing is clamped?
# - **5.3** `InvertedResidual`. For which strides and channels has it a shortcut?
# - Further: fold a BatchNorm by hand. What does V1 gain by `quantize` (`--model mobilenet_v1`)?

# %%
if __name__ == "__main__":
    main(config, MODELS, build, run, EXPERIMENTS)
