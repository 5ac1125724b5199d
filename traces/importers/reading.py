"""Reads trace files: bytes, lines, JSON records; bounded, and exact about where an error lies.

Whatever cannot be read becomes a TapeError that names file, line and value. Nothing here knows a
format, and nothing is guessed: no unit, no number out of a text, no NaN.
"""

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, cast

import msgspec
import pyarrow as pa
import pyarrow.json as pa_json

from tokentape.traces.errors import TapeError
from tokentape.traces.importers.rows import MAX_TOKENS

MAX_LINE_BYTES = (
    32 << 20
)  # a prompt of a million tokens is 5 MB of JSON; beyond it nothing is a row
BLOCK_BYTES = 4 << 20  # of lines that are read at once
MAX_DOCUMENT_BYTES = 256 << 20  # of a trace that is one JSON value, unpacked
MAX_WORD = 64  # characters of a value kept in `extra`
BOM = b"\xef\xbb\xbf"
LAST_NS = 2**63 - 1
LAST_YEAR = 2262  # as far as 64 bits of ns reach
UNREADABLE = "correct or remove the line"
# Keys that hold, or may hold, what somebody wrote: of these only the size is ever kept.
CONTENT = frozenset(
    (
        *("content", "input", "input_text", "inputs", "message", "messages", "output"),
        *("output_text", "payload", "prompt", "prompts", "query", "request", "response", "system"),
        *("text", "text_input", "tools"),
    )
)

_ISO = re.compile(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(?:\.(\d{1,9})\d*)?\s?(Z|[+-]\d\d:?\d\d)?")
_decode = msgspec.json.Decoder().decode


@contextmanager
def open_trace(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a trace file, unpacked where its name ends in .gz; TapeError when damaged."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as packed:
                yield cast("IO[bytes]", packed)
        else:
            with path.open("rb") as plain:
                yield plain
    except (OSError, EOFError, zlib.error) as error:
        raise TapeError(f"{path}: cannot be read ({error}); fetch it again") from error


def line_blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number of its first line, from 1, and some MB of whole lines), no byte-order mark."""
    with open_trace(path) as file:
        number, kept = 1, b""
        while data := file.read(BLOCK_BYTES):
            data = data.removeprefix(BOM) if number == 1 and not kept else data
            cut = data.rfind(b"\n") + 1
            if cut:
                block = kept + data[:cut]
                yield number, block
                number += block.count(b"\n")
                kept = data[cut:]
            else:
                kept += data
            if len(kept) > MAX_LINE_BYTES:
                raise TapeError(
                    f"{path}, line {number}: longer than {MAX_LINE_BYTES >> 20} MiB; "
                    "not a trace of lines, or damaged"
                )
        if kept:
            yield number, kept


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of the lines that are not blank, with any line end."""
    for first, block in line_blocks(path):
        yield from lines_of(first, block)


def lines_of(first: int, block: bytes) -> Iterator[tuple[int, bytes]]:
    """As lines, of one block; on old Macs a carriage return alone ends a line."""
    for number, line in enumerate(block.split(b"\n"), first):
        for part in line.splitlines():
            if part.strip():
                yield number, part


class Record:
    """A JSON object of a trace, with the place it was found at; asks for values by type.

    A key that is absent or null gives None; anything else that does not fit is a TapeError.
    """

    __slots__ = ("data", "path", "what")

    def __init__(self, path: Path, what: str | int, data: dict[str, Any]) -> None:
        self.path = path
        self.what = what
        self.data = data

    def has(self, *names: str) -> bool:
        """True when none of the values is absent or null."""
        return all(self.data.get(name) is not None for name in names)

    def need(self, *names: str) -> None:
        """TapeError when the object lacks one of the keys."""
        if not all(name in self.data for name in names):
            missing_columns(f"{self.path}, {self.place}", names, list(self.data))

    def count(self, name: str, most: int = MAX_TOKENS) -> int | None:
        """A whole number from 0 to `most`."""
        value = self.data.get(name)
        if value is None or (type(value) is int and 0 <= value <= most):
            return value
        raise self.refusal(name, f"not a whole number up to {most}")

    def ns(self, name: str, unit_ns: int) -> int | None:
        """A time or duration as ns, to the last digit written; never negative or without end."""
        value = self.data.get(name)
        if value is None:
            return None
        if type(value) is int and 0 <= value * unit_ns <= LAST_NS:
            return value * unit_ns
        if type(value) is float and math.isfinite(value) and 0 <= value * unit_ns < LAST_NS:
            return exact_ns(value, unit_ns)
        raise self.refusal(name, "not a time")

    def instant_ns(self, name: str) -> int | None:
        """ns since 1970 of an ISO 8601 text, UTC where it names no zone; all nine digits kept."""
        value = self.data.get(name)
        if value is None:
            return None
        match = _ISO.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise self.refusal(name, "not a time with a date")
        try:
            whole = datetime.fromisoformat(f"{match[1]}T{match[2]}{match[4] or '+00:00'}")
        except ValueError:
            raise self.refusal(name, "no such time") from None
        if not 1970 < whole.year < LAST_YEAR:
            raise self.refusal(name, "not a time of this age")
        return int(whole.timestamp()) * 10**9 + int((match[3] or "").ljust(9, "0"))

    def ids(self, name: str) -> list[int] | None:
        """A list of block ids, each up to 64 bits."""
        value = self.data.get(name)
        if value is None:
            return None
        if isinstance(value, list) and all(type(i) is int and 0 <= i < 1 << 64 for i in value):
            return value
        raise self.refusal(name, "not a list of block ids")

    def word(self, name: str) -> str | None:
        """A name or id, cut to 256 characters; numbers are written out."""
        value = self.data.get(name)
        if value is None or value == "":
            return None
        if isinstance(value, str):
            return value[:256]
        if type(value) is int:
            return str(value)
        raise self.refusal(name, "not a name")

    def inner(self, name: str) -> "Record":
        """The object under a key; an empty one where there is none."""
        value = self.data.get(name)
        if value is None:
            return Record(self.path, self.what, {})
        if isinstance(value, dict):
            return Record(self.path, self.what, value)
        raise self.refusal(name, "not an object")

    def items(self, name: str) -> "list[Record]":
        """The objects of the list under a key; none where there is no list."""
        value = self.data.get(name)
        if value is None:
            return []
        if isinstance(value, list) and all(isinstance(one, dict) for one in value):
            return [Record(self.path, f"{self.place}, {name}[{i}]", v) for i, v in enumerate(value)]
        raise self.refusal(name, "not a list of objects")

    def extra(self, *known: str) -> str | None:
        """Other keys as JSON: numbers, flags and single words; of anything else the size."""
        if self.data.keys() <= set(known):
            return None
        kept: dict[str, Any] = {}
        for name, value in self.data.items():
            if name in known:
                continue
            if name.lower() not in CONTENT and _is_word(value):
                kept[name] = value
            else:
                kept[f"{name}_json_bytes"] = len(json.dumps(value, ensure_ascii=False).encode())
        return json.dumps(kept)

    def refusal(self, name: str, why: str) -> TapeError:
        """What is raised for a value that does not fit; shows no more than its beginning."""
        shown = json.dumps(self.data.get(name))[:40]
        return TapeError(f"{self.path}, {self.place}: {name} is {shown}, {why}; {UNREADABLE}")

    @property
    def place(self) -> str:
        """Where in the file, for people."""
        return f"line {self.what}" if isinstance(self.what, int) else self.what


def _is_word(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_WORD and not any(c.isspace() for c in value)
    return value is None or isinstance(value, (bool, int, float))


def exact_ns(value: float, unit_ns: int) -> int:
    """The decimal digits that a float was written with, times the unit, rounded once."""
    return round(Decimal(repr(value)) * unit_ns)


def json_lines(path: Path) -> Iterator[Record]:
    """One object a line; TapeError names the line that is none."""
    for first, block in line_blocks(path):
        yield from records_of(path, first, block)


def records_of(path: Path, first: int, block: bytes) -> Iterator[Record]:
    """As json_lines, of one block."""
    for number, line in lines_of(first, block):
        try:
            value = _decode(line)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise TapeError(
                f"{path}, line {number}: not JSON ({error}; cut off?); "
                "fetch the file again or remove the line"
            ) from None
        if not isinstance(value, dict):
            raise TapeError(f"{path}, line {number}: not a JSON object; {UNREADABLE}")
        yield Record(path, number, value)


def plain_rows(block: bytes, schema: pa.Schema) -> pa.Table | None:
    """The rows of a block in which every line has the schema's keys, no others and no null.

    None for any other block, which is read line by line then: this is only a faster way. Arrow
    takes no float for a whole number, and no NaN.
    """
    try:
        table = pa_json.read_json(
            pa.BufferReader(block),
            pa_json.ReadOptions(block_size=BLOCK_BYTES // 4),
            pa_json.ParseOptions(
                explicit_schema=schema,
                newlines_in_values=False,
                unexpected_field_behavior="error",
            ),
        )
    except (pa.ArrowInvalid, UnicodeDecodeError):
        return None
    if table.schema != schema or any(column.null_count for column in table.columns):
        return None
    return table.combine_chunks()


def json_document(path: Path) -> Record:
    """The object that a whole file is."""
    with open_trace(path) as file:
        content = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        raise TapeError(f"{path}: larger than {MAX_DOCUMENT_BYTES >> 20} MiB; split it")
    try:
        value = _decode(content.removeprefix(BOM))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise TapeError(f"{path}: not JSON ({error}; cut off?); fetch the file again") from None
    if not isinstance(value, dict):
        raise TapeError(f"{path}: not a JSON object; see the format's description")
    return Record(path, "top", value)


def missing_columns(where: object, wanted: tuple[str, ...], found: list[str]) -> None:
    """TapeError that names what a file lacks and what it has instead."""
    lacking = [name for name in wanted if name not in found]
    if lacking:
        names = ", ".join(json.dumps(name[:40]) for name in found[:20]) or "nothing"
        raise TapeError(f"{where}: no column {', '.join(lacking)}; found {names}")
