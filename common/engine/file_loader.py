"""Images that stay in files: one pool of worker processes decodes those of all splits."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.engine import processes
from common.engine.device import seeded
from common.engine.errors import UserError
from common.engine.progress import Bar
from common.engine.signals import leave_signals_to_the_main_process, on_leave
from common.engine.sources import Pictures, read_image

Item = tuple[str, int, int]  # split, row, seed
Batch = tuple[Tensor, Tensor, list[int], list[str]]  # see _collate
Transform = Callable[[Any], Tensor]
MEMORY_LIMIT = 2 * 2**30  # bytes of pixels; CIFAR-10 at 32 px takes 0.18 GB
# --augment NAME: the class of torchvision.transforms.v2 that draws for each image.
POLICIES = {
    "strong": "TrivialAugmentWide",
    "randaugment": "RandAugment",
    "autoaugment": "AutoAugment",
}


class Files(Dataset):
    """(split, row, seed) -> (3, H, W) uint8, or what is wrong with the file; and its label."""

    def __init__(
        self, splits: dict[str, Pictures], side: int, augment: dict[str, str], flips: bool
    ) -> None:
        self.paths = {name: pictures.paths for name, pictures in splits.items()}
        self.labels = {name: pictures.labels.tolist() for name, pictures in splits.items()}
        self.transforms = {n: file_transform(side, augment[n], flips) for n in splits}

    def __getitem__(self, item: Item) -> tuple[Tensor | str, int]:
        split, row, seed = item
        label = self.labels[split][row]
        try:
            image = read_image(self.paths[split][row])
        except UserError as error:
            return str(error), label
        with seeded(seed):
            return self.transforms[split](image), label


def file_transform(side: int, augment: str, flips: bool) -> Transform:
    """Szegedy et al.'s crop (2015); with "none" the one that papers test on, 224 of 256 pixels."""
    from torchvision.transforms import v2

    if augment == "none":
        return v2.Compose([v2.Resize(round(side * 256 / 224), antialias=True), v2.CenterCrop(side)])
    steps = [v2.RandomResizedCrop(side, antialias=True)]
    if flips and augment != "alternating":  # which the loader does, by image and epoch
        steps.append(v2.RandomHorizontalFlip())
    if augment in POLICIES:
        steps.append(getattr(v2, POLICIES[augment])())
    return v2.Compose(steps)


class Pool:
    """The worker processes of a data set. Splits take turns, so one pool serves all of them: where
    a new process imports the script again (macOS, Windows), three pools would be three imports.
    """

    def __init__(self, files: Files, workers: int | None, device: torch.device) -> None:
        workers = worker_count(workers)
        self.files, self.plan = files, _Plan()
        self.loader = DataLoader(
            files,
            batch_sampler=self.plan,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
            multiprocessing_context=_start_method() if workers else None,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # or each epoch would draw from the one that dropout uses
        )
        _pools.add(self)

    def batches(self, plan: Iterable[list[Item]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of `plan`: (N, 3, H, W) uint8 and labels (N,).

        Raises:
            UserError: a file is broken, or a worker died.
        """
        for x, y, _, broken in self.read(plan):
            if broken:
                raise UserError(broken[0])
            yield x, y

    def read(self, plan: Iterable[list[Item]]) -> Iterator[Batch]:
        self.plan.batches = plan
        return from_workers(self.loader)

    def take(self, split: str, rows: Iterable[int]) -> Tensor:
        """Some images, read by this process, (len(rows), 3, H, W) uint8."""
        images, _, _, broken = _collate([self.files[split, int(row), 0] for row in rows])
        if broken:
            raise UserError(broken[0])
        return images


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


@on_leave
def close_workers() -> None:
    """End all worker processes now: left to Python's exit, each of them delays it by 5 seconds."""
    for pool in list(_pools):
        iterator = getattr(pool.loader, "_iterator", None)
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
        pool.loader._iterator = None


class _Plan(Sampler):
    """The batches that the splits ask for, one epoch after the other."""

    def __init__(self) -> None:
        self.batches: Iterable[list[Item]] = []

    def __iter__(self) -> Iterator[list[Item]]:
        return iter(self.batches)


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


def _collate(items: list[tuple[Tensor | str, int]]) -> Batch:
    """The images that were read, their labels and places, and what is wrong with the others."""
    whole = [i for i, (image, _) in enumerate(items) if isinstance(image, Tensor)]
    images = torch.stack([items[i][0] for i in whole]) if whole else torch.empty(0)
    labels = torch.tensor([items[i][1] for i in whole])
    return images, labels, whole, [image for image, _ in items if isinstance(image, str)]


def _start_worker(worker: int) -> None:
    leave_signals_to_the_main_process()
    torch.set_num_threads(1)


def _start_method() -> str | None:
    """Forked, workers begin in 0.1 s; Python 3.14 starts them anew on Linux too, in 3 s. Where the
    script has chosen, its choice stands.
    """
    chosen = multiprocessing.get_start_method(allow_none=True)
    return "fork" if sys.platform == "linux" and chosen is None else None


def worker_count(workers: int | None) -> int:
    """As many as asked for; else one per core of this process's share, 8 at most for memory."""
    if workers is not None:
        return workers
    return min(8, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


# -------------------------------------------------------------------------------- reading all files


def read_files(
    splits: dict[str, Pictures], side: int, skip_broken: bool, workers: int | None
) -> tuple[dict[str, Pictures], int]:
    """The pictures that can be read, and how many were left out.

    Small ones come with their pixels, (3, side, side) uint8, scaled to the shorter side and cut at
    the centre. Of large ones a broken file is found now and not in the last minute, where they are
    few enough to be read twice.

    Raises:
        UserError: a file is broken and `skip_broken` is not given, or no file of a split is whole.
    """
    from torchvision.transforms import v2

    total = sum(map(len, splits.values()))
    # Larger images are cropped at random scales from the full picture, which memory won't hold.
    keep = side <= 64 and 3 * side**2 * total <= MEMORY_LIMIT
    if keep:
        transform = v2.Compose([v2.Resize(side, antialias=True), v2.CenterCrop(side)])
    elif total <= 10_000 or skip_broken:  # about a minute on two cores
        transform = v2.CenterCrop(1)
    else:
        if processes.is_main():
            print(f"{total:,} files are not read in advance: a broken one stops the run")
        return splits, 0
    files = Files(splits, side, dict.fromkeys(splits, "none"), False)
    files.transforms = dict.fromkeys(splits, transform)
    batches = [
        [(name, row, 0) for row in rows.tolist()]
        for name, pictures in splits.items()
        for rows in torch.arange(len(pictures)).split(256)
    ]
    pool = Pool(files, workers if total > 2000 else 0, torch.device("cpu"))
    good: dict[str, list[int]] = {name: [] for name in splits}
    pixels: dict[str, list[Tensor]] = {name: [] for name in splits}
    with Bar(total, "reading images", "img", show=processes.is_main()) as bar:
        for batch, (images, _, whole, broken) in zip(batches, pool.read(batches)):
            if broken and not skip_broken:
                raise UserError(f"{broken[0]}, or pass --skip-broken")
            name = batch[0][0]
            good[name] += [batch[i][1] for i in whole]
            if keep and whole:
                # A tensor that a worker sent holds a file handle as long as it lives.
                pixels[name].append(images.clone())
            bar.advance(len(batch))
    for name, rows in good.items():
        if not rows:
            raise UserError(f"none of the {len(splits[name])} {name} images can be read")
    read = {name: splits[name].take(torch.tensor(rows)) for name, rows in good.items()}
    if keep:
        for name, pictures in read.items():
            pictures.pixels = torch.cat(pixels.pop(name))
    return read, total - sum(map(len, good.values()))
