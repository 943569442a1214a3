"""Lesson 8's command line: what its flags say of each other."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TypeVar

from common import cli
from common.config import DATASETS, TrainConfig
from common.engine.errors import UserError, unknown

ConfigT = TypeVar("ConfigT", bound=TrainConfig)
EXTERNAL = "torchvision:"


def parse_flags(config_class: type[ConfigT], argv: list[str] | None = None) -> ConfigT:
    """As `common.cli.parse_flags`; `--dataset` may be a folder."""
    if argv is None:
        argv = sys.argv[1:] if cli.script() else []
    config = cli.parse_flags(config_class, argv)
    with cli.exit_codes():
        for flag, value in (("--predict", config.predict), ("--from", config.from_run)):
            if not value and any(word.partition("=")[0] == flag for word in argv):
                raise UserError(f"{flag}: what comes after it is empty")
        return locate(config)


def locate(config: ConfigT, flag: str = "--dataset") -> ConfigT:
    """A `--dataset` that is a path as a folder of images; a `torchvision:` model as pretrained,
    unless it is to be trained from scratch.

    Raises:
        UserError: neither a dataset's name nor a folder.
    """
    if config.model.startswith(EXTERNAL) and config.strategy != "scratch":
        config = dataclasses.replace(config, pretrained=True)
    external = config.model.startswith(EXTERNAL)
    of_one_size = config.model.removeprefix(EXTERNAL).startswith(("vit", "maxvit"))
    if of_one_size and (config.pretrained or external):
        if external and config.image_size not in (None, 224):
            raise UserError(f"--image-size {config.image_size}: {config.model} takes 224 px alone")
        # Their positions fit no other size.
        config = dataclasses.replace(config, image_size=config.image_size or 224)
    if config.dataset in DATASETS:
        return config
    if Path(config.dataset).is_dir():
        return dataclasses.replace(config, dataset="folder", data_dir=config.dataset)
    is_path = "/" in config.dataset or "\\" in config.dataset or Path(config.dataset).exists()
    if is_path or flag != "--dataset":
        raise UserError(f"{flag} {config.dataset}: no such folder")
    raise unknown("dataset, and no folder,", config.dataset, DATASETS)
