"""A trained model put to use: `--predict`; `--export` as files that run without this course, each
checked against the model.
"""

from __future__ import annotations

import importlib.util
import inspect
import io
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from common.engine import processes
from common.engine.device import pick_device
from common.engine.errors import UserError
from common.engine.files import write_atomically, write_json
from common.engine.sources import to_rgb
from common.transfer.calibration import Calibration, Trained
from common.transfer.origins import open_asked
from common.transfer.prediction import paths_of, predict_files, resized_side

TOLERANCE = 1e-4  # largest difference of two logits


def use(config: Any, lesson: ModuleType) -> None:
    """`--from RUN` with `--predict` or `--export`: what the run has learned, put to use.

    `--from resnet20` is the net that travels with the course.

    Raises:
        UserError: a flag is for a training, and nothing is trained here.
    """
    past = open_asked(config, lesson)
    for name in ("dataset", "strategy", "compare", "fraction", "epochs"):
        if getattr(config, name) != getattr(type(config), name):
            raise UserError(
                f"--{name} {getattr(config, name)}: with --from, --predict and --export take the "
                f"run as it is; leave out --{name}, or train first"
            )
    folder = past.folder or Path(config.run_dir) / lesson.LESSON / config.from_run
    folder.mkdir(parents=True, exist_ok=True)
    model, known = past.origin.model, (past.origin.class_names, past.origin.mean_std)
    model = model.to(pick_device(config.device))
    calibration = Calibration.load(past.folder)
    net = Trained(model, *known, past.config.image_size, calibration)
    deploy(config, folder, net, past.build)


def deploy(config: Any, folder: Path, net: Trained, build: Callable[[int], nn.Module]) -> None:
    """Classify the images of `--predict`; write the files of `--export`."""
    if config.predict:
        predict_files(net, paths_of(config.predict), folder, config.skip_broken)
    if config.export or config.export_pixels:
        clean = build(len(net.class_names))  # without the hooks that freezing leaves
        clean.load_state_dict(net.model.state_dict())
        if hasattr(clean, "transform_input"):  # Inception's own way of normalising is no weight
            clean.transform_input = net.model.transform_input
        export_model(replace(net, model=clean), folder, config.export_pixels)


# ------------------------------------------------------------------------------------------- export


class FromPixels(nn.Module):
    """The model with all its preprocessing but the EXIF turn: pictures of any one size
    (N, H, W, 3) uint8 -> (N, K) probabilities.

    ONNX's own Resize gives other pixels than torchvision's when it makes a picture smaller, so the
    two passes of the triangle filter are two products with a matrix of its weights.
    """

    def __init__(self, net: Trained) -> None:
        super().__init__()
        self.model, self.side, self.temperature = net.model, net.side, net.calibration.temperature
        mean, std = (v.cpu().float().reshape(1, 3, 1, 1) for v in net.mean_std)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, pictures: Tensor) -> Tensor:
        _, height, width, _ = pictures.shape
        short = torch.minimum(_whole(height), _whole(width))
        x = pictures.permute(0, 3, 1, 2).double()  # (N, 3, H, W)
        x = _rounded(x @ self._filter(width, short).T)  # (N, 3, H, side)
        x = _rounded(self._filter(height, short) @ x)  # (N, 3, side, side)
        x = (x.float() / 255 - self.mean) / self.std
        return (self.model(x) / self.temperature).softmax(1)

    def _filter(self, length: int, short: Tensor) -> Tensor:
        """(side, length): what each pixel of the square in the centre takes of each pixel of a row,
        or column, when the shorter side of the picture is scaled to `resized_side(side)`.
        """
        resized = resized_side(self.side) * _whole(length) // short
        spare = resized - self.side
        first = spare // 2 + (spare % 4 == 3)  # round(spare / 2), halves to the even number
        scale = _whole(length).double() / resized
        centre = (first + torch.arange(self.side, dtype=torch.float64) + 0.5) * scale
        pixels = torch.arange(length, dtype=torch.float64) + 0.5
        weights = (1 - (pixels - centre[:, None]).abs() / scale.clamp(min=1)).clamp(min=0)
        return weights / weights.sum(1, keepdim=True)


def _whole(number: int) -> Tensor:
    """So that a size is computed in the file, and not once for all when it is written."""
    return torch.scalar_tensor(number, dtype=torch.int64)


def _rounded(x: Tensor) -> Tensor:
    """To whole numbers, as pixels are; what is just at a half goes up wherever it is computed."""
    return (x + (0.5 + 2**-20)).floor()


def export_model(net: Trained, folder: Path, pixels: bool = False) -> dict[str, float]:
    """Write `model.pt2` (torch.export) and, where its packages are installed, `model.onnx`, each
    for any number of normalised images; `model.json`, which says how a picture becomes an input
    and what the outputs mean; and `classify.py`, which does so by onnxruntime, without the course.

    Every file is read again and asked for the answer to three images, one more than it was made
    with.

    Args:
        pixels: the files hold `FromPixels(net)`: pictures of any size in, probabilities out.

    Returns:
        The largest difference to the model's own answer, by file name.

    Raises:
        UserError: a file gives other answers, or can't be written.
    """
    model, side = net.model.cpu().eval(), net.side
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 3, side, side, generator=generator)
    free = {0: torch.export.Dim("batch", min=1, max=4096)}
    example = x[:2]
    if pixels:
        model = FromPixels(net).eval()
        shape = 3, side + 29, 2 * side + 12, 3
        x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        free |= {1: torch.export.Dim("height"), 2: torch.export.Dim("width")}
        example = x[:2, 10:, 5:].contiguous()
    with torch.inference_mode():
        expected = model(x)
    differences: dict[str, float] = {}
    for name, write in WRITERS.items():
        missing = [p for p in NEEDS.get(name, ()) if importlib.util.find_spec(p) is None]
        if missing:
            print(f"export     {name} left out: pip install {' '.join(missing)}")
            continue
        path = folder / name
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of deprecations inside torch
                answers = write(model, example, path, free)(x).detach()
        except OSError as error:
            raise UserError(f"{path} can't be written ({error.strerror})") from None
        off = differences[name] = float((answers - expected).abs().max())
        if not off <= TOLERANCE:
            raise UserError(f"{path} answers otherwise than the model, by {off:.2g}")
        size = path.stat().st_size / 1e6
        print(f"export     {path}, {size:.1f} MB, right to {off:.1g}")
    preprocessing: dict[str, object] = {"turn": "as the EXIF tag says", "channels": "RGB"}
    if not pixels:
        mean, std = (v.flatten().tolist() for v in net.mean_std)
        # Pixels of the shorter side, and of the side of the square in the centre.
        preprocessing |= {"resize": resized_side(side), "resample": "bilinear, antialiased"}
        preprocessing |= {"crop": side, "range": [0, 1], "mean": mean, "std": std}
    output = (
        "probabilities" if pixels else "logits; probabilities are softmax(logits / temperature)"
    )
    facts = {
        "input": [None, None, None, 3] if pixels else [None, 3, side, side],
        "input_type": "uint8" if pixels else "float32",
        "preprocessing": preprocessing,
        "classes": list(net.class_names),
        "output": output,
        "temperature": net.calibration.temperature,
        "unsure_below": net.calibration.threshold,
        "files": differences,
    }
    write_json(folder / "model.json", facts)
    if "model.onnx" not in differences:  # which the script asks
        return differences
    write_atomically(
        folder / "classify.py", CLASSIFY.replace("# to_rgb", inspect.getsource(to_rgb))
    )
    if processes.is_main():
        print(f"export     {folder / 'classify.py'}, which needs numpy, pillow and onnxruntime")
    return differences


# What a picture goes through, in plain numpy. Its sizes and its rounding are torchvision's; how it
# becomes RGB is the course's own function.
CLASSIFY = '''"""python classify.py IMAGE ...: what model.onnx says of pictures, by model.json."""

import json
import pathlib
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


# to_rgb

here = pathlib.Path(__file__).parent
about = json.loads((here / "model.json").read_text(encoding="utf-8"))
how = about["preprocessing"]
session = onnxruntime.InferenceSession(str(here / "model.onnx"), providers=["CPUExecutionProvider"])
for path in sys.argv[1:]:
    image = to_rgb(ImageOps.exif_transpose(Image.open(path)))
    if "crop" in how:  # otherwise all this is in model.onnx
        short, side = min(image.size), how["crop"]
        sides = [how["resize"] * s // short for s in image.size]
        image = image.resize(sides, Image.Resampling.BILINEAR)
        left, top = (round((s - side) / 2) for s in image.size)
        image = image.crop((left, top, left + side, top + side))
    x = np.asarray(image)  # (H, W, 3) uint8
    if "mean" in how:
        x = (np.float32(x) / 255 - np.float32(how["mean"])) / np.float32(how["std"])
        x = x.transpose(2, 0, 1)
    (answer,) = session.run(None, {session.get_inputs()[0].name: x[None]})
    p = answer[0]
    if about["output"] != "probabilities":
        z = p / about["temperature"]
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    print(path, about["classes"][p.argmax()], f"{p.max():.4f}", sep="\\t")
'''


Answer = Callable[[Tensor], Tensor]  # a file that was read again


def _torch_export(model: nn.Module, x: Tensor, path: Path, free: dict[int, Any]) -> Answer:
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=(free,))
    # In memory first: on a full disk torch's own writer ends the whole process.
    data = io.BytesIO()
    torch.export.save(program, data)
    write_atomically(path, data.getvalue())
    return torch.export.load(path).module()


def _onnx(model: nn.Module, x: Tensor, path: Path, free: dict[int, Any]) -> Answer:
    import onnxruntime

    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=(free,), verbose=False)
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


WRITERS = {"model.pt2": _torch_export, "model.onnx": _onnx}
NEEDS = {"model.onnx": ("onnx", "onnxscript", "onnxruntime")}
