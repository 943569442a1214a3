"""Which images a transfer uses, images of another domain, and features in the place of images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from common.data import Data, Loader
from common.engine.device import mixed_seed
from common.engine.errors import UserError
from common.engine.sources import Pictures, Source, stratified_split


def choose_classes(source: Source, classes: range) -> Source:
    """The images of some of the classes, their labels counted from 0 again."""

    def choose(pictures: Pictures) -> Pictures:
        inside = (pictures.labels >= classes.start) & (pictures.labels < classes.stop)
        part = pictures.take(inside.nonzero().squeeze(1))
        return dataclasses.replace(part, labels=part.labels - classes.start)

    return dataclasses.replace(
        source,
        class_names=[source.class_names[c] for c in classes],
        train=choose(source.train),
        val=None if source.val is None else choose(source.val),
        test=choose(source.test),
    )


def few_labels(source: Source, fraction: float, seed: int, val_share: float = 0.1) -> Source:
    """The same validation and test images, but only a fraction of the training images.

    Validation is split off first, so that it is as large whatever the fraction.
    """
    train, val = source.train, source.val
    if val is None:
        rest, part = stratified_split(train.labels, val_share, seed)
        train, val = train.take(rest), train.take(part)
    if fraction < 1:
        _, part = stratified_split(train.labels, fraction, seed)
        train = train.take(part)
    return dataclasses.replace(source, train=train, val=val)


def source_of(data: Data) -> Source:
    """The images of a data set, so that they may be cut in another way."""
    splits = {name: loader.part.pictures for name, loader in data.splits().items()}
    return Source(data.name, data.class_names, flips=data.train.part.flips, **splits)


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


def balanced_order(labels: Tensor, seed: int, epoch: int) -> Tensor:
    """(N,) row numbers of one epoch, drawn with replacement so that all classes come equally often.

    >>> labels = torch.tensor([0] * 90 + [1] * 10)
    >>> 0.35 < labels[balanced_order(labels, seed=0, epoch=0)].float().mean() < 0.65
    tensor(True)
    """
    share = 1 / torch.bincount(labels)[labels]
    generator = torch.Generator().manual_seed(mixed_seed(seed, epoch, 6))
    return torch.multinomial(share, len(labels), replacement=True, generator=generator)


# ----------------------------------------------------------------------------------- other domains


def shifted(pictures: Pictures, kind: str, seed: int) -> Pictures:
    """The same pictures in another domain: "inverted", "noisy" or "textured"."""
    pixels = pictures.pixels.float()
    n, _, height, width = pixels.shape
    generator = torch.Generator().manual_seed(seed)
    if kind == "inverted":
        pixels = 255 - pixels
    elif kind == "noisy":
        pixels += 64 * torch.randn(n, 1, height, width, generator=generator)
    else:
        # Stripes of a random direction and phase behind each digit.
        angle, phase = math.pi * torch.rand(2, n, 1, 1, generator=generator)
        rows, columns = torch.arange(height).view(-1, 1), torch.arange(width)
        wave = torch.sin(2 * math.pi / 3 * (rows * angle.sin() + columns * angle.cos()) + phase)
        pixels = torch.maximum(pixels, (64 + 64 * wave).unsqueeze(1))
    return dataclasses.replace(pictures, pixels=pixels.clamp(0, 255).round().to(torch.uint8))


def other_domain(here: Source, there: Source | None, kind: str) -> Source:
    """The target domain: `there`, or the images of `here` shifted in the way `kind`.

    Raises:
        UserError: the two have other classes; or the images are no pixels, which can't be shifted.
    """
    if there is not None:
        if there.class_names != here.class_names:
            odd = sorted(set(there.class_names) ^ set(here.class_names)) or ["the order"]
            raise UserError(f"--target-dir: both folders need the same classes; {odd[0]} differs")
        return there
    if here.train.pixels is None:
        raise UserError("--experiment domain-adaptation: name the other folder by --target-dir")
    seeds = {"train": 0, "val": 1, "test": 2}
    splits = {name: shifted(getattr(here, name), kind, seed) for name, seed in seeds.items()}
    return dataclasses.replace(here, name=f"{here.name}, {kind}", **splits)


# ------------------------------------------------------------------------------- loaders of a kind


class FeatureLoader(Loader):
    """Features computed once, handed out in the order in which their images would have come."""

    def __init__(self, images: Loader, features: Tensor) -> None:
        super().__init__(images.labels, images.config, images.device, images.train)
        self.features, self.labels_there = features, images.labels.to(features.device)
        self.order = images.order  # it may draw all classes equally often

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.order(epoch).to(self.features.device)
        for batch in range(start, len(self)):
            at = self.positions(batch)
            rows = order[at.start : at.stop : at.step]
            yield self.features[rows], self.labels_there[rows]


class PairLoader(Loader):
    """A batch of source images followed by one of target images; the labels are the source's.

    x (2N, 3, H, W), y (N,). The shorter of the two ends the epoch.
    """

    def __init__(self, source: Loader, target: Loader) -> None:
        super().__init__(source.labels, source.config, source.device, source.train)
        self.source, self.target = source, target

    def __len__(self) -> int:
        return min(len(self.source), len(self.target))

    def rebatch(self, batch_size: int, accumulate: int) -> None:
        for loader in (super(), self.source, self.target):
            loader.rebatch(batch_size, accumulate)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        pairs = zip(self.source.batches(epoch, start), self.target.batches(epoch, start))
        for (x_source, y), (x_target, _) in pairs:
            n = min(len(x_source), len(x_target))
            yield torch.cat([x_source[:n], x_target[:n]]), y[:n]


def in_chunks(loader: Loader, mixed: bool = False) -> Iterator[Tensor]:
    """Every image of a split as it looks in a test, (<= 256, 3, H, W) at a time; `mixed`: in the
    order of the first epoch instead of its own, which in a folder is class after class.
    """
    rows = loader.order(0) if mixed else torch.arange(len(loader.labels))
    for part in rows.tensor_split(math.ceil(len(rows) / 256)):  # alike: a mean of them is fair
        yield loader.take(part.numpy())


def with_features(data: Data, features: dict[str, Tensor]) -> Data:
    """The dataset with the images of the splits in `features` replaced by these, (N, D)."""
    splits = data.splits()
    loaders = {name: FeatureLoader(splits[name], rows) for name, rows in features.items()}
    return dataclasses.replace(data, in_memory=True, **loaders)
