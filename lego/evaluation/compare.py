"""Two metrics files of one revision side by side, as `dvc metrics diff` shows one file of two revisions.

python -m lego.compare metrics/details/ashem.json metrics/details/dense.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lego.base.artifacts import ArtifactError, read_json
from lego.base.outside import printable


def rows_of(left: dict[str, Any], right: dict[str, Any]) -> list[tuple[str, Any, Any, float | None, float | None]]:
    """Key, both values, right less left, and that as a share of the left one; of numbers only, else None."""
    rows = []
    for key in [*left, *(key for key in right if key not in left)]:
        a, b = left.get(key), right.get(key)
        both = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (a, b))
        change = b - a if both else None  # type: ignore[operator]
        rows.append((key, a, b, change, change / abs(a) if change is not None and a else None))
    return rows


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:.4e}" if abs(value) >= 1e7 else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def comparison(left: Path, right: Path) -> list[str]:
    """The lines that are printed.

    Raises:
        ArtifactError: a file is missing, or is no flat table of numbers.
    """
    tables = []
    for file in (left, right):
        table = read_json(file)
        if any(isinstance(value, dict | list) for value in table.values()):
            raise ArtifactError(f"{file}: is not flat; compare two metrics files of models, such as those in metrics/")
        tables.append(table)
    names = [left.stem, right.stem] if left.stem != right.stem else [str(left), str(right)]
    lines = [("metric", *names, "change", "change %")]
    for key, a, b, change, part in rows_of(*tables):
        percent = "-" if part is None else f"{100 * part:+.2f}"
        lines.append((key, _shown(a), _shown(b), "-" if change is None else f"{change:+.4g}", percent))
    widths = [max(len(line[n]) for line in lines) for n in range(5)]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("left", type=Path)
    parser.add_argument("right", type=Path)
    parser.add_argument("--json", action="store_true", help="the rows as JSON")
    asked = parser.parse_args(arguments)
    try:
        lines = comparison(asked.left, asked.right)
        if asked.json:
            keys = ("metric", "left", "right", "change", "change_share")
            rows = rows_of(read_json(asked.left), read_json(asked.right))
            lines = [json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=2)]
    except ArtifactError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0
