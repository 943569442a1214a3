"""Wrong solutions as students write them, and exactly the checks that each must lose.

`code` replaces the lesson's class of that name, or one of its methods.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.grading.exercises import lesson_path
from common.grading.holes import replace_part


@dataclass(frozen=True)
class Wrong:
    """One wrong solution."""

    fault: str
    exercise: str
    replaces: str  # "Class", "function" or "Class.method"
    code: str
    lost: str  # checks of this exercise; every other point must be kept
    says: str  # part of a message that points at the fault

    @property
    def lesson(self) -> str:
        return f"{int(self.exercise.split('.')[0]):02d}"

    def source(self) -> str:
        return replace_part(
            lesson_path(self.lesson).read_text(encoding="utf-8"), self.replaces, self.code
        )


BASIC_BLOCK = """
class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_channels, channels, stride=1, shortcut="B", se_reduction=0):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.se = SqueezeExcitation(channels, se_reduction) if se_reduction else nn.Identity()
        self.shortcut = make_shortcut(shortcut, in_channels, channels, stride)

    def forward(self, x):
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = self.se(self.bn2(self.conv2(residual)))
        return F.relu(residual + self.shortcut(x))
"""


def basic_block(old: str, new: str) -> str:
    assert BASIC_BLOCK.count(old) == 1
    return BASIC_BLOCK.replace(old, new)


WRONG = (
    Wrong(
        "no projection where the stride changes",
        "1.4",
        "BasicBlock",
        basic_block("make_shortcut(shortcut, in_channels, channels, stride)", "nn.Identity()"),
        "shape parameters layers values gradients modes identity unseen",
        "missing: 1x1 convolution 8 -> 16, stride 2",
    ),
    Wrong(
        "the last ReLU is missing",
        "1.4",
        "BasicBlock",
        basic_block(
            "return F.relu(residual + self.shortcut(x))", "return residual + self.shortcut(x)"
        ),
        "values identity unseen",
        "it would be right after a ReLU",
    ),
    Wrong(
        "ReLU before the addition",
        "1.4",
        "BasicBlock",
        basic_block(
            "return F.relu(residual + self.shortcut(x))",
            "return F.relu(residual) + self.shortcut(x)",
        ),
        "values identity unseen",
        "the ReLU comes before the sum",
    ),
    Wrong(
        "the first bias left on",
        "1.4",
        "BasicBlock",
        basic_block("stride, padding=1, bias=False", "stride, padding=1"),
        "parameters layers unseen",
        "conv1 is a 3x3 convolution 8 -> 8, padding 1, bias; expected 3x3 convolution 8 -> 8",
    ),
    Wrong(
        "BatchNorm forgotten",
        "1.4",
        "BasicBlock",
        basic_block("F.relu(self.bn1(self.conv1(x)))", "F.relu(self.conv1(x))").replace(
            "self.bn1 = nn.BatchNorm2d(channels)", ""
        ),
        "parameters layers values unseen",
        "missing: BatchNorm2d 8",
    ),
    Wrong(
        "a layer that forward never uses",
        "1.4",
        "BasicBlock",
        basic_block("self.bn1(self.conv1(x))", "self.bn2(self.conv1(x))"),
        "values gradients unseen",
        "no gradient reaches bn1.weight, bn1.bias",
    ),
    Wrong(
        "the shortcut detached",
        "1.4",
        "BasicBlock",
        basic_block("self.shortcut(x))", "self.shortcut(x).detach())"),
        "gradients",
        "no gradient reaches shortcut.0.weight",
    ),
    Wrong(
        "the shape is right, the work isn't: pooling and a linear map instead of convolutions",
        "1.4",
        "BasicBlock",
        """
        class BasicBlock(nn.Module):
            expansion = 1

            def __init__(self, in_channels, channels, stride=1, shortcut="B", se_reduction=0):
                super().__init__()
                self.pool = nn.AvgPool2d(stride, ceil_mode=True)
                self.mix = nn.Conv2d(in_channels, channels, 1)

            def forward(self, x):
                return F.relu(self.mix(self.pool(x)))
        """,
        "parameters layers values modes identity unseen",
        "expected 1,184 parameters, got 72",
    ),
    Wrong(
        "the output hard-coded",
        "1.4",
        "BasicBlock.forward",
        """
        def forward(self, x):
            stride = self.conv1.stride[0]
            height, width = (-(-size // stride) for size in x.shape[2:])
            return torch.zeros(len(x), self.conv1.out_channels, height, width)
        """,
        "values gradients modes identity unseen",
        "every number is 0: it does not depend on the input",
    ),
    Wrong(
        "a parameter count made up with a parameter that does nothing",
        "1.1",
        "PadShortcut.forward",
        """
        def forward(self, x):
            x = F.avg_pool2d(x, self.stride)
            return F.pad(x, (0, 0, 0, 0, 0, self.extra_channels))
        """,
        "values unseen",
        "the output is off by up to",
    ),
    Wrong(
        "the zeros in front of the channels",
        "1.1",
        "PadShortcut.forward",
        """
        def forward(self, x):
            x = x[:, :, :: self.stride, :: self.stride]
            return F.pad(x, (0, 0, 0, 0, self.extra_channels, 0))
        """,
        "values unseen",
        "the output is off by up to",
    ),
    Wrong(
        "SE without the sigmoid",
        "1.3",
        "SqueezeExcitation.forward",
        """
        def forward(self, x):
            gate = x.mean(dim=(2, 3), keepdim=True)
            return x * self.excite(F.relu(self.squeeze(gate)))
        """,
        "values unseen",
        "the output is off by up to",
    ),
    Wrong(
        "SE that forgets to scale the input",
        "1.3",
        "SqueezeExcitation.forward",
        """
        def forward(self, x):
            gate = x.mean(dim=(2, 3), keepdim=True)
            return torch.sigmoid(self.excite(F.relu(self.squeeze(gate))))
        """,
        "shape values unseen",
        "should be (2, 32, 6, 6) and is (2, 32, 1, 1)",
    ),
    Wrong(
        "groups forgotten",
        "1.5",
        "Bottleneck.__init__",
        """
        def __init__(
            self, in_channels, channels, stride=1, shortcut="B", se_reduction=0,
            groups=1, base_width=64,
        ):
            super().__init__()
            width = channels * base_width // 64 * groups
            out_channels = self.expansion * channels
            self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(out_channels)
            self.se = nn.Identity()
            if se_reduction:
                self.se = SqueezeExcitation(out_channels, se_reduction)
            self.shortcut = make_shortcut(shortcut, in_channels, out_channels, stride)
        """,
        "parameters layers values unseen",
        "expected 3x3 convolution 32 -> 32, padding 1, groups 4, no bias",
    ),
    Wrong(
        "the stride on the first 1x1, as in the paper of 2015",
        "1.5",
        "Bottleneck.__init__",
        """
        def __init__(
            self, in_channels, channels, stride=1, shortcut="B", se_reduction=0,
            groups=1, base_width=64,
        ):
            super().__init__()
            width = channels * base_width // 64 * groups
            out_channels = self.expansion * channels
            self.conv1 = nn.Conv2d(in_channels, width, 1, stride, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(out_channels)
            self.se = nn.Identity()
            if se_reduction:
                self.se = SqueezeExcitation(out_channels, se_reduction)
            self.shortcut = make_shortcut(shortcut, in_channels, out_channels, stride)
        """,
        "layers values unseen",
        "stride 2",
    ),
    Wrong(
        "a ReLU after the pre-activation sum",
        "1.6",
        "PreActBlock.forward",
        """
        def forward(self, x):
            activated = F.relu(self.bn1(x))
            residual = self.conv2(F.relu(self.bn2(self.conv1(activated))))
            identity = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(activated)
            return F.relu(residual + identity)
        """,
        "values identity unseen",
        "there is a ReLU at the end that should not be",
    ),
    Wrong(
        "stride 2 in the first stage too",
        "1.7",
        "ResNet.__init__",
        """
        def __init__(
            self, block, depths, channels=(64, 128, 256, 512), stem_channels=64, num_classes=1000,
            small_input=False, zero_init_residual=True, **block_options,
        ):
            super().__init__()
            stem = [nn.Conv2d(3, stem_channels, 3, padding=1, bias=False)]
            if not small_input:
                stem = [nn.Conv2d(3, stem_channels, 7, stride=2, padding=3, bias=False)]
            preact = block is PreActBlock
            if not preact:
                stem += [nn.BatchNorm2d(stem_channels), nn.ReLU()]
            if not small_input:
                stem += [nn.MaxPool2d(3, stride=2, padding=1)]
            self.stem = nn.Sequential(*stem)
            stages, in_channels = [], stem_channels
            for depth, width in zip(depths, channels):
                blocks = []
                for j in range(depth):
                    blocks.append(block(in_channels, width, 2 if j == 0 else 1, **block_options))
                    in_channels = width * block.expansion
                stages.append(nn.Sequential(*blocks))
            self.stages = nn.Sequential(*stages)
            last = [nn.BatchNorm2d(in_channels), nn.ReLU()] if preact else []
            self.head = nn.Sequential(
                *last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes)
            )
            self.init_weights(zero_init_residual)
        """,
        "parameters layers values result unseen",
        "stride 2",
    ),
    Wrong(
        "BatchNorm after the ReLU",
        "2.2",
        "VGGBlock.__init__",
        """
        def __init__(self, in_channels, out_channels, depth, batch_norm=False, ceil_mode=False):
            super().__init__()
            layers = []
            for _ in range(depth):
                layers += [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.ReLU()]
                if batch_norm:
                    layers += [nn.BatchNorm2d(out_channels)]
                in_channels = out_channels
            self.convs = nn.Sequential(*layers)
            self.pool = nn.MaxPool2d(2, ceil_mode=ceil_mode)
        """,
        "values unseen",
        "the output is off by up to",
    ),
    Wrong(
        "wrong padding in the 5x5 branch",
        "3.3",
        "Inception.__init__",
        """
        def __init__(self, in_channels, widths, five_by_five=False, conv=ConvBnReLU):
            super().__init__(
                conv(in_channels, widths.conv1x1, 1),
                nn.Sequential(
                    conv(in_channels, widths.reduce3x3, 1),
                    conv(widths.reduce3x3, widths.conv3x3, 3),
                ),
                nn.Sequential(
                    conv(in_channels, widths.reduce5x5, 1),
                    conv(widths.reduce5x5, widths.conv5x5, 5 if five_by_five else 3, padding=1),
                ),
                nn.Sequential(
                    nn.MaxPool2d(3, stride=1, padding=1), conv(in_channels, widths.pool_proj, 1)
                ),
            )
        """,
        "shape layers values gradients unseen",
        "branches.2.1.0 is a 5x5 convolution 2 -> 6, padding 1, no bias; expected 5x5",
    ),
    Wrong(
        "branches in a plain list, whose parameters nobody finds",
        "3.2",
        "Branches.__init__",
        """
        def __init__(self, *branches):
            super().__init__()
            self.branches = list(branches)
        """,
        "parameters values unseen",
        "got 0",
    ),
    Wrong(
        "one draw for the whole batch",
        "4.3",
        "StochasticDepth.forward",
        """
        def forward(self, x):
            if not self.training or self.rate == 0:
                return x
            keep = 1 - self.rate
            return x * (x.new_empty(1).bernoulli_(keep) / keep)
        """,
        "result unseen",
        "average(0.25): expected True, got False",
    ),
    Wrong(
        "stochastic depth in eval mode too",
        "4.3",
        "StochasticDepth.forward",
        """
        def forward(self, x):
            keep = 1 - self.rate
            return x * (x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep) / keep)
        """,
        "modes",
        "two passes in eval mode give different outputs",
    ),
    Wrong(
        "an activation after the projection",
        "5.3",
        "InvertedResidual.__init__",
        """
        def __init__(
            self, in_channels, out_channels, expanded, stride=1, kernel=3, se=False,
            activation=nn.ReLU6, norm=nn.BatchNorm2d,
        ):
            super().__init__()
            conv = partial(ConvBN, activation=activation, norm=norm)
            layers = [conv(in_channels, expanded)] if expanded != in_channels else []
            layers += [conv(expanded, expanded, kernel, stride, groups=expanded)]
            layers += [SqueezeExcitation(expanded)] if se else []
            layers += [conv(expanded, out_channels)]
            self.layers = nn.Sequential(*layers)
            self.stride = stride
            self.has_shortcut = stride == 1 and in_channels == out_channels
        """,
        "values unseen",
        "the output is off by up to",
    ),
    Wrong(
        "the growth rate added twice",
        "6.2",
        "DenseBlock.__init__",
        """
        def __init__(self, in_channels, depth, growth_rate, dense=True, **layer_options):
            super().__init__()
            self.dense = dense
            self.layers = nn.ModuleList()
            for i in range(depth):
                channels = in_channels + 2 * i * growth_rate
                if not dense and i > 0:
                    channels = growth_rate
                self.layers.append(DenseLayer(channels, growth_rate, **layer_options))
            self.out_channels = in_channels + depth * growth_rate if dense else growth_rate
        """,
        "shape parameters values gradients identity unseen",
        "expected BatchNorm2d 10",
    ),
    Wrong(
        "dropout in eval mode",
        "6.1",
        "DenseLayer.forward",
        """
        def forward(self, features):
            x = self.read(*features)
            if self.bottleneck:
                x = self.conv2(F.relu(self.norm2(x)))
            return F.dropout(x, self.dropout.p)
        """,
        "values modes",
        "two passes in eval mode give different outputs",
    ),
    Wrong(
        "a softmax at the end of the classifier",
        "7.1",
        "SimpleCNN.__init__",
        """
        def __init__(self, num_classes=1000, small_input=False, width_mult=1.0):
            super().__init__()
            a, b, c = (scaled(width, width_mult) for width in (32, 64, 128))
            hidden = scaled(512, width_mult)
            self.stem = self.stage(3, a)
            self.stages = nn.Sequential(self.stage(a, b), self.stage(b, c))
            self.head = nn.Sequential(
                nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(c * 16, hidden), nn.ReLU(),
                nn.Dropout(0.5), nn.Linear(hidden, num_classes), nn.Softmax(1),
            )
        """,
        "values unseen",
        "a softmax at the end",
    ),
    Wrong(
        "weights frozen, BatchNorm's statistics not",
        "8.1",
        "freeze",
        """
        def freeze(part):
            for parameter in part.parameters():
                parameter.requires_grad_(False)
        """,
        "result unseen",
        "that_move(frozen(0)): expected ['1.1.running_mean'",
    ),
    Wrong(
        "the first part learns fastest",
        "8.2",
        "discriminative_groups",
        """
        def discriminative_groups(parts, lr, decay, weight_decay):
            groups = []
            for distance, part in enumerate(parts):
                for group in parameter_groups(part, weight_decay):
                    if group["params"]:
                        groups.append({**group, "lr": lr / decay**distance})
            return groups
        """,
        "result unseen",
        "rates(0.1, 2.0, 0.0): expected",
    ),
)
