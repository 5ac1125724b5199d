"""The standard views as one SQL file, for a plain DuckDB shell: `.read FILE`, with no tokentape.

The file names the tapes' Parquet files where they lie and holds the few small tables itself. What a
session refuses (writing, other files) a shell allows: the views are the same, the safety is not.
"""

# ruff: noqa: S608 - SQL is put together from our own names and from quoted values

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokentape.analysis.modules import load_order
from tokentape.analysis.session import Session, connect
from tokentape.traces.errors import TapeError
from tokentape.traces.reader import Tape

_TABLES = ("_losses", "_facts", "_tapes", "_hardware", "_slos", "_metrics")
_FILES = ("_rows_of_tapes", "_telemetry")
_HEAD = """-- Views of tokentape over {tapes}, for DuckDB 2.0.
-- In a shell: .read FILE        In Python: duckdb.connect().execute(open(FILE).read())
-- Start with: FROM metrics_long; FROM metrics; FROM requests LIMIT 10; FROM duckdb_views();
"""


def write_views(tapes: Sequence[Tape], out: Path, *, force: bool = False) -> int:
    """Write the file; how many views and macros it makes. TapeError where it exists already."""
    with connect(tapes) as session:
        text = "\n".join(_statements(session)) + "\n"
    try:
        with out.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise TapeError(f"{out}: exists; --force replaces it, or choose another --out") from None
    return sum(len(module.objects) for module in load_order())


def _statements(session: Session) -> Iterator[str]:
    yield _HEAD.format(tapes=", ".join(session.labels))
    for name in (*_TABLES, *(f"_no{files}" for files in _FILES)):
        yield from _table(session, name)
    for name in _FILES:
        query = f"SELECT sql FROM duckdb_views() WHERE view_name = '{name}'"
        [(sql,)] = session.sql(query).fetchall()
        yield f"{sql}\n"
    for module in load_order():
        yield f"-- {module.name}: {module.text}\n"
        yield from (f"{made.sql}\n" for made in module.objects)


def _table(session: Session, name: str) -> Iterator[str]:
    described = session.sql(f"DESCRIBE {name}").fetchall()
    columns = ", ".join(f'"{column}" {kind}' for column, kind, *_ in described)
    yield f"CREATE TABLE {name} ({columns});"
    for row in session.sql(f"FROM {name}").fetchall():
        yield f"INSERT INTO {name} VALUES ({', '.join(map(_literal, row))});"
    yield ""


def _literal(value: object) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bool | int | float):
        return repr(value)
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return "'" + text.replace("'", "''") + "'"
