"""What a trained model says of picture files: the five likeliest classes, and where it looked."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import inspection, plotting
from common.engine.errors import UserError
from common.engine.files import write_csv, write_json
from common.engine.sources import decodable, read_image
from common.transfer.calibration import Calibration, Trained

EVERY_PICTURE = (
    "every picture gets one of these classes, also one that shows none of them, and it may get it "
    "with a high probability"
)


def paths_of(joined: str) -> list[str]:
    """The paths of `--predict`, joined by `os.pathsep`; one that has it in its name stays whole.
    So does an address, which isn't fetched: the error then names what was typed.
    """
    parts, paths = re.split(f"(?<!http)(?<!https){os.pathsep}|{os.pathsep}(?!//)", joined), []
    while parts:
        ends = range(1, min(len(parts), 8) + 1)
        end = next((n for n in ends if os.path.exists(os.pathsep.join(parts[:n]))), 1)
        paths.append(os.pathsep.join(parts[:end]))
        del parts[:end]
    return paths


def find_images(paths: Sequence[str]) -> list[str]:
    """The files themselves; of a folder, the pictures in it, sorted.

    Raises:
        UserError: a path that isn't there, or no pictures at all.
    """
    found, readable = [], decodable()
    for path in paths:
        here = Path(path)
        if path and here.is_dir():
            inside = sorted(p for p in here.rglob("*") if p.suffix.lower() in readable)
            found += [str(p) for p in inside if not p.name.startswith(".")]
        elif path and here.is_file():
            found.append(path)
        else:
            raise UserError(f"--predict {path}: no such file or folder")
    if not found:
        raise UserError(f"--predict {' '.join(paths)}: no images there")
    return found


def resized_side(side: int) -> int:
    """What the shorter side of a picture is scaled to before a square of `side` is cut out of its
    centre: small images are read at their side, of larger ones a rim of an eighth is cut off.
    """
    return side if side <= 64 else round(side * 256 / 224)


def load_images(
    paths: Sequence[str], side: int, skip_broken: bool = False
) -> tuple[Tensor, list[str]]:
    """(N, 3, side, side) uint8, scaled and cut at the centre as test images are, and their paths.

    Raises:
        UserError: a file can't be read as an image, and `skip_broken` isn't given; or none can.
    """
    from torchvision.transforms.v2 import functional

    images, read = [torch.zeros(0, 3, side, side, dtype=torch.uint8)], []
    for path in paths:
        try:
            image = functional.resize(read_image(path), [resized_side(side)], antialias=True)
        except UserError as error:
            if not skip_broken:
                raise
            print(f"skipped    {error}".partition(": repair")[0], flush=True)
            continue
        images.append(functional.center_crop(image, [side, side])[None])
        read.append(path)
    return torch.cat(images), read


def predict_files(
    net: Trained, paths: Sequence[str], folder: Path, skip_broken: bool = False
) -> list[dict[str, Any]]:
    """Print the likeliest classes of each file, write predictions.csv and predictions.json, and
    draw Grad-CAM over the first 16.

    Returns:
        For each file that could be read: path, class, probability, second, margin (how far the
        first is ahead of the second), unsure (None where no threshold is known), likeliest.
    """
    files, model, calibration = find_images(paths), net.model, net.calibration
    device = next(model.parameters()).device
    mean, std = (v.view(1, 3, 1, 1).to(device) for v in net.mean_std)
    model.eval()
    answers: list[dict[str, Any]] = []
    shown = torch.zeros(0, 3, net.side, net.side, device=device)
    for i in range(0, len(files), 64):
        x, read = load_images(files[i : i + 64], net.side, skip_broken)
        if not read:
            continue
        x = x.to(device).float().div_(255).sub_(mean).div_(std)
        with torch.inference_mode():
            shares = (model(x).float() / calibration.temperature).softmax(1).cpu()
        top = shares.topk(min(5, len(net.class_names)), dim=1)
        for path, classes, values in zip(read, top.indices.tolist(), top.values.tolist()):
            names = [net.class_names[c] for c in classes]
            answers.append(_answer(path, names, values, calibration.threshold))
        shown = torch.cat((shown, x[: 16 - len(shown)]))
    if not answers:
        raise UserError(f"--predict {' '.join(paths)}: none of the files can be read as an image")
    _tell(answers, len(files) - len(answers), calibration)
    _write(answers, folder, calibration)
    titles = [f"{Path(a['path']).name}: {a['class']} {a['probability']:.0%}" for a in answers[:16]]
    pictures, heat = inspection.to_images(shown, *net.mean_std), inspection.grad_cam(model, shown)
    figure = plotting.grad_cam(pictures, heat, titles)
    print(f"figure     {plotting.save(figure, folder / 'predictions.png')}", flush=True)
    return answers


def _answer(
    path: str, names: list[str], shares: list[float], threshold: float | None
) -> dict[str, Any]:
    return {
        "path": path,
        "class": names[0],
        "probability": shares[0],
        "second": names[1],
        "margin": shares[0] - shares[1],
        "unsure": None if threshold is None else shares[0] < threshold,
        "likeliest": dict(zip(names, shares)),
    }


def _tell(answers: list[dict[str, Any]], skipped: int, calibration: Calibration) -> None:
    for answer in answers:
        told = ", ".join(f"{name} {share:.1%}" for name, share in answer["likeliest"].items())
        print(f"predict    {answer['path']}: {told}{'  (unsure)' if answer['unsure'] else ''}")
    if calibration.threshold is not None:
        unsure = sum(bool(a["unsure"]) for a in answers)
        print(
            f"unsure     {unsure} of {len(answers)}: below {calibration.threshold:.1%}, which was "
            f"set on {calibration.images} validation images"
        )
    if skipped:
        print(f"skipped    {skipped} files that can't be read as images")
    print(f"note       {EVERY_PICTURE}")


def _write(answers: list[dict[str, Any]], folder: Path, calibration: Calibration) -> None:
    about = {"temperature": calibration.temperature, "threshold": calibration.threshold}
    told = {"note": EVERY_PICTURE, **about, "predictions": answers}
    write_json(folder / "predictions.json", told)
    rows = [{k: v for k, v in answer.items() if k != "likeliest"} for answer in answers]
    write_csv(folder / "predictions.csv", rows)
    print(f"answers    {folder / 'predictions.csv'}, {folder / 'predictions.json'}")
