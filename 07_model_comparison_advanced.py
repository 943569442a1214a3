# %%
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# %% [markdown]
# ## The ends of the timeline
#
# Lessons 1 to 6 hold the fifteen years in the middle. Here are what came before, LeNet-5 (1998) and AlexNet
# (2012), the small net that a first lab builds by hand, and what came after: the Vision Transformer (2020), which
# does without convolutions. Like every model of the course they have a stem, stages and a head.


# %%
class ConvNet(nn.Module):
    """(N, 3, H, W) -> (N, num_classes): what the three plain nets below share. They fill in the parts."""

    stem: nn.Module
    stages: nn.Sequential
    head: nn.Sequential  # ends in the linear classifier

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, h, w), the last feature map."""
        return self.stages(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))

    def get_classifier(self) -> nn.Linear:
        return self.head[-1]

    def reset_classifier(self, num_classes: int) -> None:
        old = self.head[-1]
        self.head[-1] = nn.Linear(old.in_features, num_classes).to(old.weight)


def scaled(channels: int, width_mult: float) -> int:
    """A layer's width times `width_mult`, rounded, and at least one channel."""
    return max(1, round(channels * width_mult))


# %% [markdown]
# ## LeNet-5: 1998, read cheques for years


# %%
class LeNet5(ConvNet):
    """(N, 3, 32, 32) -> (N, num_classes).  LeCun et al. 1998, fig. 2.

    Its one form is the 32x32 form, whatever `small_input` says. Smaller images are framed with zeros to 32 pixels,
    as the paper frames MNIST's 28; the map of larger ones is averaged down to the 5x5 that the head expects.

    NOTE: three input channels, a C3 that sees all maps of S2 (the paper's table 1 leaves 40 of 96 connections
    out), plain average pooling (the paper's has a weight and a bias for each map) and a linear classifier with
    cross-entropy (the paper's output layer measures distances to drawings of the digits).

    >>> LeNet5(num_classes=10).forward_features(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 16, 5, 5])
    """

    def __init__(
        self, num_classes: int = 1000, small_input: bool = False, width_mult: float = 1.0
    ) -> None:
        super().__init__()
        c1, c3, c5, f6 = (scaled(width, width_mult) for width in (6, 16, 120, 84))
        self.stem = nn.Sequential(nn.Conv2d(3, c1, 5), nn.Tanh(), nn.AvgPool2d(2))  # (N, 6, 14, 14)
        self.stages = nn.Sequential(
            nn.Conv2d(c1, c3, 5), nn.Tanh(), nn.AvgPool2d(2)
        )  # (N, 16, 5, 5)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(5),
            nn.Flatten(),
            nn.Linear(c3 * 5 * 5, c5),
            nn.Tanh(),
            nn.Linear(c5, f6),
            nn.Tanh(),
            nn.Linear(f6, num_classes),
        )

    def forward_features(self, x: Tensor) -> Tensor:
        dh, dw = (max(0, 32 - size) for size in x.shape[-2:])
        x = F.pad(x, (dw // 2, dw - dw // 2, dh // 2, dh - dh // 2))  # left, right, top, bottom
        return super().forward_features(x)


# %% [markdown]
# ## The lab's net: three convolutions, two linear layers


# %%
class SimpleCNN(ConvNet):
    """(N, 3, H, W) -> (N, num_classes): what one writes on the first day. No paper.

    At 32x32 and 10 classes it has 1,147,466 parameters, nine tenths of them in the first linear layer. The last map is
    brought to 4x4, which is its own size at 32x32, so that the net takes images of any size from 8 pixels on.
    Its one form is the 32x32 form, whatever `small_input` says.

    >>> SimpleCNN(num_classes=10).forward_features(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 128, 4, 4])
    """

    def __init__(
        self, num_classes: int = 1000, small_input: bool = False, width_mult: float = 1.0
    ) -> None:
        super().__init__()
        widths = [scaled(width, width_mult) for width in (32, 64, 128)]
        hidden = scaled(512, width_mult)
        stages = [self.stage(a, b) for a, b in zip([3, *widths], widths)]
        self.stem, self.stages = stages[0], nn.Sequential(*stages[1:])
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(widths[-1] * 4 * 4, hidden),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(hidden, num_classes),
        )

    @staticmethod
    def stage(in_channels: int, out_channels: int) -> nn.Sequential:
        """(N, C_in, H, W) -> (N, C_out, H/2, W/2)"""
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        return nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2))


# %% [markdown]
# ## AlexNet: 2012, the net that ended the argument


# %%
class AlexNet(ConvNet):
    """(N, 3, H, W) -> (N, num_classes).  Krizhevsky 2014, "One weird trick", fig. 1; first in Krizhevsky et al. 2012.

    NOTE: like torchvision's, this is the one-tower net of 2014, without the local response normalisation and
    without the two groups that let the net of 2012 fit on two cards.

    Args:
        small_input: for images of 32 pixels and less.  NOTE: the first layer is 5x5 with stride 1 instead of 11x11
            with stride 4, pooling is 2x2, and the linear layers are 1024 wide on a 2x2 map instead of 4096 on 6x6.
        width_mult: scales every layer but the classifier.

    >>> AlexNet().forward_features(torch.zeros(1, 3, 224, 224)).shape
    torch.Size([1, 256, 6, 6])
    """

    def __init__(
        self, num_classes: int = 1000, small_input: bool = False, width_mult: float = 1.0
    ) -> None:
        super().__init__()
        w1, w2, w3, w4, w5 = (scaled(width, width_mult) for width in (64, 192, 384, 256, 256))
        hidden = scaled(1024 if small_input else 4096, width_mult)
        map_size = 2 if small_input else 6
        pool = partial(nn.MaxPool2d, 2) if small_input else partial(nn.MaxPool2d, 3, stride=2)
        first = (
            nn.Conv2d(3, w1, 5, padding=2) if small_input else nn.Conv2d(3, w1, 11, 4, padding=2)
        )
        self.stem = nn.Sequential(first, nn.ReLU(), pool())
        self.stages = nn.Sequential(
            nn.Sequential(nn.Conv2d(w1, w2, 5, padding=2), nn.ReLU(), pool()),
            nn.Sequential(nn.Conv2d(w2, w3, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(w3, w4, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(w4, w5, 3, padding=1), nn.ReLU(), pool()),
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(map_size),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(w5 * map_size**2, hidden),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )


# %% [markdown]
# ## The Vision Transformer: an image is worth 16x16 words
#
# Cut the image into patches, make each patch a vector, and let every vector look at every other:
#
# $$\text{attention}(Q, K, V) = \text{softmax}\left(\frac{QK^\top}{\sqrt{d}}\right) V$$
#
# Nothing in it knows that two patches are neighbours, except what it learns from their positions. That is the
# price: it needs more data than a convolution to learn what a convolution is born with.


# %%
class Attention(nn.Module):
    """Every token asks every token.  Vaswani et al. 2017, sec. 3.2; Dosovitskiy et al. 2021, appendix A.

    (N, T, D) -> (N, T, D)

    >>> Attention(64, heads=4)(torch.zeros(1, 10, 64)).shape
    torch.Size([1, 10, 64])
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} does not split into {heads} heads")
        self.heads = heads
        self.in_proj = nn.Linear(dim, 3 * dim)  # queries, keys and values in one product
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.in_proj(x).unflatten(-1, (3, self.heads, -1))  # (N, T, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, D/heads)
        x = F.scaled_dot_product_attention(q, k, v)  # (N, heads, T, D/heads)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (N, T, D)


class EncoderBlock(nn.Module):
    """Tokens exchange what they know, then each thinks for itself.  Dosovitskiy et al. 2021, fig. 1 right, eq. 2-3.

    (N, T, D) -> (N, T, D)

    Both halves are residual branches with the norm in front, as in lesson 1's pre-activation block.

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
    """Cut into patches, project each, put the class token in front, add positions.  Dosovitskiy et al. 2021, eq. 1.

    (N, 3, H, W) -> (N, 1 + H/patch * W/patch, D)

    Positions are learned on the grid of `image_size`. On another grid they are interpolated, as the paper does
    when it fine-tunes at a higher resolution (sec. 3.2).

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
        position = self.position_for(*x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)  # (N, h * w, D)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        return x + position

    def position_for(self, height: int, width: int) -> Tensor:
        """(1, 1 + height * width, D): the learned positions, interpolated where the grid is another one."""
        if (height, width) == (self.grid, self.grid):
            return self.position
        of_class, of_patches = self.position[:, :1], self.position[:, 1:]
        of_patches = of_patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        of_patches = F.interpolate(of_patches, (height, width), mode="bicubic", align_corners=True)
        return torch.cat([of_class, of_patches.flatten(2).transpose(1, 2)], dim=1)


class VisionTransformer(nn.Module):
    """(N, 3, H, W) -> (N, num_classes).  Dosovitskiy et al. 2021, fig. 1.

    Args:
        patch_size, depth, heads, dim, mlp_dim: the row of the paper's table 1.
        small_input: for images of 32 pixels and less.  NOTE: patches a quarter as wide, so that a 32x32 image
            still gives 64 of them; the paper upsamples CIFAR to 224 and more instead.
        image_size: the resolution that positions are learned for; by default 224, or 32 with `small_input`.
    """

    def __init__(
        self,
        patch_size: int,
        depth: int,
        heads: int,
        dim: int,
        mlp_dim: int,
        num_classes: int = 1000,
        small_input: bool = False,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        if small_input:
            patch_size = patch_size // 4
        self.stem = PatchEmbedding(dim, patch_size, image_size or (32 if small_input else 224))
        self.stages = nn.Sequential(*[EncoderBlock(dim, heads, mlp_dim) for _ in range(depth)])
        self.head = nn.Sequential(nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, num_classes))
        self.init_weights()

    def init_weights(self) -> None:
        """As in the authors' code: Xavier for the linear layers, biases near zero, the classifier at zero."""
        for module in self.stages.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.normal_(module.bias, std=1e-6)
        nn.init.zeros_(self.head[-1].weight)
        nn.init.zeros_(self.head[-1].bias)

    def forward_tokens(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 1 + h * w, D): the class token, then one token for each patch."""
        return self.stages(self.stem(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, D, h, w): the last patch tokens, laid out as the map they came from."""
        patch_height, patch_width = self.stem.projection.stride
        grid = x.shape[-2] // patch_height, x.shape[-1] // patch_width
        return self.forward_tokens(x)[:, 1:].transpose(1, 2).unflatten(2, grid)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(
            self.forward_tokens(x)[:, 0]
        )  # the class token alone has gathered the answer

    def get_classifier(self) -> nn.Linear:
        return self.head[-1]

    def reset_classifier(self, num_classes: int) -> None:
        old = self.head[-1]
        self.head[-1] = nn.Linear(old.in_features, num_classes).to(old.weight)

    def arrange_torchvision_state(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """torchvision's names made ours where they differ: `in_proj_weight` is a linear layer's weight, bare parameters
        have other names, and the positions belong to the encoder and so come after the projection."""
        renamed = {
            name.replace("in_proj_", "in_proj."): value for name, value in state_dict.items()
        }
        position = renamed.pop("encoder.pos_embedding")
        return {"class_token": renamed.pop("class_token"), "position": position, **renamed}


# %% [markdown]
# ## The paper's table as data


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
    # NOTE: no paper's. Small enough to learn on a CPU: with small_input (4x4 patches) 0.8M parameters.
    "vit_xs_16": Row(16, 6, 4, 128, 256),
}


def vit(name: str, width_mult: float = 1.0, **options: int | bool) -> VisionTransformer:
    """The model of one row of the table: `num_classes`, `small_input`, `image_size`, and `width_mult`.

    `width_mult` scales `dim` in steps of the number of heads, and `mlp_dim` with it.
    """
    row = TABLE[name]
    dim = row.heads * scaled(row.dim // row.heads, width_mult)
    return VisionTransformer(
        row.patch_size, row.depth, row.heads, dim, dim * row.mlp_dim // row.dim, **options
    )


MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet5": LeNet5,
    "simple_cnn": SimpleCNN,
    "alexnet": AlexNet,
    **{name: partial(vit, name) for name in TABLE},
}
