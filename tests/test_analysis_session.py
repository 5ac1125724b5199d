"""The session: what it opens, what it refuses, what it says when something is wrong."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tokentape.analysis.session as session_module
from rows import make_tape, streamed_row
from tokentape.analysis.modules import ModuleError, read_module
from tokentape.analysis.session import Session, connect
from tokentape.traces.errors import TapeError, UsageError
from tokentape.traces.reader import open_tape
from tokentape.traces.writer import TapeWriter


@pytest.fixture(scope="module")
def tape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tape(tmp_path_factory.mktemp("s") / "a.tape", [streamed_row(i) for i in range(5)])


@pytest.fixture(scope="module")
def session(tape: Path) -> Iterator[Session]:
    with connect([tape]) as opened:
        yield opened


def digest(folder: Path) -> str:
    """Of all names, bytes and times in a folder."""
    seen = hashlib.sha256()
    for path in sorted(folder.glob("**/*")):
        seen.update(f"{path} {path.stat().st_mtime_ns}".encode())
        seen.update(path.read_bytes() if path.is_file() else b"")
    return seen.hexdigest()


def test_a_session_leaves_a_tape_as_it_was(tape: Path) -> None:
    before = digest(tape)
    with connect([tape]) as session:
        assert session.table("FROM metrics_long").num_rows > 0
    assert digest(tape) == before


def test_tapes_and_paths_may_be_mixed_and_equal_names_get_numbers(
    tape: Path, tmp_path: Path
) -> None:
    other = make_tape(tmp_path / "a.tape", [streamed_row(0)])
    with connect([open_tape(tape), other, str(other)]) as session:
        assert session.labels == ["a.tape", "a.tape#2", "a.tape#3"]
        query = "SELECT run, count(*) FROM requests GROUP BY run ORDER BY run"
        assert session.sql(query).fetchall() == [("a.tape", 5), ("a.tape#2", 1), ("a.tape#3", 1)]


def test_paths_with_quotes_and_glob_characters_are_only_paths(tmp_path: Path) -> None:
    odd = make_tape(tmp_path / "it's [1] * ?.tape", [streamed_row(0)])
    make_tape(tmp_path / "it's 1 * ?.tape", [streamed_row(0), streamed_row(1)])
    with connect([odd]) as session:
        assert session.sql("SELECT run, count(*) FROM requests GROUP BY ALL").fetchall() == [
            (odd.name, 1)
        ]


def test_segments_of_an_older_and_a_newer_format_are_read_together(
    tape: Path, tmp_path: Path
) -> None:
    mixed = tmp_path / "mixed.tape"
    shutil.copytree(tape, mixed)
    [segment] = mixed.glob("requests/**/*.parquet")
    table = pq.read_table(segment)
    newer = table.append_column("invented_later", pa.nulls(table.num_rows, pa.int64()))
    pq.write_table(newer, segment.with_name("newer.parquet"))
    pq.write_table(table.drop_columns(["backpressure_ns"]), segment.with_name("older.parquet"))
    with connect([mixed]) as session:
        query = "SELECT count(*), count(end_ns), count(backpressure_ns) FROM requests"
        assert session.sql(query).fetchall() == [(15, 15, 0)]
        assert "invented_later" not in session.sql("FROM requests").columns


def test_telemetry_is_a_view_also_where_there_is_none(tmp_path: Path) -> None:
    writer = TapeWriter.create(tmp_path / "t", role="replay", command=[], options={}, facts={})
    writer.append_telemetry((5, 6, "http://x/metrics", "running", "{}", 3.0))
    writer.close()
    bare = make_tape(tmp_path / "bare", [])
    with connect([bare, tmp_path / "t"]) as session:
        found = session.sql("SELECT run, ts_ns, name, value FROM telemetry").fetchall()
        assert found == [("t", 5, "running", 3.0)]


@pytest.mark.parametrize(
    "query",
    [
        "COPY (SELECT 1) TO '{file}'",
        "WITH x AS (COPY (SELECT 1) TO '{segment}' (FORMAT parquet, USE_TMP_FILE false)) FROM x",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{segment}' (FORMAT parquet, USE_TMP_FILE false)",
        "SELECT * FROM query('WITH x AS (COPY (SELECT 1) TO ''{segment}'') FROM x')",
        "WITH x AS (INSERT INTO _losses VALUES ('a', 'b', 1) RETURNING *) FROM x",
        "CREATE TABLE t AS SELECT 1",
        "ATTACH '{file}'",
        "SET memory_limit = '1GB'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "EXPORT DATABASE '{file}'",
        "SELECT 1; SELECT 2",
        "",
    ],
)
def test_only_one_statement_that_reads_is_allowed(
    session: Session, tape: Path, tmp_path: Path, query: str
) -> None:
    [segment] = tape.glob("requests/**/*.parquet")
    file, before = tmp_path / "out", digest(tape)
    with pytest.raises(UsageError, match=r"^sql: "):
        session.table(query.format(file=file, segment=segment))
    assert digest(tape) == before and not file.exists()


@pytest.mark.parametrize(
    "query",
    ["FROM read_csv('/etc/passwd')", "FROM '/etc/x.csv'", "FROM read_text('/proc/version')"],
)
def test_no_file_but_the_tapes_can_be_read(session: Session, query: str) -> None:
    with pytest.raises(UsageError, match=r"^sql: Permission Error: Cannot access file"):
        session.table(query)


def test_python_variables_are_not_tables(session: Session) -> None:
    mine = pa.table({"a": [1]})
    with pytest.raises(UsageError, match="mine does not exist"):
        session.table("FROM mine")
    assert mine.num_rows == 1


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1",
        "FROM requests",
        "DESCRIBE requests",
        "SHOW TABLES",
        "EXPLAIN FROM requests",
        "explain analyze SELECT count(*) FROM events",
        "WITH a AS (SELECT 1) SELECT * FROM a UNION ALL VALUES (2)",
        "WITH RECURSIVE a AS (SELECT 1 AS x UNION ALL SELECT x + 1 FROM a WHERE x < 3) FROM a",
        "SUMMARIZE losses",
    ],
)
def test_everything_that_only_reads_is_allowed(session: Session, query: str) -> None:
    assert session.table(query).num_columns > 0


@pytest.mark.parametrize(
    ("query", "what"),
    [
        ("SELEC 1", 'syntax error at or near "SELEC"'),
        ("SELECT nothing FROM requests", '"nothing" not found'),
        ("FROM nowhere", "nowhere does not exist"),
        ("SELECT CAST(outcome AS INTEGER) FROM requests", "Could not convert"),
    ],
)
def test_a_wrong_query_is_one_line(session: Session, query: str, what: str) -> None:
    with pytest.raises(UsageError) as error:
        session.table(query)
    assert what in str(error.value) and "\n" not in str(error.value)


def test_two_relations_can_be_read_in_turns(session: Session) -> None:
    first, second = session.sql("FROM requests"), session.sql("FROM events")
    assert first.fetchall() and second.fetchall() and first.limit(1).fetchall()


def test_closing_a_session_ends_its_relations(tape: Path) -> None:
    with connect([tape]) as session:
        relation = session.sql("FROM requests")
        assert len(relation.fetchall()) == 5
    with pytest.raises(duckdb.ConnectionException):
        relation.fetchall()


def test_a_segment_that_vanishes_is_a_tape_error(tape: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone.tape"
    shutil.copytree(tape, gone)
    with connect([gone]) as session:
        for segment in gone.glob("requests/**/*.parquet"):
            segment.unlink()
        with pytest.raises(TapeError, match="parquet: gone since the tape was opened"):
            session.table("SELECT sum(end_ns) FROM requests")


def test_no_tape_and_a_wrong_limit_are_usage_errors(tape: Path) -> None:
    with pytest.raises(UsageError, match="no tape given"):
        connect([])
    with pytest.raises(UsageError):
        connect([tape], memory_limit="a lot")


def test_a_small_memory_limit_gives_the_same_answer(tape: Path, session: Session) -> None:
    query = "FROM metrics_long ORDER BY metric, stat"
    with connect([tape], memory_limit="200MB", threads=1) as small:
        assert small.table(query) == session.table(query)


def test_sql_that_does_not_bind_is_named_with_file_and_line(
    tape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a" / "b.sql"
    path.parent.mkdir()
    path.write_text(
        "-- module: a.b\n-- requires:\n\n-- A view.\nCREATE VIEW b AS\nSELECT nothing;\n"
    )
    monkeypatch.setattr(session_module, "_modules", lambda: (read_module(path),))
    with pytest.raises(ModuleError) as error:
        connect([tape])
    assert str(error.value).startswith(f"{path}:5: ") and "nothing" in str(error.value)
