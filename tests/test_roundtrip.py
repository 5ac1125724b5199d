"""Engine, proxy, tape, replay, tape, SQL: what is known of the engine comes back at the end."""

import concurrent.futures
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import tokentape
from proxied import capturing
from tokentape.traces.check import check
from tokentape.traces.reader import Tape, open_tape
from tokentape.traces.writer import TapeWriter

STEP_MS = 20.0
PROFILE = f"step_ms = {STEP_MS}\nstep_ms_per_sequence = 0.0\nstep_ns_per_kv_token = 0.0\n"
PROFILE += "step_jitter = 0.0\nfrontend_ms = 0.0\nnatural_output_tokens_mean = 0.0\n"
SYSTEM = "you are a careful and patient assistant " * 40
LENGTHS = [4, 9, 16, 25, 30, 12]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    profile = tmp_path_factory.mktemp("engine") / "steady.toml"
    profile.write_text(PROFILE)
    command = [sys.executable, "-m", "tokentape", "engine", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(
        [*command, "--profile", str(profile)], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        yield "http://" + line.split("http://", 1)[1].split(";")[0].strip()
        process.terminate()


def tokentape_json(*arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "tokentape", *arguments, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def tapes(engine: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tape, Tape]:
    """A capture of a few chats that share a system prompt, and its replay at 2x."""
    folder = tmp_path_factory.mktemp("tapes")
    with capturing(engine, folder / "prod.tape") as proxy:

        def ask(output_tokens: int) -> int:
            with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="sk-canary") as client:
                stream = client.chat.completions.create(
                    model="m",
                    messages=[
                        {"role": "system", "content": SYSTEM},
                        {"role": "user", "content": f"question {output_tokens} canary"},
                    ],
                    max_tokens=output_tokens,
                    stream=True,
                    stream_options={"include_usage": True},
                )
                return sum(bool(c.choices and c.choices[0].delta.content) for c in stream)

        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            assert list(pool.map(ask, LENGTHS)) == LENGTHS
        proxy.stop()
    run = folder / "run.tape"
    told = tokentape_json(
        "replay", str(proxy.tape), "--to", engine, "--tape", str(run), "--speed", "2x"
    )
    assert told["outcomes"] == {"ok": len(LENGTHS)}
    return open_tape(proxy.tape), open_tape(run)


def test_both_tapes_are_sound_and_hold_every_request(tapes: tuple[Tape, Tape]) -> None:
    for tape in tapes:
        assert check(tape) == []
        assert (tape.rows, tape.losses) == (len(LENGTHS), {})
        lengths = sorted(r["output_tokens"] for r in tape.read(["output_tokens"]).to_pylist())
        assert lengths == sorted(LENGTHS)


def test_the_engines_step_comes_back_as_the_time_per_output_token(tapes: tuple[Tape, Tape]) -> None:
    for tape in tapes:
        rows = tape.sql("select median(tpot_ns) from tpot").fetchall()
        assert rows[0][0] / 1e6 == pytest.approx(STEP_MS, rel=0.1)


def test_the_replay_asks_the_same_of_the_candidate(tapes: tuple[Tape, Tape]) -> None:
    prod, run = tapes
    columns = ["request_id", "source_request_id", "input_tokens", "output_tokens", "endpoint"]
    sources = {r["request_id"]: r for r in prod.read(columns).to_pylist()}
    for row in run.read(columns).to_pylist():
        source = sources[row["source_request_id"]]
        assert row["output_tokens"] == source["output_tokens"]
        assert row["input_tokens"] == source["input_tokens"]
        assert row["endpoint"] == source["endpoint"]


def test_at_twice_the_speed_the_plan_takes_half_the_time(tapes: tuple[Tape, Tape]) -> None:
    prod, run = tapes
    spans = []
    for tape, column in ((prod, "arrival_ns"), (run, "scheduled_ns")):
        at = tape.read([column])[column].to_pylist()
        spans.append(max(at) - min(at))
    assert spans[1] == pytest.approx(spans[0] / 2, abs=1)


def test_a_shared_system_prompt_is_shared_again_in_the_replay(tapes: tuple[Tape, Tape]) -> None:
    prod, run = tapes
    for tape in (prod, run):
        cached = tape.read(["cached_tokens"])["cached_tokens"].to_pylist()
        assert sum(c > 0 for c in cached) >= len(LENGTHS) - 3, cached


def test_report_and_sql_agree_on_the_number_of_requests(tapes: tuple[Tape, Tape]) -> None:
    paths = [str(t.path) for t in tapes]
    report = tokentape_json("report", *paths)
    assert report
    both = tokentape.open(str(tapes[0].path.parent / "*.tape"))
    counted = both.sql("select run, count(*) from requests group by run order by run").fetchall()
    assert counted == [("prod.tape", len(LENGTHS)), ("run.tape", len(LENGTHS))]


def test_neither_prompt_nor_key_is_in_any_file(tapes: tuple[Tape, Tape]) -> None:
    for path in tapes[0].path.parent.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"canary" not in data, path
            assert b"careful and patient" not in data, path


@pytest.mark.slow
def test_a_run_finds_nothing_of_the_run_before_it_in_the_cache_unless_it_is_to_be_warm(
    engine: str, tmp_path: Path
) -> None:
    """Six prompts of four shared blocks of 128 tokens and one of their own, one after the other."""
    writer = TapeWriter.create(tmp_path / "a.tape", role="import", command=[], options={}, facts={})
    for n in range(6):
        row = {"request_id": n.to_bytes(16), "arrival_ns": n * 100_000_000, "input_tokens": 640}
        row |= {"block_hashes": [1, 2, 3, 4, 10 + n], "block_tokens": 128, "block_unit": "token"}
        writer.append(row | {"output_tokens": 1, "stream": True})
    writer.close()

    def cached(run: str, *options: str) -> int:
        to = ["--to", engine, "--tape", str(tmp_path / run), *options]
        tokentape_json("replay", str(tmp_path / "a.tape"), *to)
        return sum(open_tape(tmp_path / run).read(["cached_tokens"])["cached_tokens"].to_pylist())

    fresh = [cached(f"fresh-{n}.tape") for n in range(2)]
    assert fresh == [5 * 512, 5 * 512]
    cached("cold.tape", "--warm-cache")
    assert cached("warm.tape", "--warm-cache") > 5 * 512 + 512
