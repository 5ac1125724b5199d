"""A DuckDB database in memory over one or many tapes: the standard views, and nothing else.

It reads the Parquet files in place and never writes one: the only files that it may open are the
tapes' own, a query must be a SELECT, and what DuckDB 2.0 hides inside a SELECT (a COPY in a WITH)
is refused as well. Settings are locked once the views stand.
"""

# ruff: noqa: S608 - SQL is put together from our own names and from quoted paths

import functools
import json
import re
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from tokentape.analysis.hardware import HARDWARE_TABLE, Hardware, hardware_row
from tokentape.analysis.modules import Module, load_order
from tokentape.analysis.slo import UNKNOWN_PRESETS, Slo, slo_table
from tokentape.analysis.views import ON_DEMAND, comment, make, metrics_table, named, quoted
from tokentape.traces.content import content_datasets, content_files
from tokentape.traces.errors import TapeError, UsageError
from tokentape.traces.reader import Tape, open_tape
from tokentape.traces.schema import REQUESTS, TELEMETRY

ROWS, TELEMETRY_ROWS = "_rows_of_tapes", "_telemetry"  # what prelude.schema stands on

_READING_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
_RUNNING_FUNCTIONS = {"query", "json_execute_serialized_sql"}  # run SQL that they get as text
_DATA_ERRORS = (duckdb.IOException, duckdb.InvalidInputException, duckdb.OutOfMemoryException)
_EXPLAIN = re.compile(r"\s*explain\s+(?:analyze\s+)?", re.IGNORECASE)

_TAPES = pa.schema(
    [
        ("run", pa.string()),
        ("path", pa.string()),
        ("tape_id", pa.string()),
        ("role", pa.string()),
        ("created_unix_ns", pa.int64()),
        ("wall_epoch_unix_ns", pa.int64()),
        ("sealed_requests", pa.int64()),
        ("sealed_events", pa.int64()),
        ("unsealed_requests", pa.int64()),
        ("lost_requests", pa.int64()),
        ("sampled_out_requests", pa.int64()),
        ("damaged_segments", pa.int64()),
        ("facts", pa.string()),
    ]
)
_LOSSES = pa.schema([("run", pa.string()), ("reason", pa.string()), ("requests", pa.int64())])


@functools.cache
def _modules() -> tuple[Module, ...]:
    return tuple(load_order())


class Session:
    """The standard views over some tapes, for one thread. A context manager, or close it."""

    def __init__(self, tapes: list[Tape], connection: duckdb.DuckDBPyConnection) -> None:
        self.tapes = tapes
        self.labels = run_labels(tapes)
        self._connection = connection
        self._unmade = [module for module in _modules() if module.name in ON_DEMAND]
        self._commented = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the memory; relations that were given out stop working."""
        self._connection.close()

    def sql(self, query: str) -> duckdb.DuckDBPyRelation:
        """A lazy relation of one SELECT, EXPLAIN, DESCRIBE or SHOW; UsageError when it is wrong."""
        try:
            _refuse_writing(self._connection, query)
            self._make(query)
            return self._connection.sql(query)
        except duckdb.Error as error:
            raise _shown(error, self.tapes) from None

    def _make(self, query: str) -> None:
        """Make the modules that a query names; all, with their comments, if it asks about views."""
        needed, about_all = named(self._unmade, query)
        make(self._connection, needed)
        self._unmade = [m for m in self._unmade if m not in needed]
        if about_all and not self._commented:
            comment(self._connection, list(_modules()))
            self._commented = True

    def give(self, name: str, rows: pa.Table) -> None:
        """Rows of the caller that queries may then name, in place of earlier ones so named."""
        self._connection.register(name, rows)

    def table(self, query: str) -> pa.Table:
        """The whole result of one SELECT; UsageError or TapeError, one line, when it fails."""
        relation = self.sql(query)
        try:
            return relation.to_arrow_table()
        except duckdb.Error as error:
            raise _shown(error, self.tapes) from None

    def rows(self, query: str) -> list[dict[str, Any]]:
        """The same as dicts; a long query is bound once here, where a relation is bound twice."""
        try:
            _refuse_writing(self._connection, query)
            self._make(query)
            found = self._connection.execute(query)
            names = [name for name, *_ in found.description or []]
            return [dict(zip(names, row, strict=True)) for row in found.fetchall()]
        except duckdb.Error as error:
            raise _shown(error, self.tapes) from None


def connect(
    tapes: Sequence[Tape | str | Path],
    *,
    memory_limit: str | None = None,
    threads: int | None = None,
    hardware: Mapping[str, Hardware] = MappingProxyType({}),
    slos: Sequence[Slo] = (),
    content_key: bytes = b"",
) -> Session:
    """Open a session over tapes or their paths; `memory_limit` as in "500MB".

    hardware: facts by run label that replace the tape's own; "" for every run that is not named.
    slos: what the view `goodput` holds the runs against. content_key: of the bodies, where they are
    encrypted; without it there is no view `content` over them.
    """
    opened = [t if isinstance(t, Tape) else open_tape(t) for t in tapes]
    if not opened:
        raise UsageError("no tape given")
    connection = duckdb.connect(":memory:")
    session = Session(opened, connection)
    try:
        connection.execute("SET enable_progress_bar = false")
        connection.execute("SET parquet_metadata_cache = true")  # a sealed segment never changes
        for name, value in (("memory_limit", memory_limit), ("threads", threads)):
            if value is not None:
                connection.execute(f"SET {name} = {quoted(str(value))}")
        _make_tables(connection, opened, session.labels)
        machines = pa.Table.from_pylist(_hardware_rows(session, hardware), schema=HARDWARE_TABLE)
        _make_table(connection, "_hardware", machines)
        _make_table(connection, "_slos", slo_table(slos))
        modules = _modules()
        _make_table(connection, "_metrics", metrics_table(list(modules)))
        make(connection, [module for module in modules if module.name not in ON_DEMAND])
        _refuse_unknown_presets(connection)
        _open_files(connection, opened, session.labels)
        _open_content(connection, opened, session.labels, content_key)
        _lock(connection, opened)
    except duckdb.Error as error:
        connection.close()
        raise _shown(error, opened) from None
    return session


def _hardware_rows(session: Session, told: Mapping[str, Hardware]) -> list[dict[str, Any]]:
    if unknown := told.keys() - {"", *session.labels}:
        raise UsageError(f"no run is named {min(unknown)}; there are {', '.join(session.labels)}")
    pairs = zip(session.tapes, session.labels, strict=True)
    return [hardware_row(tape, run, told) for tape, run in pairs]


def _refuse_unknown_presets(connection: duckdb.DuckDBPyConnection) -> None:
    if unknown := connection.execute(UNKNOWN_PRESETS).fetchone():
        known = [name for (name,) in connection.execute("SELECT slo FROM slos_presets").fetchall()]
        raise UsageError(f"no preset is named {unknown[0]}; there are {', '.join(known)}")


def run_labels(tapes: Sequence[Tape]) -> list[str]:
    """The `run` of each tape: its directory name, with #2, #3 ... where names repeat."""
    labels: list[str] = []
    for tape in tapes:
        name = label = tape.path.resolve().name
        number = 1
        while label in labels:
            number += 1
            label = f"{name}#{number}"
        labels.append(label)
    return labels


def _make_tables(
    connection: duckdb.DuckDBPyConnection, tapes: list[Tape], labels: list[str]
) -> None:
    """The small tables that the modules stand on, and empty ones in place of the Parquet files."""
    _make_table(connection, ROWS, _empty(REQUESTS))
    _make_table(connection, TELEMETRY_ROWS, _empty(TELEMETRY))
    labelled = list(zip(tapes, labels, strict=True))
    losses = [
        {"run": run, "reason": reason, "requests": n}
        for tape, run in labelled
        for reason, n in tape.losses.items()
    ]
    _make_table(connection, "_losses", pa.Table.from_pylist(losses, schema=_LOSSES))
    rows = [_tape_row(tape, run) for tape, run in labelled]
    _make_table(connection, "_facts", pa.Table.from_pylist(rows, schema=_TAPES))
    connection.execute(
        "CREATE TABLE _tapes AS "
        "SELECT * EXCLUDE (facts), false AS sampled, facts::JSON AS facts FROM _facts"
    )


def _open_files(
    connection: duckdb.DuckDBPyConnection, tapes: list[Tape], labels: list[str]
) -> None:
    """Put the files where the empty tables were: the modules are bound before a file is opened."""
    labelled = list(zip(labels, tapes, strict=True))
    segments = [(run, t.path, [s.path for s in t.segments]) for run, t in labelled]
    _replace_by_files(connection, ROWS, REQUESTS, segments)
    samples = [(run, t.path, t.telemetry_files) for run, t in labelled]
    _replace_by_files(connection, TELEMETRY_ROWS, TELEMETRY, samples)
    connection.execute(
        f"UPDATE _tapes SET sampled = run IN (SELECT run FROM {ROWS} WHERE sample_prob < 1)"
    )


def _open_content(
    connection: duckdb.DuckDBPyConnection, tapes: list[Tape], labels: list[str], key: bytes
) -> None:
    """The view `content`, where a tape has bodies that can be read.

    Through Arrow: DuckDB 2.0 fails on encrypted files as soon as a filter leaves rows out.
    """
    scans: list[str] = []
    for run, tape in zip(labels, tapes, strict=True):
        for found in content_datasets(tape.path, key):
            name = f"_content_{len(scans)}"
            connection.register(name, found)
            scans.append(f"SELECT {quoted(run)} AS run, * FROM {name}")
    if scans:
        connection.execute(f"CREATE VIEW content AS {' UNION ALL '.join(scans)}")


def _tape_row(tape: Tape, run: str) -> dict[str, Any]:
    return {
        "run": run,
        "path": str(tape.path),
        "tape_id": tape.facts.get("tape_id"),
        "role": tape.role,
        "created_unix_ns": tape.facts.get("created_unix_ns"),
        "wall_epoch_unix_ns": tape.facts.get("wall_epoch_unix_ns"),
        "sealed_requests": tape.rows,
        "sealed_events": tape.events,
        "unsealed_requests": tape.unsealed_rows + tape.open_rows,
        "lost_requests": sum(tape.losses.values()),
        "sampled_out_requests": tape.sampled_out,
        "damaged_segments": len(tape.damaged),
        "facts": json.dumps(tape.facts),
    }


def _replace_by_files(
    connection: duckdb.DuckDBPyConnection,
    name: str,
    columns: pa.Schema,
    files: list[tuple[str, Path, list[Path]]],
) -> None:
    """Replace an empty table by a view of the same columns over the files of (run, tape, files).

    Files of one schema share a scan, so that planning a query opens one footer and not all. The run
    comes from the path, which is constant in a file: a filter on it leaves out whole tapes. A tape
    that is given twice is scanned twice. A column that a file lacks is NULL, one that the format
    does not know is left out.
    """
    scans: dict[tuple[pa.Schema, int], list[tuple[str, Path, Path]]] = {}
    for i, (run, tape, paths) in enumerate(files):
        again = sum(other == tape for _, other, _ in files[:i])
        for path in paths:
            found = pq.read_schema(path)
            scans.setdefault((found.remove_metadata(), again), []).append((run, tape, path))
    connection.execute(f"ALTER TABLE {name} RENAME TO _no{name}")
    union = " UNION ALL BY NAME ".join([f"SELECT * FROM _no{name}", *map(_scan, scans.values())])
    names = ", ".join(f'"{n}"' for n in ("run", *columns.names))
    query = f"SELECT {names} FROM ({union})"
    if len(scans) == 1 and next(iter(scans))[0].equals(columns):
        query = _scan(*scans.values())  # the usual case, planned twice as fast
    connection.execute(f"CREATE VIEW {name} AS {query}")


def _scan(files: list[tuple[str, Path, Path]]) -> str:
    listed = ", ".join(quoted(str(path)) for _, _, path in files)
    cases = " ".join(
        f"WHEN starts_with(filename, {quoted(f'{tape}/')}) THEN {quoted(run)}"
        for run, tape in dict.fromkeys((run, tape) for run, tape, _ in files)
    )
    scan = f"read_parquet([{listed}], hive_partitioning = false)"
    return f"SELECT CASE {cases} END AS run, * FROM {scan}"


def _empty(columns: pa.Schema) -> pa.Table:
    fields = [pa.field("run", pa.string()), *columns]
    return pa.table([pa.nulls(0, f.type) for f in fields], schema=pa.schema(fields))


def _make_table(connection: duckdb.DuckDBPyConnection, name: str, rows: pa.Table) -> None:
    connection.register("_arrow", rows)
    connection.execute(f"CREATE TABLE {name} AS SELECT * FROM _arrow")
    connection.unregister("_arrow")


def _lock(connection: duckdb.DuckDBPyConnection, tapes: list[Tape]) -> None:
    """Leave nothing open but the tapes' files, and a folder of its own to spill into."""
    files = [str(path) for path in _files(tapes)]
    spill = Path(tempfile.gettempdir()) / f"tokentape-spill-{uuid.uuid4().hex}"
    for name, value in (
        ("temp_directory", quoted(str(spill))),
        ("allowed_paths", f"[{', '.join(map(quoted, files))}]"),
        ("autoinstall_known_extensions", "false"),
        ("autoload_known_extensions", "false"),
        ("python_enable_replacements", "false"),
        ("enable_external_access", "false"),
        ("lock_configuration", "true"),
    ):
        connection.execute(f"SET {name} = {value}")


def _refuse_writing(connection: duckdb.DuckDBPyConnection, query: str) -> None:
    """UsageError for anything but one statement that reads, however deep the rest is hidden."""
    read = _EXPLAIN.sub("", query, count=1)
    statements = connection.extract_statements(read)
    [(text,)] = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [read]).fetchall()
    parsed = json.loads(text)
    if len(statements) != 1 or parsed["error"]:
        raise UsageError(
            "sql: one SELECT, DESCRIBE, SHOW or EXPLAIN, please; nothing else is allowed"
        )
    for node in _nodes(parsed):
        kind = str(node.get("type"))
        if kind.endswith("_NODE") and kind not in _READING_NODES:
            raise UsageError(
                f"sql: only reading is allowed, not {kind.removesuffix('_QUERY_NODE')}"
            )
        if node.get("function_name") in _RUNNING_FUNCTIONS:
            raise UsageError(f"sql: {node['function_name']}() is not allowed")


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for part in tree:
            yield from _nodes(part)


def _files(tapes: list[Tape]) -> Iterator[Path]:
    for tape in tapes:
        yield from (segment.path for segment in tape.segments)
        yield from tape.telemetry_files
        yield from content_files(tape.path)


def _shown(error: duckdb.Error, tapes: list[Tape]) -> TapeError | UsageError:
    """One line of a DuckDB error: the user's query is wrong, or a file is."""
    for path in _files(tapes):
        if not path.exists():
            return TapeError(f"{path}: gone since the tape was opened; open it again")
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, _DATA_ERRORS):
        return TapeError(f"sql: {text}")
    return UsageError(f"sql: {text}")
