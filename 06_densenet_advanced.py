"""Lesson 6, advanced: DenseNet, where nothing that was found is found twice.

Huang, Liu, van der Maaten and Weinberger, "Densely Connected Convolutional Networks", 2017
(arXiv 1608.06993).

The idea in one sentence: let every layer read the feature maps of all layers before it, and each
needs to add only a few of its own.

    python 06_densenet_advanced.py                             # trains: digits, on a GPU CIFAR-10
    python 06_densenet_advanced.py --experiment reuse          # who reads whom: figure 5
    python 06_densenet_advanced.py --experiment growth-rate    # few maps per layer, or many?
    python 06_densenet_advanced.py --experiment gradient-flow  # what the short paths are good for
    python 06_densenet_advanced.py --model densenet121 --checkpointing   # less memory

Measured on digits (8 px, 10 epochs, seed 0, torch 2.15, float32 on two cores of an Intel Xeon):

    default, densenet40_k12     test 99.72%, 28 s of training
    reuse                       99.72%; on average the least read source of a layer has 0.89 of the
                                average weight; blocks 2 and 3 read their input 0.11 and 0.07 below
                                the average; 34 s
    growth-rate, 6 epochs, two  final training loss for k = 6, 12, 24: 0.060, 0.033, 0.019 at equal
    seeds                       depth, 0.034, 0.033, 0.035 at equal cost; test 99.0% to 99.4%; 82 s
    gradient-flow, 40 layers    most moved over least moved layer, untrained: dense 2.1, chain 221;
                                test after training: dense 99.72%, chain 88.02%; 59 s
    --checkpointing             peak of one training step without the weights: densenet40_k12, 64
                                images of 32 px, 274 MB instead of 1,175; densenet121, 4 images of
                                224 px, 254 MB instead of 501
"""

# %% [markdown]
# ## The problem, and the one equation
#
# A ResNet adds: what a layer found is mixed into what all layers before it had found, and a later
# layer that needs the old part must take the sum apart again. DenseNet appends. Layer $l$ reads the
# list of all that was found before it and puts $k$ new maps at its end:
#
# $$x_l = H_l([x_0, x_1, \dots, x_{l-1}])$$
#
# $L$ layers have $L(L+1)/2$ connections instead of $L$, and yet few parameters: a layer that can
# read everything need not repeat anything, so that $k = 12$ maps, the growth rate, are enough.
# Every layer also stands one step from the end of its block, and so does its gradient.
#
#     x0 ─┬────────────┬────────────┬──────────── x0 ┐
#         └─ H1 ── x1 ─┼────────────┼──────────── x1 │ the block's output:
#                      └─ H2 ── x2 ─┼──────────── x2 │ all of them, side by side
#                                   └─ H3 ─────── x3 ┘

# %%
from common.cli import in_notebook, main, parse_flags
from common.config import TrainConfig, knob

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Config(TrainConfig):
    """What this lesson can be told; every field is a flag, and `--help` prints them all."""

    model: str = knob(
        "densenet40_k12", "a name of MODELS: densenet40_k12, densenet_bc100_k12, densenet121, ..."
    )
    growth_rate: int | None = knob(
        None, "new channels per layer, the paper's k (default: the model's)", low=1, high=512
    )
    dropout: float = knob(
        0.0,
        "share of new values zeroed in training; the paper's is 0.2 without --augment",
        low=0,
        high=0.95,
    )
    checkpointing: bool = knob(
        False, "recompute concatenations in backward: less memory, the same numbers"
    )
    rates: str = knob(
        "6,12,24", "growth rates that --experiment growth-rate compares", low=1, high=512
    )
    depth: int = knob(
        22, "layers of the nets that --experiment growth-rate compares", low=7, high=1000
    )
    depths: str = knob(
        "10,22,40", "layers of the nets that --experiment gradient-flow compares", low=7, high=1000
    )
    seeds: int = knob(2, "runs of each net that --experiment growth-rate averages", low=1, high=100)

    # What differs from the defaults of common/config.py; the record at the top was measured with
    # these.
    RECIPES = {"digits": {"image_size": 8, "epochs": 10, "batch_size": 64, "base_lr": 0.2}}


# Flags are read before torch is imported, so that --help answers at once; a notebook gets the
# defaults.
config = parse_flags(Config) if __name__ == "__main__" else Config()

# %%
import inspect
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
from common.engine.device import memory_format, set_up_torch
from common.data import load_data
from common.engine.errors import UserError
from common.evaluation import evaluate
from common.experiments import Trial, conclude, mean_and_spread, train_trial
from common.pretrained import load_pretrained, weights_mean_std
from common.profiling import count_macs, count_parameters, profile
from common.runs import Run, banner, draw_figures, prepare
from common.training import fit, make_optimizer, make_schedule, train_one_epoch

LESSON = "06_densenet_advanced"

# %% [markdown]
# ## Recompute, but count once: gradient checkpointing beside BatchNorm
#
# Backward needs each convolution's input. For layer $l$ of a dense block that input is a fresh copy
# of all $l$ maps before it, so that a block of $L$ layers keeps about $L^2/2$ copies although it
# only ever made $L$ maps. Checkpointing throws the copies away and makes them again when backward
# asks.
#
# Computing twice must not count twice. A BatchNorm in training mode does two things in its forward
# pass: it normalises by the batch, which the recomputation needs, and it moves its running
# statistics, which has already happened. The second pass therefore holds the statistics still.


# %%
@contextmanager
def running_statistics_held(module: nn.Module) -> Iterator[None]:
    """Inside, each BatchNorm of `module` normalises by its batch as always, and learns nothing from
    it.

    >>> norm = nn.BatchNorm2d(3)
    >>> with running_statistics_held(norm):
    ...     y = norm(torch.randn(8, 3, 4, 4) + 5)
    >>> norm.running_mean, int(norm.num_batches_tracked)
    (tensor([0., 0., 0.]), 0)
    """
    norms = [m for m in module.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # running = (1 - momentum) * running + momentum * batch; and no counter, nothing to count.
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, num_batches_tracked) in zip(norms, saved):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked


@torch.compiler.disable  # the compiler accepts no context of ours; it steps aside for this call
def recomputed_in_backward(
    function: Callable[..., Tensor], module: nn.Module, *inputs: Tensor
) -> Tensor:
    """`function(*inputs)`, of which only the inputs are kept: backward computes the rest again.

    Args:
        module: whose BatchNorms `function` runs through.
    """
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        # One context for the first time, one for the second.
        context_fn=lambda: (nullcontext(), running_statistics_held(module)),
        preserve_rng_state=False,  # for functions in which nothing is random
    )


# %% [markdown]
# ## The dense layer: read everything, write a little


# %%
class DenseLayer(nn.Module):
    """From all earlier feature maps, `growth_rate` new ones.  Huang et al. 2017, sec. 3, "composite
    function".

    [(N, C_0, H, W), (N, C_1, H, W), ...] -> (N, growth_rate, H, W), in_channels = C_0 + C_1 + ...

    BatchNorm, ReLU and a 3x3 convolution, in this order: the same map is read by many layers, and
    each gives it a scale of its own. With `bottleneck` (the "B" of DenseNet-B) a 1x1 convolution
    comes first and narrows the wide input to 4 * growth_rate channels, so that the 3x3 costs the
    same however deep the layer sits.

    Args:
        dropout: probability of zeroing a new value in training; 0.2 in the paper where images are
            not augmented.
        checkpointing: keep only the earlier maps for backward, and concatenate and normalise them
            again there.  Pleiss et al. 2017, "Memory-efficient implementation of DenseNets".

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
            # The recomputation stops as soon as backward has what it needs. The last thing it needs
            # is the input of conv1: concatenation and norm run twice, but no convolution does.
            x = recomputed_in_backward(self.read, self, *features)
        else:
            x = self.read(*features)
        if self.bottleneck:
            x = self.conv2(F.relu(self.norm2(x)))  # (N, growth_rate, H, W)
        return self.dropout(x)


# %% [markdown]
# ## The dense block: the list only grows


# %%
class DenseBlock(nn.Module):
    """`depth` dense layers, each fed with the outputs of all before it.  Huang et al. 2017, fig. 1
    and eq. 2.

    (N, C, H, W) -> (N, C + depth * growth_rate, H, W)

    Nothing is ever overwritten: the input itself is the first part of the output.

    Args:
        dense: False cuts all connections but those between neighbours, for the experiment on
            gradients: each layer reads the preceding one alone, and the last layer's output is the
            block's, (N, C, H, W) -> (N, growth_rate, H, W).
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
        # Of the maps in the list that `forward` grows: the block's input, then each layer's output.
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
    """Between two blocks: mix the channels, halve the resolution.  Huang et al. 2017, sec. 3,
    "pooling layers".

    (N, C_in, H, W) -> (N, C_out, H/2, W/2). Concatenation needs equal resolutions, so that a block
    can't halve inside. Out of C_in channels the "C" of DenseNet-C keeps C_in * compression.

    NOTE: the paper's text names BatchNorm, the 1x1 convolution and the pooling; the authors' code
    has a ReLU after the norm, as everywhere else, and so have torchvision and this lesson.

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
        compression: the share of channels that a transition keeps, the paper's theta; 1.0 keeps
            all, less than 1 makes a DenseNet-C.
        stem_channels: width of the stem; twice the growth rate where None.
        dense, dropout, checkpointing: see `DenseBlock` and `DenseLayer`.
        small_input: the stem of the paper's CIFAR nets, a bare 3x3 convolution, for images of 32
            pixels and less.  NOTE: DenseNet-121 to -201 have no such form in the paper; they keep
            their four blocks.
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
        """(N, 3, H, W) -> (N, C, h, w), the last block's output before its norm: 1/32 of the
        input's resolution; small, 1/8 after four blocks and 1/4 after three.
        """
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
# The number in a name counts layers with weights: the stem, two for each dense layer (1x1 and 3x3),
# one for each transition, the classifier. $121 = 1 + 2 \cdot (6 + 12 + 24 + 16) + 3 + 1$.


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
    `checkpointing`. With a `growth_rate` of its own a net keeps its depth and changes its width.
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

    depth = 3n + 4 for n layers per block, 6n + 4 with bottlenecks: the stem, two transitions and
    the classifier are the 4. The stem is 16 channels wide, twice the growth rate in DenseNet-BC.
    Their one form is the 32x32 form, whatever `small_input` says.

    >>> bc100 = cifar_densenet(100, bottleneck=True, compression=0.5, num_classes=10)
    >>> sum(p.numel() for p in bc100.parameters())
    769162
    """
    convolutions = 2 if bottleneck else 1
    n, rest = divmod(depth - 4, 3 * convolutions)
    if rest or n < 1:
        step = 3 * convolutions
        raise ValueError(f"a CIFAR DenseNet has depth {step}n + 4, not {depth}")
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


# %% [markdown]
# ## The first experiment: who reads whom?
#
# Every layer may read every earlier one. Does it, or do the old maps lie there unread? The paper's
# figure 5 answers from the weights of the trained net alone: the mean absolute weight with which
# layer $l$ reads the maps of layer $s$. Weight decay pulls what is of no use to zero; what is still
# large is read.
#
# Each column below is divided by its mean: 1 is a source that the layer uses as much as its average
# one. An untrained net gives 1 everywhere, up to the luck of its draw: that is the control.


# %%
def connection_weights(model: DenseNet) -> list[Tensor]:
    """The paper's figure 5: for each dense block a table of who reads whom.

    Row s is a source: the block's input (0), or the block's layer s. Column l is a reader: the
    block's layer l + 1, and last the transition or the classifier behind the block. An entry is the
    mean absolute weight from s to l over the mean of its column; NaN where nothing can be read yet.

    >>> [tuple(table.shape) for table in connection_weights(cifar_densenet(10))]
    [(3, 3), (3, 3), (3, 3)]
    """
    tables = []
    # Behind a block: the convolution of the next stage's transition, or the classifier.
    behind = [stage[0][2] for stage in model.stages[1:]] + [model.get_classifier()]
    for stage, last_reader in zip(model.stages, behind):
        block = stage[-1]
        readers = [layer.conv1 for layer in block.layers] + [last_reader]
        table = torch.full((len(readers), len(readers)), math.nan)
        for column, reader in enumerate(readers):
            sources = reader.weight.detach().abs().split(block.channels[: column + 1], dim=1)
            table[: column + 1, column] = torch.stack([source.mean() for source in sources])
        tables.append(table / table.nanmean(dim=0))
    return tables


def dense_weights(model: DenseNet) -> Tensor:
    """The weights of all dense layers in one row."""
    layers = [m for m in model.modules() if isinstance(m, DenseLayer)]
    return torch.cat([layer.conv1.weight.detach().flatten() for layer in layers])


def forgetting_weight_decay(config: Config, steps: int, left: float = 0.05) -> float:
    """The weight decay after which, at the end of training, `left` of the initial weights is left.

    Decay w at learning rates lr_t and momentum m shrinks what the loss does not renew by
    exp(-w * sum(lr_t) / (1 - m)), and a schedule that rises and falls has a mean of about half its
    peak.
    """
    return math.log(1 / left) * (1 - config.momentum) / (config.lr / 2 * steps)


def reuse(config: Config) -> dict[str, object]:
    """Figure 5 of the paper: which earlier layers each layer reads; prints a verdict, draws a
    figure.
    """
    chosen_decay = config.weight_decay
    config, device = prepare(config)
    data = load_data(config, device)
    if chosen_decay is None:
        # NOTE: the paper trains for 300 epochs with a decay of 1e-4, in which the initial weights
        # are long forgotten. A run of seconds has to forget faster to show anything but its start.
        steps = config.epochs * len(data.train) // config.accumulate
        config = replace(config, weight_decay=forgetting_weight_decay(config, steps))
        print(f"recipe     weight decay {config.weight_decay:.2g}, to forget the initial weights")
    run = Run.open(config, LESSON)

    make = partial(build, config, data.num_classes)
    set_up_torch(device, config.seed, config.deterministic)
    start = dense_weights(make())  # what the trial, which takes the same seed, begins with
    trial = train_trial(config.model, make, data, config, device)
    kept = F.cosine_similarity(start, dense_weights(trial.model).cpu(), dim=0).item()
    trained = connection_weights(trial.model)

    weights = torch.cat([table[table.isfinite()] for table in trained])
    heading = f"Who reads whom in {config.model}: mean absolute weight, 1 = the reader's average"
    figure, axes = plotting.panels(len(trained), heading)
    for i, (table, ax) in enumerate(zip(trained, axes)):
        last = "T" if i + 1 < len(trained) else "C"
        name = "transition" if last == "T" else "classifier"
        plotting.heatmap(
            table.numpy(),
            ["input", *map(str, range(1, len(table)))],
            [*map(str, range(1, len(table))), last],
            f"Block {i + 1}",
            xlabel=f"reading layer ({last}: the {name})",
            ylabel="layer whose maps are read",
            fmt="{:.2f}",
            limits=(weights.min().item(), weights.max().item()),
            ax=ax,
        )
    run.figure("reuse", figure)
    habits = [reading_habits(table) for table in trained]
    chance = luck_of_the_draw(make)
    rows = [
        {"block": f"block {i + 1}", **{habit: f"{x:.2f}" for habit, x in h.items()}}
        for i, h in enumerate(habits)
    ]
    rows.append({"block": "untrained", **{habit: f"1 ± {x:.2f}" for habit, x in chance.items()}})
    verdict = reuse_verdict(habits, chance, kept)
    tables = [[t[: i + 1, i].tolist() for i in range(len(t))] for t in trained]  # without the NaN
    return conclude(run, rows, verdict, weights_by_reader=tables)


def reading_habits(table: Tensor) -> dict[str, float]:
    """The paper's four remarks on figure 5 as means over entries of one table; 1 is the average."""
    third = max(1, len(table) // 3)
    return {
        "the least read": float(table.nan_to_num(math.inf).amin(dim=0)[1:].mean()),
        "oldest layers, by the last": float(table[1 : 1 + third, -1 - third : -1].mean()),
        "the block's input": float(table[0, 1:].mean()),
        "newest layers, behind": float(table[-third:, -1].mean()),
    }


def luck_of_the_draw(build: Callable[[], DenseNet], draws: int = 10) -> dict[str, float]:
    """The control: the most by which the same figures miss 1 in nets that nobody trained."""
    seen = [reading_habits(t) for _ in range(draws) for t in connection_weights(build())]
    return {habit: max(abs(h[habit] - 1) for h in seen) for habit in seen[0]}


def reuse_verdict(
    habits: list[dict[str, float]], chance: dict[str, float], kept: float
) -> list[str]:
    """The remarks of the paper's section 5, put to the numbers.

    Args:
        kept: cosine between the weights before and after training.
    """
    least = min(h["the least read"] for h in habits)
    oldest = min(h["oldest layers, by the last"] for h in habits)
    verdict = [
        f"training turned the weights to a cosine of {kept:.2f} with those drawn at the start: "
        + ("the figure shows mostly the draw, train longer" if kept > 0.5 else "the draw is gone"),
        f"layers {'spread' if least > 0.5 else 'do not spread'} their weights over all that they "
        f"can read: on average the least read source still has {least:.2f} of the average weight",
        f"the last layers of a block {'still read' if oldest > 0.5 else 'hardly read'} its first "
        f"ones: {oldest:.2f} of the average weight",
    ]
    claims = {
        "blocks behind a transition read its output less than their own maps": [
            1 - h["the block's input"] for h in habits[1:]
        ],
        "the classifier leans on the newest maps": [habits[-1]["newest layers, behind"] - 1],
    }
    for (claim, effects), habit in zip(
        claims.items(), ("the block's input", "newest layers, behind")
    ):
        if all(e > chance[habit] for e in effects):
            word = "yes"
        elif all(e < -chance[habit] for e in effects):
            word = "no, the opposite"
        else:
            word = "not beyond chance in every block"
        figures = " and ".join(f"{e:+.2f}" for e in effects)
        verdict.append(f"{claim}: {word} ({figures}; chance ±{chance[habit]:.2f})")
    return verdict


# %% [markdown]
# ## The second experiment: how many maps should a layer add?
#
# The growth rate buys width, and its price is steep: cost grows with the square of $k$ and of the
# depth. So there are two fair races: at equal depth, where a larger $k$ costs more, and at equal
# multiply-adds, where a larger $k$ must be shallower.


# %%
def equal_cost_depth(growth_rate: int, macs: int, input_size: tuple[int, int, int]) -> int:
    """Depth of the CIFAR DenseNet of this growth rate that costs closest to `macs`."""

    def cost(depth: int) -> int:
        with torch.device("meta"):
            return count_macs(cifar_densenet(depth, growth_rate, num_classes=10), input_size)

    depth = 7
    while cost(depth) < macs:
        depth += 3
    return min(depth, max(7, depth - 3), key=lambda d: abs(cost(d) - macs))


def growth_rates(config: Config) -> dict[str, object]:
    """Narrow and deep against wide and shallow; prints a verdict, draws a figure."""
    rates = whole_numbers(config.rates, "--rates")
    check_depths([config.depth], "--depth")
    chosen_epochs = config.epochs
    config, device = prepare(config)
    if chosen_epochs is None:  # many nets, each several times: six tenths of the recipe's length
        config = replace(config, epochs=max(1, round(0.6 * config.epochs)))
    data = load_data(config, device)
    run = Run.open(config, LESSON)

    middle = rates[len(rates) // 2]
    with torch.device("meta"):
        net = cifar_densenet(config.depth, middle, num_classes=data.num_classes)
    macs = count_macs(net, data.input_size)
    races = {
        "equal depth": [(k, config.depth) for k in rates],
        "equal cost": [(k, equal_cost_depth(k, macs, data.input_size)) for k in rates],
    }
    trials: dict[tuple[int, int], list[Trial]] = {}
    for k, depth in dict.fromkeys(races["equal depth"] + races["equal cost"]):
        trials[k, depth] = [
            train_trial(
                f"k {k}, {depth} layers, seed {seed}",
                partial(cifar_densenet, depth, k, num_classes=data.num_classes),
                data,
                replace(config, seed=seed),
                device,
            )
            for seed in range(config.seed, config.seed + config.seeds)
        ]

    figure, axes = plotting.panels(3, "Growth rate: at equal depth, and at equal cost")
    for (race, nets), ax in zip(races.items(), axes):
        losses = {
            f"k {k}, {depth} layers": [[r.train_loss for r in t.history] for t in trials[k, depth]]
            for k, depth in nets
        }
        title = f"Training loss at {race}"
        plotting.curves(losses, "epoch", "training loss", title, log_y=True, ax=ax)
    points = [
        (f"k {k}, {depth} layers", runs[0].macs / 1e6, mean_and_spread(final_losses(runs))[0])
        for (k, depth), runs in trials.items()
    ]
    plotting.scatter(
        points,
        "million multiply-adds an image",
        f"final training loss, mean of {config.seeds}",
        "What the cost buys",
        log_x=True,
        ax=axes[2],
    )
    run.figure("growth_rate", figure)

    rows = []
    for (k, depth), runs in trials.items():
        mean, spread = mean_and_spread([t.test_top1 for t in runs])
        rows.append(
            {
                "k": k,
                "layers": depth,
                "parameters": runs[0].params,
                "M MACs": round(runs[0].macs / 1e6, 2),
                "train loss": round(mean_and_spread(final_losses(runs))[0], 4),
                "test top-1": f"{mean:.2%}",
                "spread": f"{spread:.2%}",
                "seconds": round(sum(t.seconds for t in runs) / len(runs), 1),
            }
        )
    return conclude(run, rows, growth_verdict(trials, races, len(data.test.labels)))


def final_losses(runs: list[Trial]) -> list[float]:
    return [trial.history[-1].train_loss for trial in runs]


def growth_verdict(
    trials: dict[tuple[int, int], list[Trial]],
    races: dict[str, list[tuple[int, int]]],
    test_images: int,
) -> list[str]:
    """Who fits and who tests best in each race, and by more than chance or not."""

    def top1(net: tuple[int, int]) -> float:
        return mean_and_spread([t.test_top1 for t in trials[net]])[0]

    def name(net: tuple[int, int]) -> str:
        return f"k {net[0]} with {net[1]} layers"

    verdict = []
    for race, nets in races.items():
        losses = [mean_and_spread(final_losses(trials[net]))[0] for net in nets]
        best = nets[losses.index(min(losses))]
        if losses == sorted(losses, reverse=True):
            course = "falls as k grows"
        elif losses == sorted(losses):
            course = "rises as k grows"
        else:
            course = f"is lowest for {name(best)}"
        # Told apart only if the worst seed of the best net beats every seed of all others.
        others = [x for net in nets if net != best for x in final_losses(trials[net])]
        clear = max(final_losses(trials[best])) < min(others)
        verdict.append(
            f"at {race} the training loss {course}: {', '.join(f'{x:.4f}' for x in losses)}"
            + ("" if clear else "; the seeds of the best overlap with others")
        )
        first, *_, last = sorted(nets, key=top1, reverse=True)
        gap, p = top1(first) - top1(last), top1(first)
        # Two standard errors of a difference of two shares of so many test images.
        noise = 2 * math.sqrt(2 * p * (1 - p) / test_images)
        margin = f"by {gap:.2%}, chance alone gives up to {noise:.2%}"
        if gap > noise:
            verdict.append(f"at {race} {name(first)} tests best, {name(last)} worst, {margin}")
        else:
            verdict.append(
                f"at {race} no growth rate is ahead: {name(first)} leads {name(last)} {margin}"
            )
    narrow, wide = min(races["equal depth"]), max(races["equal depth"])
    times = trials[wide][0].macs / trials[narrow][0].macs
    verdict.append(
        f"from k {narrow[0]} to {wide[0]} at {wide[1]} layers the cost grows {times:.1f} times and "
        f"the test accuracy changes by {top1(wide) - top1(narrow):+.2%}"
    )
    return verdict


def whole_numbers(text: str, flag: str) -> list[int]:
    """The numbers of a flag such as "6,12,24", sorted.

    Raises:
        UserError: something else, or fewer than two.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(set(numbers)) < 2 or min(numbers) < 1:
        raise UserError(f"{flag} {text}: at least two whole numbers, such as 6,12,24")
    return sorted(set(numbers))


def check_depths(depths: list[int], flag: str) -> None:
    """Refuse, before anything is trained, a depth that three equal blocks can't have."""
    for depth in depths:
        if depth < 7 or depth % 3 != 1:
            raise UserError(f"{flag} {depth}: a CIFAR DenseNet has 3n + 4 layers (7, 10, 13, ...)")


# %% [markdown]
# ## The third experiment: what are the short paths good for?
#
# In a chain of layers the gradient of the first is a product of all Jacobians behind it. In a dense
# block every layer also stands one step from the end. Cut the long connections, give the chain the
# same number of parameters (it becomes wider), and ask each layer: by which share of itself would
# one step of gradient descent move its weights?


# %%
def plain_width(depth: int, growth_rate: int) -> int:
    """Channels per layer of the chain with at most the parameters of the dense net, and nearly as
    many.
    """

    def params(k: int, dense: bool) -> int:
        with torch.device("meta"):
            return count_parameters(cifar_densenet(depth, k, dense=dense, num_classes=10))

    limit, width = params(growth_rate, dense=True), growth_rate
    while params(width + 1, dense=False) <= limit:
        width += 1
    return width


def gradient_profile(model: DenseNet, x: Tensor, y: Tensor) -> list[float]:
    """For each dense layer, first to last: the norm of its first convolution's gradient over the
    norm of the weights themselves. Leaves weights and statistics as they were.
    """
    model.train().zero_grad(set_to_none=True)
    with running_statistics_held(model):
        F.cross_entropy(model(x), y).backward()
    weights = [m.conv1.weight for m in model.modules() if isinstance(m, DenseLayer)]
    moved = [(w.grad.norm() / w.detach().norm()).item() for w in weights]
    model.zero_grad(set_to_none=True)
    return moved


def unevenness(profile: list[float]) -> float:
    """The layer that would be moved most over the one that would be moved least."""
    return max(profile) / min(profile)


def gradient_flow(config: Config, draws: int = 3) -> dict[str, object]:
    """How evenly the gradient reaches the layers with dense connections and without; prints a
    verdict, draws a figure.
    """
    depths = whole_numbers(config.depths, "--depths")
    check_depths(depths, "--depths")
    config, device = prepare(config)
    data = load_data(config, device)
    run = Run.open(config, LESSON)
    k, deepest, classes = config.growth_rate or 12, depths[-1], data.num_classes
    nets = {
        (kind, depth): partial(cifar_densenet, depth, width, dense=dense, num_classes=classes)
        for depth in depths
        for kind, dense, width in (("dense", True, k), ("chain", False, plain_width(depth, k)))
    }

    x, y = next(iter(data.train.batches()))
    before: dict[tuple[str, int], list[list[float]]] = {net: [] for net in nets}
    for net, make in nets.items():
        for draw in range(draws):
            torch.manual_seed(config.seed + draw)
            before[net].append(gradient_profile(make().to(device), x, y))
    uneven = {net: [unevenness(profile) for profile in p] for net, p in before.items()}
    trials = {
        kind: train_trial(f"{kind}-{deepest}", nets[kind, deepest], data, config, device)
        for kind in ("dense", "chain")
    }
    after = {kind: gradient_profile(trial.model, x, y) for kind, trial in trials.items()}

    figure, (start, deeper, loss) = plotting.panels(
        3, "The gradient with dense connections, and in a chain"
    )
    plotting.curves(
        {kind: before[kind, deepest] for kind in trials},
        "layer",
        "gradient / weights",
        f"Before training, {deepest} layers",
        log_y=True,
        ax=start,
    )
    plotting.curves(
        {kind: list(zip(*(uneven[kind, d] for d in depths))) for kind in trials},
        "layers of the net",
        "most moved / least moved layer",
        "Unevenness before training",
        log_y=True,
        x=depths,
        ax=deeper,
    )
    losses = {kind: [r.train_loss for r in trial.history] for kind, trial in trials.items()}
    title = f"Training loss, {deepest} layers"
    plotting.curves(losses, "epoch", "training loss", title, log_y=True, ax=loss)
    run.figure("gradient_flow", figure)

    rows = [
        {
            **trial.row(),
            "uneven before": f"{mean_and_spread(uneven[kind, deepest])[0]:.1f}",
            "uneven after": f"{unevenness(after[kind]):.1f}",
        }
        for kind, trial in trials.items()
    ]
    profiles = {
        kind: [sum(layer) / draws for layer in zip(*before[kind, deepest])] for kind in trials
    }
    verdict = gradient_verdict(profiles, uneven, trials, depths)
    return conclude(run, rows, verdict, before=profiles, after=after)


def gradient_verdict(
    profiles: dict[str, list[float]],
    uneven: dict[tuple[str, int], list[float]],
    trials: dict[str, Trial],
    depths: list[int],
) -> list[str]:
    """What the numbers say of the paper's claim that dense connections let the gradient through."""
    shallow, deep = depths[0], depths[-1]
    verdict = []
    for kind in trials:
        ratio = profiles[kind][0] / profiles[kind][-1]
        grows = f"grows {ratio:.3g}-fold" if ratio > 1 else f"shrinks to {ratio:.2g} of itself"
        verdict.append(f"{kind}, {deep} layers, untrained: on its way back the gradient {grows}")
    for kind in trials:
        a, b = (mean_and_spread(uneven[kind, depth])[0] for depth in (shallow, deep))
        verdict.append(
            f"{kind}: from {shallow} to {deep} layers the most moved layer goes from {a:.3g} to "
            f"{b:.3g} times the least moved"
        )
    dense, chain = (uneven[kind, deep] for kind in ("dense", "chain"))
    if max(dense) < min(chain):
        verdict.append(
            "the claim holds here: in every draw dense connections even the gradient out"
        )
    elif min(dense) > max(chain):
        verdict.append("the claim fails here: in every draw the chain's gradient is the more even")
    else:
        verdict.append("the claim does not show here: the draws of the two overlap (more --depths)")
    loss = {kind: trial.history[-1].train_loss for kind, trial in trials.items()}
    better, worse = sorted(loss, key=loss.get)
    verdict.append(
        f"the {better} net trains better, to a loss of {loss[better]:.4f} against "
        f"{loss[worse]:.4f}, and tests at {trials[better].test_top1:.2%} against "
        f"{trials[worse].test_top1:.2%}"
    )
    return verdict


EXPERIMENTS: dict[str, Callable[[Config], object]] = {
    "reuse": reuse,
    "growth-rate": growth_rates,
    "gradient-flow": gradient_flow,
}

# %% [markdown]
# ## One run, from data to report
#
# Flat and explicit: this is the whole recipe. `fit` repeats `train_one_epoch`, whose source is in
# the last cell.


# %%
def build(config: Config, num_classes: int) -> DenseNet:
    """The model that the flags ask for."""
    if config.dropout >= 1:
        raise UserError(f"--dropout {config.dropout:g}: a share below 1, such as 0.2")
    options = {"growth_rate": config.growth_rate} if config.growth_rate else {}
    return MODELS[config.model](
        num_classes=num_classes,
        small_input=config.small_input,
        dropout=config.dropout,
        checkpointing=config.checkpointing,
        **options,
    )


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
# ## The loop itself
#
# Nothing is hidden behind `fit`: this is what runs for every batch.

# %%
if in_notebook():
    print(inspect.getsource(train_one_epoch))

# %% [markdown]
# ## What to notice
#
# - `reuse`: every layer reads everything, the first maps of a block still by its last layers. The
#   transitions' outputs are read least: these maps are redundant, which is why DenseNet-C may drop
#   half of them.
# - `growth-rate`: at equal cost the training loss hardly depends on k. Narrow and deep buys what
#   wide and shallow buys, with more layers to wait for: compare the seconds.
# - `gradient-flow`: BatchNorm has turned the old trouble round. In the chain the gradient does not
#   vanish on its way back, it grows with every layer, until no learning rate suits the first layers
#   and the last. Dense connections need no such luck.
# - The chain has more multiply-adds than the dense net. Compare their seconds all the same:
#   concatenation multiplies nothing, and yet moves every map again for every layer that reads it.
# - DenseNet-121 has 8.0 million parameters and ResNet-50 25.6 million, at 74.4% and 76.1% on
#   ImageNet, but 2.8 billion multiply-adds against 4.1: it saves parameters more than time.
# - `activations.png`: channels are numbered. In stage 1 those below 16 are the stem's, unchanged.
#
# ## Exercises
#
# 1. Write `DenseBlock` without looking. How many channels does its layer $l$ read?
# 2. Count the parameters of DenseNet-40 (k = 12) by hand. Which share do the last layers of each
#    block hold, and what does the bottleneck change?
# 3. Remove `context_fn` from `recomputed_in_backward` and train with `--checkpointing`. Which
#    numbers change: the training loss, the validation loss, or both? Why?
# 4. A BatchNorm scales each map before a convolution reads it. Multiply the weights in
#    `connection_weights` by the absolute scale of `norm1`. Does figure 5 change?
# 5. After training, the chain's gradient is even (`gradient-flow`, last column). Nothing was added
#    to it, so what has become of its first layers' weights? What does BatchNorm make of that?
# 6. `--experiment growth-rate --rates 2,4,8`: when is a growth rate too small?

# %%
if __name__ == "__main__":
    main(config, MODELS, build, run, EXPERIMENTS)
