"""Downloads that break, from a server on this machine; archives that try to climb out."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from common.engine import sources
from common.engine.errors import UserError
from common.engine.sources import choose_dataset, fetch, unpack_tar

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
    thread = threading.Thread(target=http.serve_forever, daemon=True)
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
        patch.setattr(sources.Bar, "advance", interrupt)
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

    import numpy as np
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
