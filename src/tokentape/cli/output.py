"""Results on stdout: tables for people, JSON and CSV for programs.

Numbers are printed as they are, never rounded here; NULL is an empty cell in a table or in CSV and
null in JSON. Nothing but results goes to stdout.
"""

import csv
import datetime as dt
import json
import math
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

NUMBER = int | float | Decimal


def print_json(value: object) -> None:
    """One JSON document, indented for people."""
    write_json(value, sys.stdout)
    sys.stdout.write("\n")


def write_json(value: object, out: IO[str]) -> None:
    """As print_json, anywhere; what is no number in JSON (NaN, infinity) is null."""
    json.dump(_finite(value), out, indent=2, default=plain, ensure_ascii=False, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def print_lines(lines: Iterable[str]) -> None:
    """Lines of text."""
    sys.stdout.writelines(f"{line}\n" for line in lines)


def table_lines(names: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """Columns under their names, numbers to the right; a control character is shown, not sent."""
    cells = [[_printable(_cell(value)) for value in row] for row in rows]
    kinds = [[isinstance(value, NUMBER) for value in row] for row in rows]
    widths = [max([len(n), *(len(row[i]) for row in cells)]) for i, n in enumerate(names)]
    right = [bool(kinds) and any(row[i] for row in kinds) for i in range(len(names))]
    for row in [list(names), *cells]:
        parts = [
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)
        ]
        yield "  ".join(parts).rstrip()


def write_csv(names: Sequence[str], rows: Iterable[Sequence[object]], out: IO[str]) -> None:
    """RFC 4180 with Unix line ends; lists and structs are JSON in their cell."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(value) for value in row] for row in rows)


def plain(value: object) -> Any:
    """What JSON has no type for, as text; sizes and ids stay exact."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Decimal):  # sums of integers, and what SQL writes with a point
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, uuid.UUID | Path):
        return str(value)
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list | dict):
        return json.dumps(value, default=plain, ensure_ascii=False)
    return str(value if isinstance(value, str | NUMBER) else plain(value))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
