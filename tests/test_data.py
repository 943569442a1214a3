"""Splits, order and randomness of the loaders; folders and files as people have them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import TrainConfig
from common.data import Data, load_data, make_data
from common.engine import file_loader, sources
from common.engine.errors import UserError
from common.engine.sources import Pictures, Source, load_folder, read_image, stratified_split
from tests.warm import Warm

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_worker_outlives_its_test() -> Iterator[None]:
    """Found by the garbage collector, in some later test, a pool costs up to 5 seconds."""
    yield
    file_loader.close_workers()


def numbered(n: int = 100, classes: int = 4, **options: object) -> tuple[Source, TrainConfig]:
    """Images whose first pixel is their row number, so that a batch says what is in it."""
    pixels = torch.zeros(n, 3, 8, 8, dtype=torch.uint8)
    pixels[:, :, 0, 0] = torch.arange(n, dtype=torch.uint8).view(-1, 1)
    every = Pictures(torch.arange(n) % classes, pixels)
    test = Pictures(torch.arange(20) % classes, pixels[:20])
    settings = {"batch_size": 8, "augment": "none", "image_size": 8, **options}
    config = TrainConfig(**settings).resolve("digits")
    return Source("numbered", [str(c) for c in range(classes)], every, test), config


def rows_of(data: Data, x: torch.Tensor) -> list[int]:
    pixels = x[:, 0, 0, 0] * data.std[0] + data.mean[0]
    return (255 * pixels).round().int().tolist()


def epoch_rows(data: Data, epoch: int, start: int = 0) -> list[list[int]]:
    return [rows_of(data, x) for x, _ in data.train.batches(epoch, start)]


def test_validation_is_disjoint_from_training_and_stratified() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    rest, part = stratified_split(labels, 0.1, seed=3)
    assert set(rest.tolist()) | set(part.tolist()) == set(range(100))
    assert not set(rest.tolist()) & set(part.tolist())
    assert torch.bincount(labels[part]).tolist() == [5, 3, 2]
    assert part.tolist() != stratified_split(labels, 0.1, seed=4)[1].tolist()


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_the_share_kept_for_validation(share: float) -> None:
    config = TrainConfig(dataset="digits", device="cpu", val_share=share).resolve("digits")
    data = load_data(config, CPU)
    train, val = len(data.train.labels), len(data.val.labels)
    assert train + val == 1797 - 359 and abs(val - share * 1438) <= 5, "half an image a class"


def test_digits_splits_share_no_image() -> None:
    data = load_data(TrainConfig(seed=1).resolve("digits"), CPU)
    sizes = [len(loader.labels) for loader in data.splits().values()]
    assert sum(sizes) == 1797
    pixels = {n: {p.numpy().tobytes() for p in _inner(d.pixels)} for n, d in data.splits().items()}
    everything = sources.load_digits()
    doubles = 1797 - len(
        {p.numpy().tobytes() for p in torch.cat([everything.train.pixels, everything.test.pixels])}
    )
    shared = len(pixels["train"] & pixels["val"]) + len(pixels["train"] & pixels["test"])
    assert shared + len(pixels["val"] & pixels["test"]) <= doubles


def _inner(pixels: torch.Tensor) -> torch.Tensor:
    """Without the padding that the training split carries."""
    edge = (pixels.shape[-1] - 8) // 2
    return pixels[:, :, edge : edge + 8, edge : edge + 8].contiguous()


def test_test_images_stay_the_same_whatever_the_seed() -> None:
    a, b = (load_data(TrainConfig(seed=s).resolve("digits"), CPU) for s in (0, 1))
    assert torch.equal(a.test.pixels, b.test.pixels)
    assert not torch.equal(a.val.pixels, b.val.pixels)


def test_an_epoch_holds_each_image_at_most_once_in_a_new_order() -> None:
    data = make_data(*numbered(), CPU)
    first, second = (sum(epoch_rows(data, e), []) for e in (0, 1))
    assert len(first) == len(set(first)) == 88  # 90 in whole batches of 8
    assert first != second
    assert first == sum(epoch_rows(data, 0), [])


def test_starting_later_gives_the_rest_of_the_same_epoch() -> None:
    for augment in ("none", "basic", "strong"):
        source, config = numbered(augment=augment)
        data = make_data(source, config, CPU)
        whole = [x for x, _ in data.train.batches(2)]
        rest = [x for x, _ in data.train.batches(2, start=5)]
        assert len(rest) == len(whole) - 5
        assert all(torch.equal(a, b) for a, b in zip(whole[5:], rest))


def test_augmentation_does_not_depend_on_the_batch_size() -> None:
    source, config = numbered(augment="basic", cutout=3)
    small = make_data(source, config, CPU)
    large = make_data(source, TrainConfig(**{**config.to_dict(), "batch_size": 16}), CPU)
    a = torch.cat([x for x, _ in small.train.batches(0)])[:80]
    assert torch.equal(a, torch.cat([x for x, _ in large.train.batches(0)])[:80])


def test_cutout_alone_blanks_squares_and_changes_nothing_else() -> None:
    source, config = numbered(augment="none", cutout=3)
    source.train.pixels[:] = torch.arange(100, 180, 10, dtype=torch.uint8)  # seen if mirrored
    data = make_data(source, config, CPU)
    x, _ = next(data.train.batches())
    pixels = (255 * (x * data.std.view(3, 1, 1) + data.mean.view(3, 1, 1))).round()
    blank = pixels == 0
    assert blank[:, 0].flatten(1).sum(1).min() > 0 and blank[:, 0].flatten(1).sum(1).max() == 9
    assert ((pixels == source.train.pixels[: len(x)]) | blank).all()


def test_files_are_mirrored_in_turn_too(image_folder: Callable) -> None:
    folder = image_folder(per_class=8, size=100)
    data = load_data(folder_config(folder, workers=0, augment="alternating", batch_size=6), CPU)
    transforms = data.train.pool.files.transforms
    assert len(transforms["train"].transforms) == 1  # the crop
    transforms["train"] = torch.nn.Identity()
    first, second = (
        torch.cat([x for x, _ in data.train.batches(epoch)])[data.train.order(epoch).argsort()]
        for epoch in (0, 1)
    )
    torch.testing.assert_close(second, first.flip(3), rtol=1e-4, atol=1e-4)


def test_mixing_leaves_the_global_generator_alone() -> None:
    data = make_data(*numbered(augment="strong"), CPU)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    _, y = next(iter(data.train.batches()))
    assert y.shape == (8, 4) and torch.allclose(y.sum(1), torch.ones(8))
    assert torch.equal(torch.rand(1), expected)


def test_normalised_training_images_have_mean_zero_and_deviation_one() -> None:
    data = load_data(TrainConfig(augment="none").resolve("digits"), CPU)
    x = torch.cat([x for x, _ in data.train.batches()])
    assert x.mean().abs() < 0.02 and (x.std() - 1).abs() < 0.02


def test_accumulated_batches_are_whole_steps() -> None:
    data = make_data(*numbered(accumulate=3), CPU)
    assert len(data.train) == 9  # 90 // (3 * 8) = 3 steps of 3 batches
    data.train.rebatch(4, 6)
    assert (data.train.batch_size, data.train.accumulate, len(data.train)) == (4, 6, 18)


def test_too_few_images_for_a_batch_make_a_smaller_one() -> None:
    source, config = numbered(n=12, batch_size=64)
    assert make_data(source, config, CPU).train.batch_size == 8


# -------------------------------------------------------------------------------------------- files


def folder_config(folder: Path, **options: object) -> TrainConfig:
    settings = {"dataset": "folder", "data_dir": str(folder), "batch_size": 4, **options}
    return TrainConfig(**settings).resolve("folder", settings.pop("image_size", 96))


@pytest.mark.parametrize("augment", ["basic", "strong"])
def test_workers_change_nothing(image_folder: Callable, augment: str) -> None:
    folder = image_folder(per_class=8, size=100)
    runs = []
    for workers in (0, 2):
        data = load_data(folder_config(folder, workers=workers, augment=augment), CPU)
        assert not data.in_memory
        batches = [x for x, _ in data.train.batches(1)]
        runs.append(batches)
        again = [x for x, _ in data.train.batches(1, start=2)]
        assert all(torch.equal(a, b) for a, b in zip(batches[2:], again))
    assert len(runs[0]) == len(runs[1])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("augment", ["randaugment", "autoaugment", "basic"])
@pytest.mark.parametrize("size", [96, 24])
def test_an_image_depends_on_its_position_alone(
    image_folder: Callable, augment: str, size: int
) -> None:
    """Not on how many images a batch has: cutout and torchvision's policies, files and memory."""
    folder, passes = image_folder(per_class=8, size=100), []
    for batch in (2, 4):
        config = folder_config(
            folder, workers=0, augment=augment, batch_size=batch, image_size=size, cutout=9
        )
        data = load_data(config, CPU)
        assert data.in_memory == (size == 24)
        passes.append(torch.cat([x for x, _ in data.train.batches(1)]))
    images = min(map(len, passes))
    assert torch.equal(passes[0][:images], passes[1][:images])
    plain = load_data(dataclasses.replace(config, augment="basic", cutout=0), CPU)
    assert not torch.equal(torch.cat([x for x, _ in plain.train.batches(1)]), passes[1])


def test_mixup_differs_from_batch_to_batch() -> None:
    data = make_data(*numbered(augment="strong"), CPU)
    shares = {round(float(y[y > 0].min()), 4) for _, y in data.train.batches(0)}
    assert len(shares) > len(data.train) // 2


def test_training_crops_of_files_are_not_those_of_the_test(image_folder: Callable) -> None:
    data = load_data(folder_config(image_folder(per_class=8, size=100), workers=0), CPU)
    rows = data.train.order(0)[: data.train.batch_size].numpy()
    seen, (drawn, _) = data.train.take(rows), next(data.train.batches(0))
    assert not any(torch.equal(a, b) for a, b in zip(seen, drawn))


def test_one_pool_serves_all_splits_where_processes_are_spawned(
    image_folder: Callable, tmp_path: Path
) -> None:
    """As on macOS and Windows, where each new process imports the script again."""
    script = tmp_path / "train.py"
    script.write_text(SPAWNED.format(folder=str(image_folder(per_class=8, size=100))))
    code, out, err = Warm(tmp_path, str(script), PYTHONPATH=str(ROOT)).join()
    assert code == 0, err
    assert out.count("imported") == 1 + 1, "the script itself, and one worker for all"
    assert out.splitlines()[-1] == "equal"


SPAWNED = """
print("imported", flush=True)
import multiprocessing
import torch
from common.config import TrainConfig
from common.data import load_data

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    here = {{"data_dir": {folder!r}, "batch_size": 4, "dataset": "folder", "device": "cpu"}}
    sides = []
    for workers in (1, 0):
        config = TrainConfig(**here, workers=workers).resolve("folder", 96)
        data = load_data(config, torch.device("cpu"))
        epochs = [split.batches(epoch) for epoch in (0, 1) for split in data.splits().values()]
        sides.append([x for epoch in epochs for x, _ in epoch])
    print("equal" if all(map(torch.equal, *sides)) else "not equal")
"""


def test_small_folders_live_in_memory(image_folder: Callable) -> None:
    data = load_data(folder_config(image_folder(), image_size=16), CPU)
    assert data.in_memory and data.train.pixels.dtype == torch.uint8
    assert {name: len(d.labels) for name, d in data.splits().items()} == {
        "train": 30, "val": 3, "test": 3,
    }  # fmt: skip


def test_three_layouts(image_folder: Callable) -> None:
    for splits, has_val in ((("train", "val", "test"), True), (("train", "val"), False)):
        source = load_folder(str(image_folder(splits=splits, name="_".join(splits))), 0)
        assert (source.val is not None) == has_val
        assert source.class_names == ["cat", "dog", "eel"]
        assert len(source.train) == len(source.test) == 36


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda make, tmp: tmp / "nowhere", "no such folder"),
        (lambda make, tmp: _empty(tmp), "no class folders"),
        (lambda make, tmp: make(classes=("only",)), "one class only"),
        (lambda make, tmp: _with_empty_class(make()), "no images in this class folder"),
        (lambda make, tmp: make(splits=("val",)), "no train folder"),
        (lambda make, tmp: make(splits=("train",)), "neither val nor test"),
        (lambda make, tmp: _odd_class(make(splits=("train", "val"))), "'fox' is missing in"),
    ],
)
def test_wrong_folders_are_named(
    image_folder: Callable, tmp_path: Path, build: Callable, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_folder(str(build(image_folder, tmp_path)), 0)


def _empty(tmp: Path) -> Path:
    (tmp / "empty").mkdir()
    return tmp / "empty"


def _with_empty_class(folder: Path) -> Path:
    (folder / "fox").mkdir()
    (folder / "fox" / "notes.txt").write_text("no picture")
    return folder


def _odd_class(folder: Path) -> Path:
    (folder / "val" / "fox").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "val" / "fox" / "1.png")
    return folder


def test_broken_image_is_named_or_skipped(image_folder: Callable) -> None:
    folder = image_folder()
    (folder / "dog" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    (folder / "dog" / ".hidden.png").write_bytes(b"")
    for size in (16, 96):
        with pytest.raises(UserError, match=r"torn\.jpg"):
            load_data(folder_config(folder, image_size=size, workers=0), CPU)
        data = load_data(folder_config(folder, image_size=size, workers=0, skip_broken=True), CPU)
        assert data.skipped == 1 and "1 broken left out" in data.describe()


def test_a_link_that_leads_nowhere_is_a_broken_image(image_folder: Callable) -> None:
    folder = image_folder(splits=("train", "test"))
    (folder / "train" / "dog" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"gone\.png"):
        load_data(folder_config(folder, image_size=16, workers=0), CPU)
    data = load_data(folder_config(folder, image_size=16, workers=0, skip_broken=True), CPU)
    assert data.skipped == 1


def test_an_image_that_breaks_during_an_epoch_is_named(image_folder: Callable) -> None:
    folder = image_folder(size=100)
    for workers in (0, 1):
        data = load_data(folder_config(folder, workers=workers), CPU)
        victim = Path(data.train.pool.files.paths["train"][0])
        pixels = victim.read_bytes()
        victim.write_bytes(pixels[: len(pixels) // 2])
        with pytest.raises(UserError, match=victim.name):
            list(data.train.batches(0))
        victim.write_bytes(pixels)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "I;16", "1", "F"])
def test_every_kind_of_picture_becomes_rgb(tmp_path: Path, mode: str) -> None:
    grey = np.tile(np.linspace(0, 255, 16, dtype=np.uint8), (8, 1))
    path = tmp_path / "x.tiff"
    if mode == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    elif mode == "F":
        Image.fromarray(grey.astype(np.float32)).save(path)
    else:
        colour = Image.fromarray(grey).convert("RGB")
        (colour.quantize(256) if mode == "P" else colour.convert(mode)).save(path)
    pixels = read_image(str(path))
    assert pixels.shape == (3, 8, 16) and pixels.dtype == torch.uint8
    expected = torch.from_numpy(grey)
    if mode == "1":
        assert set(pixels.unique().tolist()) <= {0, 255}
    else:
        assert (pixels.int() - expected.int()).abs().max() <= 2


def test_exif_turns_and_transparency_is_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = read_image(str(tmp_path / "turned.png"))
    assert pixels.shape == (3, 8, 4) and pixels[0, 0, 3] == 255
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(str(tmp_path / "clear.png")) == 255).all()


def test_an_imagenet_shaped_folder_trains_through_the_real_path(
    cli: Callable, tmp_path: Path, no_figures: None
) -> None:
    """Hundreds of JPEGs of several sizes and modes, in train and val, by the ImageNet recipe."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 60), ("val", 10)):
        for label, name in enumerate(("n01 tench", "n02 Hühnchen", "n03")):
            folder = tmp_path / "imagenet" / split / name / ("nested" if label else "")
            folder.mkdir(parents=True)
            for i in range(count):
                side = [(120, 90), (64, 200), (300, 240), (40, 40)][i % 4]
                pixels = generator.integers(0, 80, (*side, 3))
                pixels[..., label] += 150
                image = Image.fromarray(pixels.astype(np.uint8))
                mode = ["RGB", "L", "CMYK", "RGB"][i % 4 if label else 0]
                image.convert(mode).save(folder / f"ILSVRC_{i}.JPEG", quality=80)
    code, out, err = cli(
        "01", "--dataset", "imagenet", "--data-dir", str(tmp_path / "imagenet"), "--epochs", "1",
        "--model", "resnet20", "--image-size", "72", "--batch-size", "27", "--workers", "2",
        "--device", "cpu", "--no-amp",
    )  # fmt: skip
    assert code == 0, err
    assert "162 train + 18 val + 30 test, from files" in out
    assert "augment strong" in out
    assert "of the epoch was spent waiting for images" in out
    (result,) = (tmp_path / "runs").rglob("result.json")
    per_class = json.loads(result.read_text())["per_class"]
    assert [c["support"] for c in per_class] == [10, 10, 10]
    assert per_class[1]["name"] == "n02 Hühnchen"


def test_a_worker_that_dies_is_one_line_where_its_images_are_missed(
    image_folder: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no exception wherever the main thread is when it dies, which may be in a save."""
    config = folder_config(image_folder(per_class=8, size=100), workers=1, batch_size=1)
    data = load_data(config, CPU)
    batches = data.train.batches(0)
    next(batches)
    iterator = data.train.pool.loader._iterator
    (worker,) = iterator._workers
    monkeypatch.setattr(type(iterator)._try_get_data, "__defaults__", (0.2,))  # looks every 5 s
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    assert sum(range(10_000)) == 49_995_000  # a handler of its death would raise by now
    with pytest.raises(UserError, match="worker process that decodes images died"):
        list(batches)


def test_more_files_than_the_system_lets_a_process_hold_open(
    image_folder: Callable, tmp_path: Path
) -> None:
    """Thousands of images from workers, with the limit of open files far below their number."""
    resource = pytest.importorskip("resource")
    folder = image_folder(per_class=1100, size=4, classes=("cat", "dog"))
    (folder / "cat" / "torn.png").write_bytes(b"nonsense")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = max(map(int, os.listdir("/dev/fd")))  # by the tests that ran here before
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(opened + 100, hard), hard))
    try:
        config = folder_config(folder, image_size=4, workers=2, skip_broken=True)
        data = load_data(config, CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sum(len(d.labels) for d in data.splits().values()) == 2200 and data.skipped == 1
    assert data.train.take(np.arange(3)).shape == (3, 3, 4, 4), "no padding"
    brightest = data.val.pixels.float().mean((2, 3)).argmax(1)
    assert torch.equal(brightest, data.val.labels), "each image still has its own label"


def test_alternating_flips_follow_from_seed_epoch_and_image_alone() -> None:
    n = 24
    pixels = torch.zeros(n, 3, 8, 8, dtype=torch.uint8)
    pixels[..., :4] = 200  # bright on the left, wherever a crop of one pixel's shift lies
    every = Pictures(torch.arange(n), pixels)
    source = Source("halves", [str(c) for c in range(n)], every, every, every, flips=True)
    settings = {"batch_size": 6, "augment": "alternating", "image_size": 8, "seed": 3}
    data = make_data(source, TrainConfig(**settings).resolve("digits"), CPU)

    def mirrored(epoch: int) -> torch.Tensor:
        seen = torch.zeros(n, dtype=torch.bool)
        for x, y in data.train.batches(epoch):
            seen[y] = x[..., :3].mean((1, 2, 3)) < x[..., 5:].mean((1, 2, 3))
        return seen

    first = mirrored(0)
    assert 0 < first.sum() < n and torch.equal(mirrored(1), ~first)
    assert torch.equal(mirrored(2), first)
    late = [x for x, _ in data.train.batches(1, start=2)]  # as after --resume within an epoch
    assert all(torch.equal(a, x) for a, (x, _) in zip(late, list(data.train.batches(1))[2:]))


def test_the_last_epochs_see_images_where_they_are_tested() -> None:
    n = 24
    pixels = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8)
    every = Pictures(torch.arange(n), pixels)
    source = Source("noise", [str(c) for c in range(n)], every, every, every, flips=True)
    fast = TrainConfig(recipe="fast", epochs=13, batch_size=6, image_size=8).resolve("cifar10")
    data = make_data(source, fast, CPU)
    tested = data.test.take(np.arange(n))

    def in_place(epoch: int) -> bool:
        seen = [(x, tested[y]) for x, y in data.train.batches(epoch)]
        same = [(a == b).flatten(1).all(1) | (a == b.flip(3)).flatten(1).all(1) for a, b in seen]
        return bool(torch.cat(same).all())

    assert [epoch for epoch in range(13) if in_place(epoch)] == [11, 12], "a sixth"
    assert TrainConfig().resolve("cifar10").still == 0, "not of other recipes"
