"""A trained model as files that run without this course, each checked against the model."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common.engine.errors import UserError
from common.engine.files import write_json

TOLERANCE = 1e-4  # largest difference of two logits


def export_model(
    model: nn.Module,
    input_size: tuple[int, int, int],
    folder: os.PathLike | str,
    class_names: Sequence[str],
    mean_std: tuple[Tensor, Tensor],
) -> dict[str, float]:
    """Write `model.pt2` (torch.export), `model.torchscript` and, where its packages are installed,
    `model.onnx`, each for any number of normalised images, and `model.json`, which says how to
    normalise and what the outputs mean.

    Every file is read again and asked for the logits of three images, one more than it was made
    with.

    Returns:
        The largest difference to the model's own logits, by file name.

    Raises:
        UserError: a file gives other logits, or can't be written.
    """
    folder = Path(folder)
    model = model.cpu().eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *input_size, generator=generator)
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
    facts = {"input": [None, *input_size], "mean": mean, "std": std, "classes": list(class_names)}
    write_json(folder / "model.json", {**facts, "files": differences})
    return differences


def _torch_export(model: nn.Module, x: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    batch = torch.export.Dim("batch", min=1, max=4096)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _torchscript(model: nn.Module, x: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    # Freezing dissolves the submodules, whose classes live in modules with names such as 01_resnet,
    # which TorchScript can't spell.
    with torch.no_grad():
        torch.jit.freeze(torch.jit.trace(_Plain(model).eval(), x)).save(str(path))
    return torch.jit.load(str(path))


class _Plain(nn.Module):
    """A model under a class name that every format can spell."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


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


WRITERS = {"model.pt2": _torch_export, "model.torchscript": _torchscript, "model.onnx": _onnx}
NEEDS = {"model.onnx": ("onnx", "onnxscript", "onnxruntime")}
