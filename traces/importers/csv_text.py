"""Reads CSV traces: columns by name, as text, in batches; then text to exact numbers.

Nothing passes through a float. A TapeError names the line and the value that cannot be read.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from tokentape.traces.errors import TapeError
from tokentape.traces.importers.reading import MAX_LINE_BYTES, UNREADABLE, open_trace
from tokentape.traces.importers.rows import MAX_TOKENS, Ints

BLOCK_BYTES = 4 << 20  # of text: about 100,000 rows

_FIELDS = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")
_COUNT = r"^\d{1,10}$"
_SECONDS = r"^\d{1,10}(\.\d{0,9}0*)?$"  # from a trace's zero: up to 300 years


@dataclass(frozen=True)
class Cells:
    """Some rows of a CSV file as text, without blanks around it.

    row: int64[n], number in the file from 0, the header and blank lines not counted.
    """

    path: Path
    row: Ints
    text: dict[str, pa.Array]

    def filled(self, names: Sequence[str]) -> tuple["Cells", int]:
        """The rows that have all the values, and how many have not."""
        present = np.all([np.asarray(pc.not_equal(self.text[name], "")) for name in names], axis=0)
        if present.all():
            return self, 0
        mask = pa.array(present)
        kept = {name: column.filter(mask) for name, column in self.text.items()}
        return Cells(self.path, self.row[present], kept), int(np.count_nonzero(~present))

    def counts(self, name: str, most: int = MAX_TOKENS) -> pa.Array:
        """Whole numbers from 0 to `most`: int64[n]."""
        texts = self.text[name]
        self.refuse(name, pc.match_substring_regex(texts, _COUNT), "not a whole number")
        numbers = texts.cast(pa.int64())
        self.refuse(name, pc.less_equal(numbers, most), "too large")
        return numbers

    def seconds_ns(self, name: str) -> Ints:
        """Seconds with up to nine decimals as ns; an empty value is -1."""
        texts = self.text[name]
        empty = pc.equal(texts, "")
        good = pc.or_(empty, pc.match_substring_regex(texts, _SECONDS))
        self.refuse(name, good, "not a time in seconds")
        filled = pc.if_else(empty, "0", texts)
        scaled = filled.cast(pa.decimal128(38, 9)).cast(pa.decimal128(38, 9))
        low_words = np.frombuffer(scaled.buffers()[1], dtype=np.int64)[0::2]
        ns = low_words[scaled.offset : scaled.offset + len(scaled)]
        return np.where(np.asarray(empty, dtype=bool), -1, ns)

    def refuse(self, name: str, good: pa.Array, why: str) -> None:
        """TapeError for the first value that is not good."""
        bad = np.flatnonzero(~np.asarray(good, dtype=bool))
        if len(bad):
            line = line_of(self.path, int(self.row[bad[0]]))
            value = self.text[name][int(bad[0])].as_py()[:60]
            raise TapeError(f"{self.path}, line {line}: {name} is {value!r}, {why}; {UNREADABLE}")


def header(path: Path) -> list[str]:
    """Names of the columns."""
    with open_trace(path) as file:
        line = file.readline(1 << 16).decode("utf-8-sig", errors="replace")
    try:
        return [name.strip() for name in next(csv.reader([line.rstrip("\r\n")]), [])]
    except csv.Error as error:
        raise TapeError(f"{path}: its first line is no header of a CSV file ({error})") from None


def cells(path: Path, wanted: Sequence[str]) -> Iterator[Cells]:
    """The wanted columns, in file order. Arrow skips blank lines; `line_of` knows that."""
    as_text = dict.fromkeys(wanted, pa.string())
    first_row = 0
    with open_trace(path) as file:
        try:
            for batch in pa_csv.open_csv(
                file,
                pa_csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
                pa_csv.ParseOptions(),
                pa_csv.ConvertOptions(column_types=as_text, include_columns=list(wanted)),
            ):
                row = first_row + np.arange(batch.num_rows, dtype=np.int64)
                first_row += batch.num_rows
                text = {name: pc.utf8_trim_whitespace(batch[name]) for name in wanted}
                yield Cells(path, row, text)
        except (pa.ArrowInvalid, UnicodeDecodeError) as error:
            why = str(error).splitlines()[0][:160]
            fields = _FIELDS.search(why)
            if fields is None:
                raise TapeError(f"{path}: not a CSV file ({why})") from error
            line, expected, found = map(int, fields.groups())
            raise TapeError(
                f"{path}, line {line_of(path, line - 2)}: {found} fields where the header has "
                f"{expected} (cut off?); fetch the file again or remove the line"
            ) from None


def line_of(path: Path, row: int) -> int:
    """Line number of a data row: the header is the first line that is not blank."""
    filled = -1
    number = 0
    with open_trace(path) as file:
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            filled += bool(line.strip())
            if filled == row + 1:
                break
    return number
