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
    python 08_transfer_learning_advanced.py --experiment compare  # or one of the other four below

Measured on one thread of an AMD EPYC that others used too, torch 2.14: resnet20 with 32 labels of
digits 5 to 9 (8 px, 20 epochs, seeds 0 to 2) tests at 79.89, 74.86 and 87.71%, 1 s of training.
"""

# %% [markdown]
# **You will** freeze a part of a net so that *nothing* in it changes, give each part a learning
# rate of its own, wake the parts in turn, choose by measuring between scratch, features and
# fine-tuning, train where some classes are rare, and move to images that look different. **You
# need** lesson 1. **Time**: 60 minutes to read, 2 to run, 1 to 4 for each experiment, 2 hours for
# the exercises.
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
# strokes, corners, textures. Other nets have learned these already, from large datasets.
#
#           source: many labels                     target: few labels
#      x ── stem ── stages ── head A            x ── stem ── stages ── head B
#             │        │                               ↑        ↑        ↑
#             └────────┴───────── copied ──────────────┴────────┘       new
#
# You still have to decide what to do with the copied part: keep it, or train it on, and how fast.

# %%
from common.cli import main
from common.config import TrainConfig, knob, numbers_of
from common.transfer.flags import parse_flags

from dataclasses import dataclass


LESSON = "08_transfer_learning_advanced"


@dataclass(frozen=True)
class Config(TrainConfig):
    """What this lesson can be told; every field is a flag, and `--help` prints them all."""

    model: str = knob("resnet20", "any model of the course, or torchvision:NAME")
    dataset: str = knob("digits", "the target: a dataset's name, or the path of a folder of images")
    from_run: str = knob("", "start from the weights of this run, or from resnet20", short="--from")
    source_classes: int | None = knob(None, "classes to pretrain on (default: half)", (), 2, 10**5)
    source_epochs: int | None = knob(None, "epochs of that pretraining", low=1, high=10000)
    strategy: str | None = knob(
        None,
        "what to train, and how fast (default: full, or what --compare finds best)",
        ("scratch", "features", "last-stage", "full", "progressive"),
    )
    compare: bool | None = knob(None, "try all strategies, then take the best (default: on digits)")
    seeds: int | None = knob(None, "trainings of each way (default: 3, on digits more)", (), 1, 100)
    fraction: float | None = knob(None, "share of the target's labels to use", low=1e-4, high=1)
    optimizer: str = knob("sgd", "what takes the steps; each part at its own rate", ("sgd",))
    rate_decay: float = knob(1.6, "how many times slower each part learns", low=1, high=100)
    unfreeze_by: float = knob(0.5, "share of the epochs after which all is awake", low=0, high=1)
    predict: str = knob("", "images to classify then; with --from, without training", nargs="+")
    export: bool = knob(False, "write torch.export and ONNX files, and check them")
    export_pixels: bool = knob(False, "the same, from a picture of any size to probabilities")
    fractions: str = knob("0.05,0.2,1", "shares of the labels", (), 1e-4, 1, only="fractions")
    imbalance: float = knob(30.0, "images, largest class to smallest", (), 1, 1e4, only="imbalance")
    shift: str = knob("textured", "of the target's look", ("textured", "noisy", "inverted"),
                      only="domain-adaptation")  # fmt: skip
    target_dir: str = knob("", "or its images' folder", only="domain-adaptation")

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
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from common.data import Data, Loader
from common.evaluation import evaluate
from common.experiments import Arm, Claim, Experiment
from common.live import digits, live, show
from common.profiling import profile
from common.runs import Run, banner, draw_figures
from common.training import Schedule, fit, make_schedule, parameter_groups, train_one_epoch
from common.transfer.arms import adaptation, recall_figure, recalls, way_to_the_oracle
from common.transfer.calibration import Trained, calibrate
from common.transfer.deployment import deploy, use
from common.transfer.embedding import feature_map
from common.transfer.images import in_chunks, with_features
from common.transfer.origins import Catalogue
from common.transfer.parts import ClassifierOnFeatures, classify_with_features, parts_of
from common.transfer.prediction import EVERY_PICTURE, find_images, paths_of
from common.transfer.task import SOURCE, Task, around, as_many_steps, at_one_rate, choose_strategy
from common.transfer.task import open_task, with_weights

# Every model of lessons 1 to 7 by its name, and torchvision's as torchvision:NAME.
MODELS: Mapping[str, Callable[..., nn.Module]] = Catalogue()
HERE = sys.modules[__name__]

# %% [markdown]
# ## Freezing
#
# Two things keep a layer as it is. Its weights ask for no gradient. And its BatchNorm, if it has
# one, uses the statistics that it came with. `requires_grad` says nothing about these: in train
# mode the running mean and variance still move towards those of your few images. This is easily
# forgotten.


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
# **Say it first**: two nets of a convolution and a BatchNorm see the same digits in train mode. In
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
# **Say it first**: ResNet-20 has a stem, three stages and a head; each stage has about four
# times the weights of the one before. Do most of its 270,000 weights learn at half of the head's
# rate or faster, if each part is 1.6 times slower? (The last stage is one part away.)

# %%
if live():
    parts = parts_of(MODELS["resnet20"](num_classes=10))
    for distance, part in enumerate(reversed(parts)):
        show(f"{sum(p.numel() for p in part.parameters()):>7,} weights at lr / {1.6**distance:.2f}")

# %% [markdown]
# ## Progressive unfreezing
#
# A new head starts with random weights, and its first gradients are noise. If the body learns from
# them, it loses what it knew. So train the head alone at first. Then *wake* one part after the
# other, from the head down: let its weights learn (Howard and Ruder 2018, section 3.3).


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
# **Say it first**: three parts, one wakes every two steps. How many learn at steps 1 to 6?

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
# images. Compute them once. Then only one linear layer is left to train: seconds, for any network.


# %%
@torch.no_grad()
def extract_features(model: nn.Module, loader: Loader) -> Tensor:
    """The features of a whole split, (N, D), in its order, without augmentation.

    NOTE: augmentation would give other features in each epoch; without it they can be cached.
    """
    model.eval()
    return torch.cat([classify_with_features(model, x)[1] for x in in_chunks(loader)])


# %% [markdown]
# **Say it first**: ResNet-20's last stage has 64 channels, which the head averages. How many
# numbers are left of a digit, and how many parameters has a classifier of five classes?

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
# | features | the source | the classifier, on cached features | good source, little time |
# | last-stage | the source | last stage and head, at one rate | few labels, related classes |
# | full | the source | everything, earlier parts slower | the usual choice |
# | progressive | the source | part by part, from the head down | first steps could harm the body |


# %%
STRATEGIES = ("scratch", "features", "last-stage", "full", "progressive")


def set_up(model: nn.Module, config: Config, loader: Loader) -> tuple[Optimizer, Schedule]:
    """Freeze what `config.strategy` does not train; the optimizer and its schedule come back."""
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
# With few images count the *steps*, not the epochs: a hundred epochs of three steps are as long as
# three epochs of a hundred steps. BiT (Kolesnikov et al. 2020, sections 2.2 and 3.3) sets the
# length of the training by the number of images too.
#
# NOTE: BiT's rule also sets the resolution, by the size of the images, and whether to use MixUp, by
# their number; this table sets neither. Its lengths are our own, for small nets.
#
# Warm-up takes a tenth of the steps, because the new head's first gradients are random.


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
# ## One transfer
#
# `--from` takes the weights of a run of this course, and `--pretrained` the official weights of
# ImageNet; resnet20 and resnet9_wide, trained on CIFAR-10, are in the course (`common/weights/`).
# Without either, the net is pretrained here: on half of the classes. The other half is the new
# task, and few of its labels are used.
#
# The classifier is kept if the new classes have the same names. If not, a new one starts from
# random weights, even for as many classes. Images are normalised as the source's were.


# %%
def build(config: Config, num_classes: int) -> nn.Module:
    """The model that the flags ask for, untrained. No auxiliary heads: they help long trainings."""
    options = {}
    if config.model in ("googlenet", "inception_v3"):
        options = {"aux": False, "transform_input": config.pretrained}
    return MODELS[config.model](num_classes=num_classes, small_input=config.small_input, **options)


def transfer(
    model: nn.Module, data: Data, config: Config, loss_fn: nn.Module, run: Run | None = None
) -> list:
    """Train `model` by `config.strategy`; the history comes back."""
    optimizer, schedule = set_up(model, config, data.train)
    learner = model
    if config.strategy == "features":
        known = {"train": data.train, "val": data.val}  # the whole model is tested
        known = {name: extract_features(model, split) for name, split in known.items()}
        data, learner = with_features(data, known), ClassifierOnFeatures(model)
    return fit(learner, data, loss_fn, optimizer, schedule, config, run, "" if run else "transfer")


# %% [markdown]
# ## One run, from weights to report
#
# With `--compare` all strategies are tried first (the experiment below). The run goes on with the
# one that does best on *validation* images, at its own rate; the test images choose nothing.


# %%
def run(config: Config) -> dict[str, object] | None:
    """Compare where that is asked for, train by one strategy, test once, draw, save, predict."""
    if config.predict:
        find_images(paths_of(config.predict))  # now, and not after the training
    if config.from_run and (config.predict or config.export or config.export_pixels):
        return use(config, HERE)
    task = open_task(config, HERE)
    run, origin, device = Run.open(task.config, LESSON), task.origin, task.device
    if origin.class_names:  # for --resume, which need not pretrain again
        origin.save(run.folder / SOURCE)
    compared = choose_strategy(task, compare, run)
    config = run.config  # with the strategy and its rate

    data = task.data(task.images, config, device)
    model = task.start(config, data)
    print(f"transfer   {config.strategy}, from {origin.name}")
    banner(config, device, data, model, run)
    before = {} if origin.model is None else {"before": extract_features(origin.model, data.test)}
    loss_fn = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    history = transfer(model, data, config, loss_fn, run)

    test = evaluate(model, data.test, data.class_names)
    cost = profile(model, data.input_size)
    draw_figures(run, model, data, history, test)
    views = {**before, "after": extract_features(model, data.test)}
    run.figure("features", feature_map(views, test.targets, data.class_names, config.seed))
    calibration = calibrate(model, data.val)  # how sure it may be: for --predict
    calibration.save(run.folder)
    facts = {
        "strategy": config.strategy, "labels": len(data.train.labels), "fraction": config.fraction,
        "source": origin.name, "source_top1": origin.top1,
        "calibration": vars(calibration), **compared, "tables": {"All": compared["strategies"]},
        "notes": [*compared["verdict"], EVERY_PICTURE],
    }  # fmt: skip
    result = run.finish(model, data, history, test, cost, **facts)
    known = data.class_names, (data.mean, data.std), config.image_size, calibration
    deploy(config, run.folder, Trained(model, *known), task.build)
    return result


# %% [markdown]
# ## The loop itself
#
# `fit` repeats this for every epoch, as in lesson 1. What is frozen has no gradient, so the
# optimizer leaves it as it is; `schedule.step()` is where the parts wake up.

# %%
if live():
    show(train_one_epoch)

# %% [markdown]
# ## Experiment: all strategies under one budget (`compare`)
#
# The same labelled images, the same epochs; each strategy has its own best of three rates, chosen
# on validation images with a seed that isn't counted. Each seed draws other images to be labelled,
# another new head and another order. All start from one source net: the answer is about this one.
#
# Margin: two points, four of 179 test images. A smaller difference is not worth a choice.


# %%
def compare(task: Task, config: Config) -> Experiment:
    arms = [task.arm(name, around(config.lr), strategy=name) for name in STRATEGIES]
    claims = [
        Claim("fine-tuning is ahead of scratch", "full", "scratch", margin=0.02),
        Claim("fine-tuning is ahead of a new classifier alone", "full", "features", margin=0.02),
        Claim("waking parts in turn is ahead of all at once", "progressive", "full", margin=0.02),
    ]
    return Experiment("Strategies under one budget", arms, claims, data=task.data, seeds=20)


# %% [markdown]
# ## Experiment: how many labels is a trained body worth? (`fractions`)
#
# For each share of the labels scratch and transfer take the *same number of steps*, each at its own
# best rate. Otherwise more labels would mean a longer training too.


# %%
def fractions(task: Task, config: Config) -> Experiment:
    shares = sorted(set(numbers_of(config.fractions, "--fractions"))) or [1.0]
    counts = [task.labelled(share) for share in shares]
    arms = [
        task.arm(f"{name}, {count} labels", around(config.lr), strategy=name, fraction=f, **length)
        for f, count in zip(shares, counts)
        for length in [as_many_steps(config, counts[-1], count)]
        for name in ("scratch", "full")
    ]
    few = f"full, {counts[0]} labels", f"scratch, {counts[0]} labels"
    many = f"full, {counts[-1]} labels", f"scratch, {counts[-1]} labels"
    text = "the lead is larger with the fewest labels than with the most"
    claims = [
        Claim("with the fewest labels transfer is ahead of scratch", *few, margin=0.02),
        Claim(text, *few, margin=0.02, beyond=many),
    ][: len(set(counts))]
    return Experiment("What labels are worth", arms, claims, data=task.data, seeds=8)


# %% [markdown]
# ## Experiment: which schedule suits a transfer? (`schedules`)
#
# In the warm-up, at a small rate, the new head's first gradients hardly move the trained weights.
# Then *cosine* falls along half a cosine. *onecycle* does so after 30% of the run. *plateau* waits
# until the validation loss stops falling, which few images show badly. Margin: two points.


# %%
def schedules(task: Task, config: Config) -> Experiment:
    strategy, kinds = config.strategy or "full", ("cosine", "onecycle", "plateau")
    arms = [task.arm(kind, schedule=kind, strategy=strategy) for kind in kinds]
    pairs = ("cosine", "plateau"), ("onecycle", "cosine")
    claims = [Claim(f"{a} is ahead of {b}", a, b, margin=0.02) for a, b in pairs]
    return Experiment("Schedules for the same transfer", arms, claims, data=task.data, seeds=20)


# %% [markdown]
# ## When some classes are rare
#
# A class with five images in a thousand hardly changes the mean loss. So the net ignores it, and
# the accuracy hardly shows it. Look at the recall of each class instead: the share of its images
# that is found. And look at the mean recall. Four remedies:
#
# - **class-balanced weights** (Cui et al. 2019): images of a class resemble each other, so the n-th
#   adds less than the first. $n$ of them count as the *effective number* $(1-\beta^n)/(1-\beta)$,
#   and the class is weighted by its inverse.
# - **focal loss** (Lin et al. 2017): what the net is sure of counts less; with the above as weights
#   $\alpha$, $-\alpha_y (1 - p_y)^\gamma \log p_y$. By hand, with $\gamma = 2$: at $p_y = 0.9$ the
#   factor is $0.1^2$, a hundredth; at $p_y = 0.5$ a quarter.
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
        if self.alpha is not None:  # labels (N, K) are mixed, and so are their weights
            loss = loss * (self.alpha[y] if y.dim() == 1 else y @ self.alpha)
        return loss.mean()


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
# **Say it first**: focal loss with $\gamma = 2$ against cross-entropy: where the net gives the true
# class 0.9, the loss shrinks to a hundredth. To which share where it gives 0.1?

# %%
if live():
    for p in (0.9, 0.5, 0.1):
        logits, y = torch.tensor([[p, 1 - p]]).log(), torch.tensor([0])
        show(f"p = {p}: {FocalLoss(2.0)(logits, y) / F.cross_entropy(logits, y):.2f}")

# %% [markdown]
# ### Experiment: which remedy helps the rare classes? (`imbalance`)
#
# The most common class has 30 times the images of the rarest. Margin: two points of mean recall.


# %%
REMEDIES: dict[str, Callable[[Tensor], nn.Module]] = {  # images of each class to a loss
    "cross-entropy": lambda counts: nn.CrossEntropyLoss(),
    "class-balanced": lambda counts: nn.CrossEntropyLoss(class_balanced_weights(counts)),
    "focal": lambda counts: FocalLoss(2.0, class_balanced_weights(counts)),
    "logit adjustment": LogitAdjustedLoss,
}


def imbalance(task: Task, config: Config) -> Experiment:
    tail = partial(task.data, imbalance=config.imbalance)
    rare = tail(task.images, config, task.device)
    changes = as_many_steps(config, task.labelled(config.fraction), len(rare.train.labels))
    changes["strategy"] = config.strategy or "full"
    arms = [task.arm(name, loss=loss, **changes) for name, loss in REMEDIES.items()]
    arms.append(task.arm("balanced sampling", balanced=True, **changes))
    plain, *remedies = (arm.name for arm in arms)
    claims = [
        Claim(f"{name} raises the mean recall", name, plain, "mean_recall", margin=0.02)
        for name in remedies
    ]
    draw = partial(recall_figure, rare)
    return Experiment("Rare classes", arms, claims, after=recalls, figure=draw, data=tail, seeds=12)


# %% [markdown]
# ## When the images look different: domain adaptation
#
# The same classes, but another camera, other paper, other light, and no labels there. Three ways to
# use the unlabelled images:
#
# - **AdaBN** replaces BatchNorm's statistics by those of the new images; nothing is trained.
# - **Deep CORAL** pulls the covariances of the two domains' logits together while it trains.
# - **DANN** trains a critic to tell the domains apart by their features, and the body to make that
#   impossible: the gradient of the critic is *reversed* on its way into the body.


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
    """`GradientReversal` as a function: (N, D) -> (N, D).

    >>> x = torch.ones(2, requires_grad=True)
    >>> reverse_gradient(x, 0.5).sum().backward()
    >>> x.grad
    tensor([-0.5000, -0.5000])
    """
    return GradientReversal.apply(x, strength)


# %% [markdown]
# **Say it first**: $y = 3x$ is followed by a reversal of strength 1, and $z = 2y$. What is
# $\partial z / \partial x$ as autograd reports it?

# %%
if live():
    x = torch.tensor(1.0, requires_grad=True)
    (2 * reverse_gradient(3 * x)).backward()
    show(x.grad)

# %% [markdown]
# Deep CORAL and DANN see batches of source and target: `TwoDomains` gives the source's logits and
# features, then the target's. NOTE: one after the other, so that BatchNorm takes each domain's own
# mean and variance, as AdaBN does in the test. The papers' nets have no BatchNorm.


# %%
class DeepCoralLoss(nn.Module):
    """Cross-entropy on the source, and the distance of both domains' logits, as in the paper's sec.
    4.1.  NOTE: there the distance has a weight, chosen so that both terms end at about one size.
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
# ### Experiment: what do unlabelled images give? (`domain-adaptation`)
#
# The target is the same digits on stripes (`--shift noisy|inverted`, or `--target-dir`). **Source
# only** is trained without the target; the **oracle** is trained on its labels, three times as
# long. Each trained net is tested twice: with the statistics that its training left, and with those
# of the target (*AdaBN*). So the gain of new statistics is not counted as the method's. All have
# one rate: a choice of rates would need target labels.
#
# Margin: two points, seven of 359 test images. A smaller gain is not worth a second loss.


# %%
METHODS: dict[str, Callable[[int, int], nn.Module]] = {  # width of the features and steps to a loss
    "Deep CORAL": lambda width, steps: DeepCoralLoss(),
    "DANN": DANNLoss,
}


def domain_adaptation(config: Config) -> Experiment:
    train = adaptation(config, partial(build, config), METHODS, adapt_batch_norm)
    names = [m + more for m in ("source only", *METHODS) for more in ("", " + AdaBN")]
    plain, adabn, _, coral, _, dann = names
    claims = [
        Claim("new statistics alone help", adabn, plain, margin=0.02),
        Claim("Deep CORAL is ahead of new statistics alone", coral, adabn, margin=0.02),
        Claim("DANN is ahead of new statistics alone", dann, adabn, margin=0.02),
    ]

    arms = [Arm(name, partial(build, config), train=train) for name in [*names, "oracle"]]
    heading = f"To {config.target_dir or config.shift} images, without labels there"
    return Experiment(heading, arms, claims, notes=way_to_the_oracle, seeds=6)


# %%
EXPERIMENTS: dict[str, Callable[[Config], object]] = {
    "compare": with_weights(HERE, compare),
    "fractions": with_weights(HERE, fractions, lambda c: max(numbers_of(c.fractions, "") or [1])),
    "schedules": with_weights(HERE, schedules),
    "imbalance": with_weights(HERE, imbalance, lambda c: c.fraction or 1.0),
    "domain-adaptation": at_one_rate(HERE, domain_adaptation),
}

# %% [markdown]
# ## What to notice
#
# - `features` trains one layer, in a fraction of the time. No classifier can bring back what the
#   source's last layer has lost. `features.png` shows the test images as that layer sees them.
# - Beside the result stand a guess and a logistic regression on the pixels. Is the net better?
# - In `domain-adaptation` compare the rows in pairs: how much of a gain comes from the statistics?
# - A loss that makes two domains alike can match a class with a wrong one. Deep CORAL and DANN do
#   not notice: they see no label of the target (`--shift inverted`).
#
# **What the experiments gave** (digits, 6 to 20 seeds; all numbers: README). `compare`, 32
# labels and few steps: full 79.6%, a new classifier alone 65.7%, which holds; scratch 76.7%, which
# is undecided, because scratch varies by 8 points from seed to seed. `fractions`: after 200 epochs
# on 32 labels scratch has 93.3%, transfer 90.9%: the claim *fails*. Where steps cost nothing, the
# weights of 649 other digits are not worth those two points; the README's table of CIFAR-10 shows
# the other case. `imbalance` and `domain-adaptation`: all claims hold; `schedules`: both fail.
#
# ## Exercises
#
# `python -m common.starter 08 --out DIR` makes a copy of this file without the parts that you write
# and says how to mark it. In order of difficulty:
#
# - **8.4** Write `FocalLoss.forward`. Which gamma is best for the rarest class, at what cost?
# - **8.1** Write `freeze`, `thaw`, `hold_still`. What if frozen BatchNorms stay in train mode?
# - **8.2** Write `discriminative_groups`. What does `--rate-decay 1` give, and what 2.6?
# - **8.5** Write `coral_loss`. Why can it be zero although every class is taken for another?
# - **8.6** Write `GradientReversal`. What does DANN become with a strength of 0 all along?
# - **8.3** Write `UnfreezingSchedule`. At which step of the default run is the stem awake?
# - **8.7** Write `adapt_batch_norm`. What goes wrong if the images come class by class?

# %%
if __name__ == "__main__":
    main(config, MODELS, build, run, EXPERIMENTS)
