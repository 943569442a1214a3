"""From the command line to a config and from an outcome
to an exit code. Flags are read before torch is imported.
"""

from __future__ import annotations

import argparse
import builtins
import dataclasses
import json
import os
import signal
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from common.config import TrainConfig
from common.engine.errors import Interrupted, UserError, unknown

ConfigT = TypeVar("ConfigT", bound=TrainConfig)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, not a screenful of usage."""
        raise UserError(f"{message} (see --help)")


def parse_flags(config_class: type[ConfigT], argv: list[str] | None = None) -> ConfigT:
    """The config that the command line asks for; the defaults where a notebook runs the cell.

    With `--resume` the settings are those that the run began with, and a flag that contradicts them
    is an error. Exits with code 2 and one line on bad input.
    """
    if argv is None:
        argv = [] if in_notebook() else sys.argv[1:]
    with exit_codes():
        given = vars(_build_parser(config_class).parse_args(argv))
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
    )
    types = typing.get_type_hints(config_class)
    for spec in dataclasses.fields(config_class):
        kinds = [
            t
            for t in typing.get_args(types[spec.name]) or (types[spec.name],)
            if t is not type(None)
        ]
        help_text = spec.metadata.get("help", "").replace("%", "%%")
        if spec.default not in (None, "", False):
            help_text += f" (default: {spec.default})"
        elif spec.default is None:
            help_text += " (default: by dataset)" if "default:" not in help_text else ""
        options: dict[str, Any] = {"dest": spec.name, "help": help_text}
        if kinds[0] is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = kinds[0]
            options["metavar"] = (
                "|".join(filter(None, spec.metadata.get("choices") or ()))
                or kinds[0].__name__.upper()
            )
        parser.add_argument("--" + spec.name.replace("_", "-"), **options)
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
    lesson, here = saved.pop("lesson", None), config_class.__module__
    if here == "__main__":
        here = Path(sys.argv[0]).stem
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
    return config_class(**{**saved, **given})


def main(
    config: TrainConfig,
    models: Mapping[str, Callable[..., Any]],
    build: Callable[[Any, int], Any],
    run: Callable[[Any], object],
    experiments: Mapping[str, Callable[[Any], object]],
) -> None:
    """What a lesson does when it is run as a script: its summary, one of its experiments, or
    training.

    Exits with 0, or 2, 130 or 143 after one line that says why.
    """
    with exit_codes():
        if config.model not in models:
            raise unknown("model", config.model, models)
        if config.summary:
            from common.runs import print_summary

            print_summary(config, build)
        elif config.experiment:
            if config.experiment not in experiments:
                raise unknown("experiment", config.experiment, experiments)
            experiments[config.experiment](config)
        else:
            run(config)
        if "torch.distributed" in sys.modules:
            from common.engine.processes import leave_processes

            leave_processes()


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn the errors that a user can cause into
    one line on stderr and the documented exit code.
    """
    signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    except UserError as error:
        _leave(f"error: {error}", 2)
    except Interrupted as stop:
        _leave(str(stop), 128 + stop.signum)
    except KeyboardInterrupt:
        _leave(_farewell(), 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    finally:
        data = sys.modules.get("common.engine.file_loader")
        if data:
            data.close_workers()


def _terminated(signum: int, frame: object) -> NoReturn:
    raise Interrupted(signum, _farewell())


def _farewell() -> str:
    """How to go on, where there is something to go on with."""
    runs = sys.modules.get("common.runs")
    run = runs.Run.current if runs else None
    if run is not None and run.last.exists():
        return run.farewell()
    return "stopped before anything was trained: there is nothing to resume"


def _leave(line: str, code: int) -> None:
    print("\r" + line if sys.stderr.isatty() else line, file=sys.stderr, flush=True)
    if not in_notebook():
        sys.exit(code)


def in_notebook() -> bool:
    """Whether a Jupyter kernel or IPython runs this: it
    has no command line of its own and must not be exited.
    """
    return hasattr(builtins, "__IPYTHON__")
