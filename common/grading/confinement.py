"""What a worker may touch: a list of what it may read, one folder that it may write, and no more.

On Linux from 5.13 on the kernel keeps such a list for any process that asks, root or not, and for
all that it starts (Landlock, `man 7 landlock`). What isn't on the list can't be opened, whoever
owns it: not the course with its solutions, not its git objects, not /tmp. Newer kernels close
outgoing TCP connections and signals to other processes in the same breath.
"""

from __future__ import annotations

import ctypes
import os
import site
import struct
import sys
import sysconfig
from pathlib import Path

LINUX = sys.platform.startswith("linux")
# What a submission may not take its models from, so its files are not on the list.
FINISHED_MODELS = ("torchvision", "timm")

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_RULE_PATH_BENEATH = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | 1 << 14 | 1 << 15  # and truncate, ioctl
_READ = _READ_FILE | _READ_DIR


def available() -> int:
    """The version of these lists that this kernel keeps; 0: none."""
    try:
        return _call(_CREATE_RULESET, None, ctypes.c_size_t(0), 1) if LINUX else 0
    except OSError:
        return 0


def readable(also: str) -> set[Path]:
    """What Python, torch and the C library may have to open once they are imported, and `also`."""
    names = "stdlib", "platstdlib", "purelib", "platlib"
    libraries = {*map(sysconfig.get_path, names), *site.getsitepackages()}
    libraries |= {f"{sys.base_prefix}/lib", f"{sys.exec_prefix}/lib"}
    libraries |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64"}
    system = ["/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero", "/dev/urandom"]
    system += ["/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu", "/usr/share/zoneinfo"]
    folders = {Path(folder).resolve() for folder in libraries}
    hidden = {Path(f, name).resolve() for f in libraries for name in FINISHED_MODELS}
    hidden = {path for path in hidden if path.exists()}
    found = {path for folder in folders for path in _without(folder, hidden)}
    return found | {Path(path).resolve() for path in (*system, also)}


def _without(path: Path, hidden: set[Path]) -> list[Path]:
    """`path`, or its children where something below it is to stay hidden."""
    if path in hidden:
        return []
    if not any(path in other.parents for other in hidden):
        return [path]
    children = [child for child in path.iterdir() if not child.is_symlink()]
    return [found for child in children for found in _without(child, hidden)]


def confine(reading: set[Path], folder: str) -> None:
    """From now on this process, which must have given up new privileges, and its children open
    nothing but `reading`, and write only in `folder`. They start no program. For good.

    Raises: OSError, where the kernel refuses.
    """
    abi = available()
    everything = (1 << (13 + min(abi, 3) - 1 + (abi >= 5))) - 1  # each version knows more of them
    attributes = (ctypes.c_uint64 * 3)(everything, 3, 3)  # files; TCP; signals, abstract sockets
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    rules = _call(_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    try:
        for path in reading:
            _allow(rules, path, _READ & everything)
        _allow(rules, Path(os.devnull), (_READ_FILE | _WRITE_FILE) & everything)
        _allow(rules, Path(folder), everything & ~_EXECUTE)
        _allow(rules, Path(f"/proc/{os.getpid()}"), _READ)
        _call(_RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)


def _allow(rules: int, path: Path, access: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # not there: nothing to allow
    try:
        if not path.is_dir():
            access &= _OF_FILES
        rule = struct.pack("=Qi", access, fd)
        _call(_ADD_RULE, rules, _RULE_PATH_BENEATH, rule, 0)
    finally:
        os.close(fd)


def _call(number: int, *arguments: object) -> int:
    result = ctypes.CDLL(None, use_errno=True).syscall(number, *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
