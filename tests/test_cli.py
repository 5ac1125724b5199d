"""The installed script as a user meets it: results, one clear line per mistake, exit codes."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rows import make_tape, streamed_row
from tokentape import cli
from tokentape.cli import grammar

SCRIPT = Path(sys.executable).parent / "tokentape"
HEAVY = {"aiohttp", "asyncio", "duckdb", "mitmproxy", "numpy", "pyarrow", "rich"}
VERB_NAMES = [name for name, _, _ in grammar.VERBS]


def tokentape(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the installed script."""
    return subprocess.run(
        [SCRIPT, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@dataclass(frozen=True)
class Ran:
    """How a command line ended."""

    returncode: object
    stdout: str
    stderr: str


Here = Callable[..., Ran]


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Here:
    """Runs a command line in this process, in the folder: imports are paid for once."""
    monkeypatch.chdir(folder)

    def ran(*arguments: str | Path) -> Ran:
        monkeypatch.setattr(sys, "argv", ["tokentape", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.run()
        return Ran(left.value.code, *capfd.readouterr())

    return ran


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good tape and many that are not."""
    folder = tmp_path_factory.mktemp("cli")
    make_tape(folder / "good.tape", [streamed_row(n) for n in range(5)])
    make_tape(folder / "wrong.tape", [streamed_row(n, output_tokens=99) for n in range(3)])
    make_tape(folder / "damaged.tape", [streamed_row(n) for n in range(3)])
    (segment,) = (folder / "damaged.tape" / "requests").glob("**/*.parquet")
    segment.write_bytes(segment.read_bytes()[:-100])
    make_tape(folder / "newer.tape", [streamed_row()])
    facts = folder / "newer.tape" / "tape.json"
    facts.write_text(facts.read_text().replace('"format_version": "1', '"format_version": "9'))
    (folder / "no.tape").mkdir()
    (folder / "empty.csv").touch()
    (folder / "cut.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:1")
    (folder / "bad.toml").write_text("steps_ms = 3\n")
    (folder / "taken.csv").write_text("x\n")
    return folder


@pytest.fixture(scope="module")
def ports() -> Iterator[dict[str, int]]:
    """A port that somebody listens on, and one that nobody does."""
    with socket.socket() as listening, socket.socket() as bound:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        bound.bind(("127.0.0.1", 0))  # held, but refuses
        yield {"TAKEN": listening.getsockname()[1], "DEAD": bound.getsockname()[1]}


CAPTURE = "capture --upstream http://127.0.0.1:9"
REPLAY = "replay good.tape --to http://127.0.0.1:9"
MISTAKES = [
    ("nope", 2, "No such command 'nope'"),
    ("info --wrong good.tape", 2, "No such option: --wrong"),
    ("info", 2, "Missing argument 'TAPE...'"),
    ("capture --tape x.tape", 2, "Missing option '--upstream'"),
    (
        f"{CAPTURE} --tape x.tape --content all",
        2,
        "'all' is not one of 'none', 'structure', 'full'",
    ),
    (f"{CAPTURE} --tape x.tape --content-key-file k", 2, "give --content full as well"),
    (f"{CAPTURE} --tape x.tape --listen 80", 2, "--listen 80: need HOST:PORT"),
    (f"{CAPTURE} --tape x.tape --listen 127.0.0.1:TAKEN", 2, "in use"),
    (f"{CAPTURE} --tape x.tape --fact gpu", 2, "--fact: an argument is not NAME=VALUE"),
    (f"{CAPTURE} --tape no.tape/../empty.csv --listen 127.0.0.1:0", 1, "empty.csv"),
    ("capture --upstream ftp://host --tape x.tape", 2, "--upstream ftp://host"),
    ("capture --upstream http:// --tape x.tape", 2, "no host"),
    ("capture --upstream http://u:p@host --tape x.tape", 2, "--upstream"),
    (f"{REPLAY} --tape x.tape --speed 2", 2, "--speed 2: need a factor"),
    (f"{REPLAY} --tape x.tape --speed 0x", 2, "--speed 0x: need a factor"),
    (f"{REPLAY} --tape x.tape --window 5m", 2, "--window 5m: need a window"),
    (f"{REPLAY} --tape x.tape --timeout 5", 2, "--timeout 5: need a duration"),
    (f"{REPLAY} --tape x.tape --workers 0", 2, "--workers"),
    (f"{REPLAY} --tape x.tape --shard 4/4", 2, "--shard 4/4: need I/N"),
    (f"{REPLAY} --tape x.tape --shard 0/4", 2, "give --start-at T too"),
    (f"{REPLAY} --tape x.tape --start-at 09:30", 2, "--start-at 09:30: need an instant"),
    (f"{REPLAY} --tape x.tape --start-at 1000000000", 2, "s ago by this host's clock"),
    (f"{REPLAY} --tape x.tape --thin 0%", 2, "--thin 0%: nothing would be left"),
    (f"{REPLAY} --tape x.tape --multiply 0", 2, "--multiply 0: need a number above zero"),
    (f"{REPLAY} --tape x.tape --multiply 99999999", 2, "would make 499,999,995 requests"),
    (f"{REPLAY} --tape x.tape --loop 5", 2, "--loop 5: need how long or how often"),
    (f"{REPLAY} --tape x.tape --spread", 2, "does not say how coarse its arrivals are"),
    (f"{REPLAY} --tape x.tape --replica 65/64", 2, "--replica 65/64: need I/N"),
    (f"{REPLAY} --tape x.tape --replica 1/64", 2, "--replica, --routing: give both"),
    (f"{REPLAY} --tape x.tape --replica 0/2 --routing prefix", 2, "knows no prefix blocks"),
    (f"{REPLAY} --tape x.tape --max-requests 0", 2, "--max-requests"),
    (f"{REPLAY} --tape x.tape --max-tokens many", 2, "--max-tokens"),
    (f"{REPLAY} --tape x.tape --key-env NO_SUCH_VARIABLE", 2, "NO_SUCH_VARIABLE"),
    (f"{REPLAY} --tape x.tape --header secret-value", 2, "--header: an argument is not NAME=VALUE"),
    (REPLAY, 2, "--tape: name the folder"),
    ("replay good.tape --to ftp://host --tape x.tape", 2, "unknown URL scheme ftp"),
    ("replay good.tape --to http://127.0.0.1:DEAD --tape x.tape", 1, "127.0.0.1:DEAD"),
    ("replay nothing.tape --to http://127.0.0.1:9 --tape x.tape", 1, "nothing.tape: no such tape"),
    ("engine --listen nowhere", 2, "--listen nowhere: need HOST:PORT"),
    ("engine --listen 127.0.0.1:TAKEN", 2, "the port is in use"),
    ("engine --profile nothing.toml", 2, "nothing.toml"),
    ("engine --profile bad.toml", 2, "did you mean step_ms"),
    ("import azur cut.csv --tape x.tape", 2, "cut.csv looks like azure; known are agentic"),
    ("import mooncake cut.csv --tape x.tape", 1, "the file looks like azure"),
    ("import azure cut.csv --tape x.tape --seed 1", 2, "nothing is drawn from it"),
    ("import azure nothing.csv --tape x.tape", 1, "nothing.csv"),
    ("import azure empty.csv --tape x.tape", 1, "empty.csv"),
    ("import azure cut.csv --tape x.tape", 1, "cut.csv"),
    ("info nothing.tape", 1, "nothing.tape: no such tape"),
    ("info nothing-*", 1, "nothing-*"),
    ("info no.tape", 1, "no.tape: not a tape (it has no tape.json)"),
    ("info empty.csv", 1, "empty.csv: not a tape"),
    ("info newer.tape", 1, "is newer than this tokentape"),
    ("report no.tape", 1, "no.tape: not a tape"),
    ("report damaged.tape", 1, "damaged segment"),
    ("recover no.tape", 1, "no.tape: not a tape"),
    ("sql good.tape", 2, "give at least one tape, then the query"),
    ("sql good.tape nonsense", 2, "nonsense"),
    ("sql good.tape FROM-nowhere", 2, "sql:"),
    ("sql good.tape from|requests --format xml", 2, "--format"),
    ("sql good.tape from|requests --out taken.csv", 1, "taken.csv: exists; --force replaces it"),
    ("sql good.tape from|requests --out nowhere/x.csv", 1, "nowhere/x.csv: No such file"),
]


@pytest.mark.parametrize(("line", "code", "said"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_told_in_one_line(
    folder: Path, here: Here, ports: dict[str, int], line: str, code: int, said: str
) -> None:
    for name, port in ports.items():
        line, said = line.replace(name, str(port)), said.replace(name, str(port))
    before = sorted(folder.rglob("*"))
    ran = here(*(word.replace("|", " ") for word in line.split()))
    assert ran.stderr.count("\n") == 1, ran.stderr
    assert ran.stderr.startswith("tokentape: ")
    assert said in ran.stderr
    assert (ran.returncode, ran.stdout) == (code, "")
    assert sorted(folder.rglob("*")) == before  # nothing half made is left


@pytest.mark.parametrize(("line", "code", "said"), MISTAKES[::7], ids=[m[0] for m in MISTAKES[::7]])
def test_the_installed_script_tells_it_the_same(
    folder: Path, ports: dict[str, int], line: str, code: int, said: str
) -> None:
    for name, port in ports.items():
        line, said = line.replace(name, str(port)), said.replace(name, str(port))
    result = tokentape(*(word.replace("|", " ") for word in line.split()), cwd=folder)
    assert (result.returncode, result.stdout) == (code, "")
    assert re.fullmatch(f"tokentape: .*{re.escape(said)}.*\n", result.stderr)


def test_a_header_value_is_never_shown(here: Here) -> None:
    line = ["replay", "good.tape", "--to", "http://127.0.0.1:9", "--header", "secret-value"]
    assert "secret-value" not in here(*line).stderr


@pytest.mark.parametrize("verb", VERB_NAMES)
def test_help_of_a_verb_ends_its_text_with_an_example(here: Here, verb: str) -> None:
    result = here(verb, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(rf"^  Example: tokentape {verb}\b", result.stdout, re.MULTILINE)


def test_no_arguments_print_the_help(here: Here) -> None:
    assert here() == here("--help")
    assert here().returncode == 0


def test_help_imports_no_room_and_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "from tokentape.__main__ import main\n"
        "try: main()\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(result.stderr.split())
    assert loaded & HEAVY == set()
    rooms = {"tokentape.traces", "tokentape.traces.errors"}
    assert {m for m in loaded if m.startswith("tokentape.")} - rooms == {
        m for m in loaded if m.startswith(("tokentape.cli", "tokentape.__main__"))
    }


def test_info_as_json_holds_the_counts(here: Here) -> None:
    (told,) = json.loads(here("info", "good.tape", "--json").stdout)
    assert (told["requests"], told["events"], told["role"]) == (5, 15, "capture")
    assert "requests" in here("info", "good.tape").stdout


def test_info_names_a_damaged_segment(here: Here) -> None:
    (told,) = json.loads(here("info", "damaged.tape", "--json").stdout)
    assert [Path(p).suffix for p in told["damaged"]] == [".parquet"]


def test_a_glob_names_several_tapes(here: Here) -> None:
    told = json.loads(here("info", "[gw]*.tape", "--json").stdout)
    assert [t["tape"] for t in told] == ["good.tape", "wrong.tape"]


def test_a_timeout_of_nothing_is_refused(here: Here) -> None:
    command = ("replay", "good.tape", "--to", "http://h", "--tape", "x.tape", "--timeout", "0s")
    done = here(*command)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "--timeout 0s: need a duration above zero" in done.stderr


def test_json_holds_numbers_as_numbers_and_never_nan(here: Here) -> None:
    query = "select sum(output_tokens) a, 'nan'::double b, 0.5 c from requests"
    done = here("sql", "good.tape", query, "--format", "json")
    (row,) = json.loads(done.stdout, parse_constant=pytest.fail)
    assert isinstance(row["a"], int)
    assert (row["b"], row["c"]) == (None, 0.5)


def test_check_exits_1_on_errors_and_0_without(here: Here) -> None:
    good = here("check", "good.tape")
    assert (good.returncode, good.stdout) == (0, "0 errors, 0 warnings\n")
    wrong = here("check", "wrong.tape", "good.tape")
    assert wrong.returncode == 1
    assert "1 errors, 0 warnings" in wrong.stdout
    damaged = here("check", "damaged.tape", "--json")
    assert damaged.returncode == 1
    assert "damaged segment" in json.loads(damaged.stdout)[0]["what"]


def test_report_reads_the_rest_of_a_damaged_tape(here: Here) -> None:
    result = here("report", "damaged.tape", "good.tape", "--skip-damaged")
    assert (result.returncode, result.stderr) == (0, "")
    assert "1 damaged segments were skipped" in result.stdout
    told = json.loads(here("report", "good.tape", "--json").stdout)
    assert told["tapes"][0]["sealed_requests"] == 5


QUERY = (
    "select arrival_ns, [1, 2] as pair, outcome, NULL as nothing from requests order by 1 limit 2"
)


def test_sql_prints_the_same_rows_in_every_format(here: Here) -> None:
    rows = [
        {"arrival_ns": 0, "pair": [1, 2], "outcome": "ok", "nothing": None},
        {"arrival_ns": 1_000_000, "pair": [1, 2], "outcome": "ok", "nothing": None},
    ]
    sql = ("sql", "good.tape", QUERY)
    assert json.loads(here(*sql, "--json").stdout) == rows
    assert here(*sql, "--format", "csv").stdout == (
        'arrival_ns,pair,outcome,nothing\n0,"[1, 2]",ok,\n1000000,"[1, 2]",ok,\n'
    )
    assert here(*sql).stdout.splitlines() == [
        "arrival_ns  pair    outcome  nothing",
        "         0  [1, 2]  ok",
        "   1000000  [1, 2]  ok",
    ]


def test_sql_writes_parquet_and_replaces_a_file_only_when_told(here: Here, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    out = tmp_path / "rows.parquet"
    sql = ("sql", "good.tape", QUERY, "--format", "parquet", "--out", out)
    assert here(*sql).returncode == 0
    assert pq.read_table(out).num_rows == 2
    assert here(*sql).returncode == 1
    assert here(*sql, "--force").returncode == 0


def test_metrics_lists_each_definition(here: Here) -> None:
    told = json.loads(here("metrics", "--json").stdout)
    assert {"ttft", "tpot"} <= {m["name"] for m in told}
    assert all(m["formula"] and m["unit"] for m in told)


def test_an_import_makes_a_tape_and_never_replaces_one_unasked(here: Here, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_bytes(
        b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        b"2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,109"
    )
    line = ("import", "azure", trace, "--tape", tmp_path / "a.tape")
    assert here(*line).stdout == "2 rows read, 2 requests written\n"
    again = here(*line)
    assert (again.returncode, again.stdout) == (1, "")
    assert "exists; --force replaces it" in again.stderr
    told = json.loads(here(*line, "--force", "--json").stdout)
    assert told == {"read": 2, "written": 2, "dropped": {}}
    facts = json.loads((tmp_path / "a.tape" / "tape.json").read_text())
    assert facts["command"][:3] == ["tokentape", "import", "azure"]


def test_a_gate_that_is_not_met_exits_3_after_the_result(here: Here, tmp_path: Path) -> None:
    profile = tmp_path / "tiny.toml"
    profile.write_text("max_model_tokens = 12\n")  # refuses every request of the tape
    line = [str(SCRIPT), "engine", "--listen", "127.0.0.1:0", "--profile", str(profile)]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as engine:
        assert engine.stderr is not None
        said = engine.stderr.readline()
        url = said.split(";")[0].split()[-1]
        replay = (
            "replay",
            "good.tape",
            "--to",
            url,
            "--model",
            "simulated-8b",
            "--json",
            "--force",
        )
        ran = here(*replay, "--tape", tmp_path / "run.tape", "--fail-on", "invalid")
        engine.send_signal(signal.SIGTERM)
    told = json.loads(ran.stdout)
    assert (ran.returncode, told["verdict"]["level"], told["rows"]) == (3, "invalid", 5)
    assert ran.stderr.splitlines()[-1] == ("tokentape: --fail-on invalid: the verdict is invalid")


@pytest.mark.timeout(30)
def test_ctrl_c_ends_quietly_with_130(tmp_path: Path) -> None:
    pipe = tmp_path / "profile.toml"
    os.mkfifo(pipe)
    line = [str(SCRIPT), "engine", "--profile", str(pipe)]
    with (
        subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
        pipe.open("wb"),  # opens when the command does, which then waits for a line
    ):
        process.send_signal(signal.SIGINT)
        out, error = process.communicate()
    assert (process.returncode, out, error) == (130, b"", b"")


def test_a_reader_that_goes_away_is_no_error_message() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [SCRIPT, "metrics", "--json"], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (result.returncode, result.stderr) == (1, b"")


def test_a_full_disk_is_one_line(folder: Path) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [SCRIPT, "info", "good.tape", "--json"],
            cwd=folder,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (result.returncode, result.stderr) == (1, "tokentape: No space left on device\n")


def test_a_terminal_gets_a_live_bar_and_a_log_gets_lines() -> None:
    code = (
        "from tokentape.cli import progress\n"
        "progress.LINE_EVERY_S = 0\n"
        "with progress.counting('rows', 3) as tell:\n"
        "    tell(2, 'half')\n"
    )
    line = [sys.executable, "-c", code]
    plain = subprocess.run(line, capture_output=True, text=True, check=True)
    assert (plain.stdout, plain.stderr) == ("", "2 of 3 rows, half\n")
    ours, theirs = pty.openpty()
    live = subprocess.run(line, stdout=subprocess.PIPE, stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 100_000)
    os.close(ours)
    assert live.stdout == b""
    assert b"rows" in shown
    assert b"2/3" in shown
    assert b"\x1b[" in shown  # drawn in place
