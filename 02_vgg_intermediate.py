"""Lesson 2, intermediate: VGG, small filters stacked deep.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2014
(arXiv 1409.1556); with BatchNorm, Ioffe and Szegedy, 2015 (arXiv 1502.03167).

The idea in one sentence: two 3x3 convolutions in a row see as much of the image as one 5x5, three
as much as one 7x7, with fewer weights and a ReLU after each, so build everything from them.

    python 02_vgg_intermediate.py                               # trains: digits, on a GPU CIFAR-10
    python 02_vgg_intermediate.py --experiment batch-norm       # with and without, at two rates
    python 02_vgg_intermediate.py --experiment receptive-field  # what a neuron sees, measured
    python 02_vgg_intermediate.py --model vgg16 --image-size 224 --summary

Measured on digits (16 px, 10 epochs, seed 0, torch 2.15, float32 on two cores of an Intel Xeon):

    default, vgg11_bn    test 99.16%, 29 s of training
    batch-norm           test at lr 0.01: 96.38% without, 98.89% with; at lr 0.1: 10.03% and 99.16%;
                         all four nets in 112 s
    receptive-field      measured and computed field agree in all 13 layers of vgg11_bn, up to 150
                         pixels; 95% of the gradient lies within 122; 8 s
"""

# %% [markdown]
# ## The problem, and the one equation
#
# How large should a filter be? AlexNet began with 11x11, its successors with 7x7. VGG asks for
# nothing but 3x3, the smallest that knows left from right and up from down, and gets the large
# view by stacking. With $C$ channels in and out:
#
# $$\underbrace{3 \cdot 3^2 C^2 = 27\,C^2}_{\text{three 3x3, three ReLUs}}
#   \quad < \quad \underbrace{7^2 C^2 = 49\,C^2}_{\text{one 7x7, one ReLU}}$$
#
# Both see the same 7x7 pixels. In one dimension:
#
#         pixels        o o o o o o o    7
#         after one       o o o o o      5
#         after two         o o o        3
#         after three         o          1

# %%
from common.cli import in_notebook, main, parse_flags
from common.config import TrainConfig, knob

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Config(TrainConfig):
    """What this lesson can be told; every field is a flag, and `--help` prints them all."""

    model: str = knob("vgg11_bn", "a name of MODELS: vgg11, vgg13, vgg16, vgg19, vgg16_bn, ...")
    dropout: float = knob(
        0.5, "share of the large head's units silenced, for over 64 px", low=0, high=0.95
    )
    field_images: int = knob(
        4, "noise images that --experiment receptive-field looks at", low=1, high=4096
    )

    # What differs from the defaults of common/config.py. Digits are enlarged to 16 pixels, so that
    # the first three blocks have a map to show; the record at the top was measured with these.
    RECIPES = {"digits": {"image_size": 16, "epochs": 10, "batch_size": 64, "base_lr": 0.4}}

    def resolve(self, *args: object, **options: object) -> TrainConfig:
        """As ever, but a net without BatchNorm gets a tenth of the recipe's learning rate.

        The paper's own was 0.01 per 256 images (sec. 3.1). The experiment `batch-norm` shows what
        becomes of such a net at the full rate.
        """
        config = super().resolve(*args, **options)
        if self.lr is None and not self.model.endswith("_bn"):
            config = replace(config, lr=config.lr / 10)
        return config


# Flags are read before torch is imported, so that --help answers at once; a notebook gets the
# defaults.
config = parse_flags(Config) if __name__ == "__main__" else Config()

# %%
import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common import plotting
from common.engine.device import memory_format
from common.data import load_data
from common.engine.errors import Diverged
from common.evaluation import evaluate
from common.experiments import Trial, conclude, train_trial
from common.inspection import to_images
from common.pretrained import load_pretrained, weights_mean_std
from common.profiling import count_macs, count_parameters, profile
from common.runs import Run, banner, draw_figures, prepare
from common.training import fit, make_optimizer, make_schedule, train_one_epoch

# %% [markdown]
# ## The VGG block: a few 3x3 convolutions, then halve the map
#
# Every convolution keeps height and width (3x3 with a padding of 1), and every pool halves them. So
# a block is told two numbers, how wide and how deep, and a network is a list of such pairs.


# %%
class VGGBlock(nn.Module):
    """`depth` 3x3 convolutions with ReLU, then a 2x2 max-pool.  Simonyan and Zisserman 2014, 2.1.

    (N, C_in, H, W) -> (N, C_out, H/2, W/2)

    Args:
        in_channels: C_in, read by the first convolution only.
        out_channels: C_out, the width of every convolution of the block.
        depth: number of convolutions.
        batch_norm: normalise between each convolution and its ReLU.  Ioffe and Szegedy 2015, 3.2.
        ceil_mode: round H/2 up instead of down, so that a 1x1 map stays one.

    NOTE: a BatchNorm subtracts whatever bias the convolution before it added, so with `batch_norm`
    these biases do nothing. They are kept because the published weights of the _bn nets have them.

    >>> VGGBlock(3, 64, depth=2)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 64, 16, 16])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        depth: int,
        batch_norm: bool = False,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Conv2d(in_channels, out_channels, 3, padding=1)]
            if batch_norm:
                layers += [nn.BatchNorm2d(out_channels)]
            layers += [nn.ReLU()]
            in_channels = out_channels  # only the first convolution widens
        self.convs = nn.Sequential(*layers)
        self.pool = nn.MaxPool2d(2, ceil_mode=ceil_mode)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs(x)  # (N, C_out, H, W)
        return self.pool(x)  # (N, C_out, H/2, W/2)


# %% [markdown]
# ## The head: three linear layers that hold most of the weights
#
# The last map, 512 channels of 7x7, is read pixel by pixel by a linear layer of 4096 units. That
# one layer has 102.8 million weights, five times as many as all convolutions of VGG-19 together. It
# is where VGG overfits, hence the dropout, and what later networks replaced by an average.


# %%
def vgg_head(in_channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    """The paper's classifier: (N, C, h, w) -> (N, num_classes).  Table 1.

    NOTE: the paper's last map is 7x7, that of a 224-pixel image. The adaptive pool, torchvision's,
    does nothing there, and stretches or shrinks the map of an image of another size to 7x7.

    >>> with torch.device("meta"):
    ...     head = vgg_head(512, num_classes=1000, dropout=0.5)
    >>> sum(p.numel() for p in head.parameters())
    123642856
    """
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(7),  # (N, C, 7, 7)
        nn.Flatten(),  # (N, 49 C)
        nn.Linear(7 * 7 * in_channels, 4096),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(4096, num_classes),
    )


def small_head(in_channels: int, num_classes: int) -> nn.Sequential:
    """Average and one linear layer, for small images: (N, C, h, w) -> (N, num_classes).

    >>> small_head(512, num_classes=10)(torch.zeros(1, 512, 1, 1)).shape
    torch.Size([1, 10])
    """
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1),  # (N, C, 1, 1), which a 32-pixel image already has
        nn.Flatten(),  # (N, C)
        nn.Linear(in_channels, num_classes),
    )


# %% [markdown]
# ## The paper's table as data
#
# Table 1 of the paper has a column for each network. All five stages have the same widths in every
# column; the columns differ in how many convolutions each stage has. Convolutions and the three
# linear layers add up to the number in the name: 2 + 2 + 3 + 3 + 3 and 3 make VGG-16.

# %%
CHANNELS = (64, 128, 256, 512, 512)

DEPTHS: dict[str, tuple[int, ...]] = {
    # Convolutions of 64, 128, 256, 512 and 512 channels.
    "vgg11": (1, 1, 2, 2, 2),  # column A
    "vgg13": (2, 2, 2, 2, 2),  # column B
    "vgg16": (2, 2, 3, 3, 3),  # column D
    "vgg19": (2, 2, 4, 4, 4),  # column E
}

# %% [markdown]
# ## The model: stages and head, and no stem


# %%
class VGG(nn.Module):
    """(N, 3, H, W) -> (N, num_classes).  Simonyan and Zisserman 2014, table 1.

    Args:
        depths: 3x3 convolutions of each stage.
        channels: width of each stage.
        batch_norm: a BatchNorm after every convolution.
            NOTE: not in the paper; it appeared five months later.
        dropout: share of the head's hidden units silenced in training (sec. 3.1); the small head
            has none.
        small_input: the form of the CIFAR literature, for images of 32 pixels and less.
            NOTE: one linear layer in place of the paper's three, and pools that round up. At 32
            pixels all five pools halve the map (32, 16, 8, 4, 2, 1) and rounding changes nothing.
            At 16 and at 8 pixels the last one and the last two find a 1x1 map and leave it: these
            pools are dropped in effect.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        channels: tuple[int, ...] = CHANNELS,
        num_classes: int = 1000,
        small_input: bool = False,
        batch_norm: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.stem = nn.Identity()  # the first block reads the pixels themselves
        stages, in_channels = [], 3
        for depth, width in zip(depths, channels):
            stages.append(VGGBlock(in_channels, width, depth, batch_norm, ceil_mode=small_input))
            in_channels = width
        self.stages = nn.Sequential(*stages)
        if small_input:
            self.head = small_head(in_channels, num_classes)
        else:
            self.head = vgg_head(in_channels, num_classes, dropout)
        self.init_weights()

    def init_weights(self) -> None:
        """He initialisation: N(0, 2 / fan_in), for the classifier N(0, 1 / fan_in); biases zero.

        NOTE: the paper drew from N(0, 0.1^2), whatever the fan, and therefore started its deeper
        nets from a trained vgg11 (sec. 3.1). He et al. 2015 ("Delving deep", eq. 10) scale by the
        number of inputs, which keeps the variance of the activations through any number of ReLUs.
        Scaling by the outputs instead (eq. 14) would shrink it wherever a stage widens, 170 times
        over the net, and nothing but BatchNorm would bring it back.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                followed_by = "linear" if module is self.get_classifier() else "relu"
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity=followed_by)
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 512, H/32, W/32), the last feature map; 1x1 at least if small."""
        return self.stages(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))

    def get_classifier(self) -> nn.Linear:
        return self.head[-1]

    def reset_classifier(self, num_classes: int) -> None:
        old = self.head[-1]
        self.head[-1] = nn.Linear(old.in_features, num_classes).to(old.weight)


def vgg(name: str, **options: float | bool) -> VGG:
    """The model of one column of the table: `num_classes`, `small_input`, `dropout`.

    >>> vgg("vgg16_bn", num_classes=10, small_input=True)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    return VGG(DEPTHS[name.removesuffix("_bn")], batch_norm=name.endswith("_bn"), **options)


MODELS: dict[str, Callable[..., nn.Module]] = {
    name + suffix: partial(vgg, name + suffix) for suffix in ("", "_bn") for name in DEPTHS
}

# %% [markdown]
# ## Experiment: how far does a neuron see?
#
# A layer with kernel $k$ adds $k - 1$ steps to the field of the layer before it, and one step is as
# many pixels as the strides so far multiply to:
#
# $$r \leftarrow r + (k - 1)\,j, \qquad j \leftarrow j \cdot s$$
#
# with $r = j = 1$ at the image. The same field can be measured: take the activation in the centre
# of a map, and ask autograd which pixels it depends on.


# %%
class Field(NamedTuple):
    """What an activation sees: `size` pixels each way. Neighbours lie `jump` pixels apart."""

    layer: str
    size: int
    jump: int


def receptive_fields(layers: nn.Module) -> list[Field]:
    """The field of every convolution and pool of a plain chain of layers, by the recurrence.

    >>> two = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3))
    >>> [field.size for field in receptive_fields(two)]
    [3, 5]
    """
    fields, size, jump = [], 1, 1
    for name, layer in layers.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)):
            # A convolution keeps its sizes as pairs (height, width), a pool as one number.
            pool = isinstance(layer, nn.MaxPool2d)
            size += ((layer.kernel_size if pool else layer.kernel_size[0]) - 1) * jump
            jump *= layer.stride if pool else layer.stride[0]
            fields.append(Field(name, size, jump))
    return fields


def centre_gradient(activation: Tensor, image: Tensor) -> Tensor:
    """How strongly each pixel moves the centre of a map: (N, C, h, w), (N, 3, H, W) -> (H, W).

    The gradient of the centre position, its channels summed, in absolute value and summed over the
    colours and the N images: a pixel that a ReLU or a max-pool hides in one image shows in another.
    """
    h, w = activation.shape[-2:]
    centre = activation[:, :, h // 2, w // 2].sum()
    (gradient,) = torch.autograd.grad(centre, image, retain_graph=True)
    return gradient.abs().sum(dim=(0, 1))


def extent(gradient: Tensor) -> int:
    """Side of the smallest square that holds every pixel with a gradient."""
    rows, columns = gradient.nonzero(as_tuple=True)
    return int(max(rows.max() - rows.min(), columns.max() - columns.min())) + 1


def effective_extent(gradient: Tensor, share: float = 0.95) -> int:
    """Side of the square, centred as the field is, that holds `share` of the gradient.

    Luo et al. 2016, "Understanding the effective receptive field", found it far below the field.

    >>> effective_extent(torch.tensor([[1.0, 1, 1], [1, 100, 1], [1, 1, 1]]), share=0.9)
    1
    """
    rows, columns = gradient.nonzero(as_tuple=True)
    weights = gradient[rows, columns]
    # In half pixels, so that the centre of an even field is a whole number too.
    off_row = (2 * rows - rows.min() - rows.max()).abs()
    off_column = (2 * columns - columns.min() - columns.max()).abs()
    distance = torch.maximum(off_row, off_column)
    within = torch.bincount(distance, weights).cumsum(0) / weights.sum()
    return int((within < share).sum()) + 1


def conv_stack(kernels: tuple[int, ...], channels: int) -> nn.Sequential:
    """Convolutions of these kernels, a ReLU after each: (N, C, H, W) -> (N, C, H, W).

    Simonyan and Zisserman 2014, sec. 2.3; without biases, as the paper counts.

    >>> sum(p.numel() for p in conv_stack((3, 3, 3), channels=64).parameters()) == 27 * 64**2
    True
    """
    layers: list[nn.Module] = []
    for kernel in kernels:
        same = kernel // 2  # the padding that keeps height and width
        layers += [nn.Conv2d(channels, channels, kernel, padding=same, bias=False), nn.ReLU()]
    return nn.Sequential(*layers)


# %% [markdown]
# Four choices of filters side by side, then a whole network, layer by layer.

# %%
CHOICES: dict[str, tuple[int, ...]] = {
    "one 5x5": (5,),
    "two 3x3": (3, 3),
    "one 7x7": (7,),
    "three 3x3": (3, 3, 3),
}


class Seen(NamedTuple):
    """One line of the experiment's table; sizes in pixels."""

    name: str
    computed: int
    measured: int
    effective: int  # of the square with 95% of the gradient
    parameters: int
    macs: int
    gradient: np.ndarray  # (H, W)


def look(name: str, field: Field, gradient: Tensor, parameters: int, macs: int) -> Seen:
    size, effective = extent(gradient), effective_extent(gradient)
    return Seen(name, field.size, size, effective, parameters, macs, gradient.numpy())


def look_at_choices(images: int, channels: int = 64) -> list[Seen]:
    """Each of CHOICES on 15x15 noise of 64 channels; MACs are those of a 56x56 map."""
    seen = []
    for name, kernels in CHOICES.items():
        stack = conv_stack(kernels, channels)
        image = torch.randn(images, channels, 15, 15, requires_grad=True)
        gradient = centre_gradient(stack(image), image)
        field, macs = receptive_fields(stack)[-1], count_macs(stack, (channels, 56, 56))
        seen.append(look(name, field, gradient, count_parameters(stack), macs))
    return seen


def look_at_layers(model: VGG, images: int) -> list[Seen]:
    """Every convolution and pool of `model`, on noise just large enough for the last field."""
    model = model.eval().requires_grad_(False)  # only the gradient of the image is wanted
    fields = receptive_fields(model.stages)
    jump = fields[-1].jump
    side = jump * (-(-fields[-1].size // jump) // 2 * 2 + 1)  # an odd last map has a centre
    image = torch.randn(images, 3, side, side, requires_grad=True)
    seen, x = [], image
    for i, block in enumerate(model.stages, 1):
        convs = 0
        for layer in (*block.convs, block.pool):
            x = layer(x)
            if not isinstance(layer, (nn.Conv2d, nn.MaxPool2d)):
                continue
            convs += isinstance(layer, nn.Conv2d)
            name = f"pool{i}" if layer is block.pool else f"conv{i}_{convs}"
            parameters = count_parameters(layer)
            macs = x[0, 0].numel() * layer.weight.numel() if parameters else 0
            field = fields[len(seen)]
            seen.append(look(name, field, centre_gradient(x, image), parameters, macs))
    return seen


def receptive_field(config: Config) -> dict[str, object]:
    """The fields of `--model` computed and measured, and section 2.3 of the paper in numbers.

    All on the CPU: a GPU's fast convolutions round, and leave traces where a gradient is zero.
    """
    config, _ = prepare(replace(config, device="cpu"))
    run = Run.open(config, "02_vgg_intermediate")
    choices = look_at_choices(config.field_images)
    model = MODELS[config.model](num_classes=10, small_input=True)
    layers = look_at_layers(model, config.field_images)
    run.figure("receptive_fields", draw_fields(choices, layers, config.model))
    run.figure("field_growth", draw_growth(choices, layers, config.model))
    rows = [
        {
            "name": s.name,
            "sees (computed)": s.computed,
            "sees (measured)": s.measured,
            "95% within": s.effective,
            "parameters": s.parameters,
            "M MACs": round(s.macs / 1e6, 1),
        }
        for s in (*choices, *layers)
    ]
    return conclude(run, rows, field_verdict(choices, layers, config.model))


def field_verdict(choices: list[Seen], layers: list[Seen], model: str) -> list[str]:
    """What the numbers say, whichever way they fall."""
    verdict = []
    for wide, stacked in (choices[:2], choices[2:]):
        weights, macs = stacked.parameters / wide.parameters, stacked.macs / wide.macs
        verdict.append(
            f"{stacked.name} see {stacked.measured}x{stacked.measured} pixels where {wide.name} "
            f"sees {wide.measured}x{wide.measured}, with {weights:.0%} of its weights and "
            f"{macs:.0%} of its multiply-adds"
        )
    agree = sum(s.measured == s.computed for s in layers)
    verdict.append(f"{model}: measured and computed field agree in {agree} of {len(layers)} layers")
    last = layers[-1]
    verdict.append(
        f"{model}: {last.name} sees {last.computed} pixels each way, but 95% of what moves it lies "
        f"within {last.effective}, with untrained weights"
    )
    return verdict


# %%
def draw_fields(choices: list[Seen], layers: list[Seen], model: str) -> object:
    """Where the gradient is, with the computed field drawn around it."""
    pools = [s for s in layers if s.name.startswith("pool")][-4:]
    heading = f"What one activation sees: bright pixels move it; above four choices, below {model}"
    figure, axes = plotting.panels(8, heading, columns=4, size=(3.3, 3.7))
    for ax, seen in zip(axes, (*choices, *pools)):
        strength = np.sqrt(seen.gradient / seen.gradient.max())  # brings out the faint rim
        ax.imshow(strength, cmap="inferno", interpolation="nearest")
        rows, columns = seen.gradient.nonzero()
        top, bottom = (rows.min() + rows.max() + sign * seen.computed for sign in (-1, 1))
        left, right = (columns.min() + columns.max() + sign * seen.computed for sign in (-1, 1))
        corners = np.array([[left, right, right, left, left], [top, top, bottom, bottom, top]]) / 2
        ax.plot(*corners, color="#5FB7E5")
        ax.set_title(f"{seen.name}: {seen.computed}x{seen.computed} pixels", size=11, loc="left")
        ax.set(xticks=[], yticks=[])
    return figure


def draw_growth(choices: list[Seen], layers: list[Seen], model: str) -> object:
    """The field from layer to layer, and what each choice costs."""
    figure, (growth, weights) = plotting.panels(2, "Seeing farther, and its price", widths=(3, 2))
    sizes = {
        "computed": [s.computed for s in layers],
        "95% of gradient": [s.effective for s in layers],
    }
    title = f"Receptive field in {model}; dots are measured"
    plotting.curves(sizes, "layer", "pixels each way", title, ax=growth)
    growth.plot(range(1, len(layers) + 1), [s.measured for s in layers], "o", color="#222222", ms=4)
    growth.set_xticks(range(1, len(layers) + 1), [s.name for s in layers], rotation=60, ha="right")
    plotting.bars(
        {s.name: s.parameters for s in choices},
        "weights",
        "Weights at 64 channels",
        fmt="{:,.0f}",
        ax=weights,
    )
    return figure


# %% [markdown]
# ## Experiment: what BatchNorm changes
#
# The same net with and without, the same seed, the same data, at two learning rates: a careful one
# and ten times as much. Ioffe and Szegedy claim two things: at the same rate the normalised net
# learns faster, and it can take rates at which the other fails.


# %%
class Outcome(NamedTuple):
    """One of the four trials; `trial` is None if the loss stopped being finite."""

    name: str
    batch_norm: bool
    lr: float
    losses: list[float]  # at every step that was finite
    trial: Trial | None

    @property
    def top1(self) -> float:
        """Test accuracy; a net whose weights are no numbers has none."""
        return self.trial.test_top1 if self.trial else 0.0

    def epochs_to(self, level: float) -> int | None:
        """The first epoch whose validation accuracy reaches `level`; None if none does."""
        history = self.trial.history if self.trial else []
        return next((r.epoch for r in history if r.val_top1 >= level), None)

    def row(self) -> dict[str, object]:
        fate = {"train loss": "not finite", "train top-1": "", "test top-1": "", "seconds": ""}
        kept = self.trial.row() if self.trial else fate
        row = {"name": self.name, "lr": round(self.lr, 6)}
        row |= {k: kept[k] for k in fate}
        return {**row, "epochs to 90%": self.epochs_to(0.9) or "never"}


def batch_norm(config: Config) -> dict[str, object]:
    """`--model` with and without BatchNorm at the recipe's learning rate and at a tenth of it."""
    plain = config.model.removesuffix("_bn")
    config, device = prepare(replace(config, model=f"{plain}_bn"))
    data = load_data(config, device)
    run = Run.open(config, "02_vgg_intermediate")
    outcomes = []
    for lr in (config.lr / 10, config.lr):
        for model in (plain, f"{plain}_bn"):
            setting = replace(config, model=model, lr=lr)
            name = f"{model}, lr {lr:.2g}"
            try:
                build_it = partial(build, setting, data.num_classes)
                trial = train_trial(name, build_it, data, setting, device)
                losses = trial.loss
            except Diverged as error:
                trial, losses = None, error.losses
                print(f"{name:<24} {error}", flush=True)
            outcomes.append(Outcome(name, model != plain, lr, losses, trial))

    figure, (loss, accuracy, final) = plotting.panels(
        3, f"BatchNorm in {plain}, at one learning rate and at ten times as much"
    )
    losses = {o.name: o.losses for o in outcomes}
    smooth = max(1, len(data.train) // 2)
    plotting.curves(losses, "step", "loss", "Training loss", smooth=smooth, ax=loss)
    levels = {o.name: [r.val_top1 for r in o.trial.history] if o.trial else [] for o in outcomes}
    plotting.curves(levels, "epoch", "top-1", "Validation accuracy", percent=True, ax=accuracy)
    tests = {o.name: o.top1 if o.trial else float("nan") for o in outcomes}
    colors = plotting.PALETTE
    plotting.bars(tests, "test top-1", "Test accuracy", percent=True, colors=colors, ax=final)
    run.figure("batch_norm", figure)
    verdict = batch_norm_verdict(outcomes, len(data.test.labels))
    return conclude(run, [o.row() for o in outcomes], verdict)


def batch_norm_verdict(outcomes: list[Outcome], test_images: int) -> list[str]:
    """What the numbers say of the two claims, whichever way they fall."""
    low, high = sorted({o.lr for o in outcomes})
    at = {(o.batch_norm, o.lr): o for o in outcomes}
    verdict = []

    never = float("inf")
    faster = []
    for lr in (low, high):
        plain, normed = (at[bn, lr].epochs_to(0.9) or never for bn in (False, True))
        when = ["never" if e == never else f"in epoch {e}" for e in (plain, normed)]
        verdict.append(
            f"at lr {lr:.2g} 90% of the validation images are right {when[0]} without BatchNorm, "
            f"{when[1]} with it"
        )
        faster.append(None if plain == normed else normed < plain)
    if all(faster):
        verdict.append("the first claim holds here: BatchNorm learns faster at the same rate")
    elif False in faster:
        verdict.append("the first claim fails here: at one of the rates the plain net is faster")
    else:
        verdict.append("the first claim is undecided here: at one of the rates they are level")

    change = {bn: at[bn, high].top1 - at[bn, low].top1 for bn in (False, True)}
    # Two standard errors of the difference of two accuracies near 95% on so many images.
    noise = 2 * (2 * 0.95 * 0.05 / test_images) ** 0.5
    verdict.append(
        f"ten times the rate changes test accuracy by {change[False]:+.2%} without BatchNorm and "
        f"by {change[True]:+.2%} with it; {noise:.1%} may be chance on {test_images} images"
    )
    if not all(at[bn, low].epochs_to(0.9) for bn in (False, True)):
        verdict.append("the second claim is undecided here: not both learn at the lower rate")
    elif change[True] < -noise:
        verdict.append("the second claim fails here: the higher rate harms the normalised net too")
    elif change[False] < -noise:
        verdict.append("the second claim holds here: only the normalised net takes the higher rate")
    else:
        verdict.append("the second claim did not show here: the plain net takes that rate too")
    return verdict


EXPERIMENTS: dict[str, Callable[[Config], object]] = {
    "batch-norm": batch_norm,
    "receptive-field": receptive_field,
}

# %% [markdown]
# ## One run, from data to report
#
# Flat and explicit: this is the whole recipe. `fit` repeats `train_one_epoch`, whose source is in
# the last cell.


# %%
def build(config: Config, num_classes: int) -> nn.Module:
    """The model that the flags ask for."""
    return MODELS[config.model](
        num_classes=num_classes, small_input=config.small_input, dropout=config.dropout
    )


@torch.no_grad()
def block_maps(model: VGG, x: Tensor) -> dict[str, np.ndarray]:
    """What each block has found before its pool discards three values of four: (C, h, w) by name.

    Blocks whose map is a single pixel are left out: there is nothing to see.
    """
    maps, x = {}, model.stem(x)
    for i, block in enumerate(model.eval().stages, 1):
        x = block.convs(x)  # (1, C, h, w)
        if x.shape[-1] > 1:
            maps[f"block {i} before its pool"] = x[0].float().cpu().numpy()
        x = block.pool(x)
    return maps


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

    run = Run.open(config, "02_vgg_intermediate")
    banner(config, device, data, model, run)
    history = fit(model, data, loss_fn, optimizer, schedule, config, run)

    # The only time that the test images are seen.
    test = evaluate(model, data.test, data.class_names)
    cost = profile(model, data.input_size)
    draw_figures(run, model, data, history, test)
    one = data.test.take(np.array([0]))
    picture = to_images(one, data.mean, data.std)[0]
    run.figure("block_maps", plotting.activations(picture, block_maps(model, one)))
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
# - `--model vgg16 --image-size 224 --summary`: 119.6 of the 134.3 million parameters sit in the
#   head (ten classes), 15.3 of the 15.5 billion multiply-adds in the convolutions.
# - `filters.png`: 3x3 is too small for a picture, a colour or an edge is all that fits. On gray
#   digits the filters keep the colours that they were drawn with: red, green and blue are equal
#   there, so that only the sum over the three reaches the loss.
# - `block_maps.png`: the first block still shows the digit; from block to block the maps shrink,
#   and what is left says what is there, no longer where.
# - In `receptive_fields.png` the corners of the field are dark: the many paths to the centre pixel
#   outweigh the few to the rim.
#
# ## Exercises
#
# 1. Write `VGGBlock` without looking.
# 2. Add BatchNorm to it. Which parameters of the convolution have become useless?
# 3. Write `VGG.__init__` from the table. What changes in the head if images have 256 pixels?
# 4. Write `receptive_fields`. From which layer on does VGG-16 see all of a 32-pixel image?
# 5. Repeat `--experiment batch-norm` with `--model vgg16`. Does depth change the verdict?
# 6. What would five 3x3 cost in place of one 11x11, and what would you lose?

# %%
if __name__ == "__main__":
    main(config, MODELS, build, run, EXPERIMENTS)
