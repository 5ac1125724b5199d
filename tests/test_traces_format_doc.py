"""FORMAT.md is enough: its example writes a tape with pyarrow alone, which every command reads."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from test_docs import EXAMPLES, serving
from tokentape import cli
from tokentape.traces import format_doc, schema
from tokentape.traces.check import check
from tokentape.traces.reader import open_tape
from tokentape.traces.schema import REQUESTS
from tokentape.traces.summary import summarize
from tokentape.traces.words import FORMAT_VERSION

ROOT = Path(__file__).parents[1]
OLD = Path(__file__).parent / "data" / "tapes"


def written_by_a_stranger(folder: Path) -> Path:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "FORMAT.md").read_text(), re.DOTALL)
    alone = "import sys; sys.modules['tokentape'] = None\n"  # an import of it would raise
    subprocess.run([sys.executable, "-c", alone + example], cwd=folder, check=True)
    return folder / "mine.tape"


def test_a_stranger_s_tape_is_sound_and_says_what_it_holds(tmp_path: Path) -> None:
    tape = open_tape(written_by_a_stranger(tmp_path))
    assert check(tape) == []
    held = summarize(tape)
    assert (held.requests, held.events, held.sessions.sessions) == (2, 3, 1)
    assert (tape.rows, tape.unsealed_rows) == (2, 0)


def ran(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *line: str | Path
) -> str:
    monkeypatch.setattr(sys, "argv", ["tokentape", *map(str, line)])
    with pytest.raises(SystemExit) as left:
        cli.run()
    out, error = capfd.readouterr()
    assert left.value.code == 0, error
    return out


@pytest.mark.timeout(60)
def test_a_stranger_s_tape_is_replayed_reported_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tape = written_by_a_stranger(tmp_path)
    engine_line = EXAMPLES["engine"].replace(" --listen 127.0.0.1:8000", "")
    with serving(engine_line, tmp_path) as engine:
        ran(monkeypatch, capfd, "replay", tape, "--to", engine, "--tape", tmp_path / "run.tape")
    rows = open_tape(tmp_path / "run.tape").read(["output_tokens", "outcome"]).to_pylist()
    assert [(row["outcome"], row["output_tokens"]) for row in rows] == [("ok", 3), ("ok", 5)]
    assert "2" in ran(monkeypatch, capfd, "sql", tape, "select count(*) from requests")
    ran(monkeypatch, capfd, "report", tape, tmp_path / "run.tape")
    out = tmp_path / "mine.jsonl"
    ran(monkeypatch, capfd, "export", tape, "--format", "mooncake", "--out", out)
    assert [json.loads(line)["input_length"] for line in out.read_text().splitlines()] == [50, 70]


@pytest.mark.parametrize("tape", sorted(OLD.glob("*.tape")), ids=lambda path: path.name)
def test_a_tape_of_each_version_stays_readable(tape: Path, tmp_path: Path) -> None:
    """Never make these anew: they are what an older tokentape wrote."""
    expected = json.loads((OLD / "expected.json").read_text())[tape.name]
    opened = open_tape(tape)
    assert opened.facts["format_version"] == expected["format_version"]
    table = opened.read()
    assert table.column_names == REQUESTS.names
    assert {n: table[n].to_pylist() for n in expected["columns"]} == expected["columns"]
    assert check(opened) == []
    files = sorted(p for p in tape.rglob("*") if p.is_file())
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()
    assert digest == expected["sha256"]
    copy = shutil.copytree(tape, tmp_path / tape.name)
    assert summarize(open_tape(copy)).requests == table.num_rows


def test_the_present_version_has_its_tape() -> None:
    assert (OLD / f"format-{FORMAT_VERSION}.tape").is_dir()


def test_the_page_on_privacy_lists_the_columns_of_each_mode_as_the_schema_does() -> None:
    page = (ROOT / "docs" / "privacy.md").read_text()
    assert format_doc.modes_markdown() in page
    listed = format_doc.modes_markdown()
    assert all(f"`{column.name}`" in listed for column in schema.COLUMNS)
