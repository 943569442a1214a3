"""Lesson 8, advanced: transfer learning, or how to start from what another net has learned.

Yosinski, Clune, Bengio and Lipson, "How transferable are features in deep neural networks?", 2014
(arXiv 1411.1792); Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification",
2018 (arXiv 1801.06146).

The idea in one sentence: early layers learn what is common to all images, so with few labels keep
them, and learn only what is new.

    python 08_transfer_learning_advanced.py                   # digits 0-4 to 5-9, all strategies
    python 08_transfer_learning_advanced.py --dataset my_data --pretrained   # resnet20, no network
    python 08_transfer_learning_advanced.py --dataset my_data --pretrained --model resnet18
    python 08_transfer_learning_advanced.py --dataset my_data --from runs/01_resnet_beginner/NAME
    python 08_transfer_learning_advanced.py --fractions 0.05,0.2,1.0
    python 08_transfer_learning_advanced.py --from runs/08_transfer_learning_advanced/NAME \\
        --predict cat.jpg dog.jpg --export
    python 08_transfer_learning_advanced.py --from resnet20 --predict cat.jpg
    python 08_transfer_learning_advanced.py --experiment domain-adaptation
    python 08_transfer_learning_advanced.py --experiment imbalance

Measured, digits 5-9 with 32 labels after digits 0-4, 40 steps, mean and deviation of seeds 0, 1, 2:
scratch 52.5% (2.2), features 62.2% (4.8), last stage 71.5% (3.5), full 79.1% (5.7), progressive
76.9% (3.4); 20 s on two cores of an Intel Xeon, comparison included, torch 2.15. With --epochs 60,
120 steps: scratch 93.1% (2.8), full 93.9% (5.0), no more than chance. On five classes of CIFAR-10
(JPEG copy) after the other five, 2,250 labels: scratch 69.7% (2.2), full 85.0% (0.6); 566 s.

Domain adaptation, all ten digits, the same seeds, test accuracy on the target, 97 s:

    target     source only   AdaBN         Deep CORAL    DANN          oracle
    inverted   12.6% (1.7)   21.7% (1.0)   14.7% (3.9)    9.4% (3.0)   94.7% (0.3)
    noisy      74.7% (6.4)   83.1% (1.3)   75.6% (6.3)   79.6% (1.3)   80.4% (1.3)
    textured   49.6% (12.7)  86.4% (1.2)   66.0% (5.1)   80.4% (2.2)   89.5% (2.4)
"""

# %% [markdown]
# ## The problem, and the one diagram
#
# A net has millions of weights, and you have a hundred images. Training it from scratch fits the
# hundred and little else. But most of what a net has to know is not about your classes: edges,
# strokes, corners, textures. Somebody has paid for that with a large dataset already.
#
#           source: many labels                     target: few labels
#      x ── stem ── stages ── head A            x ── stem ── stages ── head B
#             │        │                               ↑        ↑        ↑
#             └────────┴───────── copied ──────────────┴────────┘       new
#
# What is left to decide is what to do with the copied part: keep it, or train it on, and how fast.

# %%
from common.cli import in_notebook, main
from common.config import TrainConfig, knob
from common.transfer.flags import locate, parse_flags

from dataclasses import dataclass


LESSON = "08_transfer_learning_advanced"
SOURCE = "source.pt"  # the pretrained net, beside the run that started from it


@dataclass(frozen=True)
class Config(TrainConfig):
    """What this lesson can be told; every field is a flag, and `--help` prints them all."""

    model: str = knob("resnet20", "any model of the course, or torchvision:NAME")
    dataset: str = knob("digits", "the target: a dataset's name, or the path of a folder of images")
    from_run: str = knob(
        "", "start from the best weights of this run folder, or from resnet20 (--from for short)"
    )
    source_classes: int | None = knob(
        None,
        "pretrain on so many of the classes and transfer to the others "
        "(default: half, unless there are weights to start from)",
        low=2,
        high=100_000,
    )
    source_epochs: int | None = knob(None, "epochs of that pretraining", low=1, high=10000)

    strategy: str | None = knob(
        None,
        "what to train, and how fast (default: by the number of labels)",
        ("scratch", "features", "last-stage", "full", "progressive"),
    )
    fraction: float | None = knob(
        None, "share of the target's training labels to use", low=0, high=1
    )
    rate_decay: float = knob(
        1.6, "how many times slower each part learns than the part after it", low=1, high=100
    )
    unfreeze_by: float = knob(
        0.5,
        "share of the epochs after which progressive unfreezing has reached the stem",
        low=0,
        high=1,
    )
    compare: bool | None = knob(None, "all strategies under one budget (default: digits only)")
    fractions: str = knob(
        "", "scratch against transfer at these shares of the labels: 0.1,1.0", low=0, high=1
    )
    seeds: int = knob(
        3, "trainings of each kind in a comparison, with seeds SEED, SEED + 1, ...", low=1, high=100
    )

    predict: str = knob("", "images to classify afterwards; with --from, without training")
    export: bool = knob(False, "write torch.export, TorchScript and ONNX files, and check them")
    adapt_epochs: int | None = knob(
        None, "epochs of each training of --experiment domain-adaptation", low=1, high=10000
    )
    target_dir: str = knob("", "folder of the other domain for --experiment domain-adaptation")
    imbalance: float = knob(
        30.0,
        "images of the largest class for one of the smallest, --experiment imbalance",
        low=1,
        high=10000,
    )

    RECIPES = {
        "digits": {
            "fraction": 0.05,
            "compare": True,
            "source_epochs": 12,
            "base_lr": 1.6,
            "adapt_epochs": 6,
        },
        "mnist": {"fraction": 0.01, "source_epochs": 3, "base_lr": 0.4, "adapt_epochs": 3},
        "fashion_mnist": {"fraction": 0.01, "source_epochs": 10, "base_lr": 0.4, "adapt_epochs": 5},
        "cifar10": {"fraction": 0.1, "source_epochs": 30, "base_lr": 0.4, "adapt_epochs": 15},
        "cifar100": {"fraction": 0.1, "source_epochs": 40, "base_lr": 0.4, "adapt_epochs": 20},
        # source_epochs by the number of images
        "folder": {"fraction": 1.0, "base_lr": 0.1, "adapt_epochs": 15},
        "imagenet": {"fraction": 1.0, "source_epochs": 90, "adapt_epochs": 30},
    }


config = parse_flags(Config) if __name__ == "__main__" else Config()

# %%
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from common import plotting
from common.engine import processes
from common.engine.device import (
    amp_dtype,
    autocast,
    memory_format,
    mixed_seed,
    pick_device,
    set_up_torch,
)
from common.data import Data, Loader, make_data, read_once
from common.engine.errors import UserError
from common.evaluation import evaluate
from common.experiments import Trial, conclude, mean_and_spread, train_trial
from common.profiling import count_macs, profile
from common.runs import Run, banner, draw_figures, prepare
from common.engine.sources import Pictures, Source, load_source
from common.evaluation import score
from common.training import Schedule, fit, make_schedule, parameter_groups
from common.transfer.embedding import feature_map
from common.transfer.export import export_model
from common.transfer.images import PairLoader, choose_classes, few_labels, in_chunks, with_features
from common.transfer.origins import Catalogue, Origin, open_run, trained_origin
from common.transfer.prediction import find_images, predict_files

# %% [markdown]
# ## Freezing
#
# Two things keep a layer as it is. Its weights ask for no gradient. And its BatchNorm, if it has
# one, uses the statistics that it came with: `requires_grad` says nothing about the running mean
# and variance, which `model.train()` would go on to overwrite with those of your few images. It is
# the commonest mistake in transfer learning.


# %%
def freeze(part: nn.Module) -> None:
    """Keep the weights of `part`, and the statistics of its BatchNorms, whatever `train()` says.

    >>> layer = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    >>> freeze(layer)
    >>> _ = layer.train()(torch.ones(2, 3, 5, 5))
    >>> layer[1].running_mean.abs().sum().item(), layer[1].weight.requires_grad
    (0.0, False)
    """
    for parameter in part.parameters():
        parameter.requires_grad_(False)
    for module in part.modules():
        hooked = hold_still in module._forward_pre_hooks.values()
        if isinstance(module, nn.BatchNorm2d) and not hooked:
            module.register_forward_pre_hook(hold_still)


def thaw(part: nn.Module) -> None:
    """Undo `freeze`: the weights learn again, and from the next `train()` on the statistics too."""
    for parameter in part.parameters():
        parameter.requires_grad_(True)


def hold_still(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Before each forward pass of a BatchNorm: in eval mode for as long as it is frozen."""
    if not any(parameter.requires_grad for parameter in norm.parameters()):
        norm.eval()


# %% [markdown]
# ## The parts of a net, and a learning rate for each
#
# Yosinski et al. 2014 cut a trained net at each layer: the first are general, the last specific to
# the classes. So the last should learn fast and the first hardly. Howard and Ruder 2018 (section
# 3.2) let each layer learn 2.6 times slower than the one after it:
#
# $$\eta_{l-1} = \eta_l / 2.6$$
#
# NOTE: theirs are language models. Here 1.6 is the default: with 2.6 the stem of a net that trains
# for 40 steps would hardly move.


# %%
def parts_of(model: nn.Module, most: int = 4) -> list[nn.ModuleList]:
    """The model as parts that learn or freeze together, from the stem to the head.

    Stages beyond `most` share a part with their neighbours: 18 rates that differ by 2.6 each would
    leave the first at nothing.

    >>> model = nn.Module()
    >>> model.stem, model.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)
    >>> model.stages = nn.Sequential(*[nn.Conv2d(8, 8, 3) for _ in range(7)])
    >>> [len(part) for part in parts_of(model)]
    [1, 2, 2, 2, 1, 1]
    """
    stages = list(model.stages.children())
    size = math.ceil(len(stages) / most)
    parts = [[model.stem], *(stages[i : i + size] for i in range(0, len(stages), size))]
    # What else there is, such as auxiliary heads, learns with the head.
    taken = {id(p) for part in parts for module in part for p in module.parameters()}
    rest = [
        child
        for child in model.children()
        if any(id(p) not in taken for p in child.parameters())
        and not any(id(p) in taken for p in child.parameters())
    ]
    parts.append(rest or [model.head])
    return [nn.ModuleList(part) for part in parts]


def discriminative_groups(
    parts: list[nn.Module], lr: float, decay: float, weight_decay: float
) -> list[dict[str, object]]:
    """Parameter groups for an optimizer: the last part at `lr`, each before it `decay` times
    slower.  Howard and Ruder 2018, sec. 3.2.

    >>> body, head = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> groups = discriminative_groups([body, head], lr=0.1, decay=2.0, weight_decay=0.0)
    >>> [group["lr"] for group in groups if group["params"][0] is body.weight]
    [0.05]
    """
    groups = []
    for distance, part in enumerate(reversed(parts)):
        for group in parameter_groups(part, weight_decay):  # weights, then biases and norms
            if group["params"]:
                groups.append({**group, "lr": lr / decay**distance})
    return groups


# %% [markdown]
# ## Progressive unfreezing
#
# A new head starts with random weights, and its first gradients are noise. If the body learns from
# them, it forgets. So train the head alone at first, and wake one part after the other, from the
# head down (Howard and Ruder 2018, section 3.3). That is a schedule like any other.


# %%
class UnfreezingSchedule(Schedule):
    """A schedule of learning rates under which parts wake up one by one, the last part first.

    Args:
        parts: from the stem to the head.
        every: optimizer steps between two awakenings.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        kind: str,
        steps: int,
        warmup_steps: int,
        parts: list[nn.Module],
        every: int,
    ) -> None:
        self.parts, self.every, self.awake = parts, max(1, every), 0
        super().__init__(optimizer, kind, steps, warmup_steps)

    def _apply(self) -> None:
        super()._apply()
        awake = min(len(self.parts), 1 + self.taken // self.every)
        if awake != self.awake:
            self.awake = awake
            for part in self.parts[:-awake]:
                freeze(part)
            for part in self.parts[-awake:]:
                thaw(part)


# %% [markdown]
# ## Feature extraction: the body runs once
#
# If nothing in front of the classifier learns, every epoch computes the same features of the same
# images. Compute them once, and training is that of one linear layer: seconds, for any network.


# %%
def classify_with_features(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and what the classifier made them from, the features (N, D)."""
    seen: list[Tensor] = []
    classifier = model.get_classifier()
    handle = classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        logits = model(x)
    finally:
        handle.remove()
    return logits, seen[0]


@torch.no_grad()
def extract_features(model: nn.Module, loader: Loader) -> Tensor:
    """The features of a whole split, (N, D), in its order, without augmentation.

    NOTE: augmentation would give other features in each epoch; without it they can be cached.
    """
    model.eval()
    config = loader.config
    amp = amp_dtype(loader.device, config.amp, config.image_size)
    with autocast(loader.device, amp):
        features = [classify_with_features(model, x)[1] for x in in_chunks(loader)]
    return torch.cat(features).float()


class ClassifierOnFeatures(nn.Module):
    """The last layer alone, to be trained on features; saved and loaded as the whole model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor) -> Tensor:
        return self.model.get_classifier()(features)

    def state_dict(self, *args: object, **options: object) -> dict[str, Tensor]:
        return self.model.state_dict(*args, **options)

    def load_state_dict(self, state: Mapping[str, Tensor], *args: object) -> object:
        return self.model.load_state_dict(state, *args)


# %% [markdown]
# ## The strategies
#
# | strategy | starts from | learns | when it pays |
# |---|---|---|---|
# | scratch | random weights | everything, at one rate | many labels, or images unlike the source |
# | features | the source | the classifier, on cached features | a source that knows much, no time |
# | last-stage | the source | last stage and head, at one rate | few labels, related classes |
# | full | the source | everything, earlier parts slower | the usual choice |
# | progressive | the source | part by part, from the head down | a fragile start |


# %%
STRATEGIES = ("scratch", "features", "last-stage", "full", "progressive")


def sgd(groups: list[dict[str, object]], config: TrainConfig) -> SGD:
    """The optimizer of all lessons, for groups that may have rates of their own."""
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    nesterov = config.momentum > 0
    return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=fused)


def set_up(
    strategy: str, model: nn.Module, config: Config, loader: Loader
) -> tuple[Optimizer, Schedule]:
    """What learns, and at which rate: the model frozen where it has to be, its optimizer and
    schedule.
    """
    parts = parts_of(model)
    if strategy == "scratch":
        groups = parameter_groups(model, config.weight_decay)
    elif strategy == "features":
        freeze(model)
        thaw(model.get_classifier())
        groups = parameter_groups(model, config.weight_decay)
    elif strategy == "last-stage":
        freeze(model)
        for part in parts[-2:]:
            thaw(part)
        groups = parameter_groups(model, config.weight_decay)
    else:
        groups = discriminative_groups(parts, config.lr, config.rate_decay, config.weight_decay)
    optimizer = sgd(groups, config)
    if strategy != "progressive":
        return optimizer, make_schedule(optimizer, config, loader)
    steps = len(loader) // loader.accumulate
    epochs_between = max(1, int(config.unfreeze_by * config.epochs / (len(parts) - 1)))
    return optimizer, UnfreezingSchedule(
        optimizer,
        config.schedule,
        config.epochs * steps,
        round(config.warmup * steps),
        parts,
        epochs_between * steps,
    )


# %% [markdown]
# ## Settings that follow from the size of the data
#
# With few images the number of *steps* decides, not of epochs: a hundred epochs of three steps are
# no more than three epochs of a hundred. The rule of BiT (Kolesnikov et al. 2020, section 3.3) has
# the same shape: the length of the training by the number of images, everything else fixed. Warm-up
# takes a tenth of it: the new head's first gradients are random; the body should not follow them.


# %%
class Size(NamedTuple):
    """A row of the table: what to do with up to so many labelled images."""

    images: float
    strategy: str
    batch_size: int
    steps: int
    why: str


SMALL_DATA = (
    Size(100, "full", 16, 40, "small batches, or there would be one step an epoch"),
    Size(1_000, "full", 32, 200, "enough labels that the body may learn, slowly"),
    Size(5_000, "full", 32, 600, "the same, for longer"),
    Size(20_000, "full", 64, 3_000, "the body adapts; scratch begins to catch up"),
    Size(math.inf, "full", 128, 10_000, "as a training from scratch, but shorter"),
)


# Per 256 images of an optimizer step: 0.1 in batches of 64. A folder of large images has a gentler
# rate, since a net for such images comes with official weights.
RATE_OF_SMALL_IMAGES = 0.4


def settings_for(asked: Config, config: Config, images: int) -> Config:
    """`config` with what the flags left open set by the number of labelled training images."""
    row = next(row for row in SMALL_DATA if images <= row.images)
    batch_size = asked.batch_size or row.batch_size
    steps_per_epoch = max(1, images // batch_size)
    epochs = asked.epochs or (1 if config.smoke else max(5, round(row.steps / steps_per_epoch)))
    warmup = epochs / 10 if asked.warmup is None and not config.smoke else config.warmup
    base_lr = config.base_lr
    if config.dataset == "folder" and asked.base_lr is None and config.small_input:
        base_lr = RATE_OF_SMALL_IMAGES
    lr = asked.lr or base_lr * batch_size * config.accumulate / 256
    strategy = asked.strategy or row.strategy
    return replace(
        config, batch_size=batch_size, epochs=epochs, warmup=warmup, lr=lr, strategy=strategy
    )


# %% [markdown]
# ## Where the weights come from
#
# Three sources, in this order: a run of this course (`--from`), trained weights (`--pretrained`),
# or, with no network and no weights at hand, a small but honest pretraining of our own: the first
# half of the classes teaches the net, the second half is the new task, whose labels are few.
#
# `--pretrained` means the official weights of ImageNet, downloaded once. One net travels with the
# course and needs no network: resnet20, trained on CIFAR-10 at 32 px (`common/weights/`).
#
# A classifier belongs to its classes and not to their number: it is kept if the new classes have
# the same names, and drawn anew otherwise.


# %%
class Task(NamedTuple):
    """What to start from, and what to learn."""

    asked: Config  # before what the flags left open was filled in
    config: Config
    device: torch.device
    build: Callable[[int], nn.Module]  # untrained, for so many classes
    origin: Origin
    target: Source


def build(config: Config, num_classes: int) -> nn.Module:
    """The model that the flags ask for, untrained. No auxiliary heads: they help long trainings."""
    options = {}
    builder = MODELS[config.model]
    if config.model in ("googlenet", "inception_v3"):
        options = {"aux": False, "transform_input": config.pretrained}
    return builder(num_classes=num_classes, small_input=config.small_input, **options)


def open_task(config: Config) -> Task:
    """Read the target's images and find, or make, the weights to start from."""
    asked = locate(config)
    if asked.fractions:
        parse_fractions(asked.fractions)  # a slip is told before anything is trained
    past = open_run(asked.from_run, sys.modules[__name__]) if asked.from_run else None
    if past:
        size = asked.image_size or past.config.image_size
        asked = replace(asked, model=past.config.model, image_size=size, pretrained=False)
    halves = asked.source_classes is not None or not (past or asked.pretrained)
    if halves and asked.source_classes is None and asked.dataset in ("folder", "imagenet"):
        if asked.strategy != "scratch":
            raise UserError(
                "no weights to start from: add --pretrained, or --from RUN, or --source-classes N "
                "to pretrain on N of your classes, or --strategy scratch"
            )
        halves = False
    if asked.model not in MODELS:
        raise UserError(f"unknown model {asked.model!r}: a name of the course, or torchvision:NAME")
    config, device = prepare(asked)
    target = read_once(load_source(config), config)
    make = partial(build, config)

    if past:
        make, origin = past.build, past.origin
    elif asked.pretrained:
        origin = trained_origin(config.model, make)
    else:
        origin = Origin("random weights")
    if halves:
        count = config.source_classes or len(target.class_names) // 2
        classes = len(target.class_names)
        if classes - count < 2:
            raise UserError(f"--source-classes {count}: of {classes} classes, two must stay")
        folder = Path(config.resume)
        kept = (folder if folder.is_dir() else folder.parent) / SOURCE
        needed = config.strategy != "scratch" or config.compare or config.fractions
        if config.resume and kept.is_file():
            origin = Origin.load(kept, make)
        elif origin.model is None and needed:
            origin = pretrain(choose_classes(target, range(count)), config, device, make)
        target = choose_classes(target, range(count, classes))
    if origin.model is not None:
        origin.model.to(device)
    seen = [name for name in target.class_names if name in (origin.class_names or ())]
    if seen and processes.is_main():
        print(
            f"note       {origin.name} was trained on classes of these names ({', '.join(seen[:3])}"
            f"{', ...' if len(seen) > 3 else ''}): on the same images it has nothing to transfer",
            flush=True,
        )
    labels = len(few_labels(target, config.fraction, config.seed).train)
    config = settings_for(asked, config, labels)
    if config.strategy != "scratch" and origin.model is None:
        raise UserError(f"--strategy {config.strategy} needs weights to start from")
    return Task(asked, config, device, make, origin, target)


def pretrain(
    source: Source, config: Config, device: torch.device, build: Callable[[int], nn.Module]
) -> Origin:
    """Train on the source's classes, from random weights, by the recipe of the other lessons.

    A folder's images decide how long: until about 180,000 were seen, in 8 epochs at least and 30 at
    most.
    """
    epochs = config.source_epochs or min(30, max(8, round(180_000 / len(source.train))))
    recipe = source_recipe(replace(config, source_epochs=epochs))
    data = make_data(source, recipe, device)
    names = source.class_names
    print(f"source     {names[0]} to {names[-1]}: {data.describe()}", flush=True)
    trial = train_trial("pretraining", partial(build, len(names)), data, recipe, device)
    return Origin("pretraining", trial.model, (data.mean, data.std), names, trial.test_top1)


def source_recipe(config: Config, **changes: float) -> TrainConfig:
    """The other lessons' recipe for the dataset, with as many epochs as `--source-epochs` says."""
    shared = ("image_size", "augment", "seed", "device", "amp", "workers", "skip_broken", "smoke")
    same = {name: getattr(config, name) for name in shared}
    if config.dataset == "folder" and config.small_input:
        changes = {"base_lr": RATE_OF_SMALL_IMAGES, **changes}
    recipe = TrainConfig(dataset=config.dataset, epochs=config.source_epochs, **same, **changes)
    return recipe.resolve(config.dataset)


# %% [markdown]
# ## One transfer


# %%
def start(task: Task, strategy: str, num_classes: int, seed: int) -> nn.Module:
    """The source's model with a new classifier, or for `scratch` an untrained one.

    The same classes in the same order, as in pictures of another kind, keep the classifier.
    """
    set_up_torch(task.device, seed, task.config.deterministic)
    if strategy == "scratch":
        model = task.build(num_classes)
    else:
        model = deepcopy(task.origin.model)
        if task.origin.class_names != task.target.class_names:
            model.reset_classifier(num_classes)
    return model.to(task.device, memory_format=memory_format(task.config.image_size))


def target_data(task: Task, config: Config) -> Data:
    """The few labelled images of the target, normalised as the source's were."""
    source = few_labels(task.target, config.fraction, config.seed)
    data = make_data(source, config, task.device, task.origin.mean_std)
    if data.in_memory:  # a small batch is for learning; looking needs none
        data.val.batch_size = data.test.batch_size = max(256, config.batch_size)
    return data


def transfer(
    strategy: str, model: nn.Module, data: Data, config: Config, run: Run | None = None
) -> list:
    """Train `model` by one strategy; the history comes back."""
    loss_fn = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    optimizer, schedule = set_up(strategy, model, config, data.train)
    learner = model
    if strategy == "features":
        known = {"train": data.train, "val": data.val}  # the test is one of the whole model
        data = with_features(data, {name: extract_features(model, s) for name, s in known.items()})
        learner = ClassifierOnFeatures(model)
    label = "" if run else strategy
    return fit(learner, data, loss_fn, optimizer, schedule, config, run, label=label)


def try_out(task: Task, strategy: str, config: Config, name: str = "") -> Trial:
    """One training without a run folder, tested with the weights of its last epoch: nothing is
    chosen.
    """
    data = target_data(task, config)
    model = start(task, strategy, data.num_classes, config.seed)
    history = transfer(strategy, model, data, config)
    top1 = score(model, data.test)[1]
    seconds = sum(record.seconds for record in history)
    name = name or strategy
    print(
        f"{name:<24} seed {config.seed}  {len(data.train.labels):>5} labels  train "
        f"{history[-1].train_top1:6.2%}  test {top1:6.2%}  {seconds:.1f} s",
        flush=True,
    )
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    macs = count_macs(model, data.input_size)
    return Trial(name, learned, macs, top1, seconds, history, model=model)


def seeds_of(config: Config) -> range:
    return range(config.seed, config.seed + config.seeds)


def of_seeds(count: int) -> str:
    return f"mean and deviation of {count} seeds" if count > 1 else "one seed"


# %% [markdown]
# ## All strategies under one budget
#
# The same labelled images, the same epochs, the same recipe; only the strategy differs. Each seed
# draws other images to be labelled, another new head and another order. The band in the figure goes
# from the worst seed to the best.


# %%
def compare(task: Task) -> dict[str, object]:
    """Every strategy with every seed; prints a verdict, draws a figure."""
    config = task.config
    run = Run.open(replace(config, experiment="compare"), LESSON)
    usable = STRATEGIES if task.origin.model is not None else ("scratch",)
    trials = {
        strategy: [try_out(task, strategy, replace(config, seed=s)) for s in seeds_of(config)]
        for strategy in usable
    }
    figure, (progress, outcome) = plotting.panels(2, "Strategies under one budget")
    curves = {k: [[r.val_top1 for r in t.history] for t in v] for k, v in trials.items()}
    plotting.curves(
        curves, "epoch", "validation top-1", "On the way", percent=True, ax=progress
    )  # fmt: skip
    stats = {k: mean_and_spread([t.test_top1 for t in v]) for k, v in trials.items()}
    plotting.bars(
        {k: m for k, (m, _) in stats.items()},
        "test top-1",
        f"Test accuracy, {of_seeds(config.seeds)}",
        {k: s for k, (_, s) in stats.items()},
        percent=True,
        colors=plotting.PALETTE,
        ax=outcome,
    )
    run.figure("strategies", figure)
    labels = len(few_labels(task.target, config.fraction, config.seed).train)
    rows = [
        {
            "strategy": k,
            "labels": labels,
            "parameters that learn": v[0].params,
            "test top-1": f"{stats[k][0]:.2%}",
            "deviation": f"{stats[k][1]:.2%}",
            "seconds": round(mean(t.seconds for t in v), 2),
        }
        for k, v in trials.items()
    ]
    return conclude(run, rows, compare_verdict(stats, config.seeds), source_top1=task.origin.top1)


def compare_verdict(stats: dict[str, tuple[float, float]], seeds: int) -> list[str]:
    """How each strategy stands to scratch, whichever way the numbers fall."""
    if "scratch" not in stats or len(stats) < 2:
        return ["nothing to compare: there were no weights to start from"]
    base, base_spread = stats["scratch"]
    verdict = []
    for name, (top1, spread) in stats.items():
        if name != "scratch":
            verdict.append(f"{name} {ahead(top1, spread, base, base_spread, seeds)}")
    best = max(stats, key=lambda name: stats[name][0])
    verdict.append(f"the best mean is that of {best}: {stats[best][0]:.2%}")
    return verdict


def ahead(top1: float, spread: float, base: float, base_spread: float, seeds: int) -> str:
    """'is ahead of scratch by 12.3 points, more than the seeds' spread (2.1 points)'."""
    gap, noise = top1 - base, max(spread, base_spread)
    word = "ahead of" if gap > 0 else "behind" if gap < 0 else "level with"
    text = f"is {word} scratch by {abs(100 * gap):.1f} points"
    if seeds < 2:
        return f"{text} (one seed: no spread to measure it by)"
    size = "more" if abs(gap) > noise else "no more"
    return f"{text}, {size} than the seeds' spread ({100 * noise:.1f} points)"


# %% [markdown]
# ## How many labels is a trained body worth?


# %%
def label_fractions(task: Task) -> dict[str, object]:
    """Scratch against transfer at several shares of the labels, with every seed."""
    config = task.config
    shares = parse_fractions(config.fractions)
    if task.origin.model is None:
        raise UserError("--fractions needs weights to transfer from")
    strategy = "full" if config.strategy == "scratch" else config.strategy
    run = Run.open(replace(config, experiment="fractions"), LESSON)
    top1: dict[str, list[list[float]]] = {"scratch": [], strategy: []}
    labels, rows, verdict = [], [], []
    for share in shares:
        count = len(few_labels(task.target, share, config.seed).train)
        sized = settings_for(task.asked, replace(config, fraction=share), count)
        labels.append(count)
        for name, values in top1.items():
            trials = [try_out(task, name, replace(sized, seed=s)) for s in seeds_of(config)]
            values.append([t.test_top1 for t in trials])
            average, spread = mean_and_spread(values[-1])
            rows.append(
                {
                    "strategy": name,
                    "fraction": share,
                    "labels": count,
                    "epochs": sized.epochs,
                    "test top-1": f"{average:.2%}",
                    "deviation": f"{spread:.2%}",
                    "seconds": round(mean(t.seconds for t in trials), 1),
                }
            )
        both = (*mean_and_spread(top1[strategy][-1]), *mean_and_spread(top1["scratch"][-1]))
        verdict.append(f"with {count} labels {strategy} {ahead(*both, config.seeds)}")
    figure, (ax,) = plotting.panels(1, size=(7.6, 4.8))
    plotting.curves(
        {name: list(zip(*values)) for name, values in top1.items()},
        "labelled training images",
        "test top-1",
        f"What labels are worth: {of_seeds(config.seeds)}",
        x=labels,
        percent=True,
        ax=ax,
    )
    for color, values in zip(plotting.PALETTE, top1.values()):
        stats = [mean_and_spread(v) for v in values]
        means, spreads = zip(*stats)
        ax.errorbar(labels, means, spreads, fmt="o", color=color, capsize=4)
    ax.set_xscale("log")
    ax.set_xticks(labels, [f"{n:,}" for n in labels])
    ax.minorticks_off()
    run.figure("label_fractions", figure)
    return conclude(run, rows, verdict, source_top1=task.origin.top1)


def parse_fractions(text: str) -> list[float]:
    """'0.1,1.0' -> [0.1, 1.0], ascending.

    Raises:
        UserError: not shares above 0 and up to 1, separated by commas.
    """
    try:
        shares = sorted({float(part) for part in text.split(",")})
    except ValueError:
        shares = [0.0]
    if not all(0 < share <= 1 for share in shares):
        raise UserError(f"--fractions {text}: shares above 0 and up to 1, such as 0.1,1.0")
    return shares


# %% [markdown]
# ## Schedules for transfer
#
# Warm-up spares the trained weights the first, random gradients of the new head; after it the rate
# falls by a half cosine. One-cycle warms up for a third of the run. Plateau waits until the
# validation loss stops falling, which with few validation images is a noisy signal.


# %%
def schedules(config: Config) -> dict[str, object]:
    """Three schedules for the same transfer, with every seed; prints a verdict."""
    task = open_task(config)
    config = task.config
    run = Run.open(replace(config, experiment="schedules"), LESSON)
    stats = {}
    for kind in ("cosine", "onecycle", "plateau"):
        sized = replace(config, schedule=kind)
        trials = [
            try_out(task, config.strategy, replace(sized, seed=s), kind) for s in seeds_of(config)
        ]
        stats[kind] = mean_and_spread([t.test_top1 for t in trials])
    rows = [
        {"schedule": k, "test top-1": f"{m:.2%}", "deviation": f"{s:.2%}"}
        for k, (m, s) in stats.items()
    ]
    best, worst = (f(stats, key=lambda k: stats[k][0]) for f in (max, min))
    gap, noise = stats[best][0] - stats[worst][0], max(s for _, s in stats.values())
    size = "more" if gap > noise else "no more"
    verdict = [
        f"{best} is ahead of {worst} by {100 * gap:.1f} points, {size} than the seeds' spread "
        f"({100 * noise:.1f} points)"
    ]
    run.figure(
        "schedules",
        plotting.bars(
            {k: m for k, (m, _) in stats.items()},
            "test top-1",
            "Schedules for the same transfer",
            {k: s for k, (_, s) in stats.items()},
            percent=True,
        ),
    )
    return conclude(run, rows, verdict)


# %% [markdown]
# ## When some classes are rare
#
# A class with five images in a thousand costs the mean loss next to nothing, so the net ignores it,
# and the accuracy hardly shows it. Look at the recall of each class instead. Three remedies:
#
# - **weights**: a class counts in inverse proportion to its images
# - **focal loss**: what the net gets right already counts less, $-(1 - p_y)^\gamma \log p_y$
# - **balanced sampling**: rare images come more often


# %%
class FocalLoss(nn.Module):
    """(N, K) logits and (N,) labels -> the mean of -(1 - p)^gamma log p.  Lin et al. 2017, eq. 4.

    With gamma = 0 it is the cross-entropy:

    >>> logits, y = torch.tensor([[2.0, 0.0], [0.5, 1.0]]), torch.tensor([0, 0])
    >>> torch.allclose(FocalLoss(gamma=0)(logits, y), F.cross_entropy(logits, y))
    True
    """

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        log_p = -F.cross_entropy(logits, y, reduction="none")  # (N,), log of the true class's share
        return -((1 - log_p.exp()) ** self.gamma * log_p).mean()


def class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """(K,), in inverse proportion to the classes' images; the mean over all images is 1.

    >>> class_weights(torch.tensor([0, 0, 0, 1]), 2)
    tensor([0.6667, 2.0000])
    """
    counts = torch.bincount(labels, minlength=num_classes).clamp(min=1)
    return len(labels) / (num_classes * counts)


def balanced_order(labels: Tensor, seed: int, epoch: int) -> Tensor:
    """(N,) row numbers of one epoch, drawn with replacement so that all classes come equally often.

    >>> labels = torch.tensor([0] * 90 + [1] * 10)
    >>> 0.35 < labels[balanced_order(labels, seed=0, epoch=0)].float().mean() < 0.65
    tensor(True)
    """
    share = class_weights(labels, int(labels.max()) + 1)[labels]
    generator = torch.Generator().manual_seed(mixed_seed(seed, epoch, 6))
    return torch.multinomial(share, len(labels), replacement=True, generator=generator)


def long_tail(pictures: Pictures, num_classes: int, ratio: float, seed: int) -> Pictures:
    """Each class rarer than the one before it by one factor, the last `ratio` times as rare as the
    first.  Cui et al. 2019, sec. 5.1.
    """
    counts = torch.bincount(pictures.labels, minlength=num_classes)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for c in range(num_classes):
        keep = max(1, round(int(counts.min()) * ratio ** (-c / (num_classes - 1))))
        mine = (pictures.labels == c).nonzero().squeeze(1)
        rows.append(mine[torch.randperm(len(mine), generator=generator)[:keep]])
    return pictures.take(torch.cat(rows).sort().values)


def imbalance(config: Config) -> dict[str, object]:
    """Recall of each class on a long-tailed split, before and after three remedies."""
    task = open_task(replace(config, fraction=1.0))
    config = task.config
    run = Run.open(replace(config, experiment="imbalance"), LESSON)
    names = task.target.class_names
    recalls: dict[str, list[list[float]]] = {}
    counts = torch.zeros(0)
    for seed in seeds_of(config):
        whole = few_labels(task.target, 1.0, seed)
        tail = replace(whole, train=long_tail(whole.train, len(names), config.imbalance, seed))
        counts = torch.bincount(tail.train.labels, minlength=len(names))
        sized = replace(settings_for(task.asked, config, len(tail.train)), seed=seed)
        strategy = sized.strategy if task.origin.model is not None else "scratch"
        losses: dict[str, nn.Module] = {
            "nothing": nn.CrossEntropyLoss(),
            "weighted loss": nn.CrossEntropyLoss(class_weights(tail.train.labels, len(names))),
            "focal loss": FocalLoss(),
            "balanced sampling": nn.CrossEntropyLoss(),
        }
        for remedy, loss_fn in losses.items():
            data = make_data(tail, sized, task.device, task.origin.mean_std)
            if remedy == "balanced sampling":
                data.train.order = partial(balanced_order, data.train.labels, seed)
            model = start(task, strategy, len(names), seed)
            optimizer, schedule = set_up(strategy, model, sized, data.train)
            loss_fn = loss_fn.to(task.device)
            fit(model, data, loss_fn, optimizer, schedule, sized, label=remedy)
            test = evaluate(model, data.test, names)
            recalls.setdefault(remedy, []).append([c.recall for c in test.per_class])
            print(f"{remedy:<20} seed {seed}  test {test.top1:6.2%}", flush=True)
    table = {k: torch.tensor(v, dtype=torch.float64) for k, v in recalls.items()}  # (seeds, K)
    columns = [f"{name} ({n})" for name, n in zip(names, counts.tolist())]
    figure = plotting.heatmap(
        torch.stack([t.mean(0) for t in table.values()]).numpy(),
        list(table),
        columns,
        "Recall of each class" + (f", mean of {config.seeds} seeds" if config.seeds > 1 else ""),
        xlabel="class (its training images)",
        percent=True,
        limits=(0, 1),
    )
    run.figure("imbalance", figure)
    rows = [
        {
            "remedy": k,
            "mean recall": f"{t.mean():.2%}",
            **{c: f"{r:.1%}" for c, r in zip(columns, t.mean(0).tolist())},
        }
        for k, t in table.items()
    ]
    return conclude(run, rows, imbalance_verdict(table, names[-1]))


def imbalance_verdict(table: dict[str, Tensor], rarest: str) -> list[str]:
    """What each remedy does to the mean recall and to that of the rarest class."""
    plain = table["nothing"]
    verdict = []
    for remedy, recall in table.items():
        if remedy == "nothing":
            continue
        gap = float(recall.mean() - plain.mean())
        noise = max(mean_and_spread(t.mean(1).tolist())[1] for t in (recall, plain))
        tail = float(recall[:, -1].mean() - plain[:, -1].mean())
        word = "raises" if gap > 0 else "lowers" if gap < 0 else "does not change"
        size = "more" if abs(gap) > noise else "no more"
        verdict.append(
            f"{remedy} {word} the mean recall by {abs(100 * gap):.1f} points, {size} than the "
            f"seeds' spread ({100 * noise:.1f}); that of {rarest}, the rarest, by "
            f"{100 * tail:+.1f}"
        )
    return verdict


# %% [markdown]
# ## When the images look different: domain adaptation
#
# The same classes, but another camera, other paper, other light, and no labels there. Three ways to
# use the unlabelled images:
#
# - **AdaBN** replaces BatchNorm's statistics by those of the new images; nothing is trained.
# - **Deep CORAL** pulls the covariance of the two domains' features together while it trains.
# - **DANN** trains a critic to tell the domains apart by their features, and the body to fool it:
#   the gradient of the critic is *reversed* on its way into the body.
#
# Two more tell what there is to gain: **source only** knows nothing of the target, the **oracle**
# has its labels.


# %%
@torch.no_grad()
def adapt_batch_norm(model: nn.Module, loader: Loader) -> nn.Module:
    """AdaBN: BatchNorm's mean and variance measured anew on unlabelled images.  Li et al. 2016.

    Returns the model, changed in place, in eval mode.
    """
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
        norm.train()
    # Mixed: the variance within a batch of one class misses that between the classes.
    for x in in_chunks(loader, mixed=True):
        model(x)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    return model.eval()


def coral_loss(source: Tensor, target: Tensor) -> Tensor:
    """Squared distance of two covariances, (N, D) and (M, D) -> ().  Sun and Saenko 2016, eq. 1.

    >>> features = torch.randn(8, 3)
    >>> coral_loss(features, features + 5).abs().item() < 1e-6  # a shift is not a covariance
    True
    """
    d = source.shape[1]
    return (torch.cov(source.T) - torch.cov(target.T)).square().sum() / (4 * d**2)


class GradientReversal(torch.autograd.Function):
    """The identity forward, -strength times the gradient backward.  Ganin et al. 2016, sec. 4.2."""

    @staticmethod
    def forward(ctx: object, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None


def reverse_gradient(x: Tensor, strength: float = 1.0) -> Tensor:
    """
    >>> x = torch.ones(2, requires_grad=True)
    >>> reverse_gradient(x, 0.5).sum().backward()
    >>> x.grad
    tensor([-0.5000, -0.5000])
    """
    return GradientReversal.apply(x, strength)


class DeepCoral(nn.Module):
    """In training (2N, 3, H, W), source then target -> source logits and both features; else
    logits.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        if not self.training:
            return self.model(x)
        n = len(x) // 2
        logits, features = classify_with_features(self.model, x)
        return logits[:n], features[:n], features[n:]


class CoralLoss(nn.Module):
    """Cross-entropy on the source, and `weight` times the distance of the covariances."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, output: tuple[Tensor, Tensor, Tensor], y: Tensor) -> Tensor:
        logits, source, target = output
        return F.cross_entropy(logits, y) + self.weight * coral_loss(source, target)


class DANN(nn.Module):
    """A classifier, and a critic behind reversed gradients.  Ganin et al. 2016, fig. 1.

    In training (2N, 3, H, W), source then target -> source logits (N, K) and the critic's (2N,).

    Args:
        steps: of the whole training, over which the reversal grows from 0 to 1.
    """

    def __init__(self, model: nn.Module, steps: int, hidden: int = 128) -> None:
        super().__init__()
        self.model, self.steps, self.taken = model, steps, 0
        width = model.get_classifier().in_features
        self.critic = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not self.training:
            return self.model(x)
        n = len(x) // 2
        logits, features = classify_with_features(self.model, x)
        # Ganin et al. 2016, sec. 5.2.2: early on the critic's gradient is noise.
        strength = 2 / (1 + math.exp(-10 * self.taken / self.steps)) - 1
        self.taken += 1
        return logits[:n], self.critic(reverse_gradient(features, strength)).squeeze(1)


def dann_loss(output: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    """Cross-entropy of the classes on the source, and of the two domains on both."""
    logits, domain = output
    n = len(domain) // 2
    truth = torch.cat([torch.zeros(n), torch.ones(n)]).to(domain)
    return F.cross_entropy(logits, y) + F.binary_cross_entropy_with_logits(domain, truth)


def shifted(pictures: Pictures, kind: str, seed: int) -> Pictures:
    """The same pictures in another domain: "inverted", "noisy" or "textured"."""
    pixels = pictures.pixels.float()
    n, _, height, width = pixels.shape
    generator = torch.Generator().manual_seed(seed)
    if kind == "inverted":
        pixels = 255 - pixels
    elif kind == "noisy":
        noise = torch.randn(n, 1, height, width, generator=generator)
        pixels = pixels + 64 * noise
    elif kind == "textured":
        # Stripes of a random direction and phase behind each digit.
        angle, phase = math.pi * torch.rand(2, n, 1, 1, generator=generator)
        rows, columns = torch.arange(height).view(-1, 1), torch.arange(width)
        wave = torch.sin(2 * math.pi / 3 * (rows * angle.sin() + columns * angle.cos()) + phase)
        pixels = torch.maximum(pixels, (64 + 64 * wave).unsqueeze(1))
    return replace(pictures, pixels=pixels.clamp(0, 255).round().to(torch.uint8))


METHODS = ("source only", "AdaBN", "Deep CORAL", "DANN", "oracle")
CORAL_WEIGHT = 10.0  # so that both losses end at about one size, as the paper asks (sec. 4.2)


def domain_adaptation(config: Config) -> dict[str, object]:
    """Three methods between source only and oracle, on every target domain and with every seed."""
    config, device = prepare(locate(config))
    source = load_source(config)
    # Covariances and critics have gradients with spikes: hence the limit, for all methods alike.
    recipe = source_recipe(config, base_lr=config.base_lr / 2, clip=1.0)
    recipe = replace(recipe, epochs=1 if config.smoke else config.adapt_epochs)
    run = Run.open(replace(config, experiment="domain-adaptation", epochs=recipe.epochs), LESSON)
    targets = {k: read_once(t, config) for k, t in target_domains(source, config).items()}
    source = read_once(source, config)
    top1: dict[str, dict[str, list[float]]] = {t: {m: [] for m in METHODS} for t in targets}
    for seed in seeds_of(config):
        sized = replace(recipe, seed=seed)
        here = make_data(source, sized, device)
        fresh = partial(build, config, here.num_classes)
        plain = train_trial("source only", fresh, here, sized, device).model
        for name, target in targets.items():
            there = make_data(target, sized, device, (here.mean, here.std))
            models = {"source only": plain}
            models["AdaBN"] = adapt_batch_norm(deepcopy(plain), there.train)
            both = replace(here, train=PairLoader(here.train, there.train))
            for method in ("Deep CORAL", "DANN"):
                set_up_torch(device, seed, config.deterministic)
                model = fresh().to(device)
                if method == "DANN":
                    learner = DANN(model, sized.epochs * len(both.train)).to(device)
                    loss_fn = dann_loss
                else:
                    learner, loss_fn = DeepCoral(model), CoralLoss(CORAL_WEIGHT)
                optimizer = sgd(parameter_groups(learner, sized.weight_decay), sized)
                schedule = make_schedule(optimizer, sized, both.train)
                fit(learner, both, loss_fn, optimizer, schedule, sized, label=f"{method} {name}")
                models[method] = model
            models["oracle"] = train_trial(f"oracle {name}", fresh, there, sized, device).model
            for method in METHODS:
                top1[name][method].append(score(models[method], there.test)[1])
            told = ", ".join(f"{m} {top1[name][m][-1]:.1%}" for m in METHODS)
            print(f"{name}, seed {seed}: {told}", flush=True)
    figure, axes = plotting.panels(len(targets), "From one domain to another, without labels there")
    rows, verdict = [], []
    for ax, (name, methods) in zip(axes, top1.items()):
        stats = {m: mean_and_spread(v) for m, v in methods.items()}
        plotting.bars(
            {m: average for m, (average, _) in stats.items()},
            "test top-1 on the target",
            f"{name}, {of_seeds(config.seeds)}",
            {m: spread for m, (_, spread) in stats.items()},
            percent=True,
            colors=plotting.PALETTE,
            ax=ax,
        )
        rows.append(
            {"target": name, **{m: f"{a:.1%} ± {100 * s:.1f}" for m, (a, s) in stats.items()}}
        )
        verdict += adaptation_verdict(name, stats, config.seeds)
    run.figure("domain_adaptation", figure)
    return conclude(run, rows, verdict)


def adaptation_verdict(target: str, stats: dict[str, tuple[float, float]], seeds: int) -> list[str]:
    """Whether each method beats source only, and how much of the way to the oracle it goes."""
    base, base_spread = stats["source only"]
    room = stats["oracle"][0] - base
    verdict = []
    for method in ("AdaBN", "Deep CORAL", "DANN"):
        average, spread = stats[method]
        gap, noise = average - base, max(spread, base_spread)
        word = "beats" if gap > 0 else "does not beat"
        size = "more" if abs(gap) > noise else "no more"
        told = f"{method} {word} source only on {target}: {100 * gap:+.1f} points"
        if seeds > 1:
            told += f", {size} than the seeds' spread ({100 * noise:.1f})"
        if room > 0 and gap > 0:
            told += f", {gap / room:.0%} of the way to the oracle"
        verdict.append(told)
    return verdict


def target_domains(source: Source, config: Config) -> dict[str, Source]:
    """The folder of `--target-dir`, or the source's own images shifted in three ways."""
    if config.target_dir:
        there = locate(replace(config, dataset=config.target_dir))
        target = load_source(there)
        if target.class_names != source.class_names:
            odd = sorted(set(target.class_names) ^ set(source.class_names)) or ["the order"]
            raise UserError(
                f"--target-dir {config.target_dir}: both folders need the same classes, and "
                f"{odd[0]} differs"
            )
        return {config.target_dir: target}
    if source.train.pixels is None:
        raise UserError("--experiment domain-adaptation: name the other folder by --target-dir")
    return {
        kind: replace(
            source,
            name=f"{source.name}, {kind}",
            train=shifted(source.train, kind, seed=0),
            test=shifted(source.test, kind, seed=1),
        )
        for kind in ("inverted", "noisy", "textured")
    }


# %% [markdown]
# ## One run, from weights to report


# %%
def run(config: Config) -> dict[str, object] | None:
    """Compare where that is asked for, train by one strategy, test once, draw, save, predict."""
    if config.predict:
        find_images(config.predict.split(os.pathsep))  # now, and not after the training
    if config.from_run and (config.predict or config.export):
        return use(config)
    task = open_task(config)
    config = task.config
    outcome: dict[str, object] = {}
    if config.compare and not config.resume:
        outcome = compare(task)
    if config.fractions and not config.resume:
        label_fractions(task)

    data = target_data(task, config)
    model = start(task, config.strategy, data.num_classes, config.seed)
    run = Run.open(config, LESSON)
    if task.origin.class_names:  # for --resume, which need not pretrain again
        task.origin.save(run.folder / SOURCE)
    print(f"transfer   {config.strategy}, from {task.origin.name}")
    banner(config, task.device, data, model, run)
    if task.origin.model is not None:
        before = extract_features(task.origin.model, data.test)
    history = transfer(config.strategy, model, data, config, run)

    test = evaluate(model, data.test, data.class_names)
    cost = profile(model, data.input_size)
    draw_figures(run, model, data, history, test)
    if task.origin.model is not None:
        views = {"before": before, "after": extract_features(model, data.test)}
        views = {name: features.float().cpu().numpy() for name, features in views.items()}
        run.figure("features", feature_map(views, test.targets, data.class_names, config.seed))
    result = run.finish(
        model,
        data,
        history,
        test,
        cost,
        strategy=config.strategy,
        labels=len(data.train.labels),
        fraction=config.fraction,
        source=task.origin.name,
        source_top1=task.origin.top1,
        strategies=outcome.get("rows"),
        verdict=outcome.get("verdict"),
    )
    deploy(config, run.folder, model, data.class_names, (data.mean, data.std), task.build)
    return result


def use(config: Config) -> None:
    """`--from RUN` with `--predict` or `--export`: what the run has learned, put to use.

    `--from resnet20` is the net that travels with the course.
    """
    past = open_run(config.from_run, sys.modules[__name__])
    device = pick_device(config.device)
    origin = past.origin
    sized = replace(config, image_size=past.config.image_size)
    folder = past.folder or Path(config.run_dir) / LESSON / config.from_run
    folder.mkdir(parents=True, exist_ok=True)
    deploy(sized, folder, origin.model.to(device), origin.class_names, origin.mean_std, past.build)


def deploy(
    config: Config,
    folder: os.PathLike,
    model: nn.Module,
    class_names: list[str],
    mean_std: tuple[Tensor, Tensor],
    build: Callable[[int], nn.Module],
) -> None:
    """Classify the images of `--predict`; write the files of `--export`."""
    if config.predict:
        paths = config.predict.split(os.pathsep)
        predict_files(model, class_names, mean_std, config.image_size, paths, folder)
    if config.export:
        clean = build(len(class_names))  # without the hooks that freezing leaves
        clean.load_state_dict(model.state_dict())
        size = (3, config.image_size, config.image_size)
        export_model(clean, size, folder, class_names, mean_std)


def experiment(task_of: Callable[[Task], dict[str, object]]) -> Callable[[Config], object]:
    return lambda config: task_of(open_task(config))


MODELS: Mapping[str, Callable[..., nn.Module]] = Catalogue()
EXPERIMENTS: dict[str, Callable[[Config], object]] = {
    "compare": experiment(compare),
    "fractions": experiment(label_fractions),
    "schedules": schedules,
    "imbalance": imbalance,
    "domain-adaptation": domain_adaptation,
}

# %% [markdown]
# ## The schedule that wakes the parts up

# %%
if in_notebook():
    print(inspect.getsource(UnfreezingSchedule._apply))

# %% [markdown]
# ## What to notice
#
# - What transfer saves is labels and time. In 40 steps it is 27 points ahead of scratch; in 120
#   (`--epochs 60`) less than 2, and that is within the seeds' spread. With 129 labels and more, and
#   the steps that the table gives them, the two are level.
# - `features` takes a fifteenth of the time and gains 10 points, and there it ends: a net that has
#   only told 0-4 apart has kept little else in its last layer. One stage further down there is more
#   to be had (`last-stage`), and weights that may move get the most out of it (`full`).
# - `features.png` shows the test images as the classifier sees them, before and after.
# - AdaBN trains nothing and is ahead of the other adaptations on all three targets: what differs
#   here are above all means and variances, and new ones are measured in one pass. On noisy digits
#   it even passes the oracle, which had six epochs of noise to learn from.
# - On inverted digits little is won. Two domains' features can be laid upon one another class upon
#   wrong class, and nothing in the losses of Deep CORAL and DANN objects.
#
# ## Exercises
#
# 1. Write `freeze` without looking. What happens to `last-stage` if the frozen BatchNorms are left
#    in train mode?
# 2. Write `discriminative_groups`. With `--rate-decay 1` it is plain fine-tuning: which is better
#    here, and which with 2.6, the paper's value for language models?
# 3. Transfer the other way, from 5-9 to 0-4 (change `open_task`). Is it as easy?
# 4. Write `GradientReversal`. What does DANN become with a strength of 0 all along?
# 5. Write `FocalLoss`. Which gamma is best for the rarest class, and what does it cost the others?

# %%
if __name__ == "__main__":
    main(config, MODELS, build, run, EXPERIMENTS)
