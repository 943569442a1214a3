"""What a run of lesson 8 starts from, what it is to learn, and for how long."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from common.config import TrainConfig
from common.data import Data, make_data, read_once
from common.engine import processes
from common.engine.device import memory_format, set_up_torch
from common.engine.errors import UserError
from common.engine.sources import Source, load_source
from common.experiments import Arm, Experiment, Trial, fresh, run_experiment, tested, train_trial
from common.runs import Run, prepare
from common.transfer.flags import locate
from common.transfer.images import balanced_order, choose_classes, few_labels, long_tail
from common.transfer.origins import Origin, open_asked, trained_origin

SOURCE = "source.pt"  # the pretrained net, beside the run that started from it
# Per 256 images of an optimizer step: 0.1 in batches of 64. A folder of large images has a gentler
# rate, since a net for such images comes with official weights.
RATE_OF_SMALL_IMAGES = 0.4


@dataclass
class Task:
    """What to start from, and what to learn."""

    config: Any  # resolved, and sized by the number of labels
    device: torch.device
    build: Callable[[int], nn.Module]  # the untrained net, for so many classes
    origin: Origin
    images: Source  # of all classes
    classes: range  # of these, the target's
    lesson: ModuleType  # whose `transfer` trains by a strategy

    @property
    def class_names(self) -> list[str]:
        return [self.images.class_names[c] for c in self.classes]

    def start(self, config: Any, data: Data) -> nn.Module:
        """The source's model with a new classifier, or for `scratch` an untrained one.

        The same classes in the same order, as in pictures of another kind, keep the classifier.
        """
        if config.strategy == "scratch":
            return fresh(partial(self.build, len(self.classes)), data, config, self.device)
        set_up_torch(self.device, config.seed, config.deterministic)
        model = deepcopy(self.origin.model)
        if self.origin.class_names != self.class_names:
            model.reset_classifier(len(self.classes))
        return model.to(self.device, memory_format=memory_format(config.image_size))

    def arm(
        self,
        name: str,
        rates: Sequence[float] = (),
        loss: Callable[[Tensor], nn.Module] | None = None,
        balanced: bool = False,
        **changes: Any,
    ) -> Arm:
        """A transfer as an arm of an experiment.

        Args:
            loss: the images of each class to a loss; by default that of a plain run.
            balanced: all classes come equally often.
        """

        def train(arm: Arm, data: Data, config: Any, device: torch.device) -> Trial:
            if balanced:
                loader = copy(data.train)  # the other arms keep their order
                loader.order = partial(balanced_order, loader.labels, config.seed)
                data = dataclasses.replace(data, train=loader)
            counts = torch.bincount(data.train.labels, minlength=data.num_classes)
            plain = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
            model, loss_fn = self.start(config, data), loss(counts).to(device) if loss else plain
            began = time.monotonic()
            history = self.lesson.transfer(model, data, config, loss_fn)
            seconds = time.monotonic() - began
            return tested(f"{arm.name}, seed {config.seed}", model, data, history, seconds)

        return Arm(name, self.build, changes, rates=rates, train=train)

    def labelled(self, fraction: float) -> int:
        """How many training images of the target have labels."""
        images = choose_classes(self.images, self.classes)
        config = self.config
        return len(few_labels(images, fraction, config.seed, config.val_share).train)

    def data(
        self, images: Source, config: Any, device: torch.device, imbalance: float = 1.0
    ) -> Data:
        """The few labelled images of the target, normalised as the source's were; of the commonest
        class `imbalance` for one of the rarest.
        """
        source = choose_classes(images, self.classes)
        source = few_labels(source, config.fraction, config.seed, config.val_share)
        if imbalance > 1:
            tail = long_tail(source.train, len(source.class_names), imbalance, config.seed)
            source = dataclasses.replace(source, train=tail)
        data = make_data(source, config, device, self.origin.mean_std)
        if data.in_memory:  # a small batch is for learning; looking needs none
            data.val.batch_size = data.test.batch_size = max(256, config.batch_size)
        return data


def open_task(config: TrainConfig, lesson: ModuleType) -> Task:
    """Read the target's images and find, or make, the weights to start from.

    Args:
        lesson: whose MODELS, `build` and TABLE are used.

    Raises:
        UserError: there are no weights to start from, or a flag asks for what can't be.
    """
    asked = locate(config)
    past = open_asked(asked, lesson) if asked.from_run else None
    if past:
        size = asked.image_size or past.config.image_size
        changes = {"model": past.config.model, "image_size": size, "pretrained": False}
        asked = dataclasses.replace(asked, **changes)
    halves = asked.source_classes is not None
    if not (halves or past or asked.pretrained):
        halves = asked.dataset not in ("folder", "imagenet")
        if not halves and asked.strategy != "scratch":
            raise UserError(
                "no weights to start from: add --pretrained, or --from RUN, or --source-classes N "
                "to pretrain on N of your classes, or --strategy scratch"
            )
    if asked.model not in lesson.MODELS:
        raise UserError(f"unknown model {asked.model!r}: a name of the course, or torchvision:NAME")
    config, device = prepare(asked)
    images = read_once(load_source(config), config)
    build, origin = partial(lesson.build, config), Origin("random weights")
    if past:
        build, origin = past.build, past.origin
    elif asked.pretrained:
        origin = trained_origin(config.model, build)
    classes = range(len(images.class_names))
    if halves:
        count = config.source_classes or len(classes) // 2
        if len(classes) - count < 2:
            raise UserError(f"--source-classes {count}: of {len(classes)} classes, two must stay")
        source, classes = choose_classes(images, classes[:count]), classes[count:]
        folder = Path(config.resume)
        kept = (folder if folder.is_dir() else folder.parent) / SOURCE
        wanted = config.strategy != "scratch" or config.compare or config.experiment
        if config.resume and kept.is_file():
            origin = Origin.load(kept, build)
        elif origin.model is None and wanted:
            origin = pretrain(source, config, device, build)
    if origin.model is not None:
        origin.model.to(device)
    elif config.strategy not in (None, "scratch"):
        raise UserError(f"--strategy {config.strategy} needs weights to start from")
    task = Task(config, device, build, origin, images, classes, lesson)
    _warn_of_classes_seen(task)
    task.config = settings_for(asked, config, task.labelled(config.fraction), lesson.TABLE)
    return task


def _warn_of_classes_seen(task: Task) -> None:
    seen = [name for name in task.class_names if name in (task.origin.class_names or ())]
    if seen and processes.is_main():
        print(
            f"note       {task.origin.name} was trained on classes of these names "
            f"({', '.join(seen[:3])}{', ...' if len(seen) > 3 else ''}): on the same images it has "
            "nothing to transfer",
            flush=True,
        )


def pretrain(
    source: Source, config: Any, device: torch.device, build: Callable[[int], nn.Module]
) -> Origin:
    """Train on the source's classes, from random weights, by the recipe of the other lessons.

    A folder's images decide how long: until about 180,000 were seen, in 8 epochs at least and 30 at
    most.
    """
    epochs = config.source_epochs or min(30, max(8, round(180_000 / len(source.train))))
    shared = "image_size val_share augment seed device amp workers skip_broken smoke"
    same = {name: getattr(config, name) for name in shared.split()}
    if config.dataset == "folder" and config.small_input:
        same["base_lr"] = RATE_OF_SMALL_IMAGES
    recipe = TrainConfig(dataset=config.dataset, epochs=epochs, **same).resolve(config.dataset)
    data = make_data(source, recipe, device)
    names = source.class_names
    if processes.is_main():
        print(f"source     {names[0]} to {names[-1]}: {data.describe()}", flush=True)
    trial = train_trial("pretraining", partial(build, len(names)), data, recipe, device)
    return Origin("pretraining", trial.model, (data.mean, data.std), names, trial.test_top1)


# ----------------------------------------------------------------------------------------- settings


def settings_for(asked: Any, config: Any, images: int, table: Sequence[Any]) -> Any:
    """`config` with what the flags left open (`asked`) set by the number of labelled training
    images: by the first row of the table that is for as many.
    """
    row = next(row for row in table if images <= row.images)
    batch_size = asked.batch_size or row.batch_size
    steps_per_epoch = max(1, images // batch_size)
    epochs = asked.epochs or (1 if config.smoke else max(5, round(row.steps / steps_per_epoch)))
    warmup = epochs / 10 if asked.warmup is None and not config.smoke else config.warmup
    base_lr = config.base_lr
    if config.dataset == "folder" and asked.base_lr is None and config.small_input:
        base_lr = RATE_OF_SMALL_IMAGES
    # No step has more than all images; and 100 is what --lr may be at most.
    lr = asked.lr or min(base_lr * min(batch_size * config.accumulate, images) / 256, 100.0)
    settings = {"batch_size": batch_size, "epochs": epochs, "warmup": warmup, "lr": lr}
    return dataclasses.replace(config, **settings)


def around(lr: float) -> tuple[float, ...]:
    """The rates that an arm may choose from."""
    return lr / 3, lr, 3 * lr


def as_many_steps(config: Any, most: int, labels: int) -> dict[str, float]:
    """With `labels` images as many steps as the config's epochs have with `most`."""
    full, part = (max(1, n // config.batch_size) for n in (most, labels))
    longer = 1 if config.smoke else full / part
    return {"epochs": max(1, round(config.epochs * longer)), "warmup": config.warmup * longer}


# -------------------------------------------------------------------------------------- experiments


def refuse_deployment(config: Any) -> None:
    """An experiment keeps numbers and no net, so there is nothing to export or to ask.

    Raises:
        UserError: a flag wants a net.
    """
    for name in ("predict", "export", "export_pixels"):
        if getattr(config, name):
            raise UserError(
                f"--{name.replace('_', '-')}: --experiment {config.experiment} keeps no net; leave "
                "out one of the two"
            )


def with_weights(
    lesson: ModuleType,
    design: Callable[[Task, Any], Experiment],
    fraction: Callable[[Any], float | None] = lambda config: config.fraction,
) -> Callable[[Any], object]:
    """An experiment that starts from a source's weights. `fraction` is the share of the labels that
    the length of the training goes by.
    """

    def carry_out(config: Any) -> object:
        refuse_deployment(config)
        task = open_task(dataclasses.replace(config, fraction=fraction(config)), lesson)
        if task.origin.model is None:
            raise UserError(
                f"--experiment {config.experiment} needs weights to start from: add --pretrained, "
                "or --from RUN, or --source-classes N"
            )
        return run_experiment(lesson.LESSON, partial(design, task), task.config, task.images)

    return carry_out


def at_one_rate(lesson: ModuleType, design: Callable[[Any], Experiment]) -> Callable[[Any], object]:
    """A domain adaptation: the rate can't be chosen without labels, so all methods have one.

    Covariances and critics have gradients with spikes: hence the limit, for all methods alike.
    """

    def carry_out(config: Any) -> object:
        refuse_deployment(config)
        config = locate(config)
        if config.from_run:
            raise UserError(f"--experiment {config.experiment} trains anew: leave out --from")
        base_lr = config.base_lr or (0.8 if config.dataset == "digits" else 0.2)
        config = dataclasses.replace(config, base_lr=base_lr, clip=config.clip or 1.0)
        return run_experiment(lesson.LESSON, design, config)

    return carry_out


def choose_strategy(task: Task, design: Callable[[Task, Any], Experiment], run: Run) -> Any:
    """`--compare` in a run: the experiment in the run's folder, and what to add to its result. Sets
    `run.config` to the strategy that was asked for, or else the best on validation images, and its
    rate.
    """
    config = task.config
    chosen: dict[str, Any] = {"strategy": config.strategy or "full"}
    outcome: dict[str, Any] = {}
    if config.compare:
        if task.origin.model is None:
            raise UserError("--compare needs weights to start from")
        # The same test images for all seeds, lest one seed's choice sees those of another.
        images = dataclasses.replace(task.images, drawn=0.0)
        outcome = run_experiment(run.lesson, partial(design, task), config, images, run)
        if not config.strategy:
            by_arm = groupby(outcome["trainings"], key=itemgetter("arm"))  # they come arm by arm
            arms = {arm: list(trainings) for arm, trainings in by_arm}
            best = max(arms, key=lambda arm: mean(t["val_top1"] for t in arms[arm]))
            lr = arms[best][0]["lr"]
            chosen = {"strategy": best, "lr": lr}
            if processes.is_main():
                print(f"winner     {best}, by validation accuracy, at rate {lr:.3g}", flush=True)
    run.config = dataclasses.replace(config, **chosen)
    return {"strategies": outcome.get("rows", []), "verdict": outcome.get("verdict", [])}
