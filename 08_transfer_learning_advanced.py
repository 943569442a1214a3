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
    python 08_transfer_learning_advanced.py --from runs/08_transfer_learning_advanced/NAME \\
        --predict cat.jpg my_folder --skip-broken --export
    python 08_transfer_learning_advanced.py --from resnet20 --predict cat.jpg
    python 08_transfer_learning_advanced.py --experiment compare
    python 08_transfer_learning_advanced.py --experiment fractions
    python 08_transfer_learning_advanced.py --experiment schedules
    python 08_transfer_learning_advanced.py --experiment imbalance
    python 08_transfer_learning_advanced.py --experiment domain-adaptation

RECORD
"""

# %% [markdown]
# ## What you will be able to do
#
# - freeze a part of a net so that *nothing* in it changes, and say what most people forget
# - give each part of a net a learning rate of its own, and wake the parts one after the other
# - decide between scratch, features and fine-tuning, and measure the decision
# - train on classes of which some are rare, and move to images that look different
#
# You need lesson 1 (a ResNet, BatchNorm, the loop). Reading 60 minutes, running 2 (each experiment
# 1 to 4), exercises 120.
#
# <details><summary>1. Which weights of a net trained on cats and dogs help with cars?</summary>
# The early ones: edges, colours, textures. The last ones tell cats from dogs.</details>
# <details><summary>2. Is a BatchNorm with <code>requires_grad=False</code> frozen?</summary>
# No. In train mode its running mean and variance still change.</details>
# <details><summary>3. Why do early layers get a smaller learning rate?</summary>
# They fit the new task already, and few labels can only spoil them.</details>
# <details><summary>4. A class has 1% of the images. What does the accuracy say about it?</summary>
# Hardly anything: a net that never names it loses one point. Look at its recall.</details>
# <details><summary>5. A net for day is to work at night. What do unlabelled images give?</summary>
# The mean and variance of every channel at night, to begin with.</details>

# %% [markdown]
# ## The problem, and the one diagram
#
# A net has millions of weights, and you have a hundred images. A training from scratch fits the
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
from common.cli import main
from common.config import TrainConfig, knob, numbers
from common.transfer.flags import parse_flags

from dataclasses import dataclass


LESSON = "08_transfer_learning_advanced"


@dataclass(frozen=True)
class Config(TrainConfig):
    """What this lesson can be told; every field is a flag, and `--help` prints them all."""

    model: str = knob("resnet20", "any model of the course, or torchvision:NAME")
    dataset: str = knob("digits", "the target: a dataset's name, or the path of a folder of images")
    from_run: str = knob("", "start from the weights of this run, or from resnet20 (short: --from)")
    source_classes: int | None = knob(
        None,
        "classes to pretrain on; the others are the target (default: half, without other weights)",
        low=2,
        high=100_000,
    )
    source_epochs: int | None = knob(None, "epochs of that pretraining", low=1, high=10000)

    strategy: str | None = knob(
        None,
        "what to train, and how fast (default: full, or what --compare finds best)",
        ("scratch", "features", "last-stage", "full", "progressive"),
    )
    compare: bool | None = knob(
        None, "try all strategies first, and go on with the best (default: digits only)"
    )
    fraction: float | None = knob(None, "share of the target's labels to use", low=0, high=1)
    optimizer: str = knob("sgd", "what takes the steps; each part at its own rate", ("sgd",))
    rate_decay: float = knob(1.6, "how many times slower each part learns", low=1, high=100)
    unfreeze_by: float = knob(0.5, "share of the epochs after which all is awake", low=0, high=1)

    predict: str = knob("", "images to classify afterwards; with --from, without training")
    export: bool = knob(False, "write torch.export and ONNX files, and check them")

    # Of the experiments:
    fractions: str = knob("0.05,0.2,1", "shares of the labels to compare at", low=0.0001, high=1)
    imbalance: float = knob(30.0, "images of the largest class for one of the smallest", (), 1, 1e4)
    shift: str = knob(
        "textured", "how the target looks different", ("textured", "noisy", "inverted")
    )
    target_dir: str = knob("", "or the folder of the target's images")

    RECIPES = {
        "digits": {"fraction": 0.05, "compare": True, "source_epochs": 12, "base_lr": 1.6},
        "mnist": {"fraction": 0.01, "source_epochs": 3, "base_lr": 0.4},
        "fashion_mnist": {"fraction": 0.01, "source_epochs": 10, "base_lr": 0.4},
        "cifar10": {"fraction": 0.1, "source_epochs": 30, "base_lr": 0.4},
        "cifar100": {"fraction": 0.1, "source_epochs": 40, "base_lr": 0.4},
        "folder": {"fraction": 1.0, "base_lr": 0.1},  # source_epochs by the number of images
        "imagenet": {"fraction": 1.0, "source_epochs": 90},
    }


config = parse_flags(Config) if __name__ == "__main__" else Config()

# %%
import inspect
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from dataclasses import asdict, replace
from functools import partial
from statistics import mean
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from common import plotting, training
from common.data import Data, Loader, make_data, read_once
from common.engine.device import amp_dtype, autocast, memory_format, set_up_torch
from common.engine.sources import load_source
from common.evaluation import baselines, evaluate
from common.experiments import Arm, Claim, Experiment, Results, Trial, run_experiment, tested
from common.live import digits, live, show
from common.profiling import profile
from common.runs import Run, banner, draw_figures
from common.training import Schedule, fit, make_optimizer, make_schedule, parameter_groups
from common.transfer import images
from common.transfer.calibration import calibrate
from common.transfer.deployment import deploy, use
from common.transfer.embedding import feature_map
from common.transfer.flags import locate
from common.transfer.images import ClassifierOnFeatures, classify_with_features, in_chunks
from common.transfer.origins import Catalogue
from common.transfer.parts import parts_of
from common.transfer.prediction import find_images
from common.transfer.task import SOURCE, Task, as_many_steps, choose_strategy, open_task
from common.transfer.task import settings_for, with_weights

# Every model of lessons 1 to 7 by its name, and torchvision's as torchvision:NAME.
MODELS: Mapping[str, Callable[..., nn.Module]] = Catalogue()
HERE = sys.modules[__name__]

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
# **Say it first.** Two nets of a convolution and a BatchNorm see the same digits in train mode. In
# one `requires_grad` is off everywhere, the other went through `freeze`. Whose running mean is
# still zero?

# %%
if live():
    off, frozen = (nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)) for _ in range(2))
    off.requires_grad_(False)
    freeze(frozen)
    for net in (off, frozen):
        net.train()(digits())
        show(net[1].running_mean)

# %% [markdown]
# ## The parts of a net, and a learning rate for each
#
# Yosinski et al. 2014 cut a trained net at each layer: the first layers are general, the last
# specific to the classes. So the last should learn fast and the first hardly. Howard and Ruder 2018
# (section 3.2) let each layer learn 2.6 times slower than the one after it:
#
# $$\eta_{l-1} = \eta_l / 2.6$$
#
# NOTE: theirs are language models. Here 1.6 is the default: with 2.6 the stem of a net that trains
# for 40 steps would hardly move.
#
# By hand, for a net of five parts (stem, three stages, head) with a rate of 0.1 at the head: the
# stem is four parts away, so it learns at $0.1 / 1.6^4 = 0.1 / 6.5536 = 0.0153$.


# %%
def discriminative_groups(
    parts: list[nn.Module], lr: float, decay: float, weight_decay: float
) -> list[dict[str, object]]:
    """Parameter groups for an optimizer: the last part at `lr`, each before it `decay` times
    slower.  Howard and Ruder 2018, sec. 3.2.

    >>> parts = [nn.Linear(2, 2, bias=False) for _ in range(5)]
    >>> groups = discriminative_groups(parts, lr=0.1, decay=1.6, weight_decay=0.0)
    >>> [round(group["lr"], 4) for group in groups]  # the last part first
    [0.1, 0.0625, 0.0391, 0.0244, 0.0153]
    """
    groups = []
    for distance, part in enumerate(reversed(parts)):
        for group in parameter_groups(part, weight_decay):  # weights, then biases and norms
            if group["params"]:
                groups.append({**group, "lr": lr / decay**distance})
    return groups


# %% [markdown]
# **Say it first.** ResNet-20 has a stem, three stages and a head. Which share of its 270,000
# weights learns at a quarter of the head's rate or faster, if each part is 1.6 times slower? (The
# last stage is one part away, the second two.)

# %%
if live():
    parts = parts_of(MODELS["resnet20"](num_classes=10))
    for distance, part in enumerate(reversed(parts)):
        show(f"{sum(p.numel() for p in part.parameters()):>7,} weights at lr / {1.6**distance:.2f}")

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
        self, optimizer: Optimizer, kind: str, steps: int, warmup_steps: int,
        parts: list[nn.Module], every: int,
    ) -> None:  # fmt: skip
        self.parts, self.every, self.awake = parts, max(1, every), 0
        super().__init__(optimizer, kind, steps, warmup_steps)

    def _apply(self) -> None:
        """Called at the start and after each step; the schedule below sets the rates."""
        super()._apply()
        awake = min(len(self.parts), 1 + self.taken // self.every)
        if awake != self.awake:
            self.awake = awake
            for part in self.parts[:-awake]:
                freeze(part)
            for part in self.parts[-awake:]:
                thaw(part)


# %% [markdown]
# **Say it first.** Three parts, one wakes every two steps. How many learn at steps 1 to 6?

# %%
if live():
    parts = [nn.Linear(2, 2) for _ in range(3)]
    optimizer = SGD([p for part in parts for p in part.parameters()], lr=0.1)
    schedule = UnfreezingSchedule(optimizer, "constant", 6, 0, parts, every=2)
    for step in range(1, 7):
        show(f"step {step}: {[part.weight.requires_grad for part in parts]}")
        schedule.step()

# %% [markdown]
# ## Feature extraction: the body runs once
#
# If nothing in front of the classifier learns, every epoch computes the same features of the same
# images. Compute them once, and training is that of one linear layer: seconds, for any network.


# %%
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


# %% [markdown]
# **Say it first.** ResNet-20's last stage has 64 channels, which the head averages. How many
# numbers are left of a digit, and how many weights has a classifier of five classes?

# %%
if live():
    net = MODELS["resnet20"](num_classes=5).eval()
    logits, features = classify_with_features(net, digits())
    show(features.shape, sum(p.numel() for p in net.get_classifier().parameters()))

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


def set_up(model: nn.Module, config: Config, loader: Loader) -> tuple[Optimizer, Schedule]:
    """What learns, and at which rate, by `config.strategy`: the model frozen where it has to be,
    its optimizer and schedule.
    """
    strategy, parts = config.strategy, parts_of(model)  # the parts from the stem to the head
    if strategy in ("features", "last-stage"):
        freeze(model)
        for part in [model.get_classifier()] if strategy == "features" else parts[-2:]:
            thaw(part)
    if strategy in ("full", "progressive"):
        groups = discriminative_groups(parts, config.lr, config.rate_decay, config.weight_decay)
    else:
        groups = parameter_groups(model, config.weight_decay)  # of what asks for a gradient
    fused, nesterov = loader.device.type in ("cpu", "cuda"), config.momentum > 0
    optimizer = SGD(groups, config.lr, config.momentum, nesterov=nesterov, fused=fused)
    if strategy != "progressive":
        return optimizer, make_schedule(optimizer, config, loader)
    steps = len(loader) // loader.accumulate  # of an epoch
    every = max(1, int(config.unfreeze_by * config.epochs / (len(parts) - 1))) * steps
    lengths = config.epochs * steps, round(config.warmup * steps)
    return optimizer, UnfreezingSchedule(optimizer, config.schedule, *lengths, parts, every)


# %% [markdown]
# ## Settings that follow from the size of the data
#
# With few images the number of *steps* decides, not of epochs: a hundred epochs of three steps are
# no more than three epochs of a hundred. BiT (Kolesnikov et al. 2020, sections 2.2 and 3.3) sets
# the length of the training by the number of images too.
#
# NOTE: BiT's rule also sets the resolution, by the size of the images, and whether to use MixUp, by
# their number; this table sets neither. Its lengths are our own, for small nets.
#
# Warm-up takes a tenth of the steps: the new head's first gradients are random, and the body should
# not follow them.


# %%
class Row(NamedTuple):
    """A row of the table: what to do with up to so many labelled images."""

    images: float
    batch_size: int
    steps: int
    why: str


TABLE = (
    Row(100, 16, 40, "small batches, or there would be one step an epoch"),
    Row(1_000, 32, 200, "enough labels that the body may learn, slowly"),
    Row(5_000, 32, 600, "the same, for longer"),
    Row(20_000, 64, 3_000, "the body adapts; scratch begins to catch up"),
    Row(math.inf, 128, 10_000, "as a training from scratch, but shorter"),
)


# %% [markdown]
# **Say it first.** Of 32 labelled digits, how many steps has an epoch, and how many epochs are 40
# steps?

# %%
if live():
    asked = Config()
    for count in (32, 700, 30_000):
        sized = settings_for(asked, asked.resolve("digits"), count, TABLE)
        show(f"{count} images: {sized.epochs} epochs of {count // sized.batch_size} steps")

# %% [markdown]
# ## One transfer
#
# The weights come from one of three places: a run of this course (`--from`), trained weights
# (`--pretrained`), or, with neither at hand, a small but honest pretraining of our own: the first
# half of the classes teaches the net, the second half is the new task, whose labels are few.
#
# `--pretrained` means the official weights of ImageNet, downloaded once. One net travels with the
# course and needs no network: resnet20, trained on CIFAR-10 at 32 px (`common/weights/`).
#
# A classifier belongs to its classes and not to their number: it is kept if the new classes have
# the same names, and drawn anew otherwise. Images are normalised as the source's were.


# %%
def build(config: Config, num_classes: int) -> nn.Module:
    """The model that the flags ask for, untrained. No auxiliary heads: they help long trainings."""
    options = {}
    if config.model in ("googlenet", "inception_v3"):
        options = {"aux": False, "transform_input": config.pretrained}
    return MODELS[config.model](num_classes=num_classes, small_input=config.small_input, **options)


def start(task: Task, strategy: str, num_classes: int, seed: int) -> nn.Module:
    """The source's model with a new classifier, or for `scratch` an untrained one."""
    set_up_torch(task.device, seed, task.config.deterministic)
    if strategy == "scratch":
        model = task.build(num_classes)
    else:
        model = deepcopy(task.origin.model)
        if task.origin.class_names != task.class_names:
            model.reset_classifier(num_classes)
    return model.to(task.device, memory_format=memory_format(task.config.image_size))


def transfer(
    model: nn.Module, data: Data, config: Config, loss_fn: nn.Module, run: Run | None = None
) -> list:
    """Train `model` by `config.strategy`; the history comes back."""
    optimizer, schedule = set_up(model, config, data.train)
    learner = model
    if config.strategy == "features":
        known = {"train": data.train, "val": data.val}  # the test is one of the whole model
        known = {name: extract_features(model, split) for name, split in known.items()}
        data, learner = images.with_features(data, known), ClassifierOnFeatures(model)
    return fit(learner, data, loss_fn, optimizer, schedule, config, run, "" if run else "transfer")


# %% [markdown]
# ## One run, from weights to report
#
# Where `--compare` is on, all strategies are tried first (the experiment below) and the run goes on
# with the one that does best on *validation* images, at its own rate. The test images choose
# nothing.


# %%
def run(config: Config) -> dict[str, object] | None:
    """Compare where that is asked for, train by one strategy, test once, draw, save, predict."""
    if config.predict:
        find_images(config.predict.split(os.pathsep))  # now, and not after the training
    if config.from_run and (config.predict or config.export):
        return use(config, HERE)
    task = open_task(config, HERE)
    run, origin, device = Run.open(task.config, LESSON), task.origin, task.device
    if origin.class_names:  # for --resume, which need not pretrain again
        origin.save(run.folder / SOURCE)
    compared = choose_strategy(task, compare, run)
    config = run.config  # with the strategy and its rate

    data = task.data(task.images, config, device)
    model = start(task, config.strategy, data.num_classes, config.seed)
    print(f"transfer   {config.strategy}, from {origin.name}")
    banner(config, device, data, model, run)
    before = None if origin.model is None else extract_features(origin.model, data.test)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    history = transfer(model, data, config, loss_fn, run)

    test = evaluate(model, data.test, data.class_names)
    cost = profile(model, data.input_size)
    draw_figures(run, model, data, history, test)
    if before is not None:
        views = {"before": before, "after": extract_features(model, data.test)}
        views = {name: features.float().cpu().numpy() for name, features in views.items()}
        run.figure("features", feature_map(views, test.targets, data.class_names, config.seed))
    calibration = calibrate(model, data.val)  # how sure it may be: for --predict
    calibration.save(run.folder)
    facts = {
        "strategy": config.strategy, "labels": len(data.train.labels), "fraction": config.fraction,
        "source": origin.name, "source_top1": origin.top1, "baselines": baselines(data),
        "calibration": asdict(calibration), **compared,
    }  # fmt: skip
    result = run.finish(model, data, history, test, cost, **facts)
    mean_std, side = (data.mean, data.std), config.image_size
    deploy(config, run.folder, model, data.class_names, mean_std, side, task.build, calibration)
    return result


# %% [markdown]
# ## The loop itself
#
# `fit` repeats this for every epoch, as in lesson 1. What is frozen has no gradient, so the
# optimizer does not know it; `schedule.step()` is where the parts wake up.

# %%
if live():
    print(inspect.getsource(training.train_one_epoch))

# %% [markdown]
# ## Experiment `compare`: all strategies under one budget
#
# The same labelled images, the same epochs; each strategy has its own best of three rates, chosen
# on validation images with a seed that isn't counted. Each seed draws other images to be labelled,
# another new head and another order. All start from one source net, so the answer is about this
# source.
#
# Margin: two points, four of 179 test images. Less would not be worth the choice.


# %%
def around(lr: float) -> tuple[float, ...]:
    """The rates that every strategy may choose from."""
    return (lr / 3, lr, 3 * lr)


def try_out(
    task: Task, arm: Arm, data: Data, config: Config, device: torch.device,
    loss_of: Callable[[Tensor], nn.Module] = lambda counts: nn.CrossEntropyLoss(),
) -> Trial:  # fmt: skip
    """One transfer for an experiment, tested with the weights of its last epoch: nothing is chosen.

    Args:
        loss_of: the images of each class to a loss.
    """
    model = start(task, config.strategy, data.num_classes, config.seed)
    loss_fn = loss_of(torch.bincount(data.train.labels, minlength=data.num_classes))
    began = time.monotonic()
    history = transfer(model, data, config, loss_fn.to(device))
    seconds = time.monotonic() - began
    return tested(f"{arm.name}, seed {config.seed}", model, data, history, seconds)


def compare(task: Task, config: Config) -> Experiment:
    usable = STRATEGIES if task.origin.model is not None else STRATEGIES[:1]
    rates, train = around(config.lr), partial(try_out, task)
    arms = [Arm(name, task.build, {"strategy": name}, rates=rates, train=train) for name in usable]
    claims = [
        Claim("fine-tuning is ahead of scratch", "full", "scratch", margin=0.02),
        Claim("fine-tuning is ahead of a new classifier alone", "full", "features", margin=0.02),
        Claim("waking parts in turn is ahead of all at once", "progressive", "full", margin=0.02),
    ][: 3 * (len(arms) > 1)]
    return Experiment("Strategies under one budget", arms, claims, data=task.data)


# %% [markdown]
# ## Experiment `fractions`: how many labels is a trained body worth?
#
# At each share of the labels scratch and transfer take the *same number of steps*, each at its own
# best rate; else more labels would mean a longer training too.


# %%
def fractions(task: Task, config: Config) -> Experiment:
    shares = sorted(set(numbers(config.fractions, "--fractions"))) or [1.0]
    counts = [task.labelled(share) for share in shares]
    usable = ["scratch", "full"][: 1 + (task.origin.model is not None)]
    arms = [
        Arm(
            f"{name}, {count} labels",
            task.build,
            {"fraction": f, "strategy": name, **as_many_steps(config, counts[-1], count)},
            rates=around(config.lr),
            train=partial(try_out, task),
        )
        for f, count in zip(shares, counts)
        for name in usable
    ]
    few = f"full, {counts[0]} labels", f"scratch, {counts[0]} labels"
    many = f"full, {counts[-1]} labels", f"scratch, {counts[-1]} labels"
    text = "the lead is larger with the fewest labels than with the most"
    claims = [
        Claim("with the fewest labels transfer is ahead of scratch", *few, margin=0.02),
        Claim(text, *few, margin=0.02, beyond=many),
    ][: 2 * (len(usable) > 1)]
    return Experiment("What labels are worth", arms, claims, data=task.data)


# %% [markdown]
# ## Experiment `schedules`
#
# Warm-up spares the trained weights the first, random gradients of the new head; after it the rate
# falls by a half cosine. One-cycle warms up for a third of the run. Plateau waits until the
# validation loss stops falling, which with few validation images is a noisy signal.


# %%
def schedules(task: Task, config: Config) -> Experiment:
    train, strategy = partial(try_out, task), config.strategy or "full"
    arms = [
        Arm(kind, task.build, {"schedule": kind, "strategy": strategy}, train=train)
        for kind in ("cosine", "onecycle", "plateau")
    ]
    claims = [
        Claim("a cosine is ahead of a plateau", "cosine", "plateau", margin=0.02),
        Claim("one-cycle is ahead of a cosine", "onecycle", "cosine", margin=0.02),
    ]
    return Experiment("Schedules for the same transfer", arms, claims, data=task.data)


# %% [markdown]
# ## When some classes are rare
#
# A class with five images in a thousand costs the mean loss next to nothing, so the net ignores it,
# and the accuracy hardly shows it. Look at the recall of each class instead, and at their mean.
# Four remedies:
#
# - **class-balanced weights** (Cui et al. 2019): images of a class resemble each other, so the n-th
#   brings less than the first. $n$ of them count as the *effective number* $(1-\beta^n)/(1-\beta)$,
#   and the class is weighted by its inverse.
# - **focal loss** (Lin et al. 2017): what the net gets right already counts less,
#   $-\alpha_y (1 - p_y)^\gamma \log p_y$. By hand, with $\gamma = 2$: at $p_y = 0.9$ the factor is
#   $0.1^2$, a hundredth; at $p_y = 0.5$ a quarter.
# - **logit adjustment** (Menon et al. 2021): train with $\log \pi_k$ added to the logit of each
#   class, where $\pi_k$ is its share. The net no longer has to learn that a class is rare.
# - **balanced sampling**: rare images come more often.


# %%
def class_balanced_weights(counts: Tensor, beta: float = 0.999) -> Tensor:
    """(K,) images of each class -> (K,) weights with mean 1.  Cui et al. 2019, eq. 2 and sec. 4.

    >>> class_balanced_weights(torch.tensor([100, 1]), beta=0.99)  # 63.4 effective images, and 1
    tensor([0.0311, 1.9689])
    """
    effective = (1 - beta ** counts.clamp(min=1).double()) / (1 - beta)
    return (len(counts) / effective / (1 / effective).sum()).float()


class FocalLoss(nn.Module):
    """(N, K) logits and (N,) labels -> the mean of -alpha (1 - p)^gamma log p.  Lin et al. 2017,
    eq. 5; without alpha eq. 4.

    With gamma = 0 it is the cross-entropy:

    >>> logits, y = torch.tensor([[2.0, 0.0], [0.5, 1.0]]), torch.tensor([0, 0])
    >>> torch.allclose(FocalLoss(gamma=0)(logits, y), F.cross_entropy(logits, y))
    True
    """

    def __init__(self, gamma: float = 2.0, alpha: Tensor | None = None) -> None:
        super().__init__()
        self.gamma = gamma
        self.register_buffer("alpha", alpha)  # (K,)

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        log_p = -F.cross_entropy(logits, y, reduction="none")  # (N,), log of the true class's share
        loss = -((1 - log_p.exp()) ** self.gamma) * log_p
        return (loss if self.alpha is None else self.alpha[y] * loss).mean()


class LogitAdjustedLoss(nn.Module):
    """Cross-entropy of the logits plus the log of each class's share.  Menon et al. 2021, eq. 10.

    >>> loss = LogitAdjustedLoss(torch.tensor([9, 1]))  # without knowing more, say 9 to 1
    >>> loss(torch.zeros(1, 2), torch.tensor([1])).exp().item()
    10.0
    """

    def __init__(self, counts: Tensor) -> None:
        super().__init__()
        self.register_buffer("log_share", (counts.clamp(min=1) / counts.sum()).log())  # (K,)

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits + self.log_share, y)


# %% [markdown]
# **Say it first.** Focal loss with $\gamma = 2$ against cross-entropy: for an image that the net
# gives 0.9 the loss shrinks to a hundredth. To which share for one that it gives 0.1?

# %%
if live():
    for p in (0.9, 0.5, 0.1):
        logits, y = torch.tensor([[p, 1 - p]]).log(), torch.tensor([0])
        show(f"p = {p}: {FocalLoss(2.0)(logits, y) / F.cross_entropy(logits, y):.2f}")

# %% [markdown]
# ### Experiment `imbalance`
#
# Of the rarest class there is one image for 30 of the commonest. Margin: two points of mean recall.


# %%
REMEDIES: dict[str, Callable[[Tensor], nn.Module]] = {
    "cross-entropy": lambda counts: nn.CrossEntropyLoss(),
    "class-balanced": lambda counts: nn.CrossEntropyLoss(class_balanced_weights(counts)),
    "focal": lambda counts: FocalLoss(2.0, class_balanced_weights(counts)),
    "logit adjustment": LogitAdjustedLoss,
    "balanced sampling": lambda counts: nn.CrossEntropyLoss(),
}


def imbalance(task: Task, config: Config) -> Experiment:
    names = task.class_names
    labels = task.data(task.images, config, task.device, config.imbalance).train.labels
    changes = as_many_steps(config, task.labelled(config.fraction), len(labels))
    changes["strategy"] = config.strategy or ("full" if task.origin.model else "scratch")

    def train(arm: Arm, data: Data, config: Config, device: torch.device) -> Trial:
        if arm.name == "balanced sampling":
            loader = copy(data.train)  # the other arms keep their order
            loader.order = partial(images.balanced_order, loader.labels, config.seed)
            data = replace(data, train=loader)
        return try_out(task, arm, data, config, device, REMEDIES[arm.name])

    def recalls(trial: Trial, data: Data) -> dict[str, object]:
        labels = data.test.labels.numpy()
        each = [float(trial.right[labels == c].mean()) for c in range(len(names))]
        return {"mean_recall": mean(each), "rarest_recall": each[-1], "recalls": each}

    def draw(results: Results) -> object:
        table = [np.mean(results.values(name, "recalls"), axis=0) for name in results.records]
        columns = [f"{a} ({n})" for a, n in zip(names, torch.bincount(labels).tolist())]
        title, x = "Recall of each class, mean over seeds", "class (its training images)"
        look = {"percent": True, "limits": (0, 1), "xlabel": x}
        return plotting.heatmap(np.stack(table), list(results.records), columns, title, **look)

    arms = [Arm(name, task.build, changes, train=train) for name in REMEDIES]
    plain, *remedies = REMEDIES
    claims = [
        Claim(f"{name} raises the mean recall", name, plain, "mean_recall", margin=0.02)
        for name in remedies
    ]
    tail = partial(task.data, imbalance=config.imbalance)
    return Experiment("Rare classes", arms, claims, after=recalls, figure=draw, data=tail)


# %% [markdown]
# ## When the images look different: domain adaptation
#
# The same classes, but another camera, other paper, other light, and no labels there. Three ways to
# use the unlabelled images:
#
# - **AdaBN** replaces BatchNorm's statistics by those of the new images; nothing is trained.
# - **Deep CORAL** pulls the covariances of the two domains' logits together while it trains.
# - **DANN** trains a critic to tell the domains apart by their features, and the body to fool it:
#   the gradient of the critic is *reversed* on its way into the body.


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

    >>> logits = torch.randn(8, 3)
    >>> coral_loss(logits, logits + 5).abs().item() < 1e-6  # a shift is not a covariance
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


# %% [markdown]
# **Say it first.** $y = 3x$ is followed by a reversal of strength 1, and $z = 2y$. What is
# $\partial z / \partial x$ as autograd reports it?

# %%
if live():
    x = torch.tensor(1.0, requires_grad=True)
    (2 * reverse_gradient(3 * x)).backward()
    show(x.grad)

# %% [markdown]
# Both methods train on batches of the source and of the target at once: `TwoDomains` gives the
# source's logits and features, then the target's.
#
# NOTE: the two pass through the net one after the other, so that BatchNorm takes each domain's own
# mean and variance, as AdaBN does in the test. The papers' nets have no BatchNorm.


# %%
class DeepCoralLoss(nn.Module):
    """Cross-entropy on the source, and the distance of both domains' logits: the paper takes the
    last layer too (sec. 4.1), and a weight that makes both terms end at about one size.
    """

    def forward(self, output: tuple[Tensor, ...], y: Tensor) -> Tensor:
        logits, _, target_logits, _ = output
        return F.cross_entropy(logits, y) + coral_loss(logits, target_logits)


class DANNLoss(nn.Module):
    """Cross-entropy on the source, and that of a critic behind reversed gradients, which tells the
    domains apart.  Ganin et al. 2016, fig. 1.

    Args:
        width: of the features, D.
        steps: of the whole training, over which the reversal grows from 0 to 1.
    """

    def __init__(self, width: int, steps: int, hidden: int = 128) -> None:
        super().__init__()
        self.steps, self.taken = steps, 0
        self.critic = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, output: tuple[Tensor, ...], y: Tensor) -> Tensor:
        logits, source, _, target = output
        # Ganin et al. 2016, sec. 5.2.2: early on the critic's gradient is noise.
        strength = 2 / (1 + math.exp(-10 * self.taken / self.steps)) - 1
        self.taken += 1
        features = reverse_gradient(torch.cat((source, target)), strength)  # (2N, D)
        truth = torch.cat((torch.zeros(len(source)), torch.ones(len(target)))).to(features)
        domain = self.critic(features).squeeze(1)
        return F.cross_entropy(logits, y) + F.binary_cross_entropy_with_logits(domain, truth)


# %% [markdown]
# ### Experiment `domain-adaptation`
#
# The target is the same digits on stripes of random direction (`--shift noisy|inverted`, or
# `--target-dir`). Two arms say what there is to gain: **source only** knows nothing of the target,
# the **oracle** is trained on the target's labels, three times as long. Each trained method stands
# there twice, with the statistics that its training left and with those of the target (*AdaBN*), so
# that what the statistics bring is not credited to the method.
#
# All have one rate: a choice of rates would need target labels. Margin: two points, seven of 359
# test images; less would not be worth a second loss.


# %%
def learn(method: str, here: Data, there: Data, config: Config, device: torch.device) -> tuple:
    """A method's net, trained; its history; the seconds."""
    set_up_torch(device, config.seed, config.deterministic)
    model = build(config, here.num_classes).to(device)
    learner, loss_fn, data = model, nn.CrossEntropyLoss(), here
    if method == "oracle":
        data, config = there, replace(config, epochs=config.epochs * (1 if config.smoke else 3))
    elif method != "source only":
        data = replace(here, train=images.PairLoader(here.train, there.train))
        width, steps = model.get_classifier().in_features, config.epochs * len(data.train)
        learner = images.TwoDomains(model)
        loss_fn = DANNLoss(width, steps).to(device) if method == "DANN" else DeepCoralLoss()
    optimizer = make_optimizer(nn.ModuleList([learner, loss_fn]), config)  # the critic learns too
    schedule = make_schedule(optimizer, config, data.train)
    began = time.monotonic()
    history = fit(learner, data, loss_fn, optimizer, schedule, config, label=method)
    return model, history, time.monotonic() - began


def domain_adaptation(config: Config) -> Experiment:
    other = locate(replace(config, dataset=config.target_dir)) if config.target_dir else None
    folder = read_once(load_source(other), other) if other else None
    trained: dict[tuple[str, int], tuple] = {}  # a net is tested with and without new statistics

    def train(arm: Arm, here: Data, config: Config, device: torch.device) -> Trial:
        target = images.other_domain(images.source_of(here), folder, config.shift)
        there = make_data(target, config, device, (here.mean, here.std))
        method, _, new_statistics = arm.name.partition(" + ")
        key = method, config.seed
        if key not in trained:
            trained[key] = learn(method, here, there, config, device)
        model, history, seconds = trained[key]
        if new_statistics:
            model = adapt_batch_norm(deepcopy(model), there.train)
        return tested(f"{arm.name}, seed {config.seed}", model, there, history, seconds)

    methods = "source only", "Deep CORAL", "DANN"
    names = [*(method + more for method in methods for more in ("", " + AdaBN")), "oracle"]
    plain, adabn, _, coral, _, dann, oracle = names
    claims = [
        Claim("new statistics alone help", adabn, plain, margin=0.02),
        Claim("Deep CORAL is ahead of new statistics alone", coral, adabn, margin=0.02),
        Claim("DANN is ahead of new statistics alone", dann, adabn, margin=0.02),
    ]

    def way(results: Results) -> list[str]:
        low, *others, high = (results.mean(name, "test_top1") for name in names)
        told = (f"{n} {(v - low) / (high - low):.0%}" for n, v in zip(names[1:], others))
        return [f"of the way from {plain} to the {oracle}: {', '.join(told)}"] if high > low else []

    arms = [Arm(name, partial(build, config), train=train) for name in names]
    heading = f"To {config.target_dir or config.shift} images, without labels there"
    return Experiment(heading, arms, claims, notes=way)


def adaptation(config: Config) -> object:
    config = locate(config)
    # Covariances and critics have gradients with spikes: hence the limit, for all methods alike.
    base_lr = config.base_lr or (0.8 if config.dataset == "digits" else 0.2)
    config = replace(config, base_lr=base_lr, clip=config.clip or 1.0)
    return run_experiment(LESSON, domain_adaptation, config)


# %%
EXPERIMENTS: dict[str, Callable[[Config], object]] = {
    "compare": with_weights(HERE, compare),
    "fractions": with_weights(HERE, fractions, lambda c: max(numbers(c.fractions, ""), default=1)),
    "schedules": with_weights(HERE, schedules),
    "imbalance": with_weights(HERE, imbalance, lambda c: c.fraction or 1.0),
    "domain-adaptation": adaptation,
}

# %% [markdown]
# ## What to notice
#
# NOTICE
#
# ## Exercises
#
# `python -m common.starter 08 --out my_work` writes this lesson without the bodies to be written;
# the numbers are those of the marked exercises.
#
# - **8.1** Write `freeze`, `thaw` and `hold_still`. What happens to `last-stage` if the frozen
#   BatchNorms are left in train mode?
# - **8.2** Write `discriminative_groups`. With `--rate-decay 1` it is plain fine-tuning: which is
#   better here, and which with 2.6, the paper's value for language models?
# - **8.3** Write `UnfreezingSchedule`. At which step of the default run is the stem awake?
# - **8.4** Write `FocalLoss.forward`. Which gamma is best for the rarest class, and what does it
#   cost the others?
# - **8.5** Write `coral_loss`. Why can it be zero although every class is taken for another?
# - **8.6** Write `GradientReversal`. What does DANN become with a strength of 0 all along?
# - **8.7** Write `adapt_batch_norm`. What goes wrong if the images come class by class?

# %%
if __name__ == "__main__":
    main(config, MODELS, build, run, EXPERIMENTS)
