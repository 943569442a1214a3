"""What seldom happens: other systems, odd files, moved folders, what runs out on the way."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import shlex
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common import training
from common.config import TrainConfig
from common.data import FileLoader, load_data, make_data
from common.engine import checkpoint, download, files, measure, processes, sources, surroundings
from common.engine.baselines import baselines
from common.engine.device import restore_rng_state, rng_state
from common.engine.errors import UserError
from common.engine.records import EpochRecord
from common.engine.run_folder import RunFolder
from common.engine.sources import Pictures, Source, load_folder, read_image, shared_content
from common.runs import Run
from common.training import fit, make_optimizer, make_schedule
from tests.conftest import ROOT
from tests.test_data import folder_config
from tests.test_training import colours, make_net

CPU = torch.device("cpu")
TINY = ("--dataset", "digits", "--model", "resnet20", "--device", "cpu", "--smoke")


def test_a_python_without_filters_unpacks_archives_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian 12 has Python 3.11.2, whose `extractall` knows no `filter`."""
    extract = tarfile.TarFile.extractall

    def as_of_old(tar: tarfile.TarFile, path: Path) -> None:
        extract(tar, path, filter="fully_trusted")

    monkeypatch.setattr(download, "FILTERS", False, raising=False)
    monkeypatch.setattr(tarfile.TarFile, "extractall", as_of_old)
    for name, member in (("good.tar", "data/x"), ("up.tar", "data/../../x"), ("root.tar", "/x")):
        with tarfile.open(tmp_path / name, "w") as tar:
            info = tarfile.TarInfo(member)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"text"))
    download.unpack_tar(tmp_path / "good.tar", "data")
    assert (tmp_path / "data" / "x").read_bytes() == b"text"
    for name in ("up.tar", "root.tar"):
        with pytest.raises(UserError, match="can't be unpacked"):
            download.unpack_tar(tmp_path / name, "other")


def test_a_class_too_rare_for_the_drawn_images_costs_no_result() -> None:
    """Of 9,000 images one is of class b; logistic regression learns on 5,000 of them."""

    def split(many: int) -> Pictures:
        labels = torch.zeros(many, dtype=torch.long)
        labels[-1] = 1
        return Pictures(labels, torch.zeros(many, 3, 4, 4, dtype=torch.uint8))

    source = Source("rare", ["a", "b"], split(9000), split(50), split(50))
    config = TrainConfig(image_size=4).resolve("digits")
    found = baselines(make_data(source, config, CPU))
    assert found == {"chance": 0.5, "majority": 0.98}


def test_a_run_is_resumed_from_inside_and_from_anywhere(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None
) -> None:
    assert cli("01", *TINY)[0] == 0
    (run,) = (tmp_path / "runs" / "01_resnet_beginner").iterdir()
    for where, name in ((run, "."), (run.parent, run.name)):
        files.unlock(run / ".lock")
        monkeypatch.chdir(where)
        code, out, err = cli("01", "--resume", name)
        assert (code, err) == (0, "") and f"all runs: {tmp_path / 'runs' / 'index.html'}" in out
    site = tmp_path / "site"
    (site / "nets").mkdir(parents=True)
    (site / "index.html").write_text("mine")
    run.rename(site / "nets" / "copy")
    assert cli("01", "--resume", str(site / "nets" / "copy"))[0] == 0
    assert (site / "index.html").read_text() == "mine"


def test_a_torch_without_distributed_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """As AMD builds it for Windows: torch.distributed has little more than `is_available`."""
    monkeypatch.setattr(processes, "dist", SimpleNamespace(is_available=lambda: False))
    assert (processes.rank(), processes.world_size(), processes.is_main()) == (0, 1, True)
    processes.join_processes("cpu")
    processes.leave_processes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun"):
        processes.join_processes("cpu")


def test_only_pinned_memory_is_copied_without_waiting(
    image_folder: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Metal such a copy reads memory that is free by then."""
    data = load_data(folder_config(image_folder(size=80), image_size=72, workers=0), CPU)
    assert isinstance(data.train, FileLoader)
    asked, to = [], torch.Tensor.to

    def watched(tensor: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        asked.append(bool(options.get("non_blocking")))
        return to(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    next(iter(data.train.batches()))
    assert asked and not any(asked)


def test_metals_random_numbers_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    state = [torch.tensor([1], dtype=torch.uint8)]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new: state.__setitem__(0, new))
    metal = SimpleNamespace(type="mps")
    kept = rng_state(metal)
    state[0] = torch.tensor([2], dtype=torch.uint8)
    restore_rng_state(kept, metal)
    assert state[0].item() == 1


def test_floats_between_0_and_1_are_not_black(tmp_path: Path) -> None:
    grey = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    grey[0, 0] = math.nan
    Image.fromarray(grey).save(tmp_path / "x.tif")
    pixels = read_image(str(tmp_path / "x.tif"))
    assert pixels.max() == 255 and 100 < pixels.float().mean() < 140 and pixels[0, 0, 0] == 0


def huge_png(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_whatever_a_decoder_raises_is_a_broken_image(
    cli: Callable, image_folder: Callable, monkeypatch: pytest.MonkeyPatch, no_figures: None
) -> None:
    """struct.error for a broken EXIF, RuntimeError for a broken AVIF, a bomb for 400 megapixels."""
    folder = image_folder()
    (folder / "cat" / "huge.png").write_bytes(huge_png(20_000))
    flags = ("--dataset", "folder", "--data-dir", str(folder), *TINY[2:])
    code, _, err = cli("01", *flags)
    assert code == 2 and "huge.png" in err and len(err.strip().splitlines()) == 1
    assert cli("01", *flags, "--skip-broken")[0] == 0
    for error in (struct.error("required argument is not an integer"), RuntimeError("no item")):

        def decode(image: Image.Image, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("PIL.ImageOps.exif_transpose", decode)
        with pytest.raises(UserError, match=r"0\.png can't be read as an image"):
            read_image(str(folder / "dog" / "0.png"))


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
def test_a_file_name_that_is_no_utf8(image_folder: Callable) -> None:
    folder = image_folder()
    before = load_folder(str(folder), 0).fingerprint
    os.rename(folder / "cat" / "0.png", os.fsencode(folder / "cat") + b"/caf\xe9.png")
    assert load_folder(str(folder), 0).fingerprint != before


def test_an_image_that_was_repaired_makes_other_splits_and_another_fingerprint(
    image_folder: Callable,
) -> None:
    folder = image_folder()
    file = folder / "cat" / "0.png"
    whole = file.read_bytes()
    seen = []
    for content in (whole[:50], whole):
        file.write_bytes(content)
        seen.append(
            load_data(folder_config(folder, image_size=16, workers=0, skip_broken=True), CPU)
        )
    assert [data.skipped for data in seen] == [1, 0]
    assert seen[0].fingerprint != seen[1].fingerprint


def test_the_command_that_goes_on_says_where_the_images_are_now(
    cli: Callable, image_folder: Callable, tmp_path: Path, no_figures: None
) -> None:
    old = image_folder()
    flags = ("--dataset", "folder", "--data-dir", str(old), *TINY[2:])
    assert cli("01", *flags)[0] == 0
    (run,) = (tmp_path / "runs" / "01_resnet_beginner").iterdir()
    new = old.rename(tmp_path / "moved")
    files.unlock(run / ".lock")
    assert cli("01", "--resume", str(run), "--data-dir", str(new), "--no-auto-batch")[0] == 0
    words = shlex.split(RunFolder.current.farewell())
    assert words[words.index("--data-dir") + 1] == str(new) and "--no-auto-batch" in words
    files.unlock(run / ".lock")
    assert cli("01", *words[words.index("--resume") :])[0] == 0


def test_the_command_is_one_that_windows_understands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "_launcher", lambda: ["python"])
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(sys, "argv", ["01_resnet_beginner.py"])
    line = surroundings.command("--resume", r"my runs\01\a", r"runs\b")
    assert line.endswith(r'01_resnet_beginner.py --resume "my runs\01\a" runs\b'), line


def test_memory_on_a_gpu_is_that_of_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images and momentum lie there too: here 1,000,000 bytes of them beside 10 activations."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1_000_000 + 40 + 8)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1_000_000 + 40 + 8 + 40)
    monkeypatch.setattr(measure, "autocast", lambda device, amp: contextlib.nullcontext())
    x = SimpleNamespace(device=torch.device("cuda"), numel=lambda: 2, element_size=lambda: 4)
    net = nn.Module()
    net.weight, net.forward = nn.Parameter(torch.zeros(10)), lambda x: x
    assert measure.peak_memory(net, x) == 40 + 8 + 40


def test_memory_that_runs_out_after_unscaling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step allocates the momentum; with float16 the gradients are unscaled by then."""
    monkeypatch.setattr(training, "amp_dtype", lambda *_: torch.float16)
    data, config = colours(batch_size=16, epochs=1)
    net = make_net()
    optimizer = make_optimizer(net, config)
    step, left = optimizer.step, [1]

    def hungry(*args: object) -> None:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(*args)

    optimizer.step = hungry
    schedule = make_schedule(optimizer, config, data.train)
    (record,) = fit(net, data, nn.CrossEntropyLoss(), optimizer, schedule, config)
    assert schedule.taken == 5 and math.isfinite(record.train_loss)


def test_an_early_stop_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, config = colours(epochs=9, patience=1, save_every=1e6, run_dir=str(tmp_path))
    said = iter([(0.5, 0.5), (0.5, 0.5), (0.6, 0.6)])
    monkeypatch.setattr(training, "score", lambda *_: next(said))
    net = make_net()
    optimizer = make_optimizer(net, config)
    schedule = make_schedule(optimizer, config, data.train)
    run = Run.open(config, "here")
    history = fit(net, data, nn.CrossEntropyLoss(), optimizer, schedule, config, run)
    assert len(history) == 2
    assert len(checkpoint.load(run.last)["history"]) == 2, "farewell says that all is saved"


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        (
            "InvalidCxxCompiler: No working C++ compiler found in cpp.cxx: (None, 'g++')",
            "--compile",
        ),
        ("Failed to find C compiler. Please specify via CC", "--compile"),
        (
            "Expected more than 1 value per channel when training, got input size [1, 512, 1, 1]",
            "--batch-size",
        ),
    ],
)
def test_what_torch_lacks_is_one_line(
    cli: Callable, monkeypatch: pytest.MonkeyPatch, said: str, hint: str
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(training, "train_one_epoch", fail)
    code, _, err = cli("01", *TINY)
    assert code == 2 and hint in err and len(err.strip().splitlines()) == 1


@pytest.mark.skipif(os.name != "posix", reason="folders are not synced there")
def test_a_file_system_that_syncs_no_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VirtualBox's shared folders say EINVAL, network drives under WSL EIO."""
    sync = os.fsync

    def refuse(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    checkpoint.save(tmp_path / "last.pt", {"epoch": 1})
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 1


def test_without_locks_a_neighbours_save_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def unknown(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unknown)
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".last.pt.1.tmp").write_bytes(b"")
    files.claim_folder(tmp_path / "mine")
    assert not (tmp_path / "mine" / ".last.pt.1.tmp").exists()
    assert (tmp_path / "other" / ".last.pt.1.tmp").exists()


def test_a_table_that_a_spreadsheet_holds_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def windows(source: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Access is denied")

    run = Run(tmp_path, TrainConfig(), "tiny", resumed=False)
    history = [EpochRecord(epoch, 0.1, 1.0, 0.5, 1.0, 0.5, 1.0, 90.0) for epoch in (1, 2, 3)]
    monkeypatch.setattr(os, "replace", windows)
    run.note_epoch(history[:1], 3)
    run.note_epoch(history[:2], 3)
    assert capsys.readouterr().out.count("Access is denied") == 1, "said once"
    monkeypatch.undo()
    run.note_epoch(history, 3)
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 4


def test_a_page_of_all_runs_that_cant_be_written_takes_no_result_away(tmp_path: Path) -> None:
    folder = tmp_path / "tiny" / "run"
    for path in (folder, tmp_path / "index.html"):
        path.mkdir(parents=True)
    config = TrainConfig()
    files.write_json(folder / "config.json", config.to_dict())
    where = RunFolder(folder, config, "tiny", resumed=False).where()
    assert where.startswith("\nwarning") and "index.html can't be written" in where


def test_a_folder_is_taken_before_anything_is_written_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run that begins at the same moment takes the first file for what a killed one left."""
    neighbour, left = tmp_path / "tiny" / "other", []

    def write(path: Path, record: object) -> None:
        half = path.with_name(".config.json.1.tmp")
        half.write_bytes(b"half")
        script = "import sys, pathlib; from common.engine.files import claim_folder as claim"
        script += "; claim(pathlib.Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", script, str(neighbour)], check=True, cwd=ROOT)
        left.append(half.exists())

    neighbour.mkdir(parents=True)
    monkeypatch.setattr("common.engine.run_folder.write_json", write)
    RunFolder.open(TrainConfig(run_dir=str(tmp_path)), "tiny")
    assert left == [True]


def test_pictures_with_the_same_border_are_not_the_same(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for kind in ("cat", "dog"):
            (tmp_path / split / kind).mkdir(parents=True)
            for i in range(4):
                pixels = np.zeros((120, 120, 3), np.uint8)
                pixels[30:90] = generator.integers(0, 255, (60, 120, 3))
                Image.fromarray(pixels).save(tmp_path / split / kind / f"{i}.bmp")
    assert shared_content(load_folder(str(tmp_path), 0)) == []
    (tmp_path / "test" / "cat" / "0.bmp").write_bytes(
        (tmp_path / "train" / "cat" / "0.bmp").read_bytes()
    )
    assert "1 pictures of train are in test too" in shared_content(load_folder(str(tmp_path), 0))[0]


@pytest.mark.parametrize("content", [b"", struct.pack(">IIII", 2051, 60000, 28, 28) + b"short"])
def test_damaged_mnist_is_one_line(tmp_path: Path, content: bytes) -> None:
    from torchvision.datasets import MNIST

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, _ in MNIST.resources:
        (raw / name).with_suffix("").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        sources.load_mnist("mnist", str(tmp_path))
