"""All runs on one page: `python -m common.index runs` writes runs/index.html.

Every run that ends writes it too. It is for what came from elsewhere, or was stopped.
"""

from __future__ import annotations

from pathlib import Path

from common.cli import OneLineParser, exit_codes
from common.engine.overview import write_index


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m common.index", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs"), help="default: runs")
    options = parser.parse_args(argv)
    with exit_codes():
        print(f"index      {write_index(options.runs)}")


if __name__ == "__main__":
    main()
