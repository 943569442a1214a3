"""Flags of the tools; those of a lesson come from its config, see common/cli.py."""

from __future__ import annotations

import argparse
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """argparse's, where what's wrong is one line and not a screenful of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")
