"""Telemetry: pages are kept raw, bracket the run, and cost the run nothing when they are slow."""

import gzip
import importlib.util
import json
import re
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxied import capturing, until
from replay_server import Seen, Step, engine_like, serve
from test_replay_run import source
from tokentape.analysis.session import connect
from tokentape.replay.run import ReplayOptions, make_plan, run_plan
from tokentape.traces import pages
from tokentape.traces.errors import TokentapeError, UsageError
from tokentape.traces.sampler import Sources

RECORDED = Path(__file__).parent / ".." / ".." / "shared" / "data" / "vllm-h100"
LINE = re.compile(r"^([a-zA-Z_:][\w:]*)(\{.*\})? (\S+)$")


class Counting:
    """A candidate whose page counts the requests that it has answered."""

    def __init__(self) -> None:
        self.answered = 0

    def __call__(self, seen: Seen) -> Sequence[Step]:
        if seen.path == "/metrics":
            body = f'# TYPE asked counter\nasked_total{{m="a"}} {self.answered}\n'.encode()
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"
            return [head % len(body) + body]
        self.answered += 1
        return engine_like(seen)


def test_a_page_of_a_real_vllm_is_read_to_the_last_sample() -> None:
    path = RECORDED / "low.metrics.jsonl.gz"
    if not path.exists():
        pytest.skip("no recordings of a real vLLM beside this checkout")
    with gzip.open(path, "rt") as lines:
        *_, last = map(json.loads, lines)
    written = [m for m in map(LINE.match, last[2].splitlines()) if m]
    found = pages.parse(last[2])
    assert len(found) == len(written) > 300
    assert sorted((m[1], float(m[3])) for m in written) == sorted((n, v) for n, _, v in found)
    hit = next(labels for name, labels, _ in found if name == "vllm:request_success_total")
    assert json.loads(hit)["engine"] == "0"


@settings(max_examples=50)
@given(st.text('a{}=",\n #\\1.e', max_size=60))
def test_a_page_that_is_none_is_an_error_of_one_line_or_empty(text: str) -> None:
    said = ""
    try:
        pages.parse(text)
    except pages.PageError as error:
        said = str(error)
    assert "\n" not in said


@pytest.mark.parametrize("url", ["ftp://a/metrics", "a:b", "http://:1/", "http://h:x/m", "http://"])
def test_what_is_no_url_of_a_page_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match=r"--metrics-url .*http://127.0.0.1:8000/metrics"):
        pages.Page.parse(url)


def test_a_password_in_the_url_of_a_page_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError, match="leave user and password out") as error:
        pages.Page.parse("http://u:hunter2@h/metrics")
    assert "hunter2" not in str(error.value)


def test_the_first_and_the_last_sample_bracket_the_run(tmp_path: Path) -> None:
    with serve(Counting()) as server:
        options = ReplayOptions(
            source=source(tmp_path / "source.tape", [{}] * 30),
            to=server.url,
            tape=tmp_path / "run.tape",
            telemetry=Sources((server.url,)),
        )
        plan = make_plan(options)
        run_plan(plan)
    page = f"{server.url}/metrics"
    with connect([tmp_path / "run.tape"]) as session:
        [counter] = session.table(
            f"FROM counters WHERE source = '{page}' AND name = 'asked_total'"
        ).to_pylist()
        [edges] = session.table(
            "SELECT min(send_ns) AS first, max(end_ns) AS last FROM requests"
        ).to_pylist()
        ups = session.sql(f"SELECT value FROM telemetry WHERE source = '{page}' AND name = 'up'")
        assert set(ups.fetchall()) == {(1.0,)}
    assert counter["increase"] == 30
    assert json.loads(counter["labels"]) == {"m": "a"}
    assert counter["from_ns"] < edges["first"] and edges["last"] < counter["until_ns"]


def test_a_page_that_is_none_ends_a_replay_before_anything_is_sent(tmp_path: Path) -> None:
    def script(seen: Seen) -> Sequence[Step]:
        if seen.path == "/none":
            return [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n<html> { "]
        return engine_like(seen)

    with serve(script) as server:
        options = ReplayOptions(
            source=source(tmp_path / "source.tape", [{}] * 3),
            to=server.url,
            tape=tmp_path / "run.tape",
            telemetry=Sources((f"{server.url}/none",)),
        )
        plan = make_plan(options)
        with pytest.raises(
            TokentapeError, match=r"--metrics-url: .*/none is no Prometheus page.*nothing"
        ):
            run_plan(plan)
        assert server.generations == []


def test_a_capture_serves_while_a_page_does_not(tmp_path: Path) -> None:
    with serve(Counting()) as server:
        dead = "http://127.0.0.1:9/metrics"
        asked = ("--metrics-url", f"{server.url}/metrics", "--metrics-url", dead)
        with capturing(server.url, tmp_path / "t", *asked) as proxy:
            with urllib.request.urlopen(f"{proxy.url}/v1/models") as reply:
                assert reply.status == 200
            until(lambda: sum(s.path == "/metrics" for s in server.seen) > 1, "a second sample")
            said = proxy.stop()
            heard = proxy.heard
    assert f"telemetry: {dead} cannot be read" in heard + said
    with connect([tmp_path / "t"]) as session:
        modes = session.sql("SELECT DISTINCT labels FROM telemetry WHERE source = 'machine'")
        assert ('{"mode": "steal"}',) in modes.fetchall()
        rows = session.sql(
            "SELECT source, max(value), count(*) > 1 FROM telemetry WHERE name = 'up' GROUP BY ALL"
        )
        assert set(rows.fetchall()) == {
            (dead, 0.0, True),
            (f"{server.url}/metrics", 1.0, True),
        }


def test_without_the_extra_the_gpu_is_refused_in_one_line(tmp_path: Path) -> None:
    if importlib.util.find_spec("pynvml") is not None:
        pytest.skip("nvidia-ml-py is installed")
    options = ReplayOptions(
        source=tmp_path, to="http://127.0.0.1:9", telemetry=Sources((), gpu=True)
    )
    with pytest.raises(UsageError, match=r"--gpu: .*pip install 'tokentape\[gpu\]'"):
        make_plan(options, offline=True)
