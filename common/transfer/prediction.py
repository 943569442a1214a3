"""What a trained model says of picture files: the five likeliest classes, and where it looked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common import inspection, plotting
from common.engine.errors import UserError
from common.engine.sources import EXTENSIONS, read_image


def find_images(paths: Sequence[str]) -> list[str]:
    """The files themselves; of a folder, the pictures in it, sorted.

    Raises:
        UserError: a path that isn't there, or no pictures at all.
    """
    found: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS)
            found += [str(p) for p in inside if not p.name.startswith(".")]
        elif path.is_file():
            found.append(str(path))
        else:
            raise UserError(f"--predict {path}: no such file or folder")
    if not found:
        raise UserError(f"--predict {' '.join(paths)}: no images there")
    return found


def load_images(paths: Sequence[str], side: int) -> Tensor:
    """(N, 3, side, side) uint8, scaled and cut at the centre as test images are.

    Raises:
        UserError: a file can't be read as an image.
    """
    from torchvision.transforms import v2

    # Small images are decoded to their side, larger ones cut out of a slightly larger picture.
    resized = side if side <= 64 else round(side * 256 / 224)
    transform = v2.Compose([v2.Resize(resized, antialias=True), v2.CenterCrop(side)])
    return torch.stack([transform(read_image(path)) for path in paths])


def predict_files(
    model: nn.Module,
    class_names: Sequence[str],
    mean_std: tuple[Tensor, Tensor],
    side: int,
    paths: Sequence[str],
    folder: os.PathLike | str,
    most: int = 5,
) -> list[dict[str, float]]:
    """Print the likeliest classes of each file, and draw Grad-CAM over the first 16.

    Returns:
        For each file its likeliest classes and their probabilities, the best first.
    """
    files = find_images(paths)
    device = next(model.parameters()).device
    mean, std = (v.view(1, 3, 1, 1).to(device) for v in mean_std)
    model.eval()
    answers: list[dict[str, float]] = []
    for i in range(0, len(files), 64):
        x = load_images(files[i : i + 64], side).to(device).float().div_(255).sub_(mean).div_(std)
        with torch.inference_mode():
            shares = model(x).float().softmax(1).cpu()
        top = shares.topk(min(most, len(class_names)), dim=1)
        answers += [
            {class_names[c]: p for c, p in zip(classes, values)}
            for classes, values in zip(top.indices.tolist(), top.values.tolist())
        ]
        if i == 0:
            shown = x[:16]
    for file, answer in zip(files, answers):
        told = ", ".join(f"{name} {share:.1%}" for name, share in answer.items())
        print(f"predict    {file}: {told}")
    titles = [
        f"{Path(file).name}: {next(iter(answer))} {next(iter(answer.values())):.0%}"
        for file, answer in zip(files[: len(shown)], answers)
    ]
    figure = plotting.grad_cam(
        inspection.to_images(shown, *mean_std), inspection.grad_cam(model, shown), titles
    )
    print(f"figure     {plotting.save(figure, Path(folder) / 'predictions.png')}", flush=True)
    return answers
