"""Lesson 1, beginner: ResNet, learning the difference.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2015 (arXiv 1512.03385).
The idea in one sentence: let a block of layers learn what to add to its input instead of its whole
output, and a network of a hundred layers can be trained.

    python 01_resnet_beginner.py                               # trains: digits, on a GPU CIFAR-10
    python 01_resnet_beginner.py --experiment skip-connections # the paper's claim, measured
    python 01_resnet_beginner.py --model resnet50 --summary    # what is inside

Measured on an AMD EPYC, torch 2.14: resnet20 on digits (8 px, 18 epochs, seeds 0 to 2, one thread)
tests at 99.16, 98.89 and 98.89%, 13 s of training; resnet9 on CIFAR-10 (JPEG copy, seeds 0 and 1,
two threads; command: common/resnet9.py) at 90.34 and 90.49%, 1,351 s. Experiments: at the end.
"""

# %% [markdown]
# **You will** write a residual block, build the networks of the papers from it, and test the claim.
# **You need** to know what a linear layer and a gradient are. **Time**: 30 minutes to read, 2 to
# run, 3 for the experiment, about 2 hours for the exercises.
#
# <details><summary>1. Why should a deeper net never do worse on the training images?</summary>
# Its extra layers could copy their input.</details>
# <details><summary>2. What does a residual block compute when its branch gives 0?</summary>Its
# input, with 0 for what is negative; a plain block computes 0.</details>
# <details><summary>3. What is the shortcut where the shape changes?</summary>Every second pixel and
# channels of zeros (A), or a 1x1 convolution (B).</details>
# <details><summary>4. Why has ResNet-50 bottlenecks and ResNet-34 none?</summary>Two 3x3 at four
# times the width would have 17 times the weights.</details>
# <details><summary>5. Hard to train, or overfitted: what tells?</summary>Training loss.</details>

# %% [markdown]
# ## The problem, and the one equation
# If the extra layers of a deeper network copied their input, it would compute what the shallower
# one does. So it should never do worse on the training images. Yet 56 plain layers ended with more
# training errors than 20 (figure 1): copying is hard to learn. ResNet makes it the default:
#
# $$y = x + F(x) \qquad \partial y / \partial x = 1 + F'(x)$$
#
# With $F = 0$ the output is the input, but for the last ReLU. By the 1 the gradient passes as it
# is. What is added to it could cancel it, but hardly does: $F'$ would have to be -1.
#
#     x ──────────────┬── conv ── BN ── ReLU ── conv ── BN ──(+)── ReLU ── y
#                     └──────────── shortcut ─────────────────┘
#
#     image ─ stem ─ [block block] ─ [block block] ─ [block block] ─ [block block] ─ head
#                       C, H, W       2C, H/2, W/2    4C, H/4, W/4    8C, H/8, W/8
#
# A 3x3 convolution (conv) is a linear layer over 3x3 pixels of all C channels, the same at each of
# H x W places; stride 2 skips every second place. BatchNorm (BN) gives a channel mean 0, deviation
# 1 over a batch of N images, then a scale and a shift that are learned. ReLU is max(x, 0).

# %%
from common.cli import main, parse_flags
from common.config import TrainConfig, knob
from dataclasses import dataclass

LESSON = "01_resnet_beginner"


@dataclass(frozen=True)
class Config(TrainConfig):
    """What this lesson can be told; every field is a flag, and `--help` prints them all."""

    model: str = knob("resnet20", "a name of MODELS: resnet18, resnext50_32x4d, resnet9, ...")
    shortcut: str = knob("", "A pads, B projects, C always does (sec. 4.1)", ("A", "B", "C", ""),
                         without=("plainnet", "resnet9"))  # fmt: skip
    zero_init_residual: bool = knob(True, "start each residual branch at zero")
    deep: int = knob(5, "blocks per stage of the deeper nets", (), 4, 200, only="skip-connections")
    RECIPES = {"digits": {"image_size": 8, "epochs": 18, "batch_size": 64, "base_lr": 0.2}}


# Flags are read before torch is imported, so that --help answers at once.
config = parse_flags(Config) if __name__ == "__main__" else Config()

# %%
from collections.abc import Callable
from functools import partial
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from common.classifier import Classifier  # nn.Module; head[-1] is the last layer, replaceable
from common.data import Data, load_data
from common.engine.device import memory_format
from common.evaluation import evaluate
from common.experiments import Arm, Claim, Experiment, run_experiment
from common.live import digits, live, show
from common.pretrained import load_pretrained, weights_mean_std
from common.profiling import count_parameters, profile
from common.resnet9 import RESNET9, bag_of_tricks
from common.runs import Run, banner, draw_figures, prepare
from common.training import Aids, fit, make_optimizer, make_schedule, measure_layers
from common.training import train_one_epoch

# %% [markdown]
# ## The basic block and its shortcut: learn the difference, add it to the input
# Where a block keeps the shape the shortcut is the identity. Where it halves the resolution and has
# more channels, the input no longer fits. **A** takes every second pixel and appends channels of
# zeros. **B** projects: a 1x1 convolution, a linear layer at each pixel. **C** projects in every
# block, a little better in table 3 but costly, so on ImageNet the paper goes on with B.


# %%
class PadShortcut(nn.Module):
    """Option A: every `stride`-th pixel, missing channels filled with zeros.  He et al., sec. 3.3.
    (N, C_in, H, W) -> (N, C_out, H/stride, W/stride)
    >>> PadShortcut(16, 32, stride=2)(torch.ones(1, 16, 8, 8)).shape
    torch.Size([1, 32, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels, self.stride = out_channels - in_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        # F.pad lists (before, after) from the last dimension backwards: width, height, channels.
        return F.pad(x, (0, 0, 0, 0, 0, self.extra_channels))


def make_shortcut(option: str, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """What the option puts beside a block: identity, padding or projection."""
    if option not in ("A", "B", "C"):
        raise ValueError(f"shortcut is 'A' (pad), 'B' or 'C' (project), not {option!r}")
    if stride == 1 and in_channels == out_channels and option != "C":
        return nn.Identity()
    if option == "A":
        return PadShortcut(in_channels, out_channels, stride)
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


# %%
# Say it first: 16 channels become 32. How many parameters has B? What does A leave of a digit?
if live():
    print(count_parameters(make_shortcut("B", 16, 32, stride=2)))  # 16 * 32 + 2 * 32
    show(digits(4), PadShortcut(3, 3, stride=2)(digits(4)))


# %%
class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.  He et al. 2015, fig. 5 left.  `se` (2018) is optional.
    (N, C_in, H, W) -> (N, channels, H/stride, W/stride)
    >>> BasicBlock(64, 128, stride=2)(torch.zeros(1, 64, 8, 8)).shape
    torch.Size([1, 128, 4, 4])
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1, shortcut: str = "B",
                 se_reduction: int = 0) -> None:  # fmt: skip
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.se = SqueezeExcitation(channels, se_reduction) if se_reduction else nn.Identity()
        self.shortcut = make_shortcut(shortcut, in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)))  # (N, channels, H/stride, W/stride)
        residual = self.se(self.bn2(self.conv2(residual)))
        return F.relu(residual + self.shortcut(x))


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate in (0, 1) computed from all channels' means.  Hu et al. 2018,
    sec. 3.  (N, C, H, W) -> (N, C, H, W).  NOTE: equation 3 has no biases, torchvision has them.
    >>> SqueezeExcitation(64)(torch.zeros(1, 64, 8, 8)).shape
    torch.Size([1, 64, 8, 8])
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // reduction, 1)
        self.excite = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean(dim=(2, 3), keepdim=True)  # (N, C, 1, 1): a 1x1 convolution is linear here
        gate = F.relu(self.squeeze(gate))  # (N, C/reduction, 1, 1)
        gate = torch.sigmoid(self.excite(gate))  # (N, C, 1, 1): 1 / (1 + exp(-x))
        return x * gate


# %%
# By hand, at 64 channels: a 3x3 has 9 * 64 * 64 = 36,864 weights, a BatchNorm 128; twice: 73,984.
# Say it first: the scale of the last BatchNorm is 0. Which picture comes out of digits from -1
# (black) to 1 (white)? By what does a gate multiply whose weights and biases are all 0?
if live():
    block, gate = BasicBlock(3, 3), SqueezeExcitation(3, reduction=1)
    for parameter in (block.bn2.weight, *gate.parameters()):
        nn.init.zeros_(parameter)
    show(digits(4), block(digits(4)))
    print(count_parameters(BasicBlock(64, 64)), (gate(digits(1)) / digits(1)).unique())

# %% [markdown]
# ## The bottleneck: squeeze, convolve, expand
# From 50 layers on, a 1x1 leaves a quarter of the channels to one 3x3, and a second 1x1 widens them
# again. `groups` gives the 3x3 parallel paths (ResNeXt), `base_width` more channels (Wide ResNet).


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

    def __init__(self, in_channels: int, channels: int, stride: int = 1, shortcut: str = "B",
                 se_reduction: int = 0, groups: int = 1, base_width: int = 64) -> None:  # fmt: skip
        super().__init__()
        width, out_channels = channels * base_width // 64 * groups, self.expansion * channels
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


# %%
# Say it first: at 256 channels, how many times as many parameters has the basic block: 2, 17, 100?
if live():
    print(count_parameters(BasicBlock(256, 256)), count_parameters(Bottleneck(256, 64)))

# %% [markdown]
# ## Two relatives: no shortcut, and a shortcut without anything on it
# The block of 2015 ends in a ReLU, which cuts off what is negative, and its gradient. That of 2016
# ends in the sum: each block gets the gradient of the stage's end whole, plus what branches add.


# %%
class PlainBlock(BasicBlock):
    """The basic block without its shortcut, shapes as there.  He et al. 2015, fig. 3 middle."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1, **unused: str) -> None:
        super().__init__(in_channels, channels, stride, "A")  # which has no parameters

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class PreActBlock(BasicBlock):
    """BatchNorm and ReLU before each convolution, none after the sum.  He et al. 2016, fig. 4(e).
    NOTE: in the figure both paths start from x. Where the shape changes the shortcut starts from
    the activated input here, as in the authors' code.  Shapes as in the basic block.
    >>> PreActBlock(64, 128, stride=2)(torch.zeros(1, 64, 8, 8)).shape
    torch.Size([1, 128, 4, 4])
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1,
                 shortcut: str = "B") -> None:  # fmt: skip
        super().__init__(in_channels, channels, stride, shortcut)
        self.bn1 = nn.BatchNorm2d(in_channels)  # it reads the input now

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        residual = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        same = isinstance(self.shortcut, nn.Identity)
        return residual + (x if same else self.shortcut(activated))


# %%
# Say it first: the last convolution is 0. What does each block leave of digits: all, half, nothing?
if live():
    for block in (PlainBlock(3, 3), BasicBlock(3, 3), PreActBlock(3, 3)):
        nn.init.zeros_(block.conv2.weight)
        show(block(digits(4)))

# %% [markdown]
# ## The papers' tables as data, and the model: stem, stages, head
# A stem quarters the resolution, stages 2 to 4 halve it and double the channels, the head averages.


# %%
class ResNet(Classifier):
    """(N, 3, H, W) -> (N, num_classes).  He et al. 2015, table 1.  Each stage repeats `block`; its
    options are `block_options`.  NOTE: two options are younger than the table. `small_input`, for
    up to 64 pixels, has a 3x3 stem of stride 1 and no max-pool, as in the CIFAR literature. With
    `zero_init_residual` each block starts as the identity (Goyal et al. 2017, sec. 5.1).
    """

    def __init__(self, block: type[nn.Module], depths: tuple[int, ...],
                 channels: tuple[int, ...] = (64, 128, 256, 512), stem_channels: int = 64,
                 num_classes: int = 1000, small_input: bool = False,
                 zero_init_residual: bool = True, **block_options: int | str) -> None:  # fmt: skip
        super().__init__()
        size, stride = (3, 1) if small_input else (7, 2)
        stem = [nn.Conv2d(3, stem_channels, size, stride, padding=size // 2, bias=False)]
        preact = block is PreActBlock  # its blocks bring their own BatchNorm and ReLU
        stem += [] if preact else [nn.BatchNorm2d(stem_channels), nn.ReLU()]
        stem += [] if small_input else [nn.MaxPool2d(3, stride=2, padding=1)]
        self.stem = nn.Sequential(*stem)
        self.stages, in_channels = nn.Sequential(), stem_channels
        for i, (depth, width) in enumerate(zip(depths, channels)):
            self.stages.append(nn.Sequential())
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                self.stages[i].append(block(in_channels, width, stride, **block_options))
                in_channels = width * block.expansion
        last = [nn.BatchNorm2d(in_channels), nn.ReLU()] if preact else []
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.head = nn.Sequential(*last, *pool, nn.Linear(in_channels, num_classes))
        self.init_weights(zero_init_residual)

    def init_weights(self, zero_init_residual: bool) -> None:
        """He et al. 2015, "Delving deep": fan_out keeps the variance of gradients on their way."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            # A plain block has no shortcut to fall back on; PreActBlock ends in a convolution.
            elif zero_init_residual and type(module) in (BasicBlock, Bottleneck):
                nn.init.zeros_((module.bn2 if type(module) is BasicBlock else module.bn3).weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, H/32, W/32), the last feature map; H/8 if small, CIFAR's H/4."""
        return self.stages(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


def cifar_resnet(depth: int, block: type[nn.Module] = BasicBlock, **options: int | str) -> ResNet:
    """The nets of section 4.2: depth = 6n + 2, three stages of n blocks, 16, 32 and 64 wide, with
    option A if none is told. They have one form, whatever `small_input` says.
    >>> sum(p.numel() for p in cifar_resnet(20, num_classes=10).parameters())
    269722
    """
    n, rest = divmod(depth - 2, 6)
    if rest or n < 1:
        raise ValueError(f"a CIFAR ResNet has depth 6n + 2 (8, 14, 20, ...), not {depth}")
    options = {"shortcut": "A", **options, "small_input": True}
    return ResNet(block, (n, n, n), (16, 32, 64), stem_channels=16, **options)


Row = tuple[type[nn.Module], tuple[int, ...], dict[str, int | str]]
TABLE: dict[str, Row] = {  # the block, how many of it each stage has, what it is told
    # He et al. 2015, table 1; resnet34 takes a quarter of VGG-16's multiply-adds (at 224 px)
    "resnet18": (BasicBlock, (2, 2, 2, 2), {}), "resnet34": (BasicBlock, (3, 4, 6, 3), {}),
    "resnet50": (Bottleneck, (3, 4, 6, 3), {}), "resnet101": (Bottleneck, (3, 4, 23, 3), {}),
    "resnet152": (Bottleneck, (3, 8, 36, 3), {}),
    # Zagoruyko 2016; Xie et al. 2017, table 1 (32x8d: torchvision); Hu et al. 2018, table 1
    "wide_resnet50_2": (Bottleneck, (3, 4, 6, 3), {"base_width": 128}),
    "resnext50_32x4d": (Bottleneck, (3, 4, 6, 3), {"groups": 32, "base_width": 4}),
    "resnext101_32x8d": (Bottleneck, (3, 4, 23, 3), {"groups": 32, "base_width": 8}),
    "se_resnet50": (Bottleneck, (3, 4, 6, 3), {"se_reduction": 16}),
    "se_resnet18": (BasicBlock, (2, 2, 2, 2), {"se_reduction": 16}),  # not in the paper
    "preact_resnet18": (PreActBlock, (2, 2, 2, 2), {}),  # the block of He et al. 2016
    "plainnet18": (PlainBlock, (2, 2, 2, 2), {}), "plainnet34": (PlainBlock, (3, 4, 6, 3), {}),
}  # fmt: skip
MODELS: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(ResNet, block, n, **options) for name, (block, n, options) in TABLE.items()},
    **{f"resnet{depth}": partial(cifar_resnet, depth) for depth in (20, 32, 44, 56, 110)},
    **RESNET9,  # resnet9, _narrow and _wide, which learn CIFAR-10 on a laptop: common/resnet9.py
}

# %%
# Say it first: which are the 18 layers with weights on ResNet-18's longest way? How many has row
# `resnet50`? Which shape has a picture of 32 pixels after the stem and after each of four stages?
if live():
    net, x = MODELS["resnet18"](num_classes=10, small_input=True), digits(1, size=32)
    for part in (net.stem, *net.stages):
        x = part(x)
        print(tuple(x.shape))
    print(1 + 2 * (2 + 2 + 2 + 2) + 1, 1 + 3 * (3 + 4 + 6 + 3) + 1)  # stem, blocks, classifier

# %% [markdown]
# ## One run, from data to report
# `fit` repeats `train_one_epoch` (forward, loss, backward, step) and validates. `autocast` computes
# in 16 bits where that is faster; float16's loss is enlarged, `unscale_` undoes it; more: `Aids`.
# NOTE: the rate falls along a cosine, not in steps; decay on small images is 0.0005, not 0.0001.


# %%
def build(config: Config, num_classes: int) -> nn.Module:
    """The model that the flags ask for."""
    options = {} if config.model in RESNET9 else {"zero_init_residual": config.zero_init_residual}
    options |= {"shortcut": config.shortcut} if config.shortcut else {}
    return MODELS[config.model](num_classes=num_classes, small_input=config.small_input, **options)


def run(config: Config) -> dict[str, object]:
    """Train, test once with the best epoch's weights, draw, profile, save."""
    config, device = prepare(config)
    # Trained weights bring the mean and deviation that they were trained with.
    data = load_data(config, device, weights_mean_std(config.model) if config.pretrained else None)
    model = build(config, data.num_classes)
    model = model.to(device, memory_format=memory_format(config.image_size))
    if config.pretrained:
        load_pretrained(model, config.model, data.class_names)
    else:
        measure_layers(model, data)  # the filters of ResNet-9's stem

    loss_fn = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, data.train)
    run = Run.open(config, LESSON)
    banner(config, device, data, model, run)
    history = fit(model, data, loss_fn, optimizer, schedule, config, run)

    test = evaluate(model, data.test, data.class_names)  # the only look at the test images
    draw_figures(run, model, data, history, test)
    return run.finish(model, data, history, test, cost=profile(model, data.input_size))


# %%
# Say it first: the loss, cross-entropy, is -log(p), where p is the probability that the net gives
# to the right class. Which loss has a net that only guesses, among ten classes?
if live():
    show(train_one_epoch, Aids)
    print(torch.log(torch.tensor(10.0)))

# %% [markdown]
# ## Experiment: does the shortcut do it?
# Nets of three kinds and two depths, with the same parameters but for a few norms, the same seeds
# and recipe. All train here; the question is how well. Beforehand: 0.05 in training loss matters
# (a guess has 2.30), and one point in accuracy (four of 359 images). The figure also shows each
# layer's gradient. **Say it first**: is the plain net's too small in the first layer, or too large?

# %%
FAMILIES = {"plain": PlainBlock, "residual": BasicBlock, "pre-activation": PreActBlock}


def gradients(model: nn.Module, data: Data) -> list[float]:
    """Norm of the gradient of each convolution, from the image on, for one batch."""
    x, y = next(iter(data.train.batches()))
    F.cross_entropy(model.train()(x), y).backward()
    return [m.weight.grad.norm().item() for m in model.modules() if isinstance(m, nn.Conv2d)]


def skip_connections(config: Config) -> Experiment:
    """Figures 1 and 6 of the paper at the size of the dataset, in two thirds of the epochs."""
    shorter = {"epochs": max(1, config.epochs * 2 // 3)}
    net = partial(cifar_resnet, zero_init_residual=False)  # True would help one family only
    arms, deep = [], 6 * config.deep + 2
    for family, block in FAMILIES.items():
        for depth in (20, deep):
            arms.append(Arm(f"{family}-{depth}", partial(net, depth, block), shorter))
    plain, residual = (f"plain-{deep}", "plain-20"), (f"residual-{deep}", "residual-20")
    more = "depth harms the plain net more than the residual net"
    claims = [
        Claim("depth harms the plain net in training", *plain, "train_loss", margin=0.05),
        Claim(more, *plain, "train_loss", margin=0.05, beyond=residual),
        Claim("of the deep nets the residual one tests better", residual[0], plain[0], margin=0.01),
    ]
    return Experiment(
        "Skip connections at equal depth", arms, claims,
        before=lambda model, data: {"gradient by layer, at the start": gradients(model, data)},
        after=lambda trial, data: {"gradient by layer, at the end": gradients(trial.model, data)},
    )  # fmt: skip


EXPERIMENTS: dict[str, Callable[[Config], object]] = {
    "skip-connections": partial(run_experiment, LESSON, skip_connections),
    "bag-of-tricks": partial(run_experiment, LESSON, bag_of_tricks),
}

# %% [markdown]
# ## What to notice
# `most_wrong.png` shows digits that people get wrong too, `grad_cam.png` where the net looked.
#
# **What `skip-connections` gave** on digits (8 px, seeds 0 to 2, torch 2.14, one thread of an AMD
# EPYC; mean and deviation over seeds): all three claims hold. They hold on CIFAR-10 too (JPEG copy,
# 16 px, four epochs, the same seeds): training loss plain 1.19 and 1.46, residual 0.98 and 0.98,
# test at 32 layers 48.6% and 66.8%. What `bag-of-tricks` gave: the head of `common/resnet9.py`.
#
#     loss on the training images    20 layers         32 layers         test, 32 layers
#     plain                          0.080 ± 0.021     0.558 ± 0.085     88.3%
#     residual                       0.026 ± 0.007     0.038 ± 0.007     98.5%
#     pre-activation                 0.037 ± 0.005     0.045 ± 0.007     98.3%
# The plain net's gradient does not vanish. Before the first step it *grows* towards the image, from
# 0.4 to 29, 1.15 times a layer. After a ReLU part of the signal is alike in all images. BatchNorm
# removes it and divides the rest, and so the gradient, by its deviation, below 1 (Yang et al. 2019:
# 1.21 in wide nets). A shortcut brings most past the block: 1.06. Trained, the plain net has the
# largest: 0.2 to 0.8. He et al. (sec. 4.1) saw none vanish and suppose exponentially slow learning.
#
# ## Exercises
# `python -m common.starter 01 --out DIR` makes a copy without the solutions. The easiest first:
# - **1.1** Option A. Why does ResNet-20 lose 2,752 parameters by it? **1.2** The three options.
# - **1.4** `BasicBlock`: what if bn2 gives 0? **1.3** Its `se`: which share of `se_resnet18` is it?
# - **1.5** `Bottleneck`. How many multiply-adds has it at 256 channels, how many two 3x3?
# - **1.6** The pre-activation block. **1.7** The whole net: stem, stages, head.
# - Repeat the experiment at 56 layers (`--deep 9`) and at 110 (18). Do the plain nets still train?

# %%
if __name__ == "__main__":
    main(config, MODELS, build, run, EXPERIMENTS)
