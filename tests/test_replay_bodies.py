"""Recorded bodies, over a real socket: what arrives is what was recorded, but for the model."""

import gzip
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay_server import serve
from tokentape.replay.asked import Asked
from tokentape.replay.bodies import with_model
from tokentape.replay.options import ReplayOptions
from tokentape.replay.run import make_plan, run_plan
from tokentape.traces import facts as tape_facts
from tokentape.traces.errors import TapeError, UsageError
from tokentape.traces.reader import open_tape
from tokentape.traces.writer import TRACE_CLOCK, TapeWriter

CANARY = "canary-5b1e"
FIRST = (
    b'{ "prompt":"caf\\u00e9 \xc3\xa9 canary-5b1e",\n "x_new": {"model":"inner"}, "model" : "old", '
    b'"max_tokens":3,"stream":true, "stream_options":{"include_usage":true},"priority":7 }'
)
SECOND = (
    b'{"model":"old","messages":[{"role":"user","content":"hi","name":"model"}],"stream":true,'
    b'"max_tokens":4,"temperature":0.30000000000000004}'
)
THIRD = b'{"messages":[{"content":"two words"}],"max_tokens":2,"stream":true,"model":"o\\"ld"}\n'
BODIES = [FIRST, SECOND, THIRD]
PATHS = ["/v1/completions", "/openai/v1/chat/completions", "/v1/chat/completions"]
FORMATS = {True: ("openai.chat", "chat"), False: ("openai.completions", "text_completion")}


def recorded(path: Path, key: bytes = b"") -> Path:
    """A tape of five requests: the third body came under gzip, one is cut short, one is missing."""
    given: dict[str, Any] = {"command": [], "options": {}, "facts": {"content": "full"}}
    first = tape_facts.new_facts("capture", wall_epoch_unix_ns=None, **given)
    tape_facts.create_tape(path, first, force=False)
    writer = TapeWriter(path, tape_facts.lock(path), TRACE_CLOCK, "w0", content_key=key)
    for n in range(5):
        wire_format, operation = FORMATS["chat" in PATHS[n % 3]]
        row = {"request_id": (n + 1).to_bytes(16), "arrival_ns": n * 5_000_000, "stream": True}
        row |= {"wire_format": wire_format, "operation": operation, "endpoint": PATHS[n % 3]}
        row |= {"model_requested": "old", "input_tokens": 5, "output_tokens": 9, "outcome": "ok"}
        writer.append(row)
        if n == 4:
            continue
        body = gzip.compress(BODIES[2]) if n == 2 else BODIES[n % 3]
        kept = {"request_id": row["request_id"], "request_body": body, "request_whole": n != 3}
        kept |= {"request_coding": "gzip"} if n == 2 else {}
        writer.append_content(kept | {"response_body": b"", "response_whole": True})
    writer.close()
    return path


@pytest.mark.parametrize("key", [b"", b"k" * 32])
def test_bodies_arrive_byte_for_byte_but_for_the_model(tmp_path: Path, key: bytes) -> None:
    source, key_file = recorded(tmp_path / "s.tape", key), tmp_path / "key"
    key_file.write_bytes(key or b"0" * 32)
    key_file.chmod(0o600)
    with serve() as server:
        wanted = ReplayOptions(
            source=source,
            to=server.url,
            tape=tmp_path / "r.tape",
            prompt="recorded",
            content_key_file=key_file if key else None,
            warm_up=2,
        )
        plan = make_plan(wanted)
        summary = run_plan(plan)
        sent = server.generations
    assert plan.figures["left_out"] == {"has no whole recorded body": 2}
    assert "recorded bodies, all but the model as it came" in plan.text()
    old = [b'"model" : "old"', b'"model":"old"', b'"model":"o\\"ld"']
    new = [b'"model" : "m"', b'"model":"m"', b'"model":"m"']
    expected = [b.replace(was, now) for b, was, now in zip(BODIES, old, new, strict=True)]
    assert [s.body for s in sent[2:]] == expected  # two before them warmed the candidate up
    assert not any(CANARY.encode() in s.body for s in sent[:2])
    assert [s.path for s in sent[2:]] == ["/v1/completions", *["/v1/chat/completions"] * 2]
    rows = open_tape(summary.tape).read().to_pylist()
    assert [row["output_tokens"] for row in rows] == [3, 4, 2]
    assert [row["max_tokens"] for row in rows] == [3, 4, 2]
    assert {row["planned_output_tokens"] for row in rows} == {None}
    assert {row["model_requested"] for row in rows} == {"m"}
    assert json.loads(rows[0]["extra"])["priority"] == 7
    assert summary.outcomes == {"ok": 3}
    assert "not verified" not in summary.verdict.text()  # there is no length to be verified
    for file in (tmp_path / "r.tape").rglob("*"):
        assert file.is_dir() or CANARY.encode() not in file.read_bytes()


def test_workers_and_several_candidates_send_recorded_bodies_too(tmp_path: Path) -> None:
    source = recorded(tmp_path / "s.tape")
    with serve() as a, serve() as b:
        wanted = ReplayOptions(
            source=source,
            to=a.url,
            also_to=(b.url,),
            tape=tmp_path / "r.tape",
            prompt="recorded",
            workers=2,
        )
        assert run_plan(make_plan(wanted)).outcomes == {"ok": 3}
        arrived = [s.json["max_tokens"] for s in (*a.generations, *b.generations)]
    assert sorted(arrived) == [2, 3, 4]


def test_bodies_that_cannot_be_read_or_meant_otherwise_are_refused_in_one_line(
    tmp_path: Path,
) -> None:
    source = recorded(tmp_path / "s.tape", b"k" * 32)
    key_file = tmp_path / "other"
    key_file.write_bytes(b"o" * 32)
    key_file.chmod(0o600)

    def refused(**changes: Any) -> Any:
        given: dict[str, Any] = {"source": source, "to": "http://127.0.0.1:9", "prompt": "recorded"}
        return make_plan(ReplayOptions(**(given | changes)), offline=True)

    with pytest.raises(TapeError, match="encrypted; give --content-key-file"):
        refused()
    with pytest.raises(TapeError, match="another content key"):
        refused(content_key_file=key_file)
    with pytest.raises(UsageError, match="--endpoint: not with --prompt recorded"):
        refused(endpoint="chat")
    with pytest.raises(UsageError, match="--multiply and --loop: not with --prompt recorded"):
        refused(operators=Asked(loop_passes=Fraction(2)))
    with pytest.raises(UsageError, match="--content-key-file: is for --prompt recorded"):
        refused(prompt="text", content_key_file=key_file)
    writer = TapeWriter.create(tmp_path / "e", role="import", command=[], options={}, facts={})
    writer.append({"request_id": bytes(16), "arrival_ns": 0, "output_tokens": 1})
    writer.close()
    with pytest.raises(TapeError, match="keeps no bodies; capture with --content full"):
        refused(source=tmp_path / "e")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("model"), inner),
    max_leaves=4,
)


@settings(max_examples=25)
@given(
    st.dictionaries(st.text(), JSON, min_size=1, max_size=3), st.text(), st.text(), st.booleans()
)
def test_only_the_value_of_the_top_levels_model_changes(
    fields: dict[str, Any], old: str, new: str, escaped: bool
) -> None:
    fields.pop("model", None)
    before = json.dumps(fields | {"a": {"model": old}}, ensure_ascii=escaped, indent=1).encode()
    value = json.dumps(old, ensure_ascii=escaped).encode()
    begin, end = before[:-1] + b', "model" :\t', b'\n, "b":[{"model":1}]}'
    changed = with_model(begin + value + end, new)
    assert changed.startswith(begin) and changed.endswith(end)
    assert json.loads(changed[len(begin) : -len(end)]) == new


@pytest.mark.parametrize("body", [b"", b"no json", b"[1]", b'{"a":1}', b"{", b"\xff{}"])
def test_a_body_without_a_model_stays_as_it_is(body: bytes) -> None:
    assert with_model(body, "m") == body
