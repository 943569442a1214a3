"""From the command line to a config and from an outcome
to an exit code. Flags are read before torch is imported.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from common.config import TrainConfig, knob_types, refuse_idle
from common.engine import signals
from common.engine.errors import UserError, unknown
from common.engine.signals import on_leave
from common.engine.surroundings import in_notebook, script

# The first knob of each group of TrainConfig, and what --help calls the group.
GROUPS = {
    "dataset": "images",
    "epochs": "training",
    "device": "machine",
    "run_dir": "the run and its folder",
}
# What torch says of what its user can mend, and what we say instead.
TOLD: dict[tuple[str, ...], str] = {
    (  # g++, cl.exe, triton's gcc, triton
        "No working C++ compiler",
        "Compiler: cl is not found",
        "Failed to find C compiler",
        "Cannot find a working triton",
    ): "--compile: torch needs a C++ compiler, and on a GPU triton, and finds none: install one or "
    "leave out --compile",
    (
        "Expected more than 1 value per channel when training",
    ): "BatchNorm can't learn from a single value: try a larger --batch-size",
    (  # Linux, Windows, GPUs
        "can't allocate memory",
        "not enough memory",
        "out of memory",
    ): "this machine has too little memory for that: try a smaller --batch-size",
}
ConfigT = TypeVar("ConfigT", bound=TrainConfig)
__all__ = ["exit_codes", "in_notebook", "main", "on_leave", "parse_flags"]


class OneLineParser(argparse.ArgumentParser):
    """argparse's, where what's wrong is one line and not a screenful of usage: of the tools."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


class _Parser(argparse.ArgumentParser):
    """The same for a lesson, whose flags come from its config; a notebook must not be exited."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def parse_flags(config_class: type[ConfigT], argv: list[str] | None = None) -> ConfigT:
    """The config that the command line asks for; the defaults where a notebook runs the cell.

    With `--resume` the settings are those that the run began with, and a flag that contradicts them
    is an error. Exits with code 2 and one line on bad input.
    """
    if argv is None:
        argv = sys.argv[1:] if script() else []
    with exit_codes():
        given = vars(_build_parser(config_class).parse_args(argv))
        given |= {k: os.pathsep.join(v) for k, v in given.items() if isinstance(v, list)}
        if given.get("resume"):
            return _resumed(config_class, given)
        return config_class(**given)


def _build_parser(config_class: type[TrainConfig]) -> argparse.ArgumentParser:
    doc = sys.modules["__main__"].__doc__ or ""
    parser = _Parser(
        description=doc.strip().split("\n\n")[0],
        argument_default=argparse.SUPPRESS,  # so that only what was typed comes back
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage=argparse.SUPPRESS,
        add_help=False,
    )
    types = knob_types(config_class)
    shared = {spec.name: spec for spec in dataclasses.fields(TrainConfig)}
    own = parser.add_argument_group("this lesson")
    group = own
    # A lesson's own knobs come after the shared ones in the dataclass, and first in the help.
    for spec in dataclasses.fields(config_class):
        if spec.name in GROUPS:
            group = parser.add_argument_group(GROUPS[spec.name])
        kinds = [kind for kind in types[spec.name] if kind is not type(None)]
        help_text = spec.metadata.get("help", "").replace("%", "%%")
        if spec.metadata.get("without"):
            help_text += f"; not of {', '.join(spec.metadata['without'])}"
        if only := spec.metadata.get("only"):
            help_text += f"; for {only}"
        if never := spec.metadata.get("never"):
            help_text += f"; not with {never}"
        if spec.default not in (None, "", False):
            help_text += f" (default: {spec.default})"
        elif spec.default is None:
            help_text += " (default: by dataset)" if "default:" not in help_text else ""
        options: dict[str, Any] = {"dest": spec.name, "help": help_text}
        if kinds[0] is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = kinds[0]
            options["nargs"] = spec.metadata.get("nargs")
            choices = "|".join(filter(None, spec.metadata.get("choices") or ()))
            options["metavar"] = choices or kinds[0].__name__.upper()
        mine = spec is not shared.get(spec.name)
        flags = "--" + spec.name.replace("_", "-"), spec.metadata.get("short")
        (own if mine else group).add_argument(*filter(None, flags), **options)
    group.add_argument("-h", "--help", action="help", help="show this and stop")
    return parser


def _resumed(config_class: type[ConfigT], given: dict[str, Any]) -> ConfigT:
    """The settings of the run that `--resume` names,
    with what may change taken from the command line.
    """
    path = Path(given["resume"])
    if not path.exists():
        raise UserError(f"--resume {path}: no such run folder or checkpoint")
    folder = path if path.is_dir() else path.parent
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"--resume {path}: {folder} has no config.json, so it is no run folder"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"--resume {path}: config.json can't be read ({error})") from None
    if not isinstance(saved, dict):
        raise UserError(f"--resume {path}: config.json holds no settings")
    lesson, here = saved.pop("lesson", None), config_class.__module__
    if here == "__main__":
        here = Path(script()).stem or lesson
    if lesson != here:
        raise UserError(
            f"--resume {path}: a run of {lesson}, not of {here}; use python {lesson}.py"
        )
    for name, value in given.items():
        if name not in config_class.FREE_ON_RESUME and value != saved.get(name):
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} {value}: the run in {folder} has {saved.get(name)}; "
                "resume it without the flag, or start a new run"
            )
    known = {spec.name for spec in dataclasses.fields(config_class)}
    if set(saved) - known:
        raise UserError(
            f"--resume {path}: made by another version, with {', '.join(set(saved) - known)}"
        )
    config = config_class(**{**saved, **given})
    # What the run began with stays: there its recipe has filled in `lr` too, for one.
    refuse_idle(config, {name for name, value in given.items() if value != saved.get(name)})
    return config


def main(
    config: TrainConfig,
    models: Mapping[str, Callable[..., Any]],
    build: Callable[[Any, int], Any],
    run: Callable[[Any], object],
    experiments: Mapping[str, Callable[[Any], object]],
) -> None:
    """What a lesson does when it is run as a script: its summary, one of its experiments, or
    training.

    Exits with 0, or 2, 130, 143 or 129 after one line that says why.
    """
    with exit_codes():
        with suppress(AttributeError):  # class names in a script that this terminal doesn't have
            sys.stdout.reconfigure(errors="backslashreplace")
        if config.model not in models:
            raise unknown("model", config.model, models)
        if config.experiment and config.experiment not in experiments:
            raise unknown("experiment", config.experiment, experiments)
        if not config.resume:
            refuse_idle(config)
        if config.summary:
            from common.inspection import print_summary

            print_summary(config, build)
            return
        known = build is not None and models[config.model] is not None
        if known and not (config.resume or config.pretrained):
            from common.limits import check_size

            check_size(config, build)
        if config.find_lr and not known:
            raise UserError("--find-lr is for one network: name it with --model, in lessons 1 to 6")
        if config.find_lr:
            from common.find_lr import find_lr

            find_lr(config, build)
            return
        job = experiments[config.experiment] if config.experiment else run
        job(config)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn the errors that a user can cause into one line on stderr and the documented exit code.

    - 2: bad input or a missing thing, a full disk, too little memory
    - 130, 143, 129: stopped by Ctrl-C, SIGTERM or SIGHUP
    - 141: whoever read the output has closed it

    A notebook gets the line alone. What isn't the user's doing keeps its traceback.
    """
    line, code = "", 0
    try:
        with signals.caught() if script() else nullcontext():
            try:
                try:
                    yield
                finally:
                    print(end="", flush=True)  # a full disk shows here, not after the last line
            except Exception as error:
                signals.raise_if_stopped()  # what failed did so since the process is stopped
                line, code = _explained(error)
                line = "\\n".join(line.splitlines())  # a name may hold a line break
                signals.agreed(line, code, error)
                if not code:
                    raise
    except KeyboardInterrupt as stop:
        line, code = str(stop), 128 + getattr(stop, "signum", signal.SIGINT)
        signals.agreed(line, code)
    finally:
        how_to_go_on = signals.leave()
    if code and not script():
        raise _Stop(line or how_to_go_on)  # the cells after this one don't run
    if code:
        signals.say(line or how_to_go_on)
        sys.exit(code)


class _Stop(Exception):
    """What ends a cell in place of an exit code: IPython shows the line and no traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def _explained(error: Exception) -> tuple[str, int]:
    """The line and the exit code of an error that isn't the code's fault; 0 for the others."""
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, BrokenPipeError):
        _write_nowhere()
        sys.exit(141)
    if isinstance(error, OSError) and error.errno:
        where = error.filename or "the output"
        _write_nowhere()
        return f"error: {where} can't be read or written ({error.strerror})", 2
    said = "out of memory" if isinstance(error, MemoryError) else str(error)
    lines = [line for words, line in TOLD.items() if any(word in said for word in words)]
    return (f"error: {lines[0]}", 2) if lines else ("", 0)


def _write_nowhere() -> None:
    """What is still in the buffer of a full or closed stdout can't be told to anyone."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
