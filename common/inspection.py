"""Looks inside a trained model and hands back numpy arrays; leaves the model as it was found.

Works on every model of lessons 01 to 06: `model.stages` names the parts, and
`model.forward_features(x)` gives the last feature map. A model wrapped by torch.compile is looked
at in its plain form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.config import TrainConfig
from common.engine import sources
from common.engine.device import evaluating
from common.engine.records import LayerRecord
from common.engine.weights import size_for_weights
from common.limits import large_enough
from common.profiling import count_macs, count_parameters, macs_by_module


def first_filters(model: nn.Module) -> np.ndarray:
    """The weights of the first convolution, (out, in, kh, kw).

    Raises:
        ValueError: the model has no convolution.
    """
    for module in _plain(model).modules():
        if isinstance(module, nn.Conv2d):
            return _array(module.weight)
    raise ValueError(f"{type(model).__name__} has no convolution whose filters could be shown")


def stage_activations(model: nn.Module, x: Tensor, part: str = "") -> dict[str, np.ndarray]:
    """What each child of `model.stages`, or its `part`, puts out for one image (1, C, H, W), as
    (C, h, w) by name.

    Numbered stages are called "stage 1", "stage 2", ...; named ones keep their names.
    """
    model = _plain(model)
    if len(x) != 1:
        raise ValueError(f"stage_activations takes one image, (1, C, H, W), not {tuple(x.shape)}")
    stages = {
        f"stage {int(name) + 1}" if name.isdigit() else name: stage.get_submodule(part)
        for name, stage in model.stages.named_children()
    }
    seen: dict[str, np.ndarray] = {}

    def keep(name: str, output: Tensor) -> None:
        seen[name] = _array(_as_map(model, output)[0])

    with _hooked(stages, keep), evaluating(model), torch.no_grad():
        model(_beside(model, x))
    return seen


def grad_cam(
    model: nn.Module,
    x: Tensor,
    class_index: Tensor | Sequence[int] | None = None,
    *,
    min_size: int = 4,
) -> np.ndarray:
    """Where the last feature map speaks for a class: (N, C, H, W) -> (N, h, w) in [0, 1].

    Each channel k of the feature map A is weighted by the mean over all places of d score / d A_k;
    what speaks against the class is cut off.  Selvaraju et al. 2017, eq. 1 and 2. Each image's map
    is divided by its own largest value; it is zero everywhere if nothing spoke for the class.

    NOTE: where the head takes maxima (ResNet-9), each place has its own gradient, and their mean
    credits a channel in places that no maximum came from. There d score / d A is multiplied with A
    place by place (Draelos & Carin 2020, "HiResCAM"; for a head that takes means it is the same).
    With the brightest quarter of 200 CIFAR-10 test images greyed, resnet9_wide's mean probability
    (after its first 36 epochs) fell from 75% to 36%; by channel means to 48%, as with a random
    quarter, 49%.

    NOTE: of small images the last feature map has a single place, or four, and shows nothing. Where
    it has less than `min_size` rows or columns, the last stage with as many is looked at instead.

    Args:
        class_index: (N,), the class whose logit is explained; by default the predicted one of each
            image.
    """
    model = _plain(model)
    maps: list[Tensor] = []  # each stage's output, then what forward_features gives

    def watch(name: str, features: Tensor) -> Tensor:
        """Keep `features`, and go on with a copy: what follows may work in place."""
        maps.append(features)
        return features.clone()

    compute_features = model.forward_features
    model.forward_features = lambda x: watch("last", compute_features(x))
    stages = _hooked(_stages(model), watch)
    try:
        with stages, evaluating(model), torch.inference_mode(False), torch.enable_grad():
            # The input asks for a gradient, so features have one even if every layer is frozen.
            logits = model(_beside(model, x).clone().requires_grad_())  # (N, K)
            if not maps:
                raise ValueError(f"{type(model).__name__}.forward does not call forward_features")
            if class_index is None:
                class_index = logits.argmax(dim=1)
            chosen = torch.as_tensor(class_index, dtype=torch.long, device=logits.device)
            # Images don't mix in eval mode, so the gradient of the sum holds each image's own.
            score = logits.gather(1, chosen[:, None]).sum()
            if maps[-1].dim() == 3:  # a transformer's last tokens: its classifier reads only one
                maps = maps[:-1] or maps
            large = (m for m in maps if min(_as_map(model, m).shape[2:]) >= min_size)
            features = [maps[-1], *large][-1]
            (gradient,) = torch.autograd.grad(score, features)
            gradient, features = (_as_map(model, t) for t in (gradient, features))  # (N, C, h, w)
    finally:
        del model.forward_features  # the method of the class is back

    if not any(isinstance(m, nn.AdaptiveMaxPool2d) for m in model.modules()):
        gradient = gradient.mean(dim=(2, 3), keepdim=True)  # (N, C, 1, 1)
    cam = (gradient * features.detach()).sum(dim=1).relu()  # (N, h, w)
    largest = cam.amax(dim=(1, 2), keepdim=True)
    return _array(torch.where(largest > 0, cam / largest, 0))


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


def to_images(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised images (N, C, H, W) as they look: (N, H, W, 3) in [0, 1]. One channel is gray."""
    x = x.detach().float().cpu()
    mean, std = (torch.as_tensor(v, dtype=torch.float32).reshape(1, -1, 1, 1) for v in (mean, std))
    images = (x * std + mean).clamp(0, 1).permute(0, 2, 3, 1)  # (N, H, W, C)
    return images.expand(-1, -1, -1, 3).numpy().copy()


@contextmanager
def _hooked(
    modules: Mapping[str, nn.Module], hook: Callable[[str, Any], Tensor | None]
) -> Iterator[None]:
    """Inside, `hook(name, output)` sees what each module puts out, and may give another output."""
    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_hook(lambda _, __, out, name=name: hook(name, out))
            stack.enter_context(handle)
        yield


def _stages(model: nn.Module) -> dict[str, nn.Module]:
    """The stages by name. torchvision's Transformers have one, the encoder, and of its output the
    classifier reads the class token alone: its blocks then.
    """
    stages = dict(getattr(model, "stages", nn.Module()).named_children())
    (encoder,) = stages.values() if len(stages) == 1 else (None,)
    if hasattr(encoder, "pos_embedding"):
        return dict(encoder.layers.named_children())
    return stages


def _plain(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's wrapper, whose compiled code would not see hooks."""
    return getattr(model, "_orig_mod", model)


def _beside(model: nn.Module, x: Tensor) -> Tensor:
    """`x` on the model's device, in the type of its weights."""
    like = next(model.parameters(), x)
    return x.to(device=like.device, dtype=like.dtype)


def _as_map(model: nn.Module, x: Tensor) -> Tensor:
    """(N, C, h, w) of a stage's output, of tokens (N, T, C) without the class token, or of Swin's
    (N, h, w, C).
    """
    if x.dim() == 3:
        side = math.isqrt(x.shape[1])
        return x[:, -(side**2) :].transpose(1, 2).unflatten(2, (side, side))
    return x.permute(0, 3, 1, 2) if getattr(model, "channels_at_end", False) else x


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy().copy()


# ---------------------------------------------------------------------------------- the layer table


def layer_table(
    model: nn.Module, input_size: tuple[int, int, int], depth: int = 0
) -> list[LayerRecord]:
    """One record per layer that computes or holds something, in the order of the definition.

    Output shapes are of one image; parameters and MACs are a layer's own, so that the columns add
    up to `count_parameters` and `count_macs`. Works on the meta device.

    Args:
        depth: what lies deeper is counted with the module of so many levels around it; 0: nothing.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            shapes[name] = tuple(output.shape)

    root, modules = type(model).__name__, dict(model.named_modules())
    with _hooked(modules, note):
        macs = macs_by_module(model, input_size)
    total = {path.removeprefix(root + "."): sum(ops.values()) for path, ops in macs.items()}
    total[""] = total.pop("Global", 0)
    children = {
        name: [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
        for name, module in modules.items()
    }
    for name in reversed(modules):
        # A list of modules is never called itself, so the counter knows nothing of it.
        total.setdefault(name, sum(total.get(child, 0) for child in children[name]))
    records, seen = [], set()
    for name, module in modules.items():
        level = name.count(".")
        if depth and level >= depth:
            continue
        # A parameter that two layers share is listed, as it is counted, with the first.
        folded = level == depth - 1 and name != ""
        own_parameters = [p for p in module.parameters(recurse=folded) if p not in seen]
        seen.update(own_parameters)
        inside = [] if folded else children[name]
        own_macs = total[name] - sum(total.get(child, 0) for child in inside)
        params = sum(p.numel() for p in own_parameters)
        # What holds parameters is listed even if it runs in training only (auxiliary heads).
        if params or own_macs or (name in shapes and not inside):
            kind, shape = type(module).__name__, shapes.get(name, ())
            records.append(LayerRecord(name or root, kind, shape, params, own_macs))
    return records


def thop_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """What thop counts for the same image: BatchNorm too, attention and bare parameters not."""
    import thop

    copy = deepcopy(model).to("meta").eval()  # thop leaves its counters in the modules
    with torch.no_grad():
        image = torch.zeros(1, *input_size, device="meta")
        macs, _ = thop.profile(copy, (image,), verbose=False)
    return int(macs)


def print_summary(config: TrainConfig, build: Callable[[Any, int], nn.Module]) -> None:
    """The layer table of `--summary`, computed on the meta device: no weights, no data, no time."""
    name, _ = sources.choose_dataset(config.dataset, config.data_dir, gpu=False)
    image_size, classes = None, {"cifar100": 100, "imagenet": 1000}.get(name, 10)
    if name == "folder":
        image_size, _ = sources.size_of_folder(config.data_dir)
        classes = len(sources.load_folder(config.data_dir, seed=0).class_names)
    if config.pretrained:
        image_size = size_for_weights(config.model, config.image_size, 224)
    config = config.resolve(name, image_size)
    with torch.device("meta"):
        model = build(config, classes)
    size = (3, config.image_size, config.image_size)
    with large_enough(config.model, config.image_size):
        params, macs = count_parameters(model), count_macs(model, size)
    lines = [("layer", "kind", "output", "parameters", "MACs")]
    for r in layer_table(model, size, config.summary_depth):
        shape = "x".join(map(str, r.output_shape[1:])) if r.output_shape else "training only"
        lines.append((r.name, r.kind, shape, f"{r.params:,}", f"{r.macs:,}"))
    lines.append(("total", "", "", f"{params:,}", f"{macs:,}"))
    name, *widths = (max(map(len, column)) for column in zip(*lines))
    name = min(name, 80 - sum(widths) - 2 * len(widths))  # a terminal's 80 columns
    print(f"{config.model} for {config.dataset}: {classes} classes, {config.image_size} px\n")
    for layer, kind, *numbers in lines:
        layer = layer if len(layer) <= name else "…" + layer[-name + 1 :]
        right = "  ".join(f"{number:>{w}}" for number, w in zip(numbers, widths[1:]))
        print(f"{layer:<{name}}  {kind:<{widths[0]}}  {right}")
    theirs = f"{thop_macs(model, size):,} MACs"
    print(f"thop counts {theirs}: BatchNorm and pooling too, but no attention.")
