"""Batches: from memory where the images fit, from files where they don't; the same images in the
same order always.

What happens to an image follows from (seed, epoch, position in the epoch) alone: not from the batch
size, the number of processes or GPUs, nor from how often the run was stopped. So a run goes on
within an epoch by starting at a later position, and there is no random state to lose. The exception
is `--augment strong`: it mixes the images of a batch, which follows from (seed, epoch, batch).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import augmentation
from common.config import TrainConfig
from common.engine import processes, sources
from common.engine.device import memory_format, mixed_seed, seeded
from common.engine.errors import UserError
from common.engine.file_loader import Files, Pool, read_files, worker_count
from common.engine.sources import Pictures, Source

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMOKE_BATCHES = 2
MeanStd = tuple[Tensor, Tensor]  # (3,) each, per channel, of pixels in [0, 1]


@dataclass
class Data:
    """A dataset ready to train on; its loaders give x (N, 3, H, W) and y (N,) on the device."""

    name: str
    class_names: list[str]
    train: ImageLoader
    val: ImageLoader
    test: ImageLoader
    image_size: int
    mean: Tensor  # (3,), of pixels in [0, 1]
    std: Tensor
    fingerprint: str
    in_memory: bool
    skipped: int = 0  # broken images left out

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def input_size(self) -> tuple[int, int, int]:
        return 3, self.image_size, self.image_size

    def describe(self) -> str:
        sizes = " + ".join(f"{len(split.labels):,} {name}" for name, split in self.splits().items())
        where = "in memory" if self.in_memory else "from files"
        broken = f", {self.skipped} broken left out" if self.skipped else ""
        kind = f"{self.num_classes} classes, {self.image_size} px"
        return f"{self.name}, {kind}, {sizes}, {where}{broken}"

    def splits(self) -> dict[str, ImageLoader]:
        return {"train": self.train, "val": self.val, "test": self.test}


def load_data(config: TrainConfig, device: torch.device, mean_std: MeanStd | None = None) -> Data:
    """The dataset of a resolved config, split, measured and cut into batches.

    Args:
        mean_std: what to normalise with: trained weights bring their own. By default that of the
            training images, or ImageNet's where they stay in files.

    Raises:
        UserError: the dataset is missing, broken, or smaller than one optimizer step.
    """
    return make_data(sources.load_source(config), config, device, mean_std)


def make_data(
    source: Source, config: TrainConfig, device: torch.device, mean_std: MeanStd | None = None
) -> Data:
    """As `load_data`, from images that are already at hand."""
    source = read_once(source, config)
    train, val = source.train, source.val
    if val is None:
        rest, part = sources.stratified_split(train.labels, config.val_share, config.seed)
        train, val = train.take(rest), train.take(part)
    splits = {"train": train, "val": val, "test": source.test}
    if min(len(p) for p in splits.values()) == 0:
        raise UserError(f"{source.name}: too few images to split into train, validation and test")
    in_memory = train.pixels is not None
    imagenet = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    mean_std = mean_std or (sources.channel_mean_std(train.pixels) if in_memory else imagenet)

    parts = {
        name: Part(pictures, name, name == "train", source.flips, len(source.class_names), mean_std)
        for name, pictures in splits.items()
    }
    if in_memory:
        loaders = {name: MemoryLoader(part, config, device) for name, part in parts.items()}
    else:
        seen = {name: config.augment if part.train else "none" for name, part in parts.items()}
        files = Files(splits, config.image_size, seen, source.flips)
        pool = Pool(files, config.workers, device)
        loaders = {name: FileLoader(part, config, device, pool) for name, part in parts.items()}
    return Data(
        source.name,
        source.class_names,
        image_size=config.image_size,
        mean=mean_std[0],
        std=mean_std[1],
        fingerprint=source.fingerprint,
        in_memory=in_memory,
        skipped=source.skipped,
        **loaders,
    )


def read_once(source: Source, config: TrainConfig) -> Source:
    """The same images in memory, if they fit: for those who cut a source into batches many times.

    Raises:
        UserError: an image can't be read, and --skip-broken isn't given.
    """
    if source.train.pixels is not None:
        return source
    splits = {"train": source.train, "val": source.val, "test": source.test}
    splits = {name: part for name, part in splits.items() if part is not None}
    splits, skipped = read_files(splits, config.image_size, config.skip_broken, config.workers)
    return replace(source, **splits, skipped=skipped)


# ------------------------------------------------------------------------------------------ loaders


class Loader:
    """Which images each batch holds.

    Attributes:
        labels: (N,) on the CPU, of all images of the split.
        batch_size: images per batch and process.
        accumulate: batches per optimizer step.
        train: shuffled, and cut into whole optimizer steps.
    """

    def __init__(
        self, labels: Tensor, config: TrainConfig, device: torch.device, train: bool
    ) -> None:
        self.labels, self.config, self.device, self.train = labels, config, device, train
        self.batch_size, self.accumulate = config.batch_size, config.accumulate if train else 1
        if train and len(labels) < self.images_per_step:
            self.batch_size = len(labels) // (processes.world_size() * self.accumulate)
            if self.batch_size < 2:
                raise UserError(f"{len(labels)} training images are too few for an optimizer step")

    @property
    def images_per_batch(self) -> int:
        """Over all processes."""
        return self.batch_size * processes.world_size()

    @property
    def images_per_step(self) -> int:
        return self.images_per_batch * self.accumulate

    @property
    def images_per_epoch(self) -> int:
        return len(self) * self.images_per_batch

    def __len__(self) -> int:
        """Batches per epoch; in training whole optimizer steps: the rest comes next time."""
        if self.train:
            batches = len(self.labels) // self.images_per_step * self.accumulate
        else:
            mine = range(processes.rank(), len(self.labels), processes.world_size())
            batches = -(-len(mine) // self.batch_size)
        return min(batches, SMOKE_BATCHES * self.accumulate) if self.config.smoke else batches

    def rebatch(self, batch_size: int, accumulate: int) -> None:
        """Go on with other batches, such as half as large and twice as many per step."""
        self.batch_size, self.accumulate = batch_size, accumulate

    def order(self, epoch: int) -> Tensor:
        """(N,) row numbers: a permutation by seed and epoch; when testing, as they come."""
        if not self.train:
            return torch.arange(len(self.labels))
        generator = torch.Generator().manual_seed(mixed_seed(self.config.seed, epoch, 1))
        return torch.randperm(len(self.labels), generator=generator)

    def positions(self, batch: int) -> range:
        """Where in the order this process finds the images of a batch."""
        start = batch * self.images_per_batch
        stop = min(start + self.images_per_batch, len(self.labels))
        return range(start + processes.rank(), stop, processes.world_size())

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """From batch `start` on: x (N, 3, H, W) normalised and y (N,), or (N, K) when mixed."""
        raise NotImplementedError


@dataclass
class Part:
    """One split of a dataset, and how its images are seen."""

    pictures: Pictures
    name: str
    train: bool
    flips: bool  # whether a mirrored image is still of its class
    num_classes: int
    mean_std: MeanStd


class ImageLoader(Loader):
    """What becomes of a batch of pixels: draws, normalisation, mixing.

    `take(rows)` gives some images as the model sees them when it is tested, (len(rows), 3, H, W).
    """

    def __init__(self, part: Part, config: TrainConfig, device: torch.device) -> None:
        super().__init__(part.pictures.labels, config, device, part.train)
        self.part = part
        self.mean, self.std = (255 * v.view(1, 3, 1, 1).to(device) for v in part.mean_std)
        self.format = memory_format(config.image_size)
        self.mix = None
        if part.train and config.augment == "strong":
            from torchvision.transforms import v2

            kinds = v2.MixUp, v2.CutMix
            self.mix = v2.RandomChoice([kind(num_classes=part.num_classes) for kind in kinds])

    def draws(self, epoch: int) -> Tensor:
        """(N, DRAWS) numbers in [0, 1): what becomes of the image at each position."""
        generator = torch.Generator().manual_seed(mixed_seed(self.config.seed, epoch, 2))
        draws = torch.rand(len(self.labels), augmentation.DRAWS, generator=generator)
        if self.config.augment == "alternating":
            order, seed = self.order(epoch), mixed_seed(self.config.seed, 6)
            draws[:, augmentation.FLIP] = augmentation.flip_in_turn(order, seed, epoch)
        if self.config.epochs - epoch <= self.config.epochs * self.config.still:
            draws[:, augmentation.PLACE] = 0.5
        return draws

    def seeds(self, epoch: int) -> list[int]:
        """One for each position, where torchvision's transforms draw for themselves."""
        sequence = np.random.SeedSequence((self.config.seed, epoch, 5))
        return (sequence.generate_state(len(self.labels), np.uint64) >> np.uint64(1)).tolist()

    def _normalise(self, x: Tensor) -> Tensor:
        x = x.to(torch.float32, memory_format=self.format).sub_(self.mean).div_(self.std)
        side = self.config.image_size
        if x.shape[-1] != side:
            x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=side < x.shape[-1])
        return x

    def _finish(self, x: Tensor, y: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        x = self._normalise(x)
        if self.mix is not None:
            with seeded(self.config.seed, epoch, batch, 3):
                x, y = self.mix(x, y)
        return x, y


class MemoryLoader(ImageLoader):
    """All images as one uint8 tensor on the training device, augmented there by the batch.

    Digits stay 8x8 here and are enlarged by the batch, CIFAR stays at 32.
    """

    def __init__(self, part: Part, config: TrainConfig, device: torch.device) -> None:
        super().__init__(part, config, device)
        self.size = tuple(part.pictures.pixels.shape[2:])
        # 4 pixels at 32 (He et al. 2015, sec. 4.2), in proportion elsewhere.
        self.edge = max(1, self.size[0] // 8) if part.train and config.augment != "none" else 0
        mirror = config.augment == "alternating"
        pixels = augmentation.pad(part.pictures.pixels, self.edge, mirror).to(device)
        self.pixels = pixels.contiguous(memory_format=torch.channels_last)
        self.labels_there = self.labels.to(device)
        self.per_image = augmentation.per_image(config.augment) if part.train else None

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.order(epoch).to(self.device)
        augmented = self.train and (self.config.augment != "none" or self.config.cutout)
        draws = self.draws(epoch) if augmented else None
        there = draws.to(self.device) if augmented else None
        seeds = self.seeds(epoch) if self.per_image else None
        for batch in range(start, len(self)):
            at = self.positions(batch)
            rows = slice(at.start, at.stop, at.step)
            index = order[rows]
            x = self._augment(index, draws[rows], there[rows]) if augmented else self.pixels[index]
            if self.per_image:
                x = self.per_image(x, seeds[rows])
            yield self._finish(x, self.labels_there[index], epoch, batch)

    def take(self, rows: np.ndarray) -> Tensor:
        index = torch.from_numpy(np.asarray(rows)).to(self.device)
        height, width = (slice(self.edge, self.edge + side) for side in self.size)
        return self._normalise(self.pixels[index][:, :, height, width])

    def _augment(self, index: Tensor, draws: Tensor, there: Tensor) -> Tensor:
        """Images of `index`; `there` are the draws on the images' device."""
        x = augmentation.random_crop(self.pixels, index, self.size, there)
        if self.part.flips and self.config.augment != "none":
            x = augmentation.random_flip(x, there)
        if self.config.augment == "strong":
            x = augmentation.trivial_augment(x, draws)
        if self.config.cutout:
            side = max(1, round(self.config.cutout * self.size[0] / self.config.image_size))
            x = augmentation.cutout(x, side, there)
        return x


class FileLoader(ImageLoader):
    """Images decoded and augmented by worker processes; any number of them gives the same."""

    def __init__(self, part: Part, config: TrainConfig, device: torch.device, pool: Pool) -> None:
        super().__init__(part, config, device)
        self.pool, self.waited = pool, 0.0

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order, seeds, name = self.order(epoch).tolist(), self.seeds(epoch), self.part.name
        plan = (
            [(name, order[p], seeds[p]) for p in self.positions(batch)]
            for batch in range(start, len(self))
        )
        in_turn = self.part.flips and self.config.augment == "alternating"
        draws = self.draws(epoch) if self.train and (self.config.cutout or in_turn) else None
        self.waited, began = 0.0, time.monotonic()
        for batch, (x, y) in enumerate(self.pool.batches(plan), start):
            self.waited += time.monotonic() - began
            x, y = (t.to(self.device, non_blocking=t.is_pinned()) for t in (x, y))
            if draws is not None:
                here = draws[list(self.positions(batch))].to(self.device)
                x = augmentation.random_flip(x, here) if in_turn else x
                x = augmentation.cutout(x, self.config.cutout, here) if self.config.cutout else x
            yield self._finish(x, y, epoch, batch)
            began = time.monotonic()

    def take(self, rows: np.ndarray) -> Tensor:
        return self._normalise(self.pool.take(self.part.name, rows).to(self.device))

    def report_waiting(self, seconds: float) -> None:
        """Say after an epoch of so many seconds whether images came in time."""
        share = self.waited / seconds
        line = f"input      {share:.0%} of the epoch was spent waiting for images"
        if share >= 0.1:
            workers = worker_count(self.config.workers)
            line += f": more --workers (now {workers}), smaller files or a faster disk would help"
        print(line, flush=True)
