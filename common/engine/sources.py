"""Where images come from: scikit-learn's digits, downloads, folders as people really have them."""

from __future__ import annotations

import filecmp
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.engine import processes
from common.engine.download import fetch, one_at_a_time, unpack_gzip, unpack_tar
from common.engine.errors import UserError

EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm",
    ".jfif", ".jpe",  # as browsers on Windows save a JPEG
)  # fmt: skip
# Pictures that Pillow reads only with a package beside it, or in its newest versions.
DECODERS = {
    ".heic": "pillow-heif",
    ".heif": "pillow-heif",
    ".avif": "pillow-avif-plugin",
    ".jxl": "pillow-jxl-plugin",
}
# What people call the folder of a split, in any case.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
NO_CLASSES = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}


@dataclass
class Pictures:
    """The images of one split: as pixels, or as files that hold them."""

    labels: Tensor  # (N,) int64
    pixels: Tensor | None = None  # (N, C, H, W) uint8
    paths: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> Pictures:
        return Pictures(
            self.labels[rows],
            None if self.pixels is None else self.pixels[rows],
            None if self.paths is None else [self.paths[i] for i in rows.tolist()],
        )

    def and_also(self, other: Pictures) -> Pictures:
        """Both splits as one; either may hold its images as pixels and have paths too."""
        return Pictures(
            torch.cat((self.labels, other.labels)),
            None if self.pixels is None else torch.cat((self.pixels, other.pixels)),
            None if self.paths is None else self.paths + other.paths,
        )


@dataclass
class Source:
    """A dataset before it is cut into batches. `val` is None: it has to be split off `train`."""

    name: str
    class_names: list[str]
    train: Pictures
    test: Pictures
    val: Pictures | None = None
    flips: bool = True  # whether a mirrored image is still of its class
    skipped: int = 0  # broken images left out
    notes: list[str] = field(default_factory=list)  # what else was left out, and why
    drawn: float = 0.0  # share of all images drawn at random as the test set; 0: it has its own

    def redrawn(self, seed: int) -> Source:
        """The same images with a test set that `seed` draws, where the dataset brings none."""
        if not self.drawn:
            return self
        every = self.train.and_also(self.test)
        train, test = stratified_split(every.labels, self.drawn, seed)
        return replace(self, train=every.take(train), test=every.take(test))

    @property
    def fingerprint(self) -> str:
        """Changes with the images, their order or labels: a resumed run must meet the same ones."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for part in filter(None, (self.train, self.val, self.test)):
            digest.update(part.labels.numpy().tobytes())
            if part.paths is not None:
                names = "\n".join(Path(p).name for p in part.paths)
                digest.update(names.encode("utf-8", "backslashreplace"))  # of any bytes on a disk
        return digest.hexdigest()[:16]


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers of the larger and the smaller part, each class divided alike.

    >>> rest, part = stratified_split(torch.tensor([0] * 10 + [1] * 20), 0.1, seed=0)
    >>> len(rest), len(part)
    (27, 3)
    """
    generator = torch.Generator().manual_seed(seed)
    part = []
    by_label = labels.sort(stable=True).indices
    for rows in by_label.split(labels.unique(return_counts=True)[1].tolist()):
        # At least one of each class for the smaller part, as long as two stay.
        count = max(round(fraction * len(rows)), 1 if len(rows) > 2 else 0)
        part.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[torch.cat(part)] = True
    return (~chosen).nonzero().squeeze(1), chosen.nonzero().squeeze(1)


def channel_mean_std(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(3,) each, of pixels in [0, 1]; the counts are exact: no order of adding changes them."""
    count = pixels.numel() // pixels.shape[1]
    histogram = torch.stack(
        [torch.bincount(c.flatten().long(), minlength=256) for c in pixels.unbind(1)]
    )
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = (histogram * levels).sum(1) / count
    std = ((histogram * levels**2).sum(1) / count - mean**2).clamp(min=1e-6).sqrt()
    return mean.float(), std.float()


# ------------------------------------------------------------------------------- choosing a dataset


def choose_dataset(name: str, data_dir: str, gpu: bool) -> tuple[str, str]:
    """What `auto` means here, and one line that says why; another name stays as it is."""
    if name != "auto":
        return name, ""
    kind = _torchvision_class("cifar10")
    if any((Path(data_dir) / there).exists() for there in (kind.base_folder, kind.filename)):
        return "cifar10", f"CIFAR-10, found in {data_dir} (--dataset digits is quicker)"
    if not gpu:
        return "digits", (
            f"digits, since there is no GPU and no CIFAR-10 in {data_dir} (--dataset cifar10 "
            "downloads it, 170 MB)"
        )
    try:
        load_cifar("cifar10", data_dir)
    except UserError as error:
        return "digits", f"digits, since {error}"
    why = f"CIFAR-10, downloaded to {data_dir} (--dataset digits needs no download)"
    return "cifar10", why


def load_source(config: object) -> Source:
    """The dataset that a resolved config names.

    Raises:
        UserError: it is not there, can't be downloaded, or is not what the layout promises.
    """
    name, data_dir = config.dataset, config.data_dir
    if name == "digits":
        return load_digits()
    if name in ("mnist", "fashion_mnist"):
        return load_mnist(name, data_dir)
    if name in ("cifar10", "cifar100"):
        return load_cifar(name, data_dir)
    try:
        source = load_folder(data_dir, config.seed, name, remember=True)
    finally:
        _remembered.cache_clear()  # who comes back later looks anew
    if processes.is_main():
        for note in (*source.notes, *shared_content(source)):
            print(f"warning    {note}", flush=True)
    return source


def load_digits() -> Source:
    """Scikit-learn's 1,797 handwritten digits, 8x8; a fixed fifth of each class is the test set."""
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    # Grey levels 0..16 to 0..255; three equal channels, since the models take colour.
    pixels = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8))
    pixels = pixels.unsqueeze(1).repeat(1, 3, 1, 1)  # (1797, 3, 8, 8)
    every = Pictures(torch.from_numpy(bunch.target).long(), pixels)
    # Not config.seed: accuracies of different seeds are to be compared on the same images.
    train, test = stratified_split(every.labels, 0.2, seed=0)
    names = [str(d) for d in range(10)]
    return Source("digits", names, every.take(train), every.take(test), flips=False, drawn=0.2)


def load_mnist(name: str, data_dir: str) -> Source:
    """MNIST or Fashion-MNIST, padded from 28x28 to 32x32 as LeNet-5 took it."""
    kind = _torchvision_class(name)
    raw = Path(data_dir) / kind.__name__ / "raw"
    for filename, md5 in kind.resources:
        if not (raw / filename).with_suffix("").exists():
            with one_at_a_time(raw):
                if not (raw / filename).with_suffix("").exists():  # nor by another process
                    archive = fetch([m + filename for m in kind.mirrors], raw / filename, md5)
                    unpack_gzip(archive)
    splits = []
    for train in (True, False):
        try:
            data = kind(data_dir, train=train)
        except (OSError, ValueError, RuntimeError, AssertionError) as error:
            raise UserError(f"{raw} is damaged ({error}): delete it and run again") from None
        pixels = torch.nn.functional.pad(data.data, (2, 2, 2, 2)).unsqueeze(1).repeat(1, 3, 1, 1)
        splits.append(Pictures(data.targets.long(), pixels))
    return Source(name, list(data.classes), *splits, flips=name == "fashion_mnist")


def load_cifar(name: str, data_dir: str) -> Source:
    """CIFAR-10 or CIFAR-100 from the data folder, downloaded and unpacked where it is not there."""
    kind, root = _torchvision_class(name), Path(data_dir)
    if not (root / kind.base_folder).is_dir():
        with one_at_a_time(root):
            if not (root / kind.base_folder).is_dir():  # nor by another process, meanwhile
                archive = fetch([kind.url], root / kind.filename, kind.tgz_md5)
                unpack_tar(archive, kind.base_folder)
    try:
        parts = [kind(data_dir, train=train) for train in (True, False)]
    except RuntimeError:
        why = f"{root / kind.base_folder} is damaged (a checksum differs)"
        raise UserError(f"{why}: delete the folder and run again") from None
    splits = [
        Pictures(torch.tensor(p.targets), torch.from_numpy(p.data).permute(0, 3, 1, 2))
        for p in parts
    ]
    return Source(name, list(parts[0].classes), *splits)


def _torchvision_class(name: str) -> type:
    from torchvision import datasets

    names = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
    return getattr(datasets, names.get(name, name.upper()))


# ------------------------------------------------------------------------------------ image folders


def load_folder(data_dir: str, seed: int, name: str = "folder", remember: bool = False) -> Source:
    """A folder of images as files, in one of three layouts.

    - DIR/train/CLASS/*, DIR/val/CLASS/* and DIR/test/CLASS/*
    - DIR/train/CLASS/* and one of the others, which is then the test set; validation images are
      split off train
    - DIR/CLASS/*, split by seed: 10% of each class for the test, `--val-share` of the rest for
      validation

    train may be called Training, val valid, ...: see `SPLITS`.

    Args:
        remember: what is there from one call to the next, until `load_source` has made a dataset of
            it: to list a million files on a network's disk takes minutes.

    Raises:
        UserError: no such folder, no images, one class only, a class without images, classes that
            differ.
    """
    root, scan = Path(data_dir), _remembered if remember else _scan
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: no such folder")
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    dirs: dict[str, Path] = {}
    for split, names in SPLITS.items():
        found = [folder for folder in folders if folder.name.lower() in names]
        if len(found) > 1:
            raise UserError(f"{found[0]} and {found[1]}: which of them is {split}?")
        if found:
            dirs[split] = found[0]
    if dirs and "train" not in dirs:
        raise UserError(f"{root} has {' and '.join(dirs)} but no train folder")
    if len(dirs) == 1:
        raise UserError(
            f"{root} has train but neither val nor test: add one, or put the classes into "
            f"{root} itself"
        )
    if not dirs:
        classes, every, notes = scan(root)
        splits = [every.take(rows) for rows in stratified_split(every.labels, 0.1, seed)]
    else:
        scanned = {split: scan(folder) for split, folder in dirs.items()}
        classes = scanned["train"][0]
        for split, (names, _, _) in scanned.items():
            if odd := sorted(set(names) ^ set(classes)):
                where = dirs["train"] if odd[0] in names else dirs[split]
                raise UserError(
                    f"class {odd[0]!r} is missing in {where}: labels would shift, so train and "
                    f"{split} must have the same class folders"
                )
        notes = [note for _, _, more in scanned.values() for note in more]
        splits = _apart({split: pictures for split, (_, pictures, _) in scanned.items()}, notes)
    train, *val, test = splits
    # Said before thousands of files are read: `stratified_split` takes none of two.
    if not val and train.labels.bincount().max() < 3:
        raise UserError(
            f"{dirs.get('train', root)}: too few images to split into train, validation and test; "
            "at least four of a class are needed"
        )
    return Source(name, classes, train, test, *val, notes=notes, drawn=0.0 if dirs else 0.1)


def _apart(splits: dict[str, Pictures], notes: list[str]) -> list[Pictures]:
    """Each file in one split only, the first that has it: a link may lead into another one. What is
    left out is added to `notes`.
    """
    owner: dict[tuple[int, int], str] = {}
    apart = []
    for name, pictures in splits.items():
        files = [(status.st_dev, status.st_ino) for status in map(_status, pictures.paths)]
        rows = [i for i, file in enumerate(files) if owner.setdefault(file, name) == name]
        if not rows:
            raise UserError(f"all files of {name} are links into another split: nothing is left")
        if count := len(files) - len(rows):
            notes.append(f"{count:,} files of {name} are links into another split: left out")
        apart.append(pictures.take(torch.tensor(rows)))
    return apart


def _status(path: str) -> os.stat_result:
    """Of the file behind a link; of a link that leads nowhere itself, which is then unreadable."""
    return os.stat(path) if os.path.exists(path) else os.lstat(path)


def _scan(folder: Path) -> tuple[list[str], Pictures, list[str]]:
    """Class names and files of CLASS/**/*, sorted, and what pictures were left out for want of a
    decoder. Hidden files and other types are passed over.
    """
    here = os.path.realpath(folder)
    _, entries, _ = next(os.walk(folder, onerror=_refuse))
    # A link to the folder that it lies in, or to one further up, is no class but a loop.
    loops = {n for n in entries if f"{here}/".startswith(os.path.realpath(folder / n) + "/")}
    classes = sorted(n for n in entries if n not in NO_CLASSES | loops and not n.startswith("."))
    if not classes:
        raise UserError(f"{folder}: no class folders in it (expected {folder}/CLASS/IMAGE)")
    if len(classes) == 1:
        raise UserError(f"{folder}: one class only ({classes[0]}); there is nothing to tell apart")
    paths, labels, left_out, readable = [], [], Counter(), decodable()
    for label, name in enumerate(classes):
        found, missing = [], Counter()
        for path in _files_below(folder / name):
            ending = os.path.splitext(path)[1].lower()
            if ending in readable:
                found.append(path)
            elif ending in DECODERS:
                missing[ending] += 1
        if not found:
            kinds = "".join(f"; {n} {e} need {DECODERS[e]}" for e, n in missing.items())
            raise UserError(
                f"{folder / name}: no images in this class folder ({', '.join(EXTENSIONS[:4])}, "
                f"...{kinds})"
            )
        left_out += missing
        paths += sorted(found)
        labels += [label] * len(found)
    notes = [
        f"{count:,} {ending} files in {folder} are left out: pip install {DECODERS[ending]} "
        "reads them"
        for ending, count in sorted(left_out.items())
    ]
    # A locale that knows ASCII only hands other names over as they lie on the disk, undecoded.
    names = [os.fsencode(name).decode("utf-8", "replace") for name in classes]
    return names, Pictures(torch.tensor(labels), paths=paths), notes


@lru_cache(maxsize=len(SPLITS))
def _remembered(folder: Path) -> tuple[list[str], Pictures, list[str]]:
    return _scan(folder)


def _files_below(folder: Path) -> Iterator[str]:
    """The files of a folder and of those in it, links followed but never upwards or in a circle."""
    above = Path(os.path.realpath(folder)).parents
    seen = {(status.st_dev, status.st_ino) for status in map(os.stat, above)}
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [f for f in folders if not f.startswith(".") and f not in NO_CLASSES]
        yield from (os.path.join(parent, file) for file in files if not file.startswith("."))


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename} can't be read ({error.strerror})") from None


def decodable() -> set[str]:
    """The endings that Pillow reads here."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    for package in ("pillow_avif", "pillow_jxl"):
        with suppress(ImportError):
            __import__(package)
    Image.init()
    can = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return {*EXTENSIONS, *(can & set(DECODERS))}


def shared_content(source: Source, most: int = 200_000) -> list[str]:
    """Pictures that are in two splits: what is tested, or chosen by, has then been trained on.

    Only files of one size and with the same first and last 4 KiB are compared.
    """
    splits = {"train": source.train, "val": source.val, "test": source.test}
    parts = {name: part.paths for name, part in splits.items() if part and part.paths}
    if sum(map(len, parts.values())) > most:
        return []
    files = [
        (name, path, os.path.getsize(path))
        for name in parts
        for path in parts[name]
        if os.path.exists(path)
    ]
    splits_with = Counter(size for size, _ in {(size, name) for name, _, size in files})
    first: dict[bytes, tuple[str, str]] = {}
    twice: dict[tuple[str, str], list[str]] = {}
    for name, path, size in files:
        if splits_with[size] == 1:
            continue
        with open(path, "rb") as file:
            content = file.read(4096)
            file.seek(max(0, size - 4096))
            content += file.read(4096) + str(size).encode()
        where, other = first.setdefault(content, (name, path))
        if where != name and filecmp.cmp(other, path, shallow=False):
            twice.setdefault((where, name), []).append(f"{other} = {path}")
    return [
        f"{len(pairs):,} pictures of {a} are in {b} too, so {b} is no independent measure: "
        f"{pairs[0]}"
        for (a, b), pairs in twice.items()
    ]


def size_of_folder(data_dir: str) -> tuple[int, int]:
    """The side to train at, that of the pictures where they are small (the median of 64 of them, by
    their headers), else ImageNet's 224; and how many there are to train on.
    """
    source = load_folder(data_dir, seed=0, remember=True)
    paths, sides = source.train.paths, []
    for path in paths[:: max(1, len(paths) // 64)][:64]:
        # A broken one is named when it is read.
        with suppress(Exception), Image.open(path) as image:
            sides.append(min(image.size))
    side = int(np.median(sides or [224]))
    count = len(paths) if source.val else round(0.9 * len(paths))
    return side if side <= 64 else 224, count


def read_image(path: str) -> Tensor:
    """Any picture as (3, H, W) uint8: turned as its EXIF says, transparency on white, 16 bits to 8,
    CMYK to RGB.

    Raises:
        UserError: names the file.
    """
    try:
        with Image.open(path) as image:
            image = to_rgb(ImageOps.exif_transpose(image))
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything: struct.error, RuntimeError, ...
        why = f"can't be read as an image ({error})"
        raise UserError(f"{path} {why}: repair or remove it") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to RGB, as it is seen: 12- and 16-bit and float greys scaled, alpha on white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.nan_to_num(np.asarray(image).astype(np.float32))
        # Cameras and scanners store 12 bits in 16: as 16 they would be all but black. Floats are
        # shares of 1 as often as not.
        tops = (1.0, 255.0, 4095.0) if image.mode == "F" else (255.0, 4095.0)
        top = next((t for t in tops if values.max() <= t), 65535.0)
        return Image.fromarray((values.clip(0, top) * (255 / top)).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
