"""Solutions as a student would write them, in words of their own: one for each exercise.

They lean on nothing but the names and signatures that the starters print, so they stay right when
a lesson's own body changes. `grading_cases` puts mistakes into them.
"""

SOLUTIONS: dict[str, str] = {}


def _add(numbers: str, code: str) -> None:
    SOLUTIONS.update(dict.fromkeys(numbers.split(), code.strip() + "\n"))


_add(
    "0.1",
    """
def random_flip(x, draws):
    coin = draws[:, FLIP] < 0.5
    out = x.clone()
    out[coin] = torch.flip(out[coin], dims=[3])
    return out
""",
)
_add(
    "0.2",
    """
def cutout(x, side, draws):
    n, _, h, w = x.shape
    out = x.clone()
    for i in range(n):
        y = int(draws[i, CUTOUT_Y] * h) - side // 2
        z = int(draws[i, CUTOUT_X] * w) - side // 2
        out[i, :, max(0, y) : max(0, y + side), max(0, z) : max(0, z + side)] = 0
    return out
""",
)
_add(
    "0.3",
    """
def random_crop(padded, index, size, draws):
    h, w = size
    places_y, places_x = padded.shape[2] - h + 1, padded.shape[3] - w + 1
    crops = []
    for place, i in enumerate(index.tolist()):
        y = int(draws[place, CROP_Y] * places_y)
        z = int(draws[place, CROP_X] * places_x)
        crops.append(padded[i, :, y : y + h, z : z + w])
    return torch.stack(crops)
""",
)
_add(
    "1.1",
    """
class PadShortcut(nn.Module):
    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.more = out_channels - in_channels
        self.step = stride

    def forward(self, x):
        x = x[:, :, :: self.step, :: self.step]
        n, _, h, w = x.shape
        return torch.cat([x, x.new_zeros(n, self.more, h, w)], dim=1)
""",
)
_add(
    "1.2",
    """
def make_shortcut(option, in_channels, out_channels, stride):
    if option != "C" and in_channels == out_channels and stride == 1:
        return nn.Identity()
    if option == "A":
        return PadShortcut(in_channels, out_channels, stride)
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))
""",
)
_add(
    "1.3",
    """
class SqueezeExcitation(nn.Module):
    def __init__(self, channels, reduction=16):
        super().__init__()
        small = channels // reduction
        self.down = nn.Linear(channels, small)
        self.up = nn.Linear(small, channels)

    def forward(self, x):
        s = x.mean((2, 3))
        s = torch.relu(self.down(s))
        s = torch.sigmoid(self.up(s))
        return x * s[:, :, None, None]
""",
)
_add(
    "1.4",
    """
class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_channels, channels, stride=1, shortcut="B", se_reduction=0):
        super().__init__()
        self.a = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm_a = nn.BatchNorm2d(channels)
        self.b = nn.Conv2d(channels, channels, 3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.gate = SqueezeExcitation(channels, se_reduction) if se_reduction else nn.Identity()
        self.skip = make_shortcut(shortcut, in_channels, channels, stride)

    def forward(self, x):
        y = self.norm_a(self.a(x))
        y = torch.relu(y)
        y = self.bn2(self.b(y))
        y = self.gate(y)
        y = y + self.skip(x)
        return torch.relu(y)
""",
)
_add(
    "1.5",
    """
class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_channels, channels, stride=1, shortcut="B", se_reduction=0, groups=1, base_width=64):
        super().__init__()
        mid = channels * base_width // 64 * groups
        out = 4 * channels
        self.a = nn.Conv2d(in_channels, mid, 1, bias=False)
        self.norm_a = nn.BatchNorm2d(mid)
        self.b = nn.Conv2d(mid, mid, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.norm_b = nn.BatchNorm2d(mid)
        self.c = nn.Conv2d(mid, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.gate = SqueezeExcitation(out, se_reduction) if se_reduction else nn.Identity()
        self.skip = make_shortcut(shortcut, in_channels, out, stride)

    def forward(self, x):
        y = torch.relu(self.norm_a(self.a(x)))
        y = torch.relu(self.norm_b(self.b(y)))
        y = self.gate(self.bn3(self.c(y)))
        return torch.relu(y + self.skip(x))
""",
)
_add(
    "1.6",
    """
class PreActBlock(nn.Module):
    expansion = 1

    def __init__(self, in_channels, channels, stride=1, shortcut="B"):
        super().__init__()
        self.n1 = nn.BatchNorm2d(in_channels)
        self.c1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.n2 = nn.BatchNorm2d(channels)
        self.c2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.same = stride == 1 and in_channels == channels
        self.skip = make_shortcut(shortcut, in_channels, channels, stride)

    def forward(self, x):
        z = torch.relu(self.n1(x))
        y = self.c1(z)
        y = torch.relu(self.n2(y))
        y = self.c2(y)
        return y + (x if self.same else self.skip(z))
""",
)
_add(
    "1.7",
    """
class ResNet:
    def __init__(self, block, depths, channels=(64, 128, 256, 512), stem_channels=64, num_classes=1000, small_input=False, zero_init_residual=True, **block_options):
        super().__init__()
        early = block is PreActBlock
        if small_input:
            layers = [nn.Conv2d(3, stem_channels, 3, padding=1, bias=False)]
        else:
            layers = [nn.Conv2d(3, stem_channels, 7, 2, 3, bias=False)]
        if not early:
            layers += [nn.BatchNorm2d(stem_channels), nn.ReLU()]
        if not small_input:
            layers += [nn.MaxPool2d(3, 2, 1)]
        self.stem = nn.Sequential(*layers)
        self.stages = nn.Sequential()
        now = stem_channels
        for number, (depth, width) in enumerate(zip(depths, channels)):
            stage = nn.Sequential()
            for place in range(depth):
                stride = 2 if number > 0 and place == 0 else 1
                stage.append(block(now, width, stride, **block_options))
                now = width * block.expansion
            self.stages.append(stage)
        end = [nn.BatchNorm2d(now), nn.ReLU()] if early else []
        self.head = nn.Sequential(*end, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(now, num_classes))
        self.init_weights(zero_init_residual)

    def forward_features(self, x):
        x = self.stem(x)
        return self.stages(x)

    def forward(self, x):
        x = self.forward_features(x)
        return self.head(x)
""",
)
_add(
    "2.1 2.2",
    """
class VGGBlock(nn.Module):
    def __init__(self, in_channels, out_channels, depth, batch_norm=False, ceil_mode=False):
        super().__init__()
        steps = []
        for i in range(depth):
            steps.append(nn.Conv2d(in_channels if i == 0 else out_channels, out_channels, 3, padding=1))
            if batch_norm:
                steps.append(nn.BatchNorm2d(out_channels))
            steps.append(nn.ReLU())
        self.steps = nn.Sequential(*steps)
        self.down = nn.MaxPool2d(2, stride=2, ceil_mode=ceil_mode)

    def forward(self, x):
        return self.down(self.steps(x))
""",
)
_add(
    "2.3",
    """
class VGG:
    def __init__(self, depths, channels=(64, 128, 256, 512, 512), num_classes=1000, small_input=False, batch_norm=False, dropout=0.5):
        super().__init__()
        self.stem = nn.Identity()
        blocks = []
        now = 3
        for depth, width in zip(depths, channels):
            blocks.append(VGGBlock(now, width, depth, batch_norm=batch_norm, ceil_mode=small_input))
            now = width
        self.stages = nn.Sequential(*blocks)
        self.head = small_head(now, num_classes) if small_input else vgg_head(now, num_classes, dropout)
        self.init_weights()

    def forward_features(self, x):
        return self.stages(x)

    def forward(self, x):
        return self.head(self.forward_features(x))
""",
)
_add(
    "2.4",
    """
def receptive_fields(layers):
    found = []
    size = 1
    jump = 1
    for name, layer in layers.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)):
            k, s = layer.kernel_size, layer.stride
            k = k[0] if isinstance(k, tuple) else k
            s = s[0] if isinstance(s, tuple) else s
            size = size + (k - 1) * jump
            jump = jump * s
            found.append(Field(name, size, jump))
    return found
""",
)
_add(
    "3.1",
    """
class ConvBnReLU(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=None, batch_norm=True):
        super().__init__()
        if isinstance(kernel_size, int):
            kernel_size = (kernel_size, kernel_size)
        if padding is None:
            padding = tuple(k // 2 for k in kernel_size)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=not batch_norm)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001) if batch_norm else None

    def forward(self, x):
        x = self.conv(x)
        if self.bn is not None:
            x = self.bn(x)
        return torch.relu(x)
""",
)
_add(
    "3.2",
    """
class Branches(nn.Module):
    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        parts = [branch(x) for branch in self.branches]
        return torch.cat(parts, 1)
""",
)
_add(
    "3.3",
    """
class Inception(nn.Module):
    def __init__(self, in_channels, widths, five_by_five=False, conv=ConvBnReLU):
        super().__init__()
        w = widths
        big = 5 if five_by_five else 3
        self.one = conv(in_channels, w.conv1x1, 1)
        self.three = nn.Sequential(conv(in_channels, w.reduce3x3, 1), conv(w.reduce3x3, w.conv3x3, 3))
        self.five = nn.Sequential(conv(in_channels, w.reduce5x5, 1), conv(w.reduce5x5, w.conv5x5, big))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(in_channels, w.pool_proj, 1))

    def forward(self, x):
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)
""",
)
_add(
    "3.4",
    """
class InceptionC(nn.Module):
    def __init__(self, in_channels, width):
        super().__init__()
        c = ConvBnReLU
        self.one = c(in_channels, 192, 1)
        self.two = nn.Sequential(c(in_channels, width, 1), c(width, width, (1, 7)), c(width, 192, (7, 1)))
        self.three = nn.Sequential(
            c(in_channels, width, 1),
            c(width, width, (7, 1)),
            c(width, width, (1, 7)),
            c(width, width, (7, 1)),
            c(width, 192, (1, 7)),
        )
        self.four = nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), c(in_channels, 192, 1))

    def forward(self, x):
        return torch.cat([self.one(x), self.two(x), self.three(x), self.four(x)], 1)
""",
)
_add(
    "3.5",
    """
class AuxiliaryHead(nn.Module):
    def __init__(self, in_channels, num_classes, conv=ConvBnReLU):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.conv = conv(in_channels, 128, 1)
        self.hidden = nn.Linear(2048, 1024)
        self.drop = nn.Dropout(0.7)
        self.out = nn.Linear(1024, num_classes)

    def forward(self, x):
        x = self.conv(self.pool(x))
        x = torch.relu(self.hidden(x.flatten(1)))
        return self.out(self.drop(x))
""",
)
_add(
    "3.6",
    """
class AuxiliaryLoss(nn.Module):
    def __init__(self, criterion, weight):
        super().__init__()
        self.criterion = criterion
        self.weight = weight

    def forward(self, outputs, targets):
        if torch.is_tensor(outputs):
            return self.criterion(outputs, targets)
        total = self.criterion(outputs[0], targets)
        for aux in outputs[1:]:
            total = total + self.weight * self.criterion(aux, targets)
        return total
""",
)
_add(
    "4.1",
    """
def round_channels(channels, divisor=8):
    nearest = int(channels / divisor + 0.5) * divisor
    if nearest < divisor:
        nearest = divisor
    if nearest < 0.9 * channels:
        nearest += divisor
    return nearest
""",
)
_add(
    "4.2",
    """
def scale_stages(stages, width_mult=1.0, depth_mult=1.0):
    scaled = []
    for stage in stages:
        wide = round_channels(stage.channels * width_mult)
        deep = math.ceil(stage.layers * depth_mult)
        scaled.append(stage._replace(channels=wide, layers=deep))
    return tuple(scaled)
""",
)
_add(
    "4.3",
    """
class StochasticDepth(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, 1) < 1 - self.rate
        return x * keep / (1 - self.rate)
""",
)
_add(
    "4.4",
    """
class MBConv(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, stride=1, expansion=6, drop_rate=0.0, norm=nn.BatchNorm2d):
        super().__init__()
        wide = in_channels * expansion
        steps = []
        if expansion > 1:
            steps.append(conv_norm_act(in_channels, wide, 1, norm=norm))
        steps.append(conv_norm_act(wide, wide, kernel_size, stride, groups=wide, norm=norm))
        steps.append(SqueezeExcitation(wide, 4 * expansion))
        steps.append(conv_norm_act(wide, out_channels, 1, norm=norm, activation=nn.Identity))
        self.steps = nn.Sequential(*steps)
        self.add = stride == 1 and in_channels == out_channels
        self.drop = StochasticDepth(drop_rate)

    def forward(self, x):
        y = self.steps(x)
        if self.add:
            y = x + self.drop(y)
        return y
""",
)
_add(
    "5.1",
    """
class DepthwiseSeparable(nn.Module):
    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__()
        self.stride = stride
        self.filter = ConvBN(in_channels, in_channels, kernel=3, stride=stride, groups=in_channels)
        self.mix = ConvBN(in_channels, out_channels, kernel=1)

    def forward(self, x):
        return self.mix(self.filter(x))
""",
)
_add(
    "5.2",
    """
class SqueezeExcitation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        small = make_divisible(channels / 4)
        self.a = nn.Conv2d(channels, small, 1)
        self.b = nn.Conv2d(small, channels, 1)

    def forward(self, x):
        g = nn.functional.adaptive_avg_pool2d(x, 1)
        g = torch.relu(self.a(g))
        g = nn.functional.hardsigmoid(self.b(g))
        return g * x
""",
)
_add(
    "5.3",
    """
class InvertedResidual(nn.Module):
    def __init__(self, in_channels, out_channels, expanded, stride=1, kernel=3, se=False, activation=nn.ReLU6, norm=nn.BatchNorm2d):
        super().__init__()
        steps = []
        if expanded != in_channels:
            steps.append(ConvBN(in_channels, expanded, 1, activation=activation, norm=norm))
        steps.append(ConvBN(expanded, expanded, kernel, stride, groups=expanded, activation=activation, norm=norm))
        if se:
            steps.append(SqueezeExcitation(expanded))
        steps.append(ConvBN(expanded, out_channels, 1, activation=None, norm=norm))
        self.steps = nn.Sequential(*steps)
        self.stride = stride
        self.add = stride == 1 and in_channels == out_channels

    def forward(self, x):
        y = self.steps(x)
        return x + y if self.add else y
""",
)
_add(
    "6.1",
    """
class DenseLayer(nn.Module):
    def __init__(self, in_channels, growth_rate, bottleneck=True, dropout=0.0, checkpointing=False):
        super().__init__()
        steps = [nn.BatchNorm2d(in_channels), nn.ReLU()]
        if bottleneck:
            steps += [nn.Conv2d(in_channels, 4 * growth_rate, 1, bias=False)]
            steps += [nn.BatchNorm2d(4 * growth_rate), nn.ReLU()]
            in_channels = 4 * growth_rate
        steps += [nn.Conv2d(in_channels, growth_rate, 3, padding=1, bias=False)]
        self.steps = nn.Sequential(*steps)
        self.drop = nn.Dropout(dropout)

    def forward(self, features):
        x = torch.cat(features, 1)
        return self.drop(self.steps(x))
""",
)
_add(
    "6.2",
    """
class DenseBlock(nn.Module):
    def __init__(self, in_channels, depth, growth_rate, dense=True, **layer_options):
        super().__init__()
        self.dense = dense
        self.layers = nn.ModuleList()
        for i in range(depth):
            width = in_channels + i * growth_rate
            if not dense and i > 0:
                width = growth_rate
            self.layers.append(DenseLayer(width, growth_rate, **layer_options))
        self.out_channels = in_channels + depth * growth_rate if dense else growth_rate

    def forward(self, x):
        maps = [x]
        for layer in self.layers:
            new = layer(maps)
            maps = maps + [new] if self.dense else [new]
        return torch.cat(maps, 1)
""",
)
_add(
    "6.3",
    """
class Transition(nn.Sequential):
    def __init__(self, in_channels, out_channels):
        super().__init__(
            nn.BatchNorm2d(in_channels),
            nn.ReLU(),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.AvgPool2d(2),
        )
""",
)
_add(
    "6.4",
    """
class DenseNet:
    def __init__(self, depths, growth_rate, bottleneck=True, compression=0.5, stem_channels=None, dense=True, dropout=0.0, checkpointing=False, num_classes=1000, small_input=False):
        super().__init__()
        now = stem_channels if stem_channels is not None else 2 * growth_rate
        if small_input:
            self.stem = nn.Sequential(nn.Conv2d(3, now, 3, padding=1, bias=False))
        else:
            self.stem = nn.Sequential(
                nn.Conv2d(3, now, 7, 2, 3, bias=False),
                nn.BatchNorm2d(now),
                nn.ReLU(),
                nn.MaxPool2d(3, 2, 1),
            )
        self.stages = nn.Sequential()
        for i, depth in enumerate(depths):
            stage = nn.Sequential()
            if i:
                stage.append(Transition(now, int(now * compression)))
                now = int(now * compression)
            options = {"bottleneck": bottleneck, "dropout": dropout, "checkpointing": checkpointing}
            block = DenseBlock(now, depth, growth_rate, dense, **options)
            stage.append(block)
            now = block.out_channels
            self.stages.append(stage)
        self.head = nn.Sequential(
            nn.BatchNorm2d(now),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(now, num_classes),
        )
        self.init_weights()

    def forward_features(self, x):
        return self.stages(self.stem(x))

    def forward(self, x):
        return self.head(self.forward_features(x))
""",
)
_add(
    "7.1",
    """
class SimpleCNN(ConvNet):
    def __init__(self, num_classes=1000, small_input=False, width_mult=1.0):
        super().__init__()
        a, b, c = (scaled(n, width_mult) for n in (32, 64, 128))
        wide = scaled(512, width_mult)
        self.stem = nn.Sequential(nn.Conv2d(3, a, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.stages = nn.Sequential(
            nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(b, c, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(16 * c, wide),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(wide, num_classes),
        )
        self.init_weights()
""",
)
_add(
    "7.2",
    """
class LeNet5:
    def __init__(self, num_classes=1000, small_input=False, width_mult=1.0):
        super().__init__()
        a, b, c, d = (scaled(n, width_mult) for n in (6, 16, 120, 84))
        self.stem = nn.Sequential(nn.Conv2d(3, a, 5), nn.Tanh(), nn.AvgPool2d(2))
        self.stages = nn.Sequential(nn.Conv2d(a, b, 5), nn.Tanh(), nn.AvgPool2d(2))
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(25 * b, c),
            nn.Tanh(),
            nn.Linear(c, d),
            nn.Tanh(),
            nn.Linear(d, num_classes),
        )
        self.init_weights()
""",
)
_add(
    "7.3",
    """
class AlexNet(ConvNet):
    def __init__(self, num_classes=1000, small_input=False, width_mult=1.0):
        super().__init__()
        a, b, c, d, e = (scaled(n, width_mult) for n in (64, 192, 384, 256, 256))
        wide = scaled(1024 if small_input else 4096, width_mult)
        side = 2 if small_input else 6

        def pool():
            return nn.MaxPool2d(2) if small_input else nn.MaxPool2d(3, 2)

        first = nn.Conv2d(3, a, 5, padding=2) if small_input else nn.Conv2d(3, a, 11, 4, 2)
        self.stem = nn.Sequential(first, nn.ReLU(), pool())
        self.stages = nn.Sequential(
            nn.Conv2d(a, b, 5, padding=2), nn.ReLU(), pool(),
            nn.Conv2d(b, c, 3, padding=1), nn.ReLU(),
            nn.Conv2d(c, d, 3, padding=1), nn.ReLU(),
            nn.Conv2d(d, e, 3, padding=1), nn.ReLU(), pool(),
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(side),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(e * side * side, wide),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(wide, wide),
            nn.ReLU(),
            nn.Linear(wide, num_classes),
        )
        self.init_weights()
""",
)
_add(
    "7.4",
    """
class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.size = dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = q.reshape(n, t, self.heads, self.size).transpose(1, 2)
        k = k.reshape(n, t, self.heads, self.size).transpose(1, 2)
        v = v.reshape(n, t, self.heads, self.size).transpose(1, 2)
        scores = q @ k.transpose(-2, -1) / self.size**0.5
        mixed = scores.softmax(dim=-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(n, t, d))
""",
)
_add(
    "7.5",
    """
class EncoderBlock(nn.Module):
    def __init__(self, dim, heads, mlp_dim):
        super().__init__()
        self.n1 = nn.LayerNorm(dim, eps=1e-6)
        self.att = Attention(dim, heads)
        self.n2 = nn.LayerNorm(dim, eps=1e-6)
        self.a = nn.Linear(dim, mlp_dim)
        self.b = nn.Linear(mlp_dim, dim)

    def forward(self, x):
        y = self.att(self.n1(x))
        x = x + y
        y = self.b(nn.functional.gelu(self.a(self.n2(x))))
        return x + y
""",
)
_add(
    "7.6",
    """
def pareto_front(candidates, cost):
    def beats(b, a):
        cheap, dear = getattr(b, cost), getattr(a, cost)
        return cheap <= dear and b.top1 >= a.top1 and (cheap < dear or b.top1 > a.top1)

    everyone = [c for c in candidates if None not in (getattr(c, cost), c.top1)]
    unbeaten = [a for a in everyone if not any(beats(b, a) for b in everyone)]
    return sorted(unbeaten, key=lambda a: getattr(a, cost))
""",
)
_add(
    "8.1",
    """
def freeze(part):
    for p in part.parameters():
        p.requires_grad = False
    for m in part.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_pre_hook(hold_still)


def thaw(part):
    for p in part.parameters():
        p.requires_grad = True


def hold_still(norm, inputs):
    if all(not p.requires_grad for p in norm.parameters()):
        norm.eval()
""",
)
_add(
    "8.2",
    """
def discriminative_groups(parts, lr, decay, weight_decay):
    groups = []
    count = len(parts)
    for i, part in enumerate(parts):
        rate = lr / decay ** (count - 1 - i)
        for group in parameter_groups(part, weight_decay):
            if len(group["params"]) > 0:
                group["lr"] = rate
                groups.append(group)
    return groups
""",
)
_add(
    "8.3",
    """
class UnfreezingSchedule(Schedule):
    def __init__(self, optimizer, kind, steps, warmup_steps, parts, every):
        self.parts = parts
        self.every = max(1, every)
        super().__init__(optimizer, kind, steps, warmup_steps)

    def _apply(self):
        super()._apply()
        count = min(1 + self.taken // self.every, len(self.parts))
        first = len(self.parts) - count
        for i, part in enumerate(self.parts):
            if i < first:
                freeze(part)
            else:
                thaw(part)
""",
)
_add(
    "8.4",
    """
class FocalLoss(nn.Module):
    def __init__(self, gamma=2.0, alpha=None):
        super().__init__()
        self.gamma, self.alpha = gamma, alpha

    def forward(self, logits, y):
        log_p = logits.log_softmax(1).gather(1, y[:, None]).squeeze(1)
        weight = (1 - log_p.exp()) ** self.gamma
        if self.alpha is not None:
            weight = weight * self.alpha[y]
        return (-weight * log_p).mean()
""",
)
_add(
    "8.5",
    """
def coral_loss(source, target):
    d = source.shape[1]
    a = source - source.mean(0)
    b = target - target.mean(0)
    a = a.T @ a / (len(source) - 1)
    b = b.T @ b / (len(target) - 1)
    return ((a - b) ** 2).sum() / (4 * d * d)
""",
)
_add(
    "8.6",
    """
class GradientReversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, strength):
        ctx.strength = strength
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * -ctx.strength, None
""",
)
_add(
    "8.7",
    """
def adapt_batch_norm(model, loader):
    model.eval()
    old = {}
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            old[m] = m.momentum
            m.reset_running_stats()
            m.momentum = None
            m.train()
    with torch.no_grad():
        for x in in_chunks(loader, mixed=True):
            model(x)
    for m, momentum in old.items():
        m.momentum = momentum
    model.eval()
    return model
""",
)
_add(
    "2.5",
    """
class BatchNorm2d(nn.Module):
    def __init__(self, channels, eps=1e-5, momentum=0.1):
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x):
        mean, var = self.mean, self.var
        if self.training:
            flat = x.transpose(0, 1).flatten(1)
            mean = flat.mean(1)
            var = flat.var(1, unbiased=False)
            with torch.no_grad():
                n = flat.shape[1]
                self.mean.copy_((1 - self.momentum) * self.mean + self.momentum * mean)
                self.var.copy_((1 - self.momentum) * self.var + self.momentum * var * n / (n - 1))
        y = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + self.eps)
        return y * self.gamma[:, None, None] + self.beta[:, None, None]
""",
)
_add(
    "5.4",
    """
def quantize(x, scale, zero_point, bits=8):
    q = torch.round(x / scale) + zero_point
    q = torch.clamp(q, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return q.to(torch.int8)


def dequantize(q, scale, zero_point):
    return (q.to(torch.float32) - zero_point) * scale
""",
)
