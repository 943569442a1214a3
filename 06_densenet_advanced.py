"""Lesson 6, advanced: DenseNet, where every layer reads what all layers before it found.

Huang, Liu, van der Maaten and Weinberger, "Densely Connected Convolutional Networks", 2017
(arXiv 1608.06993).

The idea in one sentence: let every layer read the feature maps of all layers before it, and each
needs to add only a few of its own.

    python 06_densenet_advanced.py                             # trains: digits, on a GPU CIFAR-10
    python 06_densenet_advanced.py --experiment reuse          # who reads whom: figure 5
    python 06_densenet_advanced.py --experiment growth-rate    # few maps per layer, or many?
    python 06_densenet_advanced.py --experiment gradient-flow  # what the short paths are good for
    python 06_densenet_advanced.py --model densenet121 --checkpointing   # less memory

Measured on digits (8 px, 10 epochs, seeds 0 to 2, torch 2.15, float32 on two cores of an Intel
Xeon): densenet40_k12 tests at 99.72%, 99.72% and 99.16%, 28 s of training. Experiments: at the end.
"""

# %% [markdown]
# **You will** write the dense layer, the dense block and the transition, and test what short paths
# and few maps per layer give. **You need** lessons 1 and 2: the shortcut, BatchNorm. **Time**: 35
# minutes to read, 1 to run, 23 for the experiments, about 2 hours for the exercises.
#
# <details><summary>1. How many channels does layer 5 of a block read, with C channels in and growth
# rate k?</summary>C + 4 k: the input and what four layers added.</details>
# <details><summary>2. Why does BatchNorm stand before the convolution, and not behind it?</summary>
# The same map is read by many layers; each gives it a scale of its own.</details>
# <details><summary>3. What is the 1x1 convolution of a bottleneck good for here?</summary>The 3x3
# then reads 4 k channels, however many the list has.</details>
# <details><summary>4. Where does DenseNet throw something away?</summary>In the transitions: four
# pixels become their mean, and with compression 0.5 half as many channels come out.</details>
# <details><summary>5. Why does backward need so much memory?</summary>Each layer's input is a fresh
# copy of all maps before it: about L^2/2 copies in a block of L layers.</details>

# %% [markdown]
# ## The problem, and the one equation
#
# A ResNet adds: a block's output goes into the sum of all outputs before it, and a later block that
# needs one of them must separate it from the rest. DenseNet appends. Layer $l$ reads the list of
# all maps before it and puts $k$ new maps at its end:
#
# $$x_l = H_l([x_0, x_1, \dots, x_{l-1}])$$
#
# $L$ layers have $L(L+1)/2$ connections instead of $L$, and yet few parameters: a layer that can
# read everything need not repeat anything, so that $k = 12$ maps, the growth rate, are enough.
# From every layer it is also one step to the end of the block, and one step back for the gradient.
#
#     x0 ─┬────────────┬────────────┬──────────── x0 ┐
#         └─ H1 ── x1 ─┼────────────┼──────────── x1 │ the block's output:
#                      └─ H2 ── x2 ─┼──────────── x2 │ all of them, side by side
#                                   └─ H3 ─────── x3 ┘

# %%
from common.cli import main, parse_flags
from common.config import TrainConfig, knob

from dataclasses import dataclass, replace

LESSON = "06_densenet_advanced"


@dataclass(frozen=True)
class Config(TrainConfig):
    """What this lesson can be told; every field is a flag, and `--help` prints them all."""

    model: str = knob("densenet40_k12", "a name of MODELS: densenet_bc100_k12, densenet121, ...")
    growth_rate: int | None = knob(None, "new channels per layer (default: its own)", (), 1, 512)
    dropout: float = knob(0.0, "of new values; the paper: 0.2, --augment none", low=0, high=0.95)
    checkpointing: bool = knob(False, "recompute concatenations in backward: less memory")
    # What differs from the defaults of common/config.py; the record was measured with these.
    RECIPES = {"digits": {"image_size": 8, "epochs": 10, "batch_size": 64, "base_lr": 0.2}}


# Flags are read before torch is imported, so that --help answers at once.
config = parse_flags(Config) if __name__ == "__main__" else Config()

# %%
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import plotting
from common.classifier import Classifier  # nn.Module; head[-1] is the last layer, replaceable
from common.data import Data, load_data
from common.engine.device import memory_format
from common.engine.errors import UserError
from common.evaluation import evaluate
from common.experiments import Arm, Claim, Experiment, Results, Trial, run_experiment, train_trial
from common.live import digits, live, show
from common.pretrained import load_pretrained, weights_mean_std
from common.profiling import count_parameters, profile
from common.runs import Run, banner, draw_figures, prepare
from common.training import fit, make_optimizer, make_schedule, train_one_epoch

# %% [markdown]
# ## The dense layer: read everything, write a little


# %%
class DenseLayer(nn.Module):
    """From all earlier feature maps, `growth_rate` new ones.  Huang et al. 2017, sec. 3.
    [(N, C_0, H, W), (N, C_1, H, W), ...] -> (N, growth_rate, H, W), in_channels = C_0 + C_1 + ...

    BatchNorm, ReLU and a 3x3 convolution, in this order: the same map is read by many layers, and
    each gives it a scale of its own. With `bottleneck` (the "B" of DenseNet-B) a 1x1 convolution
    comes first and narrows the input to 4 * growth_rate channels: every 3x3 costs the same.

    Args:
        dropout: probability of zeroing a new value in training (sec. 4.2).  NOTE: the paper also
            has dropout behind the 1x1 convolutions; torchvision has it here alone.
        checkpointing: keep only the earlier maps, and compute what was made of them once more in
            backward, as explained after the net.  Pleiss et al. 2017.

    >>> earlier = [torch.zeros(2, 24, 8, 8), torch.zeros(2, 12, 8, 8)]
    >>> DenseLayer(24 + 12, growth_rate=12)(earlier).shape
    torch.Size([2, 12, 8, 8])
    """

    def __init__(self, in_channels: int, growth_rate: int, bottleneck: bool = True,
                 dropout: float = 0.0, checkpointing: bool = False) -> None:  # fmt: skip
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
            x = recomputed_in_backward(self, features)
        else:
            x = self.read(*features)
        if self.bottleneck:
            x = self.conv2(F.relu(self.norm2(x)))  # (N, growth_rate, H, W)
        return self.dropout(x)


# %% [markdown]
# By hand: with growth rate 12, the layer that reads 36 channels has $36 \cdot 48$ weights in its
# 1x1, $48 \cdot 12 \cdot 9$ in its 3x3, and two numbers for each channel of its two norms:
# 1,728 + 5,184 + 72 + 96 = 7,080. **Say it first**: how many without the bottleneck?

# %%
if live():
    print(count_parameters(DenseLayer(36, 12)), count_parameters(DenseLayer(36, 12, False)))

# %% [markdown]
# ## The dense block: the list only grows


# %%
class DenseBlock(nn.Module):
    """`depth` dense layers; each reads the input and all layers before it.  Huang et al., eq. 2.
    (N, C, H, W) -> (N, C + depth * growth_rate, H, W), of which the first C are the input.

    Args:
        dense: False makes a chain, for the experiment on gradients: each layer reads only the one
            before it, and the block's output is that of the last, (N, growth_rate, H, W).
        **layer_options: of each layer: `bottleneck`, `dropout`, `checkpointing`.

    >>> x = torch.randn(2, 24, 8, 8)
    >>> y = DenseBlock(24, depth=3, growth_rate=12)(x)
    >>> y.shape, torch.equal(y[:, :24], x)
    (torch.Size([2, 60, 8, 8]), True)
    """

    def __init__(self, in_channels: int, depth: int, growth_rate: int, dense: bool = True,
                 **layer_options: bool | float) -> None:  # fmt: skip
        super().__init__()
        self.channels = [in_channels]  # of the maps in the list that `forward` grows
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
# **Say it first**: a block of four layers with growth rate 12 reads 24 channels. How many does each
# layer read, and how many come out? What is in the first 24 of them?

# %%
if live():
    net, x = DenseBlock(24, depth=4, growth_rate=12), torch.randn(1, 24, 8, 8)
    print([layer.norm1.num_features for layer in net.layers], net(x).shape)
    print(torch.equal(net(x)[:, :24], x))

# %% [markdown]
# ## The transition: the only place that forgets


# %%
class Transition(nn.Sequential):
    """Between two blocks: mix the channels, halve the resolution.  Huang et al. 2017, sec. 3.
    (N, C_in, H, W) -> (N, C_out, H/2, W/2)

    Only maps of equal size can be concatenated, so a block can't halve them inside. The "C" of
    DenseNet-C is compression: C_out is less than C_in.
    NOTE: the paper's text names BatchNorm, the 1x1 convolution and the pooling; the authors' code
    has a ReLU after the norm, as everywhere else, and so have torchvision and this lesson.

    >>> Transition(60, 30)(torch.zeros(1, 60, 8, 8)).shape
    torch.Size([1, 30, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        mix = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        super().__init__(nn.BatchNorm2d(in_channels), nn.ReLU(), mix, nn.AvgPool2d(2))


# %% [markdown]
# **Say it first**: the first block of DenseNet-121 ends with 256 channels of 56x56 pixels. Which
# shape comes out of a transition that makes half as many channels?

# %%
if live():
    print(Transition(256, 128)(torch.zeros(1, 256, 56, 56)).shape)

# %% [markdown]
# ## The paper's table as data
#
# The number in a name counts layers with weights: the stem, two for each dense layer (1x1 and 3x3),
# one for each transition, the classifier. $121 = 1 + 2 \cdot (6 + 12 + 24 + 16) + 3 + 1$.


# %%
class Row(NamedTuple):
    """One column of table 1: layers per dense block, and the channels that each layer adds."""

    depths: tuple[int, int, int, int]
    growth_rate: int


TABLE: dict[str, Row] = {
    # Huang et al. 2017, table 1; the wide DenseNet-161 is from the authors' code.
    "densenet121": Row((6, 12, 24, 16), 32),
    "densenet161": Row((6, 12, 36, 24), 48),
    "densenet169": Row((6, 12, 32, 32), 32),
    "densenet201": Row((6, 12, 48, 32), 32),
}

# %% [markdown]
# ## The model: stem, stages, head


# %%
class DenseNet(Classifier):
    """(N, 3, H, W) -> (N, num_classes).  Huang et al. 2017, table 1.

    Args:
        depths: layers in each dense block.
        compression: a transition's channels out over its channels in, the paper's theta.
        stem_channels: width of the stem; twice the growth rate where None.
        small_input: the stem of the paper's CIFAR nets, a bare 3x3 convolution, for images of up to
            64 pixels.  NOTE: in the paper DenseNet-121 to -201 have no such form.
    """

    def __init__(self, depths: tuple[int, ...], growth_rate: int, bottleneck: bool = True,
                 compression: float = 0.5, stem_channels: int | None = None, dense: bool = True,
                 dropout: float = 0.0, checkpointing: bool = False, num_classes: int = 1000,
                 small_input: bool = False) -> None:  # fmt: skip
        super().__init__()
        channels = stem_channels or 2 * growth_rate
        if small_input:  # no norm here: each layer that reads the stem brings its own
            stem = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
        else:
            stem = [nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)]
            stem += [nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
        self.stem = nn.Sequential(*stem)

        options = {"bottleneck": bottleneck, "dropout": dropout, "checkpointing": checkpointing}
        stages = []
        for i, depth in enumerate(depths):
            stage = nn.Sequential()
            if i > 0:
                stage.append(Transition(channels, int(channels * compression)))
                channels = int(channels * compression)
            stage.append(DenseBlock(channels, depth, growth_rate, dense, **options))
            channels = stage[-1].out_channels
            stages.append(stage)
        self.stages = nn.Sequential(*stages)
        last, pool = [nn.BatchNorm2d(channels), nn.ReLU()], nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential(*last, pool, nn.Flatten(), nn.Linear(channels, num_classes))
        self.init_weights()

    def init_weights(self) -> None:
        """He initialisation (He et al. 2015, "Delving deep"): keeps the variance through ReLUs."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, H/32, W/32), not normalised. Small: H/8, of three blocks H/4."""
        return self.stages(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


def densenet(name: str, **options: float | bool) -> DenseNet:
    """The model of one row of the table; options are those of DenseNet, `growth_rate` too."""
    return DenseNet(**{**TABLE[name]._asdict(), **options})


def cifar_densenet(depth: int, growth_rate: int = 12, bottleneck: bool = False,
                   compression: float = 1.0, small_input: bool = True,
                   **options: float | bool) -> DenseNet:  # fmt: skip
    """The nets of sections 3 and 4.3: three dense blocks of equal depth on 32x32 images.

    depth = 3n + 4 for n layers per block, 6n + 4 with bottlenecks: the stem, two transitions and
    the classifier are the 4. They have one form, whatever `small_input` says.

    >>> count_parameters(cifar_densenet(100, bottleneck=True, compression=0.5, num_classes=10))
    769162
    """
    step = 6 if bottleneck else 3
    n, rest = divmod(depth - 4, step)
    if rest or n < 1:
        raise ValueError(f"a CIFAR DenseNet has depth {step}n + 4, not {depth}")
    stem = 2 * growth_rate if bottleneck and compression < 1 else 16  # DenseNet-BC, and the others
    options = {"stem_channels": stem, "small_input": True, **options}
    return DenseNet((n, n, n), growth_rate, bottleneck, compression, **options)


MODELS: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(densenet, name) for name in TABLE},
    # Huang et al. 2017, table 2
    "densenet40_k12": partial(cifar_densenet, 40),
    "densenet_bc100_k12": partial(cifar_densenet, 100, bottleneck=True, compression=0.5),
}

# %% [markdown]
# **Say it first**: a digit goes through DenseNet-40: a stem of 16 channels, three blocks of 12
# layers with growth rate 12, no compression. Which shape comes out of each block?

# %%
if live():
    net, x = MODELS["densenet40_k12"](num_classes=10), digits(1)
    x = net.stem(x)
    for stage in net.stages:
        x = stage(x)
        print(tuple(x.shape))

# %% [markdown]
# ## Recompute, but count once: gradient checkpointing beside BatchNorm
#
# Backward needs each convolution's input. For layer $l$ of a block that is a fresh copy of all $l$
# outputs before it, normalised: $L$ layers keep about $L^2/2$ copies of $L$ outputs. Checkpointing
# throws the copies away, and makes them again when backward needs them. `DenseLayer` does so with
# `--checkpointing`. It stops as soon as it has the input of `conv1`: concatenation and norm run
# twice, but no convolution does.
#
# Computing twice must not count twice. A BatchNorm in training mode does two things: it normalises
# by the batch, which the second pass needs, and it moves its running averages, which the first pass
# has done. So the second pass holds them still.


# %%
@contextmanager
def statistics_held(norm: nn.BatchNorm2d) -> Iterator[None]:
    """Inside, a BatchNorm normalises by its batch as always, and learns nothing from it.

    >>> norm = nn.BatchNorm2d(3)
    >>> with statistics_held(norm):
    ...     y = norm(torch.randn(8, 3, 4, 4) + 5)
    >>> norm.running_mean, int(norm.num_batches_tracked)
    (tensor([0., 0., 0.]), 0)
    """
    before = norm.momentum, norm.num_batches_tracked
    # running = (1 - momentum) * running + momentum * batch; and no counter, nothing to count.
    norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        norm.momentum, norm.num_batches_tracked = before


@torch.compiler.disable  # the compiler can't trace our context: this call runs without it
def recomputed_in_backward(layer: DenseLayer, features: list[Tensor]) -> Tensor:
    """`layer.read(*features)`, of which only `features` are kept: backward computes it again."""
    return checkpoint(
        layer.read, *features, use_reentrant=False,
        # One context for the first time, one for the second.
        context_fn=lambda: (nullcontext(), statistics_held(layer.norm1)),
        preserve_rng_state=False,  # nothing in it is random
    )  # fmt: skip


# %%
# Say it first: forward and backward run this norm twice. How many batches has it counted?
if live():
    layer, x = DenseLayer(24, 12, checkpointing=True), torch.randn(2, 24, 8, 8, requires_grad=True)
    layer([x]).sum().backward()
    print(layer.norm1.num_batches_tracked)

# %% [markdown]
# ## One run, from data to report


# %%
def build(config: Config, num_classes: int) -> DenseNet:
    """The model that the flags ask for."""
    options = {name: getattr(config, name) for name in ("small_input", "dropout", "checkpointing")}
    if config.growth_rate:
        options["growth_rate"] = config.growth_rate
    return MODELS[config.model](num_classes=num_classes, **options)


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
# `fit` repeats the loop of lesson 1 once an epoch. **Say it first**: `--checkpointing` changes no
# line of it. In which line is something recomputed?

# %%
if live():
    show(train_one_epoch)

# %% [markdown]
# ## Experiment: who reads whom?
#
# Every layer may read every earlier one. Does it? The paper's figure 5 answers from the weights of
# the trained net alone: the mean absolute weight with which layer $l$ reads the maps of layer $s$.
# Weight decay pulls what is of no use to zero; what is still large is read. NOTE: here each column
# is divided by its mean: at 1 a source is read as much as the average one. Untrained: 0.8 to 1.2.
#
# The paper makes four remarks. Layers spread their weights over many sources in their block. So do
# the transitions. Blocks behind a transition read its output least. The classifier leans on the
# newest maps. Beforehand: a source is read if it has half of the average weight. Means up to 0.05
# away from the average don't count: those of an untrained net are up to 0.04 away.


# %%
def connection_weights(model: DenseNet) -> list[list[Tensor]]:
    """The paper's figure 5: for each dense block who reads whom.

    A block has a column for each reader: layers 1, 2, ..., and last the transition or the
    classifier behind it. A column has a row for each source: the block's input, layer 1, 2, ...; an
    entry is the mean absolute weight of that source, over the mean of the column.

    >>> [[len(column) for column in block] for block in connection_weights(cifar_densenet(10))]
    [[1, 2, 3], [1, 2, 3], [1, 2, 3]]
    """
    blocks = []
    # Behind a block: the convolution of the next stage's transition, or the classifier.
    behind = [stage[0][2] for stage in model.stages[1:]] + [model.get_classifier()]
    for stage, last_reader in zip(model.stages, behind):
        columns = []
        for i, reader in enumerate([*(layer.conv1 for layer in stage[-1].layers), last_reader], 1):
            sources = reader.weight.detach().abs().split(stage[-1].channels[:i], dim=1)
            column = torch.stack([source.mean() for source in sources])
            columns.append(column / column.mean())
        blocks.append(columns)
    return blocks


def forgetting_weight_decay(config: Config, steps: int, left: float = 0.05) -> float:
    """The weight decay that leaves, of a weight that the loss does not renew, `left` at the end.

    Decay w at learning rates lr_t and momentum m shrinks it by exp(-w * sum(lr_t) / (1 - m)), and a
    schedule that rises and falls has a mean of about half its peak.
    """
    momentum = 0 if config.optimizer == "adamw" else config.momentum  # AdamW's decay has none
    return math.log(1 / left) * (1 - momentum) / (config.lr / 2 * steps)


def remarks(model: DenseNet) -> dict[str, float]:
    """The paper's four remarks on figure 5 as means over entries of the columns."""
    blocks = connection_weights(model)
    newest = blocks[-1][-1][-max(1, len(blocks[-1]) // 3) :]  # a third, by the classifier
    inputs = [column[0] for block in blocks[1:] for column in block[1:-1]]
    layers = [column.min() for block in blocks for column in block[1:-1]]
    transitions = [block[-1].min() for block in blocks[:-1]]
    return {
        "least read by layers": torch.stack(layers).mean().item(),
        "least read by transitions": torch.stack(transitions).mean().item(),
        "transition's output, below average": 1 - torch.stack(inputs).mean().item(),
        "classifier, newest above average": newest.mean().item() - 1,
    }


def reuse(config: Config) -> Experiment:
    """Figure 5 of the paper, and its four remarks."""
    made, net, weights = partial(build, config), config.model, "weights by block and reader"

    def forget(arm: Arm, data: Data, config: Config, device: torch.device) -> Trial:
        # NOTE: the paper trains for 300 epochs with a decay of 1e-4, in which the initial weights
        # are forgotten. A run of seconds has to forget faster to show anything but its start.
        steps = config.epochs * len(data.train) // data.train.accumulate
        decay, name = forgetting_weight_decay(config, steps), f"{net}, seed {config.seed}"
        if decay > 100:
            raise UserError("--experiment reuse: too few steps to forget: try a larger --lr")
        config = replace(config, weight_decay=decay)
        return train_trial(name, partial(made, data.num_classes), data, config, device)

    def after(trial: Trial, data: Data) -> dict[str, object]:
        read = [[column.tolist() for column in b] for b in connection_weights(trial.model)]
        return {**remarks(trial.model), weights: read}

    layers, transitions, below, above = remarks(made(10))
    claims = [
        Claim("layers read even the least read source", net, 0.5, layers),
        Claim("transitions read even the least read source", net, 0.5, transitions),
        Claim("blocks read the transition's output less than their own maps", net, 0, below, 0.05),
        Claim("the classifier leans on the newest maps", net, 0, above, 0.05),
    ]

    def draw(results: Results) -> object:  # of the first seed, block by block
        return plotting.readers(results.values(net, weights)[0])

    arms = [Arm(net, made, train=forget)]
    return Experiment("Who reads whom", arms, claims, after=after, figure=draw)


# %% [markdown]
# ## Experiment: how many maps should a layer add?
#
# A larger $k$ makes every layer wider. The cost grows with the square of $k$ and of the depth. So
# there are two comparisons: at equal depth, where a larger $k$ costs more, and at equal cost, where
# a net of larger $k$ must be shallower. The measure is the training loss, since on digits all of
# these nets test near 99%; 0.01 is a difference that matters.
#
# **Say it first**: at equal cost, do you expect narrow and deep ahead, or wide and shallow?


# %%
# Layers at which each growth rate costs what 12 costs with 22: found by count, to within 8%.
EQUAL_COST = {6: 40, 12: 22, 24: 13}


def growth_rates(config: Config) -> Experiment:
    """Growth rates 6, 12 and 24: at the depth of 22 layers, and at the cost of k = 12."""
    nets = {f"k {k}, 22 layers": (k, 22) for k in EQUAL_COST}
    nets |= {f"k {k}, {depth} layers": (k, depth) for k, depth in EQUAL_COST.items()}
    narrow, _, wide, narrow_deep, wide_shallow = nets
    # Many nets, each several times: six tenths of the recipe's length.
    shorter = {"epochs": max(1, round(0.6 * config.epochs))}
    arms = [Arm(name, partial(cifar_densenet, d, k), shorter) for name, (k, d) in nets.items()]
    claims = [
        Claim("at equal depth four times the maps train better", narrow, wide, "train_loss", 0.01),
        Claim("at equal cost wide trains better", narrow_deep, wide_shallow, "train_loss", 0.01),
        Claim("at equal cost narrow trains better", wide_shallow, narrow_deep, "train_loss", 0.01),
    ]
    return Experiment("Growth rate: at equal depth, and at equal cost", arms, claims, seeds=6)


# %% [markdown]
# ## Experiment: what are the short paths good for?
#
# In a chain of layers the gradient goes back through all of them, one after the other, and each
# multiplies it. In a dense block every layer is also one step from the end. Cut the long
# connections, give the chain the same number of parameters (it becomes wider), and ask each layer:
# by which share of itself would one step of gradient descent move its weights? Unevenness is the
# share of the most moved layer over that of the least moved, as a power of ten. Half a power of ten
# is a difference that matters, and half a point of accuracy.
#
# **Say it first**: are the chain's layers near the image moved most, or those near the loss?


# %%
# Channels of the chain that has, at so many layers, at most the dense net's parameters; to 3%.
CHAIN_WIDTH = {10: 26, 40: 56}


def gradient_profile(model: DenseNet, x: Tensor, y: Tensor) -> list[float]:
    """Of each dense layer's first convolution: norm of the gradient over norm of the weights."""
    F.cross_entropy(model.train()(x), y).backward()
    weights = [m.conv1.weight for m in model.modules() if isinstance(m, DenseLayer)]
    return [(w.grad.norm() / w.detach().norm()).item() for w in weights]


def gradient_flow(config: Config) -> Experiment:
    """Dense connections against a chain of as many parameters, at 10 and at 40 layers."""
    arms = []
    for depth, width in CHAIN_WIDTH.items():
        arms.append(Arm(f"dense-{depth}", partial(cifar_densenet, depth, 12)))
        arms.append(Arm(f"chain-{depth}", partial(cifar_densenet, depth, width, dense=False)))
    uneven = "unevenness at the start, power of ten"

    def before(model: nn.Module, data: Data) -> dict[str, object]:
        moved = gradient_profile(model, *next(iter(data.train.batches())))
        at_start = math.log10(max(moved) / min(moved))
        return {uneven: at_start, "gradient / weights by layer, at the start": moved}

    dense, chain = ("dense-40", "dense-10"), ("chain-40", "chain-10")
    claims = [
        Claim("the chain's gradient is the more uneven", chain[0], dense[0], uneven, 0.5),
        Claim("depth adds more unevenness to the chain's", *chain, uneven, 0.5, beyond=dense),
        Claim("the dense net tests better", dense[0], chain[0], margin=0.005),
    ]
    heading = "The gradient with dense connections, and in a chain"
    return Experiment(heading, arms, claims, before=before)


EXPERIMENTS: dict[str, Callable[[Config], object]] = {
    "reuse": partial(run_experiment, LESSON, reuse),
    "growth-rate": partial(run_experiment, LESSON, growth_rates),
    "gradient-flow": partial(run_experiment, LESSON, gradient_flow),
}

# %% [markdown]
# ## What to notice
#
# - The chain of 40 layers has 1.7 times the dense net's multiply-adds. Compare the seconds of both:
#   concatenation multiplies nothing, but copies every map for every layer that reads it.
# - DenseNet-121 has 8.0 million parameters and ResNet-50 25.6 million, at 74.4% and 76.1% on
#   ImageNet, but 2.8 billion multiply-adds against 4.1: it saves parameters more than time.
# - `activations.png`: channels are numbered. In stage 1 those below 16 are the stem's, unchanged.
# - `--checkpointing`, peak of one training step without the weights: densenet40_k12, 64 images of
#   32 px, 274 MB instead of 1,175; densenet121, 4 images of 224 px, 254 MB instead of 501.
#
# What the experiments gave at their defaults (digits, seeds 0 to 2, one thread of an AMD EPYC with
# other work beside it, torch 2.14):
#
#     reuse           the least read source of a layer has 0.93 of the average weight, that of a
#                     transition 0.80: both claims hold. The transition's output is read 0.07 below
#                     the average (97.5% interval 0.01 to 0.13), the newest maps by the classifier
#                     0.06 above it (-0.02 to 0.13): both claims are undecided; 310 s
#     gradient-flow   at 40 layers the most moved layer of the chain moves 230 times as much as the
#                     least moved one, that of the dense net twice as much; test 55.7% (± 5.4) and
#                     99.4% (± 0.4). All three claims hold; 823 s
#     growth-rate     (six seeds) training loss at 22 layers 0.065 with k = 6, 0.040 with 12, 0.026
#                     with 24: four times the maps train better, by 0.040 (98.3% interval 0.031 to
#                     0.049), holds. At equal cost k = 24 with 13 layers has 0.040, k = 6 with 40
#                     layers 0.035: that wide trains better fails (-0.005, -0.012 to 0.002), that
#                     narrow does is undecided (0.005, -0.001 to 0.011); 229 s
#
# In the chain the gradient does not vanish on its way back: from layer to layer it grows, until no
# learning rate suits both the first layers and the last. BatchNorm divides by the deviation of each
# batch, forward and backward; lesson 1's plain nets show the same. As for reuse: the two claims
# that hold ask for half of the average weight (an untrained net has 0.97). The undecided ones are
# about 22 and 4 of 273 entries, with effects near the margin. The paper saw them after 300 epochs,
# not after 10. Growth is worth its cost: at equal cost, deep and wide differ by 0.005 in loss.
#
# ## Exercises
#
# `python -m common.starter 06 --out DIR` makes a copy of this file without the parts that you write
# and says how to mark it. In order of difficulty:
#
# - **6.3** The transition. **6.1** The dense layer. **6.2** The dense block: how many channels does
#   its layer $l$ read?
# - **6.4** The whole net. Which share of DenseNet-40's parameters does the last layer of each block
#   hold, and what does the bottleneck change?
# - Remove `context_fn` from `recomputed_in_backward` and train with `--checkpointing`. Which
#   numbers change: the training loss, the validation loss, or both? Why?
# - A BatchNorm scales each map before a convolution reads it. Multiply the weights in
#   `connection_weights` by the absolute scale of `norm1`. Does figure 5 change?
# - The paper's dropout is 0.2, after each convolution but the first, where images are not augmented
#   (`--augment none --dropout 0.2`). Does it help here?

# %%
if __name__ == "__main__":
    main(config, MODELS, build, run, EXPERIMENTS)
