"""Downloads that go on where they broke off, and archives unpacked whole or not at all."""

from __future__ import annotations

import gzip
import http.client
import os
import shutil
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.engine.errors import UserError
from common.engine.files import lock, replacing, unlock
from common.engine.progress import Bar

FILTERS = hasattr(tarfile, "data_filter")  # not in Python 3.11.2, which Debian 12 has


def fetch(urls: list[str], path: Path, md5: str) -> Path:
    """Download to `path`, or find it there; its MD5 is checked either way.

    An interrupted download stays beside it as `.partial` and is continued by the next call; only a
    file whose checksum is right ever gets the name `path`.

    Raises:
        UserError: says which file, of what size and MD5, to put into which folder by hand.
    """
    from torchvision.datasets.utils import check_md5

    if path.exists():
        if check_md5(path, md5):
            return path
        path.unlink()  # cut short or damaged
    _make_folder(path.parent)
    partial = path.with_name(path.name + ".partial")
    size, reason = 0, ""
    for url in urls:
        try:
            size = _download(url, partial)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error))
            continue
        if check_md5(partial, md5):
            os.replace(partial, path)
            return path
        reason = "what came has another checksum"
        partial.unlink()
    about = f"{size / 1e6:.0f} MB, " if size else ""
    raise UserError(
        f"{path.name} can't be downloaded ({reason}): put it ({about}MD5 {md5}) into "
        f"{path.parent}/ by hand, from {urls[0]}"
    )


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Inside, no other process downloads into the folder: torchrun's all want the same files."""
    _make_folder(folder)
    path, told = folder / ".download.lock", False
    while not lock(path):
        if not told:
            print(f"waiting for another process: it downloads into {folder}", flush=True)
        told = True
        time.sleep(0.2)
    try:
        yield
    finally:
        unlock(path)


def _download(url: str, partial: Path) -> int:
    """Append to `partial` what is missing of `url`; the whole size in bytes."""
    done = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is missing
            return done
        raise
    with response:
        if response.status != 206:  # the server starts over
            done = 0
        total = done + int(response.headers.get("Content-Length") or 0)
        mode = "ab" if done else "wb"
        with partial.open(mode) as file, Bar(total, partial.stem, "B", done) as bar:
            while chunk := response.read(1 << 16):
                file.write(chunk)
                bar.advance(len(chunk))
    done = partial.stat().st_size
    if done < total:
        raise OSError(f"the connection ended after {done} of {total} bytes; run again to go on")
    return done


def unpack_tar(archive: Path, folder: str) -> None:
    """Unpack the one top folder of an archive beside it, whole or not at all, never outside.

    Raises:
        UserError: a member points out of the folder, or the archive is broken.
    """
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".unpack-") as scratch:
        try:
            with tarfile.open(archive) as tar:
                if FILTERS:
                    tar.extractall(scratch, filter="data")
                else:
                    _extract_inside(tar, Path(scratch).resolve())
            os.replace(Path(scratch) / folder, archive.parent / folder)
        except (tarfile.TarError, EOFError, OSError) as error:
            why = f"{archive} can't be unpacked ({error})"
            raise UserError(f"{why}: delete it and run again") from None


def _extract_inside(tar: tarfile.TarFile, folder: Path) -> None:
    """Plain files and folders alone, none of them outside of `folder`."""
    for member in tar.getmembers():
        inside = (folder / member.name).resolve().is_relative_to(folder)
        if not inside or not (member.isreg() or member.isdir()):
            raise tarfile.TarError(f"{member.name} is outside of the folder, or no plain file")
    tar.extractall(folder)


def unpack_gzip(archive: Path) -> None:
    """x.gz -> x beside it, whole or not at all."""
    try:
        with gzip.open(archive) as source, replacing(archive.with_suffix("")) as out:
            shutil.copyfileobj(source, out)
    except (EOFError, OSError) as error:
        raise UserError(f"{archive} can't be unpacked ({error}): delete it and run again") from None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"{folder} can't be made ({error.strerror})"
        raise UserError(f"{why}: choose another folder") from None
