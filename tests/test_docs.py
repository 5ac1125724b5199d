"""What the pages and the help say is so: examples run, generated pages are up to date.

In README.md, the lines that begin with `$ ` in a fenced `console` block are run, in order and each
block in a temporary folder of its own; a block that runs the demo is slow. `./run` means this
environment.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokentape import cli
from tokentape.analysis import catalogue
from tokentape.cli import grammar
from tokentape.traces import format_doc

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = {name: example for name, _, example in grammar.VERBS}
WRITTEN_URL = "http://127.0.0.1:8000"  # where the examples think that a server is
RUN_OTHERWISE = {"capacity", "sweep", "engine", "capture", "replay", "demo"}
RUN_OTHERWISE |= {"attach", "detach"}  # in a namespace: test_proxy_attach.py
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def shell(line: str, cwd: Path) -> str:
    """What a line of shell prints; its complaint where it fails."""
    result = subprocess.run(
        ["/bin/sh", "-c", line],
        cwd=cwd,
        env=os.environ | {"PATH": PATH},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"
    return result.stdout


def in_process(
    line: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> str:
    """What a line of tokentape prints, run here: what it imports is paid for once."""
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as left:
        cli.run()
    out, error = capfd.readouterr()
    assert left.value.code == 0, f"{line}\n{out}{error}"
    return str(out)


@contextlib.contextmanager
def serving(line: str, cwd: Path) -> Iterator[str]:
    """Runs a command that serves until Ctrl-C; gives the URL that it says it listens on."""
    with subprocess.Popen(
        [*line.split(), "--listen", "127.0.0.1:0"],
        cwd=cwd,
        env=os.environ | {"PATH": PATH},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            said = process.stderr.readline()
            found = re.search(r"listening on (http://[0-9.:]+)", said)
            assert found, said
            yield found[1]
        finally:
            process.send_signal(signal.SIGINT)
            _, rest = process.communicate()
    assert process.returncode == 0, rest


def ask(base_url: str) -> None:
    """One streamed completion, read to its end."""
    body = {"model": "any", "prompt": "one two three", "max_tokens": 5, "stream": True}
    request = urllib.request.Request(
        f"{base_url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as reply:
        assert b"data:" in reply.read()


def test_the_example_of_every_verb_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trace.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,4\n2023-11-16 18:15:46.9951690,396,9\n"
    )
    serve_engine = EXAMPLES["engine"].replace(" --listen 127.0.0.1:8000", "")
    with serving(serve_engine, tmp_path) as engine:
        with serving(EXAMPLES["capture"].replace(WRITTEN_URL, engine), tmp_path) as proxy:
            for _ in range(3):
                ask(proxy)
        shell(EXAMPLES["replay"].replace(WRITTEN_URL, engine), tmp_path)
        shutil.copytree(tmp_path / "prod.tape", tmp_path / "other.tape")  # for merge
        monkeypatch.chdir(tmp_path)
        for verb in ("capacity", "sweep"):  # whatever else this machine does meanwhile
            line = f"{EXAMPLES[verb].replace(WRITTEN_URL, engine)} --accept-invalid"
            assert in_process(line, monkeypatch, capfd)
    printed = {
        verb: in_process(EXAMPLES[verb], monkeypatch, capfd)
        for verb in EXAMPLES.keys() - RUN_OTHERWISE
    }
    assert all(printed.values())
    assert printed["sql"].split()[-1] == "3"
    assert "run.tape" in printed["report"] and "beside its tape: " in printed["report"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_runs_and_says_where_everything_is(tmp_path: Path) -> None:
    printed = shell(EXAMPLES["demo"], tmp_path)
    folder = tmp_path / EXAMPLES["demo"].split()[-1]
    assert "run.tape" in printed
    assert {"prod.tape", "run.tape"} <= {p.name for p in folder.iterdir()}


def blocks() -> list[str]:
    """The fenced console blocks of the README."""
    return re.findall(r"^```console\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    """The commands of a block, continuation lines joined."""
    lines = re.findall(r"^\$ (.*(?:\\\n.*)*)", block, re.MULTILINE)
    return [re.sub(r"^\./run(?= )", "exec", line.replace("\\\n", " ")) for line in lines]


def is_slow(block: str) -> bool:
    return any("demo" in line for line in commands(block))


@pytest.mark.parametrize(
    "block",
    [pytest.param(b, marks=pytest.mark.slow if is_slow(b) else ()) for b in blocks()],
)
def test_the_commands_of_the_readme_run(block: str, tmp_path: Path) -> None:
    found = commands(block)
    assert found
    for line in found:
        # `./run demo` and `./run test` are words of run; the rest are commands
        shell(re.sub(r"^exec demo\b", "exec tokentape demo", line), tmp_path)


def test_the_readme_has_commands_that_run() -> None:
    assert any(commands(block) for block in blocks())


@pytest.mark.parametrize("verb", EXAMPLES)
def test_every_verb_is_in_the_readme(verb: str) -> None:
    assert re.search(rf"`{verb}`|tokentape {verb}\b", README)


def test_the_readme_names_no_verb_that_is_not_there() -> None:
    said = set(re.findall(r"(?:^|[`$] ?|\s{4})tokentape ([a-z]+)\b", README, re.MULTILINE))
    assert said - EXAMPLES.keys() == set()


def test_every_option_of_the_readme_is_in_the_help(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said: dict[str, set[str]] = {}
    line = r"^(?:    |\$ )(?:\./run )?tokentape ([a-z]+) (.*)$"
    for verb, rest in re.findall(line, README, re.MULTILINE):
        said.setdefault(verb, set()).update(re.findall(r"(?<!\S)--[a-z-]+", rest))
    for verb, options in said.items():
        helped = re.findall(
            r"--[a-z-]+", in_process(f"tokentape {verb} --help", monkeypatch, capfd)
        )
        assert options - set(helped) == set(), verb


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"])
def test_links_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [t for t in targets if not (ROOT / t).exists()] == []


def test_the_architecture_page_is_short() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines()) <= 100


@pytest.mark.parametrize(
    ("page", "now"),
    [("FORMAT.md", format_doc.markdown), ("METRICS.md", catalogue.markdown)],
    ids=["FORMAT.md", "METRICS.md"],
)
def test_a_generated_page_is_up_to_date(page: str, now: object) -> None:
    assert callable(now)
    assert (ROOT / page).read_text(encoding="utf-8") == now()


def test_every_trap_of_the_wire_page_has_a_test_of_its_number() -> None:
    page = (ROOT / "docs" / "wire.md").read_text()
    table = page[page.index("| N | trap |") :]
    numbers = {int(n) for n in re.findall(r"\| (\d+) \|", table)}
    names = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    told = {
        int(n)
        for found in re.findall(r"def test_trap_([0-9_and]+)", names)
        for n in found.split("_")
        if n.isdigit()
    }
    elsewhere = {11: "test_proxy_tls.py", 18: "test_proxy_traps.py"}
    assert numbers == set(range(1, 25))
    assert numbers - told == set(elsewhere)
    for number, file in elsewhere.items():
        assert re.search(rf"\| {number} \| [^|]*{file}", table)
