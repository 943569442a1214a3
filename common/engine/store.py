"""Finished results in one JSON file, so that what was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from common.engine.errors import UserError
from common.engine.files import write_json


class Store:
    """Results by key, each with the settings that it was made under, written as soon as it's there.

    What was made under other settings is left out, and replaced when it is made again, so that a
    table never mixes the two.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, object], tell: bool = False) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))  # as it will read back: tuples are lists
        self.results: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                saved = json.loads(path.read_text(encoding="utf-8"))
                self.results = {k: v for k, v in saved.items() if v["settings"] == self.settings}
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(
                    f"{path} can't be read ({error}): remove it, and all is measured again"
                ) from None
            others = len(saved) - len(self.results)
            if tell:
                print(f"resume     {len(self.results)} results read from {path.name}", flush=True)
            if others:
                print(f"resume     {others} in {path.name} are of other settings: made again")

    def get(self, key: str) -> dict[str, Any] | None:
        """The fields of the record kept under `key`, or None."""
        return self.results[key]["result"] if key in self.results else None

    def put(self, key: str, record: object) -> None:
        result = asdict(record) if is_dataclass(record) else record
        self.results[key] = {"settings": self.settings, "result": result}
        write_json(self.path, self.results)
