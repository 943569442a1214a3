"""A trained model put to use: `--predict` and `--export`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from common.engine.device import pick_device
from common.engine.errors import UserError
from common.transfer.calibration import Calibration, Trained
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
