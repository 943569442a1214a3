"""Downloads that break, from a server on this machine; archives that try to climb out."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from common.engine import sources
from common.engine.errors import UserError
from common.engine.progress import Bar
from common.engine.sources import choose_dataset, fetch, unpack_tar
from tests.warm import Warm

CONTENT = bytes(range(256)) * 4000
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT with ranges; /cut breaks off half-way, /wrong serves something else."""

    requested: list[str | None] = []

    def do_GET(self) -> None:
        Handler.requested.append(self.headers.get("Range"))
        body = CONTENT if self.path != "/wrong" else CONTENT[::-1]
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = len(body) // 2 if self.path == "/cut" else len(body)
        self.wfile.write(body[start:end])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    Handler.requested.clear()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


def test_download_is_checked_and_kept(server: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "data.bin"
    assert fetch([f"{server}/whole"], path, MD5).read_bytes() == CONTENT
    fetch([f"{server}/whole"], path, MD5)
    assert len(Handler.requested) == 1, "what is there is not fetched again"


def test_broken_connection_goes_on_where_it_was(server: str, tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    with pytest.raises(UserError, match=rf"data\.bin can't be downloaded .*MD5 {MD5}.*by hand"):
        fetch([f"{server}/cut"], path, MD5)
    assert not path.exists(), "half a file must never bear the whole one's name"
    fetch([f"{server}/whole"], path, MD5)
    assert path.read_bytes() == CONTENT
    assert Handler.requested[-1] == f"bytes={len(CONTENT) // 2}-"


def test_interrupted_download_leaves_nothing_that_passes_for_whole(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.bin"

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Bar, "advance", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch([f"{server}/whole"], path, MD5)
    assert [p.name for p in tmp_path.iterdir()] == ["data.bin.partial"]
    assert fetch([f"{server}/whole"], path, MD5).read_bytes() == CONTENT


def test_wrong_content_is_thrown_away_and_a_mirror_is_tried(server: str, tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    fetch([f"{server}/wrong", f"{server}/whole"], path, MD5)
    assert path.read_bytes() == CONTENT
    path.write_bytes(b"damaged by hand")
    with pytest.raises(UserError, match="another checksum"):
        fetch([f"{server}/wrong"], path, MD5)
    assert not path.exists()


def test_an_answer_that_is_no_http_is_a_failed_download(tmp_path: Path) -> None:
    """As a proxy may send; http.client's errors are no OSErrors."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"nonsense\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/whole"
        with pytest.raises(UserError, match="can't be downloaded"):
            fetch([url], tmp_path / "data.bin", MD5)


def test_archives_stay_inside_their_folder(tmp_path: Path) -> None:
    for name, member in (("up.tar", "data/../../evil.txt"), ("root.tar", "/tmp/evil-abs.txt")):
        with tarfile.open(tmp_path / name, "w") as tar:
            info = tarfile.TarInfo(member)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"evil"))
        (tmp_path / "in").mkdir(exist_ok=True)
        archive = tmp_path / "in" / name
        (tmp_path / name).rename(archive)
        with pytest.raises(UserError, match="can't be unpacked"):
            unpack_tar(archive, "data")
        assert not (tmp_path / "evil.txt").exists()
        assert [p.name for p in (tmp_path / "in").iterdir() if p.name.startswith(".")] == []


def test_auto_says_what_and_why(tmp_path: Path) -> None:
    name, why = choose_dataset("auto", str(tmp_path), gpu=False)
    assert name == "digits" and "--dataset cifar10" in why
    (tmp_path / "cifar-10-batches-py").mkdir()
    name, why = choose_dataset("auto", str(tmp_path), gpu=False)
    assert name == "cifar10" and "--dataset digits" in why
    assert choose_dataset("cifar100", str(tmp_path), gpu=False) == ("cifar100", "")


def test_cifar_from_a_dropped_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive that a user drops in by hand is checked, unpacked and read, with no network."""
    import pickle

    from torchvision import datasets

    kind = datasets.CIFAR10
    blobs = {}
    for name in [*[f"data_batch_{i}" for i in range(1, 6)], "test_batch"]:
        pixels = np.full((4, 3072), 7, dtype=np.uint8)
        blobs[name] = pickle.dumps({"data": pixels, "labels": [0, 1, 2, 3]})
    blobs["batches.meta"] = pickle.dumps({"label_names": [f"class {i}" for i in range(10)]})
    archive = tmp_path / kind.filename
    with tarfile.open(archive, "w:gz") as tar:
        for name, blob in blobs.items():
            info = tarfile.TarInfo(f"{kind.base_folder}/{name}")
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    sums = {name: hashlib.md5(blob).hexdigest() for name, blob in blobs.items()}
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(kind, "train_list", [[n, sums[n]] for n in list(blobs)[:5]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums["batches.meta"]})
    source = sources.load_cifar("cifar10", str(tmp_path))
    assert source.train.pixels.shape == (20, 3, 32, 32) and len(source.test) == 4
    (tmp_path / kind.base_folder / "test_batch").write_bytes(b"damaged")
    with pytest.raises(UserError, match="delete the folder"):
        sources.load_cifar("cifar10", str(tmp_path))


# --------------------------------------------------------------- folders as people really have them


def test_loops_are_not_followed(image_folder: Callable) -> None:
    folder = image_folder(splits=("train", "test"))
    (folder / "train" / "cat" / "up").symlink_to("..")
    (folder / "train" / "cat" / "self").symlink_to(".")
    (folder / "train" / "all").symlink_to(folder)
    source = sources.load_folder(str(folder), seed=0)
    assert source.class_names == ["cat", "dog", "eel"]
    cats = [p for p, label in zip(source.train.paths, source.train.labels) if label == 0]
    assert len(cats) == 12


def test_the_same_file_is_in_one_split_only(image_folder: Callable) -> None:
    folder = image_folder(splits=("train", "test", "val"))
    shutil.rmtree(folder / "test" / "cat")
    (folder / "test" / "cat").symlink_to(folder / "train" / "cat")
    source = sources.load_folder(str(folder), seed=0)
    assert len(source.test) == 24 and "12 files of test are links" in source.notes[0]
    shutil.rmtree(folder / "val")
    (folder / "val").symlink_to(folder / "train")
    with pytest.raises(UserError, match="all files of val are links"):
        sources.load_folder(str(folder), seed=0)


@pytest.mark.parametrize(
    "names", [("Training", "Testing"), ("TRAIN", "Validation", "Test"), ("train", "test", "valid")]
)
def test_splits_by_the_names_that_people_give_them(names: tuple, image_folder: Callable) -> None:
    """They were taken for classes to tell apart, and pictures of `valid` for none at all."""
    folder = image_folder(splits=names, per_class=5)
    source = sources.load_folder(str(folder), seed=0)
    assert source.class_names == ["cat", "dog", "eel"] and len(source.train) == 15
    assert (source.val is not None) == (len(names) == 3)
    for name in ("train", "training"):
        (folder / name).mkdir(exist_ok=True)
    with pytest.raises(UserError, match="which of them is train"):
        sources.load_folder(str(folder), seed=0)


def test_the_same_content_in_two_splits_is_counted_and_named(image_folder: Callable) -> None:
    folder = image_folder(splits=("train", "test"))
    for i in range(3):
        shutil.copy(folder / "train" / "dog" / f"{i}.png", folder / "test" / "eel" / f"copy{i}.png")
    (note,) = sources.shared_content(sources.load_folder(str(folder), seed=0))
    assert note.startswith("3 pictures of train are in test too")
    assert f"{folder}/train/dog/0.png = {folder}/test/eel/copy0.png" in note


def test_a_jpeg_as_windows_names_it_is_a_picture(image_folder: Callable) -> None:
    folder = image_folder()
    for file, ending in zip((folder / "cat").iterdir(), (".jfif", ".JFIF", ".jpe")):
        file.rename(file.with_suffix(ending))
    source = sources.load_folder(str(folder), seed=0)
    assert len(source.train) + len(source.test) == 36


def test_what_no_decoder_reads_is_counted_and_named(
    image_folder: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = image_folder()
    for name in ("a.heic", "b.HEIC", "notes.txt"):
        (folder / "cat" / name).write_bytes(b"?")
    for clutter in ("__MACOSX", ".DS_Store", "@eaDir"):
        (folder / clutter).mkdir()
    (folder / "Thumbs.db").write_bytes(b"?")
    monkeypatch.setattr(sources, "decodable", lambda: set(sources.EXTENSIONS))
    source = sources.load_folder(str(folder), seed=0)
    assert (
        source.class_names == ["cat", "dog", "eel"] and len(source.train) + len(source.test) == 36
    )
    assert source.notes == [
        f"2 .heic files in {folder} are left out: pip install pillow-heif reads them"
    ]
    for file in (folder / "dog").iterdir():
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(
        UserError, match=r"no images in this class folder .*12 .heic need pillow-heif"
    ):
        sources.load_folder(str(folder), seed=0)


def test_twelve_bits_in_sixteen_are_seen(tmp_path: Path) -> None:
    from PIL import Image

    for top, name in ((4095, "12.png"), (65535, "16.png"), (255, "8.png")):
        ramp = np.linspace(0, top, 64).round().astype(np.uint16).reshape(8, 8)
        Image.fromarray(ramp).save(tmp_path / name)
        pixels = sources.read_image(str(tmp_path / name))
        assert pixels.max() == 255 and 120 < pixels.float().mean() < 135, name


def test_an_unreadable_class_folder_says_so(
    image_folder: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = image_folder()
    real = os.scandir

    def scandir(path: object) -> object:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"dog can't be read \(Permission denied\)"):
        sources.load_folder(str(folder), seed=0)


def test_ten_thousand_classes_are_split_at_once() -> None:
    """One pass over the labels, not one for each class; each class divided alike."""
    labels = torch.arange(10_000).repeat(3)
    calls = []

    class Counted(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            calls.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Counted():
        rest, part = sources.stratified_split(labels, 0.1, seed=0)
    assert len(part) == 10_000 and labels[part].unique().numel() == 10_000
    assert len(rest) == 20_000 and calls.count("eq") < 10


def test_too_few_images_are_found_out_before_they_are_read(image_folder: Callable) -> None:
    with pytest.raises(UserError, match="too few images to split"):
        sources.load_folder(str(image_folder(per_class=3)), seed=0)


def test_one_of_several_processes_downloads(server: str, tmp_path: Path) -> None:
    """They all find the data folder empty; the others wait, and take what is there then."""
    script = f"""
from pathlib import Path
from common.engine.download import fetch, one_at_a_time
path = Path({str(tmp_path)!r}) / "data.bin"
if not path.exists():
    with one_at_a_time(path.parent):
        fetch([{server!r} + "/whole"], path, {MD5!r})
print(len(path.read_bytes()))
"""
    for process in [Warm(tmp_path, "-c", script) for _ in range(3)]:
        code, out, err = process.join()
        assert code == 0 and str(len(CONTENT)) in out, err
    assert len(Handler.requested) == 1
