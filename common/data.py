"""Batches: from memory where the images fit, from files where they don't; the same images in the
same order always.

What happens to an image follows from (seed, epoch, position in the epoch) and from nothing else:
not from the batch size, the number of worker processes or GPUs, nor from how often the run was
stopped. So a run goes on within an epoch by starting at a later position, and there is no random
state to lose.

Another service is asked for one thing: what the course's own weights are normalised with.
"""

from __future__ import annotations

import os
import signal
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common import augmentation
from common.bundle import find_bundle
from common.config import TrainConfig
from common.engine import processes
from common.engine.device import memory_format, mixed_seed, seeded
from common.engine.errors import UserError
from common.engine.progress import Bar
from common.engine.sources import Pictures, Source, load_source, read_image, stratified_split

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MEMORY_LIMIT = 2 * 2**30  # bytes of pixels; CIFAR-10 at 32 px takes 0.18 GB
SMOKE_BATCHES = 2


@dataclass
class Data:
    """A dataset ready to train on. Each loader's `batches()`
    gives x (N, 3, H, W) and y (N,) on the device.
    """

    name: str
    class_names: list[str]
    train: Loader
    val: Loader
    test: Loader
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
        return (
            f"{self.name}, {self.num_classes} classes, {self.image_size} px, {sizes}, "
            f"{where}{broken}"
        )

    def splits(self) -> dict[str, Loader]:
        return {"train": self.train, "val": self.val, "test": self.test}


def load_data(
    config: TrainConfig, device: torch.device, mean_std: tuple[Tensor, Tensor] | None = None
) -> Data:
    """The dataset of a resolved config, split, measured and cut into batches.

    Args:
        mean_std: of pixels in [0, 1], to normalise with; by default what trained weights are used
            to (ImageNet's for official ones), ImageNet's for images that stay in files, else those
            of the training images.

    Raises:
        UserError: the dataset is missing, broken, or smaller than one optimizer step.
    """
    return make_data(load_source(config), config, device, mean_std)


def make_data(
    source: Source,
    config: TrainConfig,
    device: torch.device,
    mean_std: tuple[Tensor, Tensor] | None = None,
) -> Data:
    """As `load_data`, from images that are already at hand."""
    train, val = source.train, source.val
    if val is None:
        rest, part = stratified_split(train.labels, 0.1, config.seed)
        train, val = train.take(rest), train.take(part)
    splits = {"train": train, "val": val, "test": source.test}
    if min(len(p) for p in splits.values()) == 0:
        raise UserError(f"{source.name}: too few images to split into train, validation and test")

    skipped = source.skipped
    if train.pixels is None:
        if _fits_in_memory(splits, config.image_size):
            splits, skipped = _decode(splits, config)
        else:
            splits, skipped = _check_files(splits, config)
    in_memory = splits["train"].pixels is not None
    if mean_std is None:
        bundle = find_bundle(config.model) if config.pretrained else None
        if bundle:
            mean_std = bundle.mean, bundle.std
        elif in_memory and not config.pretrained:
            mean_std = _mean_std(splits["train"].pixels)
        else:
            mean_std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)

    kind = MemoryLoader if in_memory else FileLoader
    classes = len(source.class_names)
    loaders = {
        name: kind(pictures, config, device, mean_std, classes, name == "train", source.flips)
        for name, pictures in splits.items()
    }
    return Data(
        source.name,
        source.class_names,
        image_size=config.image_size,
        mean=mean_std[0],
        std=mean_std[1],
        fingerprint=source.fingerprint,
        in_memory=in_memory,
        skipped=skipped,
        **loaders,
    )


def read_once(source: Source, config: TrainConfig) -> Source:
    """The same images in memory, if they fit: for those who cut a source into batches many times.

    Raises:
        UserError: an image can't be read, and --skip-broken isn't given.
    """
    splits = {"train": source.train, "val": source.val, "test": source.test}
    splits = {name: part for name, part in splits.items() if part is not None}
    if source.train.pixels is not None or not _fits_in_memory(splits, config.image_size):
        return source
    splits, skipped = _decode(splits, config)
    return replace(source, **splits, skipped=skipped)


# ------------------------------------------------------------------------------------------ loaders


class Loader:
    """What both loaders share: which images each batch holds, and what becomes of a batch on the
    device.

    Attributes:
        labels: (N,) on the CPU, of all images of the split.
        batch_size: images per batch and process.
        waited: seconds of the last epoch in which training waited for images.
    """

    def __init__(
        self,
        pictures: Pictures,
        config: TrainConfig,
        device: torch.device,
        mean_std: tuple[Tensor, Tensor],
        num_classes: int,
        train: bool,
        flips: bool,
    ) -> None:
        self.labels = pictures.labels
        self.config, self.device, self.train, self.flips = config, device, train, flips
        self.batch_size, self.accumulate = config.batch_size, config.accumulate if train else 1
        self.mean, self.std = (255 * v.view(1, 3, 1, 1).to(device) for v in mean_std)
        self.format = memory_format(config.image_size)
        self.waited = 0.0
        self.mix = None
        if train and config.augment == "strong":
            from torchvision.transforms import v2

            self.mix = v2.RandomChoice(
                [v2.MixUp(num_classes=num_classes), v2.CutMix(num_classes=num_classes)]
            )
        if train and len(self.labels) < self.images_per_step:
            smaller = len(self.labels) // (processes.world_size() * self.accumulate)
            if smaller < 2:
                raise UserError(
                    f"{len(self.labels)} training images are too few for one optimizer step"
                )
            self.batch_size = smaller

    @property
    def images_per_step(self) -> int:
        return self.batch_size * processes.world_size() * self.accumulate

    def __len__(self) -> int:
        """Batches per epoch of this process. A training epoch
        is whole optimizer steps; the rest comes next time.
        """
        if self.train:
            batches = len(self.labels) // self.images_per_step * self.accumulate
        else:
            batches = -(-len(self.positions()) // self.batch_size)
        return min(batches, SMOKE_BATCHES * self.accumulate) if self.config.smoke else batches

    def halve_batches(self) -> None:
        """Half the batch, twice as many per step: the same images per step in half the memory."""
        self.batch_size //= 2
        self.accumulate *= 2

    def order(self, epoch: int) -> Tensor:
        """(N,) row numbers: a permutation that follows from
        seed and epoch, or the files' order when testing.
        """
        if not self.train:
            return torch.arange(len(self.labels))
        generator = torch.Generator().manual_seed(mixed_seed(self.config.seed, epoch, 1))
        return torch.randperm(len(self.labels), generator=generator)

    def positions(self, batch: int | None = None) -> range:
        """Where in the order this process finds the
        images of a batch, or all it will see of a split.
        """
        world, rank = processes.world_size(), processes.rank()
        if batch is None:
            return range(rank, len(self.labels), world)
        together = self.batch_size * world
        return range(batch * together + rank, min((batch + 1) * together, len(self.labels)), world)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """From batch `start` of an epoch to its end: x (N,
        3, H, W) normalised, y (N,) or (N, K) when mixed.
        """
        raise NotImplementedError

    def take(self, rows: np.ndarray) -> Tensor:
        """The images of some rows as the model sees
        them when it is tested, (len(rows), 3, H, W).
        """
        raise NotImplementedError

    def _finish(self, x: Tensor, y: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        """uint8 pixels on the device to what the model sees."""
        x = x.to(torch.float32, memory_format=self.format).sub_(self.mean).div_(self.std)
        if x.shape[-1] != self.config.image_size:
            side = self.config.image_size
            x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=side < x.shape[-1])
        if self.mix is not None:
            with seeded(self.config.seed, epoch, batch, 3):
                x, y = self.mix(x, y)
        return x, y


class MemoryLoader(Loader):
    """All images as one uint8 tensor on the training device, augmented there by the batch.

    Digits stay 8x8 here and are enlarged by the batch, CIFAR stays at 32.
    """

    def __init__(
        self, pictures: Pictures, config: TrainConfig, device: torch.device, *rest: object
    ) -> None:
        super().__init__(pictures, config, device, *rest)
        self.size = tuple(pictures.pixels.shape[2:])
        pixels = pictures.pixels.to(device)
        if self.train and config.augment != "none":
            # 4 pixels at 32 (He et al. 2015, sec. 4.2), in proportion elsewhere.
            pixels = F.pad(pixels, (max(1, self.size[0] // 8),) * 4)
        self.pixels = pixels.contiguous(memory_format=torch.channels_last)
        self.labels_there = self.labels.to(device)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.order(epoch)
        order_there = order.to(self.device)
        generator = torch.Generator().manual_seed(mixed_seed(self.config.seed, epoch, 2))
        draws = (
            torch.rand(len(order), augmentation.DRAWS, generator=generator) if self.train else None
        )
        draws_there = draws.to(self.device) if self.train else None
        for batch in range(start, len(self)):
            at = self.positions(batch)
            rows = slice(at.start, at.stop, at.step)
            index = order_there[rows]
            if self.train and self.config.augment != "none":
                x = self._augment(index, draws[rows], draws_there[rows])
            else:
                x = self.pixels[index]
            yield self._finish(x, self.labels_there[index], epoch, batch)

    def take(self, rows: np.ndarray) -> Tensor:
        index = torch.from_numpy(np.asarray(rows)).to(self.device)
        edge = (self.pixels.shape[2] - self.size[0]) // 2  # of the padding that training carries
        inner = slice(edge, edge + self.size[0]), slice(edge, edge + self.size[1])
        return self._finish(
            self.pixels[index][:, :, inner[0], inner[1]], self.labels_there[index], 0, 0
        )[0]

    def _augment(self, index: Tensor, draws: Tensor, draws_there: Tensor) -> Tensor:
        x = augmentation.random_crop(self.pixels, index, self.size, draws_there)
        if self.flips:
            x = augmentation.random_flip(x, draws_there)
        if self.config.augment == "strong":
            x = augmentation.trivial_augment(x, draws)
        if self.config.cutout:
            side = max(1, round(self.config.cutout * self.size[0] / self.config.image_size))
            x = augmentation.cutout(x, side, draws_there)
        return x


_with_workers: weakref.WeakSet[FileLoader] = weakref.WeakSet()


def close_workers() -> None:
    """End all worker processes now: left to Python's exit, each of them delays it by 5 seconds."""
    for loader in list(_with_workers):
        iterator = getattr(loader.workers, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
        loader.workers._iterator = None


class FileLoader(Loader):
    """Images decoded and augmented by worker processes, one
    seed per image, so that any number of them gives the same.
    """

    def __init__(
        self, pictures: Pictures, config: TrainConfig, device: torch.device, *rest: object
    ) -> None:
        super().__init__(pictures, config, device, *rest)
        self.plan = _Plan(self)
        self.files = _Files(pictures.paths, pictures.labels.tolist(), self._transform())
        self.workers = _file_workers(self.files, self.plan, config, device)
        _with_workers.add(self)

    def _transform(self) -> object:
        """The training crop of Szegedy et al. 2015, or the centre crop that the papers test on."""
        from torchvision.transforms import v2

        side = self.config.image_size
        if not self.train or self.config.augment == "none":
            # 224 of 256, the ratio of the papers' test crops.
            return v2.Compose(
                [v2.Resize(round(side * 256 / 224), antialias=True), v2.CenterCrop(side)]
            )
        steps = [v2.RandomResizedCrop(side, antialias=True)]
        if self.flips:
            steps.append(v2.RandomHorizontalFlip())
        if self.config.augment == "strong":
            steps.append(v2.TrivialAugmentWide())
        return v2.Compose(steps)

    def halve_batches(self) -> None:
        super().halve_batches()
        self.workers = _file_workers(self.files, self.plan, self.config, self.device)

    def take(self, rows: np.ndarray) -> Tensor:
        images, labels = _collate([self.files[int(row), 0] for row in rows])
        return self._finish(images.to(self.device), labels.to(self.device), 0, 0)[0]

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self.plan.epoch, self.plan.start = epoch, start
        self.waited, began = 0.0, time.monotonic()
        for batch, (x, y) in enumerate(from_workers(self.workers), start):
            self.waited += time.monotonic() - began
            if isinstance(x, str):
                raise UserError(x)
            x, y = (t.to(self.device, non_blocking=True) for t in (x, y))
            if self.train and self.config.cutout:
                generator = torch.Generator().manual_seed(
                    mixed_seed(self.config.seed, epoch, batch, 4)
                )
                draws = torch.rand(len(x), augmentation.DRAWS, generator=generator)
                x = augmentation.cutout(x, self.config.cutout, draws.to(self.device))
            yield self._finish(x, y, epoch, batch)
            began = time.monotonic()


def from_workers(loader: DataLoader) -> Iterator[Any]:
    """The batches of `loader`, with one line here, and nowhere else, for a worker that died.

    torch's handler of a child's death raises wherever the main thread happens to be, in the middle
    of a save too. It is set aside: the loader looks after its workers by itself every 5 seconds.

    Raises:
        UserError: a worker process is gone.
    """
    child_died = getattr(signal, "SIGCHLD", None)  # Windows has none, and no handler either
    before = child_died and signal.getsignal(child_died)
    try:
        batches = iter(loader)
        if child_died and signal.getsignal(child_died) != before:
            signal.signal(child_died, before or signal.SIG_DFL)
        yield from batches
    # ConnectionError, EOFError: it died after saying that a batch is done, before handing it over.
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "a worker process that decodes images died, most likely for want of memory: "
            "try --workers 0 or a smaller --batch-size"
        ) from None


class _Plan(Sampler):
    """The batches of an epoch as lists of (row, seed), from batch `start` on."""

    def __init__(self, loader: Loader) -> None:
        self.loader, self.epoch, self.start = loader, 0, 0

    def __len__(self) -> int:
        return len(self.loader) - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self.loader.order(self.epoch).tolist()
        sequence = np.random.SeedSequence((self.loader.config.seed, self.epoch, 5))
        seeds = sequence.generate_state(len(order), np.uint64) >> np.uint64(1)
        for batch in range(self.start, len(self.loader)):
            yield [(order[p], int(seeds[p])) for p in self.loader.positions(batch)]


class _Files(Dataset):
    """(row, seed) -> (3, H, W) uint8 and label; a string
    instead of an image says what is wrong with the file.
    """

    def __init__(self, paths: list[str], labels: list[int], transform: object) -> None:
        self.paths, self.labels, self.transform = paths, labels, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor | str, int]:
        row, seed = item
        try:
            image = read_image(self.paths[row])
        except UserError as error:
            return str(error), self.labels[row]
        with seeded(seed):
            return self.transform(image), self.labels[row]


def _collate(items: list[tuple[Tensor | str, int]]) -> tuple[Tensor | str, Tensor]:
    broken = [image for image, _ in items if isinstance(image, str)]
    if broken:
        return broken[0], torch.empty(0)
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])


def _leave_ctrl_c_to_the_main_process(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which Python ends them when it exits itself
    torch.set_num_threads(1)


def _file_workers(
    files: _Files, plan: Sampler, config: TrainConfig, device: torch.device
) -> DataLoader:
    workers = num_workers(config)
    return DataLoader(
        files,
        batch_sampler=plan,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_ctrl_c_to_the_main_process,
        generator=torch.Generator(),  # or each epoch would draw from the one that dropout uses
    )


def num_workers(config: TrainConfig) -> int:
    """One per core of this process's share, 8 at most:
    decoding scales with cores, memory with workers.
    """
    if config.workers is not None:
        return config.workers
    return min(8, max(1, (os.cpu_count() or 1) // processes.world_size()))


# -------------------------------------------------------------------------------- reading all files


def _fits_in_memory(splits: dict[str, Pictures], image_size: int) -> bool:
    # Larger images are cropped at random scales from the full picture, which memory would not hold.
    pixels = 3 * image_size**2 * sum(len(p) for p in splits.values())
    return image_size <= 64 and pixels <= MEMORY_LIMIT


def _decode(splits: dict[str, Pictures], config: TrainConfig) -> tuple[dict[str, Pictures], int]:
    """Every file as (3, image_size, image_size) uint8,
    scaled to its shorter side and cut at the centre.
    """
    from torchvision.transforms import v2

    side = config.image_size
    transform = v2.Compose([v2.Resize(side, antialias=True), v2.CenterCrop(side)])
    return _read_all(splits, config, transform, keep=True)


def _check_files(
    splits: dict[str, Pictures], config: TrainConfig
) -> tuple[dict[str, Pictures], int]:
    """Find broken images now and not in the last minute,
    where the files are few enough to be read twice.
    """
    few = 10_000  # about a minute on two cores
    total = sum(len(p) for p in splits.values())
    if total > few and not config.skip_broken:
        if processes.is_main():
            print(
                f"{total:,} files are not read in advance: a broken one stops the run where it "
                f"is met"
            )
        return splits, 0
    from torchvision.transforms import v2

    return _read_all(splits, config, v2.Compose([v2.CenterCrop(1)]), keep=False)


def _read_all(
    splits: dict[str, Pictures], config: TrainConfig, transform: object, keep: bool
) -> tuple[dict[str, Pictures], int]:
    skipped, out, together = 0, {}, 256
    total = sum(len(p) for p in splits.values())
    with Bar(total, "reading images", "img", show=processes.is_main()) as bar:
        for name, pictures in splits.items():
            files = _Files(pictures.paths, pictures.labels.tolist(), transform)
            starts = range(0, len(files), together)
            loader = DataLoader(
                files,
                batch_sampler=[
                    [(i, 0) for i in range(a, min(a + together, len(files)))] for a in starts
                ],
                num_workers=num_workers(config) if len(files) > 2000 else 0,
                collate_fn=_whole_and_broken,
                worker_init_fn=_leave_ctrl_c_to_the_main_process,
                generator=torch.Generator(),
            )
            pixels, good = [], []
            for start, (images, whole, broken) in zip(starts, from_workers(loader)):
                if broken and not config.skip_broken:
                    raise UserError(broken[0])
                # A tensor that a worker sent holds a file handle as long as it lives: keep a copy.
                pixels += [images.clone()] if keep and whole else []
                good += [start + i for i in whole]
                skipped += len(broken)
                bar.advance(len(whole) + len(broken))
            if not good:
                raise UserError(f"none of the {len(files)} {name} images can be read")
            out[name] = pictures.take(torch.tensor(good))
            if keep:
                out[name].pixels = torch.cat(pixels)
    return out, skipped


def _whole_and_broken(
    items: list[tuple[Tensor | str, int]],
) -> tuple[Tensor, list[int], list[str]]:
    """The images that could be read, which they are, and what is wrong with the others."""
    images = [image for image, _ in items]
    whole = [i for i, image in enumerate(images) if not isinstance(image, str)]
    stacked = torch.stack([images[i] for i in whole]) if whole else torch.empty(0)
    return stacked, whole, [image for image in images if isinstance(image, str)]


def _mean_std(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel, of pixels in [0, 1]; the sums are
    exact integers, so no order of adding changes them.
    """
    count = pixels.numel() // pixels.shape[1]
    histogram = torch.stack(
        [torch.bincount(c.flatten().long(), minlength=256) for c in pixels.unbind(1)]
    )
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = (histogram * levels).sum(1) / count
    std = ((histogram * levels**2).sum(1) / count - mean**2).clamp(min=1e-6).sqrt()
    return mean.float(), std.float()
