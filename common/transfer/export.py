"""A trained model as files that run without this course, each checked against the model."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common.engine import processes
from common.engine.errors import UserError
from common.engine.files import write_atomically, write_json
from common.transfer.calibration import UNKNOWN, Calibration
from common.transfer.prediction import resized_side

TOLERANCE = 1e-4  # largest difference of two logits


class FromPixels(nn.Module):
    """The model with its preprocessing but for resize and crop, which no ONNX operator does as
    torchvision does: (N, H, W, 3) uint8 -> (N, K) probabilities.
    """

    def __init__(
        self, model: nn.Module, mean_std: tuple[Tensor, Tensor], temperature: float
    ) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature
        for name, values in zip(("mean", "std"), mean_std):
            self.register_buffer(name, values.detach().cpu().float().reshape(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.permute(0, 3, 1, 2).float() / 255
        return (self.model((x - self.mean) / self.std) / self.temperature).softmax(1)


def export_model(
    model: nn.Module,
    input_size: tuple[int, int, int],
    folder: os.PathLike | str,
    class_names: Sequence[str],
    mean_std: tuple[Tensor, Tensor],
    calibration: Calibration = UNKNOWN,
    pixels: bool = False,
) -> dict[str, float]:
    """Write `model.pt2` (torch.export) and, where its packages are installed, `model.onnx`, each
    for any number of normalised images; `model.json`, which says how a picture becomes an input
    and what the outputs mean; and `classify.py`, which does so by onnxruntime, without the course.

    Every file is read again and asked for the answer to three images, one more than it was made
    with.

    Args:
        pixels: the files hold `FromPixels(model)`: pixels in, probabilities out.

    Returns:
        The largest difference to the model's own logits, by file name.

    Raises:
        UserError: a file gives other logits, or can't be written.
    """
    folder = Path(folder)
    model = model.cpu().eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *input_size, generator=generator)
    if pixels:
        model = FromPixels(model, mean_std, calibration.temperature).eval()
        shape = (3, *input_size[1:], 3)
        x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    with torch.inference_mode():
        expected = model(x)
    differences: dict[str, float] = {}
    for name, write in WRITERS.items():
        missing = [p for p in NEEDS.get(name, ()) if importlib.util.find_spec(p) is None]
        if missing:
            print(f"export     {name} left out: pip install {' '.join(missing)}")
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of deprecations inside torch
                again = write(model, x[:2], folder / name)
                logits = again(x).detach()
        except OSError as error:
            raise UserError(f"{folder / name} can't be written ({error.strerror})") from None
        differences[name] = float((logits - expected).abs().max())
        if not differences[name] <= TOLERANCE:
            raise UserError(
                f"{folder / name} gives other logits than the model, by {differences[name]:.2g}"
            )
        size = (folder / name).stat().st_size / 1e6
        print(f"export     {folder / name}, {size:.1f} MB, logits within {differences[name]:.1g}")
    mean, std = (v.flatten().tolist() for v in mean_std)
    inside = {} if pixels else {"range": [0, 1], "mean": mean, "std": std}
    output = "logits; probabilities are softmax(logits / temperature)"
    facts = {
        "input": [None, *x.shape[1:]],
        "input_type": "uint8" if pixels else "float32",
        "preprocessing": {
            "turn": "as the EXIF tag says",
            "channels": "RGB",
            "resize": resized_side(input_size[1]),  # of the shorter side, in pixels
            "resample": "bilinear, antialiased",
            "crop": input_size[1],  # side of the square in the centre, in pixels
            **inside,
        },
        "classes": list(class_names),
        "output": "probabilities" if pixels else output,
        "temperature": calibration.temperature,
        "unsure_below": calibration.threshold,
    }
    write_json(folder / "model.json", {**facts, "files": differences})
    write_atomically(folder / "classify.py", CLASSIFY)
    if processes.is_main():
        print(f"export     {folder / 'classify.py'}, which needs numpy, pillow and onnxruntime")
    return differences


# What a picture goes through, in plain numpy. Its sizes and its rounding are torchvision's.
CLASSIFY = '''"""python classify.py IMAGE ...: what model.onnx says of pictures, by model.json."""

import json
import pathlib
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

here = pathlib.Path(__file__).parent
about = json.loads((here / "model.json").read_text(encoding="utf-8"))
how, side = about["preprocessing"], about["preprocessing"]["crop"]
session = onnxruntime.InferenceSession(str(here / "model.onnx"), providers=["CPUExecutionProvider"])
for path in sys.argv[1:]:
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    short = min(image.size)
    sides = [how["resize"] * s // short for s in image.size]
    image = image.resize(sides, Image.Resampling.BILINEAR)
    left, top = (round((s - side) / 2) for s in image.size)
    x = np.asarray(image.crop((left, top, left + side, top + side)))  # (side, side, 3), uint8
    if about["input_type"] == "float32":
        x = (np.float32(x) / 255 - np.float32(how["mean"])) / np.float32(how["std"])
        x = x.transpose(2, 0, 1)
    (answer,) = session.run(None, {session.get_inputs()[0].name: x[None]})
    p = answer[0]
    if about["output"] != "probabilities":
        z = p / about["temperature"]
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    print(path, about["classes"][p.argmax()], f"{p.max():.4f}", sep="\\t")
'''


def _torch_export(model: nn.Module, x: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    batch = torch.export.Dim("batch", min=1, max=4096)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _onnx(model: nn.Module, x: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.onnx.export(
        model, (x,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


WRITERS = {"model.pt2": _torch_export, "model.onnx": _onnx}
NEEDS = {"model.onnx": ("onnx", "onnxscript", "onnxruntime")}
