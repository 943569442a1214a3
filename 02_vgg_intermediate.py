"""VGG: small filters, stacked deep.

Simonyan and Zisserman 2014, "Very Deep Convolutional Networks for Large-Scale Image Recognition"
(https://arxiv.org/abs/1409.1556). Two 3x3 convolutions in a row see as much of the image as one 5x5, three as
much as one 7x7, with fewer weights and a ReLU after each.
"""

# %%
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

# %% [markdown]
# ## The VGG block: a few 3x3 convolutions, then halve the map
#
# Every convolution keeps height and width (3x3 with a padding of 1), and every pool halves them. So a block is
# told two numbers, how wide and how deep, and a network is a list of such pairs.


# %%
class VGGBlock(nn.Module):
    """`depth` 3x3 convolutions with ReLU, then a 2x2 max-pool.  Simonyan and Zisserman 2014, sec. 2.1.

    (N, C_in, H, W) -> (N, C_out, H/2, W/2)

    Args:
        in_channels: C_in, read by the first convolution only.
        out_channels: C_out, the width of every convolution of the block.
        depth: number of convolutions.
        batch_norm: normalise between each convolution and its ReLU.  Ioffe and Szegedy 2015, sec. 3.2.
        ceil_mode: round H/2 up instead of down, so that a 1x1 map stays one.

    NOTE: a BatchNorm subtracts whatever bias the convolution before it added, so with `batch_norm` these biases
    do nothing. They are kept because the published weights of the _bn nets have them.

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
# The last map, 512 channels of 7x7, is read pixel by pixel by a linear layer of 4096 units. That one layer has
# 102.8 million weights, more than all the convolutions of VGG-19 five times over. It is where VGG overfits,
# hence the dropout, and what later networks replaced by an average.


# %%
def vgg_head(in_channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    """The paper's classifier: (N, C, h, w) -> (N, num_classes).  Simonyan and Zisserman 2014, table 1.

    NOTE: the paper reads 224-pixel images only, whose last map is 7x7. The adaptive pool, torchvision's, does
    nothing there, and stretches or shrinks the map of an image of any other size to 7x7.

    >>> sum(p.numel() for p in vgg_head(512, num_classes=1000, dropout=0.5).parameters())
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
# Table 1 of the paper has a column for each network. All five stages have the same widths in every column; the
# columns differ in how many convolutions each stage has. Counting convolutions and the three linear layers gives
# the number in the name: 2 + 2 + 3 + 3 + 3 and 3 make VGG-16.

# %%
CHANNELS = (64, 128, 256, 512, 512)

DEPTHS: dict[str, tuple[int, ...]] = {
    # Simonyan and Zisserman 2014, table 1: convolutions of 64, 128, 256, 512 and 512 channels
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
            NOTE: it appeared five months after VGG. Without it, the authors had to train vgg11 first and start
            the deeper nets from its weights (sec. 3.1).
        dropout: share of the head's hidden units that are silenced in training (sec. 3.1).
        small_input: the form of the CIFAR literature, for images of 32 pixels and less.
            NOTE: one linear layer in place of the paper's three, and pools that round up. At 32 pixels all five
            pools halve the map (32, 16, 8, 4, 2, 1) and rounding changes nothing. At 8 pixels three do (8, 4, 2,
            1), and the pools of stages 4 and 5 find a 1x1 map and leave it: they are dropped in effect.
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
        widths = (3, *channels)
        self.stages = nn.Sequential(
            *(
                VGGBlock(widths[i], widths[i + 1], depth, batch_norm, ceil_mode=small_input)
                for i, depth in enumerate(depths)
            )
        )
        if small_input:
            self.head = small_head(channels[-1], num_classes)
        else:
            self.head = vgg_head(channels[-1], num_classes, dropout)
        self.init_weights()

    def init_weights(self) -> None:
        """He initialisation for convolutions, N(0, 0.01^2) for linear layers, biases zero.

        NOTE: the paper drew the first layers from N(0, 0.1^2), whatever their fan-in, and could not train its
        deeper nets from such a start (sec. 3.1). He et al. 2015 ("Delving deep") scale by the fan instead, which
        keeps the variance through any number of ReLUs. torchvision does the same.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 512, H/32, W/32), the last feature map; never less than 1x1 if small."""
        return self.stages(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))

    def get_classifier(self) -> nn.Linear:
        return self.head[-1]

    def reset_classifier(self, num_classes: int) -> None:
        old = self.head[-1]
        self.head[-1] = nn.Linear(old.in_features, num_classes).to(old.weight)


def vgg(name: str, **options: float | bool) -> VGG:
    """The model of one row of the table: `num_classes`, `small_input`, `dropout`.

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
# A layer with kernel `k` adds `k - 1` steps to the field of the layer before, and a step is as many pixels as the
# strides so far multiply to:
#
# $$r \leftarrow r + (k - 1)\,j \qquad j \leftarrow j \cdot s \qquad (r = j = 1 \text{ at the image})$$
#
# The same field can be measured: take one activation in the centre of a map, and ask autograd which pixels it
# depends on.


# %%
class Field(NamedTuple):
    """What one layer's activation sees: `size` pixels of the image each way; neighbours are `jump` pixels apart."""

    layer: str
    size: int
    jump: int


def receptive_fields(layers: nn.Module) -> list[Field]:
    """The field of every convolution and pool of `layers`, by the recurrence. Their order must be a plain chain.

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


def conv_stack(kernels: tuple[int, ...], channels: int) -> nn.Sequential:
    """Convolutions of these kernels, a ReLU after each: (N, C, H, W) -> (N, C, H, W). No biases, as the paper counts.

    Simonyan and Zisserman 2014, sec. 2.3: one 5x5 against two 3x3, one 7x7 against three.

    >>> sum(p.numel() for p in conv_stack((3, 3, 3), channels=64).parameters()) == 3 * 3 * 3 * 64 * 64
    True
    """
    layers: list[nn.Module] = []
    for kernel in kernels:
        same = kernel // 2  # the padding that keeps height and width
        layers += [nn.Conv2d(channels, channels, kernel, padding=same, bias=False), nn.ReLU()]
    return nn.Sequential(*layers)


def centre_gradient(activation: Tensor, image: Tensor) -> Tensor:
    """How strongly each pixel moves the centre of a map: (N, C, h, w) and (N, 3, H, W) -> (H, W).

    The gradient of the centre position, its channels summed, in absolute value and summed over the colours and
    the N images: a pixel that a ReLU or a max-pool hides in one image shows in another.
    """
    h, w = activation.shape[-2:]
    centre = activation[:, :, h // 2, w // 2].sum()
    (gradient,) = torch.autograd.grad(centre, image, retain_graph=True)
    return gradient.abs().sum(dim=(0, 1))


def extent(gradient: Tensor) -> int:
    """Side of the smallest square that holds every pixel with a gradient."""
    rows, columns = gradient.nonzero(as_tuple=True)
    return int(max(rows.max() - rows.min(), columns.max() - columns.min())) + 1
