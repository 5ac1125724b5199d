"""The exported views work in DuckDB alone and give what a session gives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rows import make_tape
from test_analysis_oracle import random_rows
from tokentape.analysis.session import connect
from tokentape.analysis.shell import write_views
from tokentape.traces.errors import TapeError
from tokentape.traces.reader import open_tape

# In a process of its own, where tokentape cannot be imported: as a plain shell would be.
ALONE = """
import json, sys
sys.modules["tokentape"] = None
import duckdb
connection = duckdb.connect()
connection.execute(open(sys.argv[1]).read())
print(json.dumps([connection.execute(query).fetchall() for query in sys.argv[2:]]))
"""
QUERIES = (
    "SELECT metric, stat, value, n FROM metrics_long WHERE stat <> 'mean' ORDER BY ALL",
    "SELECT count(*), sum(ntok)::BIGINT FROM events",
    "SELECT run, role, facts ->> '$.role' FROM tapes",
    "SELECT count(*) FROM rates_in(NULL, NULL)",
)


def test_a_plain_duckdb_answers_as_a_session_does(tmp_path: Path) -> None:
    tape = make_tape(tmp_path / "it's.tape", random_rows(1), losses={"w": {"disk full": 2}})
    file = tmp_path / "views.sql"
    assert write_views([open_tape(tape)], file) > 60
    alone = subprocess.run(
        [sys.executable, "-c", ALONE, str(file), *QUERIES],
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    with connect([tape]) as session:
        expected = [session.sql(query).fetchall() for query in QUERIES]
    assert json.loads(alone.stdout) == json.loads(json.dumps(expected))
    assert expected[0] and expected[1][0][0]


def test_a_file_that_exists_is_not_replaced_unless_forced(tmp_path: Path) -> None:
    tape = open_tape(make_tape(tmp_path / "t", []))
    file = tmp_path / "views.sql"
    file.write_text("mine")
    with pytest.raises(TapeError, match="exists; --force"):
        write_views([tape], file)
    assert file.read_text() == "mine"
    write_views([tape], file, force=True)
    assert file.read_text().startswith("-- Views of tokentape over t")
