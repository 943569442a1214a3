"""A run's settings: one frozen dataclass whose fields are the flags, and a recipe for the rest."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import os
import typing
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, ClassVar

from common.engine.errors import UserError, unknown

DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "folder", "imagenet", "auto")

# Without a tenth for validation.
TRAIN_IMAGES = {
    "digits": 1295,
    "mnist": 54_000,
    "fashion_mnist": 54_000,
    "cifar10": 45_000,
    "cifar100": 45_000,
}

Recipe = dict[str, Any]
SMALL: Recipe = {"image_size": 32, "batch_size": 128}


def knob(
    default: Any,
    help: str,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    short: str = "",
    nargs: str | None = None,
    only: str = "",
    never: str = "",
    without: tuple[str, ...] = (),
) -> Any:
    """A field that is also a flag: its default, its line in --help, what it may be.

    Args:
        low: the least and `high` the most that it may be, both included. Every number has both. A
            text that has them is a list such as 20,56, and they hold for each number in it.
        short: another name of the flag.
        nargs: "+" for a text that is typed as several words; `os.pathsep` joins them.
        only: the experiments, with commas, or the flag such as `--summary`, without which it would
            do nothing.
        never: the flag, perhaps with one value as in `--augment none`, beside which it would do
            nothing.
        without: how the names of models begin that have no such thing.
    """
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "short": short}
    only = only if only.startswith("--") or not only else f"--experiment {only}"
    metadata |= {"nargs": nargs, "only": only, "never": never, "without": without}
    return dataclasses.field(default=default, metadata=metadata)


def numbers_of(value: float | str, flag: str) -> list[float]:
    """The one number that a knob holds, or those of a text such as 0.25,0.5,1.

    Raises:
        UserError: a part of the text is no number.
    """
    if not isinstance(value, str):
        return [value]
    try:
        return [float(part) for part in value.split(",")] if value else []
    except ValueError:
        raise UserError(f"{flag} {value}: wants numbers with commas between them") from None


@functools.cache
def knob_types(config_class: type[TrainConfig]) -> dict[str, tuple[type, ...]]:
    """What each knob may be: (int,), or (int, NoneType) where the recipe may decide."""
    hints = typing.get_type_hints(config_class)
    names = (spec.name for spec in dataclasses.fields(config_class))
    return {name: typing.get_args(hints[name]) or (hints[name],) for name in names}


def fits(value: object, kinds: tuple[type, ...]) -> bool:
    """Whether a value, of a JSON file perhaps, is of one of the types; an int is a float too."""
    if isinstance(value, bool):
        return bool in kinds
    wider = {int: numbers.Integral, float: numbers.Real, str: (str, os.PathLike)}
    return any(isinstance(value, wider.get(kind, kind)) for kind in kinds)


def refuse_idle(config: TrainConfig, names: Container[str] | None = None) -> None:
    """A flag that would do nothing is a mistake, which nobody would see.

    Args:
        names: of the knobs to look at; all if None.

    Raises:
        UserError: a knob is set without that for which it is `only`, or beside what it is `never`.
    """

    def there(flag: str) -> bool:
        name, _, ones = flag.partition(" ")
        given = getattr(config, name.removeprefix("--"))
        return given in ones.split(", ") if ones else bool(given)

    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if value == spec.default or not (names is None or spec.name in names):
            continue
        mine = spec.metadata.get("short") or "--" + spec.name.replace("_", "-")
        needs, beside = spec.metadata.get("only"), spec.metadata.get("never")
        if needs and not there(needs):
            raise UserError(f"{mine} is for {needs}, and would do nothing here")
        if value and beside and there(beside):
            raise UserError(f"{mine} would do nothing beside {beside}")


@dataclass(frozen=True)
class TrainConfig:
    """What every lesson can be told. `None` means: by the recipe of the dataset (see `RECIPES`).

    A lesson subclasses it, changes defaults, adds its own knobs, and gives in its own `RECIPES`
    only what differs.

    Raises:
        UserError: a value outside its range or choices, from the constructor.
    """

    model: str = knob("", "architecture, a name of MODELS")
    dataset: str = knob("auto", "what to train on", DATASETS)
    data_dir: str = knob(
        "data", "where datasets are, or are downloaded to; the images with --dataset folder"
    )
    image_size: int | None = knob(None, "side in pixels that the model sees", low=4, high=4096)
    val_share: float = knob(
        0.1,
        "of the training images, kept for validation where the data has none",
        low=1e-3,
        high=0.5,
    )
    augment: str | None = knob(
        None,
        "crop and flip (basic), with mirrored edges and flips in turn (alternating), or much more",
        ("none", "basic", "alternating", "strong", "randaugment", "autoaugment"),
    )
    cutout: int | None = knob(
        None, "side in pixels of a blanked square in each training image", low=0, high=4096
    )
    still: float | None = knob(
        None,
        "last share of the epochs, in which small images are not shifted",
        low=0,
        high=1,
        never="--augment none",
    )

    recipe: str = knob(
        "", "fast: few epochs, Muon, alternating flips, smoothed labels", ("", "fast")
    )
    epochs: int | None = knob(None, "passes over the training images", low=1, high=10_000)
    batch_size: int | None = knob(None, "images per forward pass and process", low=1, high=65_536)
    accumulate: int = knob(1, "batches per optimizer step", low=1, high=4096)
    base_lr: float | None = knob(
        None,
        "peak learning rate per 256 images of an optimizer step",
        low=0,
        high=100,
        never="--lr",
    )
    lr: float | None = knob(
        None,
        "peak learning rate as it is; default: base_lr x images per step / 256",
        low=0,
        high=100,
    )
    optimizer: str | None = knob(None, "what takes the steps", ("sgd", "adamw", "muon"))
    momentum: float | None = knob(
        None, "of SGD and Muon, Nesterov's form", low=0, high=0.9999, never="--optimizer adamw"
    )
    weight_decay: float | None = knob(
        None, "on weights; biases and norms have none", low=0, high=100
    )
    label_smoothing: float | None = knob(
        None, "share of each label spread over all classes", low=0, high=0.9
    )
    schedule: str | None = knob(
        None,
        "of the learning rate",
        ("cosine", "linear", "onecycle", "step", "plateau", "constant"),
    )
    warmup: float | None = knob(
        None, "epochs in which the learning rate rises linearly", low=0, high=10_000
    )
    clip: float = knob(0.0, "largest gradient norm; 0: no limit", low=0, high=1e6)
    ema: float | None = knob(
        None,
        "decay per step of a running average of the weights, e.g. 0.999; 0: none",
        low=0,
        high=0.999999,
    )
    patience: int = knob(
        0,
        "stop after so many epochs without a better validation loss; 0: never",
        low=0,
        high=10_000,
    )

    views: bool = knob(
        False, "test a second time with shifted and mirrored views averaged; kept apart"
    )

    device: str = knob("auto", "auto, cpu, cuda, cuda:1, mps")
    amp: bool = knob(True, "mixed precision where the chip gains by it")
    compile: bool = knob(False, "torch.compile the model: minutes to start, faster after")
    deterministic: bool = knob(False, "bit-equal reruns on a GPU too, at some cost in speed")
    auto_batch: bool = knob(True, "on CUDA out of memory halve the batch and double --accumulate")
    sync_bn: bool = knob(False, "BatchNorm over all processes")
    workers: int | None = knob(
        None, "processes that decode images; default: one per core, 8 at most", low=0, high=128
    )
    seed: int = knob(0, "of weights, data order, augmentation and splits", low=0, high=2**32 - 1)

    run_dir: str = knob("runs", "results go to RUN_DIR/<lesson>/<run name>/")
    resume: str = knob("", "run folder, or its last.pt, to go on with")
    save_every: float = knob(60.0, "seconds between checkpoints within an epoch", low=0, high=1e6)
    pretrained: bool = knob(
        False, "start from trained weights: the course's own if it has some, else official ones"
    )
    skip_broken: bool = knob(False, "leave out images that can't be read, and count them")
    summary: bool = knob(False, "print the layer table and stop")
    summary_depth: int = knob(
        0, "levels of modules to show, 0: all", low=0, high=20, short="--depth", only="--summary"
    )
    find_lr: bool = knob(
        False, "raise the learning rate step by step and draw the loss, instead of training"
    )
    track: str = knob("", "write TensorBoard's files too", ("tensorboard", ""))
    experiment: str = knob("", "run the lesson's experiment of this name instead of training")
    seeds: int | None = knob(
        None,
        "trainings of each arm of an experiment, with seeds SEED, SEED + 1, ...; default: 3, or "
        "more on digits where a training takes seconds",
        low=1,
        high=100,
        only="--experiment",
    )
    smoke: bool = knob(
        False, "two batches of everything, to see that a long run won't fail at its end"
    )

    RECIPES: ClassVar[dict[str, Recipe]] = {
        # Everything that digits needs is below 90 s on two CPU cores; the lessons' headers say how
        # far it gets.
        "digits": {"image_size": 8, "epochs": 15, "batch_size": 64, "base_lr": 0.2, "warmup": 2},
        "mnist": {**SMALL, "epochs": 5, "base_lr": 0.1, "warmup": 1},
        "fashion_mnist": {**SMALL, "epochs": 15, "base_lr": 0.1, "warmup": 1},
        "cifar10": {**SMALL, "epochs": 30, "base_lr": 0.2, "warmup": 2},
        "cifar100": {**SMALL, "epochs": 40, "base_lr": 0.2, "warmup": 2},
        "folder": {"epochs": 20, "batch_size": 64, "base_lr": 0.1, "warmup": 2},
        # Goyal et al. 2017 with the label smoothing and augmentation that came after it.
        "imagenet": {
            "image_size": 224,
            "epochs": 90,
            "batch_size": 256,
            "base_lr": 0.1,
            "warmup": 5,
            "weight_decay": 1e-4,
            "label_smoothing": 0.1,
            "augment": "strong",
            "ema": 0.9999,  # an average over about 10,000 steps, two epochs of 256 images a step
        },
    }
    COMMON_RECIPE: ClassVar[Recipe] = {
        "optimizer": "sgd",
        "momentum": 0.9,
        "schedule": "cosine",
        "augment": "basic",
        "still": 0.0,
        "weight_decay": 5e-4,
        "label_smoothing": 0.0,
        "warmup": 0,
        "ema": 0.0,
    }

    # Adam's steps don't depend on the size of the gradient, so its rate is not SGD's; and decoupled
    # decay shrinks weights by lr * decay a step.  Loshchilov and Hutter 2019; Touvron et al. 2021.
    ADAMW: ClassVar[Recipe] = {"base_lr": 1e-3, "weight_decay": 0.05}

    # Kernels turn by an angle that the rate sets, whatever the gradient's size.
    MUON: ClassVar[Recipe] = {"base_lr": 0.06, "momentum": 0.6}

    # `--recipe fast`: few epochs, after Page 2018 ("How to train your ResNet") and Jordan 2024
    # ("94% on CIFAR-10 in 3.29 seconds on a single GPU").
    FAST: ClassVar[Recipe] = {
        "optimizer": "muon",
        "schedule": "linear",
        "warmup": 0,
        "label_smoothing": 0.2,
        "augment": "alternating",
        # The end is on images in their place, as they will be tested.  He et al. 2019, "Data
        # augmentation revisited".
        "still": 1 / 6,
        "batch_size": 500,
        "epochs": 10,
    }

    # What may change when a run goes on elsewhere: where it runs, not what it computes.
    FREE_ON_RESUME: ClassVar[frozenset[str]] = frozenset(
        "device data_dir workers resume run_dir save_every compile auto_batch seeds track".split()
    )

    def __post_init__(self) -> None:
        kinds = knob_types(type(self))
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            flag = "--" + spec.name.replace("_", "-")
            choices, low, high = (spec.metadata.get(key) for key in ("choices", "low", "high"))
            if not fits(value, kinds[spec.name]):
                wanted = " or ".join(k.__name__ for k in kinds[spec.name] if k is not type(None))
                raise UserError(f"{flag} {value!r}: wants {wanted}, not {type(value).__name__}")
            if value is None:
                continue
            if choices and value not in choices:
                raise unknown(flag.lstrip("-"), value, choices)
            lacking = self.model.startswith(spec.metadata.get("without", ()))
            if lacking and value != spec.default:
                raise UserError(f"{flag} {value}: {self.model} has no such thing; leave it out")
            if low is not None:
                for number in numbers_of(value, flag):
                    if not number >= low:  # nor is nan
                        raise UserError(f"{flag} {value}: the least that makes sense is {low:g}")
                    if number > high:
                        raise UserError(f"{flag} {value}: the most that makes sense is {high:,}")
        if self.lr is not None and self.lr == 0:
            raise UserError("--lr 0: a learning rate of zero learns nothing")

    def resolve(
        self,
        dataset: str,
        image_size: int | None = None,
        world_size: int = 1,
        images: int | None = None,
    ) -> TrainConfig:
        """The same settings with every `None` filled in from the recipe of `dataset`.

        Args:
            dataset: what `auto` came out as.
            image_size: for a folder, whose images decide; None takes the recipe's.
            world_size: processes that share an optimizer step.
            images: to train on, where they are a folder's: no step has more than all of them.
        """
        recipe = {
            **self.COMMON_RECIPE,
            **TrainConfig.RECIPES[dataset],
            **self.RECIPES.get(dataset, {}),
            **(self.FAST if self.recipe == "fast" else {}),
        }
        rates = {"adamw": self.ADAMW, "muon": self.MUON}
        recipe |= rates.get(self.optimizer or recipe["optimizer"], {})
        if image_size is not None:
            recipe["image_size"] = image_size
        filled = {k: v for k, v in recipe.items() if getattr(self, k) is None}
        config = dataclasses.replace(self, dataset=dataset, **filled)
        if self.warmup is None:  # a short run must not be all warm-up
            config = dataclasses.replace(config, warmup=min(config.warmup, config.epochs / 5))
        if config.cutout is None:
            side = config.image_size // 4 if config.augment == "strong" else 0
            config = dataclasses.replace(config, cutout=side)
        if config.smoke:
            config = dataclasses.replace(config, epochs=1, warmup=0)
        if config.lr is None:
            # The linear rule of Goyal et al. 2017, sec. 2.1: k times the images per step, k times
            # the step.
            asked = config.batch_size * config.accumulate * world_size
            images_per_step = min(asked, images or TRAIN_IMAGES.get(dataset, asked))
            rate = min(config.base_lr * images_per_step / 256, 100.0)  # what --lr may be at most
            config = dataclasses.replace(config, lr=rate)
        return config

    @property
    def small_input(self) -> bool:
        """Whether models take their 32x32 form: ImageNet's stems leave nothing of a small image."""
        return self.image_size is not None and self.image_size <= 64

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for config.json and checkpoints."""
        return dataclasses.asdict(self)
