"""How fast, beside the loop that everyone writes: `python -m tests.bench
[input|parts|epoch|files|utilisation|profile|accuracy]`.

The same model, batch, images and augmentation, in one process, in turns. The plain side is PIL
transforms in a DataLoader, float32, NCHW, SGD as it comes, and `loss.item()` at every step; the
other side is the course's own loader and loop. Printed are medians over the rounds and their ratio;
nothing is asserted. CUDA runs ours with mixed precision; a CPU without, unless `--amp` is given.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from common.cli import OneLineParser, exit_codes
from common.config import TrainConfig
from common.data import IMAGENET_MEAN, IMAGENET_STD, Data, load_data, make_data, read_once
from common.engine.device import (
    amp_dtype,
    autocast,
    describe,
    keep_freed_memory,
    memory_format,
    pick_device,
    set_up_torch,
)
from common.engine.errors import UserError, unknown
from common.engine.guard import Guard
from common.engine.keeper import Keeper
from common.engine.meter import Meter
from common.engine.sources import Pictures, Source, load_source
from common.evaluation import score
from common.lessons import load_lesson
from common.profiling import count_macs
from common.training import (
    Aids,
    make_optimizer,
    make_schedule,
    measure_layers,
    train_one_epoch,
)

Batches = Iterator[tuple[Tensor, Tensor]]


class PlainImages(Dataset):
    """What torchvision's CIFAR10 does: an array of pixels, one PIL image at a time."""

    def __init__(self, pictures: Pictures, data: Data, train: bool, flips: bool) -> None:
        self.pixels = pictures.pixels.permute(0, 2, 3, 1).numpy()
        self.labels = pictures.labels.tolist()
        side = self.pixels.shape[1]
        steps: list[Callable] = []
        if train:
            steps.append(transforms.RandomCrop(side, max(1, side // 8)))
            steps += [transforms.RandomHorizontalFlip()] if flips else []
        steps += [
            transforms.ToTensor(),
            transforms.Normalize(data.mean.tolist(), data.std.tolist()),
        ]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[row])), self.labels[row]


@dataclasses.dataclass(frozen=True)
class Case:
    """What every benchmark is about."""

    pictures: Pictures | Source  # a Source: before it is split
    data: Data  # the same pictures, in the course's own loaders
    config: TrainConfig
    args: argparse.Namespace
    device: torch.device

    @property
    def steps(self) -> int:
        """Of each side in each round; the data may hold fewer."""
        return min(self.args.steps, len(self.data.train))

    def with_config(self, **changes: object) -> Case:
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))


def plain_loader(case: Case, workers: int, train: bool = True) -> DataLoader:
    return DataLoader(
        PlainImages(case.pictures, case.data, train, flips=case.config.dataset != "digits"),
        case.config.batch_size,
        shuffle=train,
        drop_last=train,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def plain_epoch(
    model: nn.Module, batches: Batches, optimizer: torch.optim.Optimizer, device: torch.device
) -> float:
    """The loop of a hundred tutorials."""
    model.train()
    total = 0.0
    for x, y in batches:
        x, y = x.to(device), y.to(device)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total


class Ours:
    """The course's side: its loader, optimizer and loop, for some number of batches."""

    def __init__(self, case: Case) -> None:
        config, data, device = case.config, case.data, case.device
        torch.manual_seed(0)
        self.model = load_lesson("01").MODELS[config.model](
            num_classes=data.num_classes, small_input=True
        )
        self.model = self.model.to(device, memory_format=memory_format(config.image_size))
        measure_layers(self.model, data)
        self.loss_fn = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.optimizer = make_optimizer(self.model, config)
        self.schedule = make_schedule(self.optimizer, config, data.train)
        self.amp = amp_dtype(device, config.amp, config.image_size)
        scaler = torch.amp.GradScaler(device.type, enabled=self.amp == torch.float16)
        self.faster = torch.compile(self.model) if config.compile else self.model
        keeper = Keeper(None, math.inf, lambda: "stopped")
        guard = Guard(device, config.clip, self.amp)
        self.aids = Aids(self.amp, scaler, None, Meter(device, config.epochs), guard, keeper)

    def epoch(self, loader: object) -> None:
        self.aids.meter.batch = 0
        train_one_epoch(
            self.faster,
            loader,
            self.loss_fn,
            self.optimizer,
            self.schedule,
            self.aids,
        )
        self.aids.meter.epoch += 1


def plain_side(case: Case) -> tuple[nn.Module, torch.optim.SGD]:
    """The same model as it comes from its builder, with the optimizer as it comes."""
    torch.manual_seed(0)
    build = load_lesson("01").MODELS[case.config.model]
    model = build(num_classes=case.data.num_classes, small_input=True).to(case.device)
    return model, torch.optim.SGD(model.parameters(), case.config.lr, 0.9, weight_decay=5e-4)


class First:
    """The first batches of a loader, as a loader."""

    def __init__(self, loader: object, count: int) -> None:
        self.loader, self.count, self.accumulate = loader, count, 1

    def __len__(self) -> int:
        return min(self.count, len(self.loader))

    def batches(self, epoch: int, start: int = 0) -> Batches:
        for i, batch in enumerate(self.loader.batches(epoch, start)):
            if i == self.count:
                return
            yield batch


def first(loader: DataLoader, count: int) -> Batches:
    for i, batch in enumerate(loader):
        if i == count:
            return
        yield batch


def timed(action: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def in_turns(
    sides: dict[str, Callable[[], object]],
    case: Case,
    warm_up: dict[str, Callable[[], object]] | None = None,
) -> dict:
    """Median seconds of each side; they alternate, so that a slow minute hits both.

    On a CPU the plain side has malloc as it comes, ours as `set_up_torch` sets it; what
    `warm_up` holds for a side is run after the change, and not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(case.args.rounds):
        for name, action in sides.items():
            if case.device.type == "cpu" and warm_up:
                keep_freed_memory(name != "plain")
                warm_up[name]()
            seconds[name].append(timed(action, case.device))
        took = "   ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items())
        print(f"  round {turn + 1} of {case.args.rounds}   {took}", flush=True)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(what: str, unit: str, plain: float, ours: float, digits: int = 0) -> None:
    print(
        f"{what:<34} plain {plain:>10,.{digits}f}   ours {ours:>10,.{digits}f} {unit:<9} "
        f"ratio {max(ours, 1e-9) / max(plain, 1e-9):6.2f}",
        flush=True,
    )


def bench_input(case: Case) -> None:
    """Crop, flip, normalise, collate: images per second of one core, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loader = plain_loader(case, workers=0)
    count = min(40, len(case.data.train))

    def ours() -> None:
        for _ in First(case.data.train, count).batches(0):
            pass

    def plain() -> None:
        for _ in first(loader, count):
            pass

    ours(), plain()
    seconds = in_turns({"plain": plain, "ours": ours}, case)
    torch.set_num_threads(threads)
    images = count * case.config.batch_size
    report("input path, one core", "images/s", images / seconds["plain"], images / seconds["ours"])


def bench_files(case: Case) -> None:
    """Decode, random crop to 224, flip, normalise, collate: 256 JPEGs of 500x375, on one core.

    The plain side is torchvision's reference recipe for ImageNet, on PIL images.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(0)
        for i in range(256):
            # Smooth noise: as many bytes per pixel as a photograph, where white noise has far more.
            small = Image.fromarray(generator.integers(0, 256, (38, 50, 3), dtype=np.uint8))
            path = Path(folder) / "train" / str(i % 4) / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            small.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        shutil.copytree(Path(folder) / "train", Path(folder) / "val")
        settings = {"batch_size": 32, "augment": "basic", "workers": 0, "data_dir": folder}
        config = TrainConfig(dataset="imagenet", **settings).resolve("imagenet")
        ours = load_data(config, torch.device("cpu"))
        steps = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
        steps += [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        plain = DataLoader(
            ImageFolder(str(Path(folder) / "train"), transforms.Compose(steps)), 32, shuffle=True
        )
        count = len(ours.train)

        def our_side() -> None:
            for _ in ours.train.batches(0):
                pass

        def plain_epoch_of_files() -> None:
            for _ in first(plain, count):
                pass

        our_side(), plain_epoch_of_files()
        seconds = in_turns(
            {"plain": plain_epoch_of_files, "ours": our_side},
            dataclasses.replace(case, device=torch.device("cpu")),
        )
    torch.set_num_threads(threads)
    images = count * 32
    report(
        "JPEGs to 224 px, one core", "images/s", images / seconds["plain"], images / seconds["ours"]
    )


def bench_epoch(case: Case) -> None:
    """Whole steps, data and logging included."""
    ours = Ours(case)
    model, optimizer = plain_side(case)
    loader = plain_loader(case, case.args.workers)
    few = case.steps
    print(
        f"epoch: {few} training steps of {case.config.batch_size} images a side and round, data "
        "and logging included; warming up",
        flush=True,
    )

    def plain() -> None:
        plain_epoch(model, first(loader, few), optimizer, case.device)

    def our_side() -> None:
        ours.epoch(First(case.data.train, few))

    plain()  # warm up: algorithms are searched, workers start
    startup = timed(our_side, case.device)
    one_step = {
        "plain": lambda: plain_epoch(model, first(loader, 1), optimizer, case.device),
        "ours": lambda: ours.epoch(First(case.data.train, 1)),
    }
    seconds = in_turns({"plain": plain, "ours": our_side}, case, one_step)
    images = few * case.config.batch_size
    report(
        f"training, {case.config.model}",
        "images/s",
        images / seconds["plain"],
        images / seconds["ours"],
    )
    if case.config.compile:
        eager = Ours(case.with_config(compile=False))
        without = timed(lambda: eager.epoch(First(case.data.train, few)), case.device)
        sides = {"eager": lambda: eager.epoch(First(case.data.train, few)), "compiled": our_side}
        each = in_turns(sides, case)
        saved, cost = each["eager"] - each["compiled"], startup - without
        pays = f"pays after {cost / saved * images:,.0f} images" if saved > 0 else "never pays here"
        print(
            f"  --compile: {each['eager'] / each['compiled']:.2f} times as fast as ours without, "
            f"{cost:.0f} s to start, {pays}",
            flush=True,
        )


def bench_parts(case: Case) -> None:
    """Milliseconds a step: input, forward, backward, optimizer, logging, each waited for."""
    sides = {"plain": _parts(False, case)}
    sides["ours"] = _parts(True, case)
    for part in sides["plain"]:
        plain, ours = sides["plain"][part], sides["ours"][part]
        print(f"  {part:<32} plain {plain:>10.2f}   ours {ours:>10.2f} ms a step", flush=True)


def _parts(ours: bool, case: Case) -> dict[str, float]:
    side = Ours(case)
    model, optimizer, amp = side.model.train(), side.optimizer, side.amp
    if not ours:
        (model, optimizer), amp = plain_side(case), None
        model.train()
    batches = iter(
        First(case.data.train, 10**9).batches(0) if ours else plain_loader(case, workers=0)
    )
    times: dict[str, list[float]] = {}
    box: dict[str, Tensor] = {}

    def measure(name: str, action: Callable[[], object]) -> None:
        times.setdefault(name, []).append(1000 * timed(action, case.device))

    def load() -> None:
        x, y = next(batches)
        box["x"], box["y"] = x.to(case.device), y.to(case.device)

    def forward() -> None:
        with autocast(case.device, amp):
            box["output"] = model(box["x"])
            box["loss"] = nn.functional.cross_entropy(box["output"].float(), box["y"])

    def log() -> None:
        if ours:
            side.aids.meter.count(box["loss"], box["output"], box["y"])
        else:
            box["loss"].item()

    for _ in range(case.steps + 1):
        measure("input (one thread for plain)", load)
        measure("forward", forward)
        measure("backward", lambda: side.aids.scaler.scale(box["loss"]).backward())
        measure("optimizer", lambda: (side.aids.scaler.step(optimizer), side.aids.scaler.update()))
        optimizer.zero_grad()
        measure("logging", log)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def bench_utilisation(case: Case) -> None:
    """What share of the chip's multiply-adds the training step uses.

    The chip's rate is that of one large matrix product in the same number format, measured in turns
    with the steps. A step is three forward passes' worth: the backward pass computes two gradients,
    of the inputs and of the weights, for each product of the forward pass.
    """
    ours, few = Ours(case), case.steps
    side = 8192 if case.device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=case.device, dtype=ours.amp or torch.float32)
    products = 20 if case.device.type == "cuda" else 2

    def product() -> None:
        for _ in range(products):
            a @ b

    def steps() -> None:
        ours.epoch(First(case.data.train, few))

    product(), steps()
    seconds = in_turns({"product": product, "steps": steps}, case)
    peak = products * side**3 / seconds["product"]
    macs = 3 * count_macs(ours.model, case.data.input_size) * few * case.config.batch_size
    used = macs / seconds["steps"]
    print(
        f"{case.config.model}: {2e-12 * used:.2f} of {2e-12 * peak:.2f} TFLOP/s in "
        f"{str(a.dtype).removeprefix('torch.')} (a product of {side} x {side} matrices): "
        f"{used / peak:.1%} utilisation",
        flush=True,
    )


def bench_profile(case: Case) -> None:
    """Where the time of our epoch goes: the operators that take most of it, by their own time.

    On a GPU the kernels' time, and how long the device had nothing to do.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    ours, few = Ours(case), case.steps
    on_gpu = case.device.type == "cuda"
    timed(lambda: ours.epoch(First(case.data.train, few)), case.device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with record(activities=activities, acc_events=True) as trace:
        seconds = timed(lambda: ours.epoch(First(case.data.train, few)), case.device)

    def own_time(event: object) -> float:  # microseconds
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    events = sorted(trace.key_averages(), key=own_time, reverse=True)
    if on_gpu:  # the same time would count twice: with the operator and with its kernel
        events = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(map(own_time, events))
    print(f"{few} steps in {seconds:.2f} s", end="")
    print(f", the device idle for {1 - total / 1e6 / seconds:.1%} of them" if on_gpu else "")
    for event in events[:12]:
        print(f"  {own_time(event) / total:6.1%}  {event.count:>6} x {event.key[:80]}", flush=True)


@dataclasses.dataclass
class Contestant:
    """One side of the race to an accuracy, written [plain:]MODEL[@EPOCHS] on the command line.

    `plain:` is the loop of a hundred tutorials: PIL images, float32, SGD, a cosine, weight decay on
    everything. Without it, the course's loop; resnet9 has its own recipe.
    """

    plain: bool
    model: str
    epochs: int

    @classmethod
    def parse(cls, text: str) -> Contestant:
        rest, _, epochs = text.partition("@")
        model = rest.removeprefix("plain:")
        if not (epochs or "10").isdecimal() or epochs == "0":
            raise UserError(f"--sides {text}: [plain:]MODEL[@EPOCHS], such as plain:resnet18@10")
        return cls(model != rest, model, int(epochs or 10))

    def __str__(self) -> str:
        return f"{'plain' if self.plain else 'ours'} {self.model}, {self.epochs} epochs"

    def race(self, case: Case) -> Iterator[tuple[float, float]]:
        """Seconds of training so far and validation accuracy, after each epoch."""
        settings = {"model": self.model, "epochs": self.epochs, "data_dir": case.args.data_dir}
        recipe = "fast" if self.model.startswith("resnet9") and not self.plain else ""
        amp = case.args.amp is not False and not self.plain
        config = TrainConfig(recipe=recipe, amp=amp, compile=case.args.compile, **settings)
        # A folder's pictures are small ones here: by the recipe for such.
        small = "cifar10" if case.args.dataset == "folder" else case.args.dataset
        config = config.resolve(small, case.data.image_size)
        data = make_data(case.pictures, config, case.device)
        case = dataclasses.replace(
            case, config=config, data=data, pictures=data.train.part.pictures
        )
        ours, seconds = Ours(case), 0.0
        if self.plain:
            model = ours.model.to(memory_format=torch.contiguous_format)
            optimizer = torch.optim.SGD(
                model.parameters(), config.lr, 0.9, weight_decay=5e-4, nesterov=True
            )
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
            loader = plain_loader(case, case.args.workers)
        for _ in range(self.epochs):
            if self.plain:
                seconds += timed(
                    lambda: plain_epoch(model, iter(loader), optimizer, case.device), case.device
                )
                schedule.step()
            else:
                seconds += timed(lambda: ours.epoch(data.train), case.device)
            yield seconds, score(ours.model, data.val)[1]


def bench_accuracy(case: Case) -> None:
    """Seconds of training until the validation accuracy first reaches each of `--targets`, and
    multiply-adds of one image's forward pass, which hold on any machine.
    """
    targets, lines = case.args.targets, []
    for side in map(Contestant.parse, case.args.sides):
        reached: dict[float, str] = {}
        print(f"{side}", flush=True)
        for epoch, (seconds, top1) in enumerate(side.race(case), 1):
            print(f"  epoch {epoch:>3}  {seconds:8.1f} s   val {top1:.2%}", flush=True)
            for target in targets:
                if top1 >= target:
                    reached.setdefault(target, f"{seconds:,.0f} s ({epoch})")
            if len(reached) == len(targets):
                break
        model = load_lesson("01").MODELS[side.model](num_classes=10, small_input=True)
        macs = count_macs(model, case.data.input_size) / 1e6
        cells = [reached.get(target, "not reached") for target in targets]
        lines.append([str(side), f"{macs:,.1f}", *cells, f"{top1:.2%}"])
    heads = ["seconds (epochs) to", "M multiply-adds", *(f"{t:.0%}" for t in targets), "last"]
    computed = precision(case.device, case.args.amp is not False, case.data.image_size)
    print(f"\n{case.data.describe()}; accuracy on validation images; {computed}")
    for line in [heads, *lines]:
        print(f"{line[0]:<32}" + "".join(f"{cell:>17}" for cell in line[1:]), flush=True)


def precision(device: torch.device, amp: bool, image_size: int) -> str:
    dtype = amp_dtype(device, amp, image_size)
    return f"ours in {dtype}" if dtype else "both in float32"


def synthetic(count: int, side: int) -> Source:
    """Noise of CIFAR's shape: speed does not depend on what is in the pictures."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    every = Pictures(torch.arange(count) % 10, torch.from_numpy(pixels))
    return Source("synthetic", [str(c) for c in range(10)], every, every.take(torch.arange(100)))


def count(text: str, least: int = 1) -> int:
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"at least {least}")
    return int(text)


def main() -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("input", "parts", "epoch", "files", "utilisation", "profile", "accuracy")
    parser.add_argument("what", nargs="*", metavar="WHAT", help=", ".join(parts))
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--steps", type=count, help="of each side in each round; default: 20 on a GPU, 2 on a CPU"
    )
    parser.add_argument("--rounds", type=count, default=3)
    several = partial(count, least=0)
    parser.add_argument("--workers", type=several, default=2, help="of the plain DataLoader")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.85, 0.9])
    parser.add_argument(
        "--sides",
        nargs="+",
        default=[
            "plain:resnet18@10",
            "plain:resnet20@40",
            "resnet18@10",
            "resnet20@40",
            "resnet9@8",
        ],
        help="of `accuracy`: [plain:]MODEL[@EPOCHS]",
    )
    parser.add_argument(
        "--dataset", default="digits", choices=("digits", "cifar10", "folder"), help="of `accuracy`"
    )
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    if wrong := [what for what in args.what if what not in parts]:
        parser.error(f"no benchmark {wrong[0]!r}; there are {', '.join(parts)}")

    models = load_lesson("01").MODELS
    for model in (args.model, *(Contestant.parse(side).model for side in args.sides)):
        if model not in models:
            raise unknown("model", model, models)
    device = pick_device(args.device)
    args.steps = args.steps or (20 if device.type == "cuda" else 2)
    set_up_torch(device, 0)
    amp = device.type == "cuda" if args.amp is None else args.amp
    settings = {"model": args.model, "amp": amp, "compile": args.compile, "augment": "basic"}
    config = TrainConfig(
        **settings, image_size=args.image_size, batch_size=args.batch_size, epochs=10
    ).resolve("cifar10")
    source = synthetic(60 * args.batch_size, args.image_size)
    data = make_data(source, config, device)
    whats = args.what or ["input", "parts", "epoch", "files"]
    print(f"{device.type}: {describe(device)}, torch {torch.__version__}")
    if set(whats) - {"accuracy"}:  # a race has sizes, batches and precision of its own
        print(
            f"{precision(device, config.amp, config.image_size)}; batch {args.batch_size}, "
            f"{args.image_size} px, medians of {args.rounds} rounds"
        )
    benches = {
        "input": bench_input,
        "parts": bench_parts,
        "epoch": bench_epoch,
        "files": bench_files,
        "utilisation": bench_utilisation,
        "profile": bench_profile,
    }
    for what in whats:
        if what in benches:
            benches[what](Case(source.train, data, config, args, device))
        else:
            size = 32 if args.dataset == "folder" else None
            config = TrainConfig(data_dir=args.data_dir).resolve(args.dataset, size)
            source = read_once(load_source(config), config)
            data = make_data(source, config, device)
            bench_accuracy(Case(source, data, config, args, device))


if __name__ == "__main__":
    with exit_codes():
        main()
