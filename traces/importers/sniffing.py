"""Says which known format a file looks like, to help somebody who named another one.

Only a suggestion in an error message: an import never goes by it.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tokentape.traces.errors import TapeError
from tokentape.traces.importers.reading import open_trace
from tokentape.traces.importers.rows import Format

HEAD_BYTES = 64 << 10

_KEY = re.compile(rb'"([A-Za-z_][\w.]{0,60})"\s*:')
_WINDOW = re.compile(rb"\d+,[\d.eE-]+,[\d.eE-]+,(Gamma|Weibull|),[\d.eE-]+,[\d.eE-]+\s*")


def looks_like(path: Path, formats: Mapping[str, Format]) -> str | None:
    """The format whose marks are all in the file's beginning, the most telling first; or None."""
    names = _names(path)
    fits = [n for n, f in formats.items() if f.marks and names.issuperset(f.marks)]
    if fits:
        return max(fits, key=lambda name: len(formats[name].marks))
    return "servegen" if "servegen" in formats and _is_window(path) else None


def _names(path: Path) -> set[str]:
    """Columns or keys in the first 64 KiB."""
    head = _head(path)
    if head.startswith(b"PAR1"):
        try:
            return set(pq.read_schema(path).names)
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            return set()
    if head.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] in (b"{", b"["):
        return {key.decode() for key in _KEY.findall(head)}
    first = head.removeprefix(b"\xef\xbb\xbf").splitlines()[:1]
    columns = first[0].decode(errors="replace").split(",") if first else []
    return {name.strip().strip('"') for name in columns}


def _is_window(path: Path) -> bool:
    first = _head(path).splitlines()[:1]
    return bool(first and _WINDOW.fullmatch(first[0]))


def _head(path: Path) -> bytes:
    if not path.is_file():
        return b""
    try:
        with open_trace(path) as file:
            return file.read(HEAD_BYTES)
    except TapeError:
        return b""
