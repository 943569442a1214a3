"""A trained model put to use: `--predict` and `--export`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from common.engine.device import pick_device
from common.engine.errors import UserError
from common.transfer.calibration import Calibration
from common.transfer.export import export_model
from common.transfer.origins import open_asked
from common.transfer.prediction import paths_of, predict_files


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
    origin, calibration = past.origin, Calibration.load(past.folder)
    model, side = origin.model.to(pick_device(config.device)), past.config.image_size
    known = origin.class_names, origin.mean_std
    deploy(config, folder, model, *known, side, past.build, calibration)


def deploy(
    config: Any,
    folder: Path,
    model: nn.Module,
    class_names: Sequence[str],
    mean_std: tuple[Tensor, Tensor],
    side: int,
    build: Callable[[int], nn.Module],
    calibration: Calibration,
) -> None:
    """Classify the images of `--predict`; write the files of `--export`."""
    if config.predict:
        paths = paths_of(config.predict)
        predict_files(
            model, class_names, mean_std, side, paths, folder, calibration, config.skip_broken
        )
    if config.export or config.export_pixels:
        clean = build(len(class_names))  # without the hooks that freezing leaves
        clean.load_state_dict(model.state_dict())
        if hasattr(model, "transform_input"):  # Inception's own way of normalising is no weight
            clean.transform_input = model.transform_input
        known = class_names, mean_std, calibration
        export_model(clean, (3, side, side), folder, *known, config.export_pixels)
