"""The plan: said before anything is sent, complete, the same each time, and without secrets."""

import json
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from replay_server import Seen, Step, plain, serve, streamed
from tokentape.replay.asked import Asked
from tokentape.replay.options import ReplayOptions
from tokentape.replay.plan import make_plan
from tokentape.replay.prompts import Length
from tokentape.replay.sessions import Shard
from tokentape.replay.targets import Form
from tokentape.traces.errors import TapeError, UsageError
from tokentape.traces.importers import import_trace
from tokentape.traces.reader import open_tape
from tokentape.traces.writer import TapeWriter

SECOND = 1_000_000_000
DATA = Path(__file__).parent.parent / ".." / "shared" / "data"
URL = "http://127.0.0.1:1"


def tape(path: Path, rows: list[dict[str, Any]], **facts: Any) -> Path:
    writer = TapeWriter.create(path, role="capture", command=[], options={}, facts=facts)
    for number, row in enumerate(rows):
        known = {"request_id": number.to_bytes(16), "arrival_ns": number * SECOND, "outcome": "ok"}
        writer.append(known | {"input_tokens": 10, "output_tokens": 5} | row)
    writer.close()
    return path


def options(source: Path, **changes: Any) -> ReplayOptions:
    return ReplayOptions(source=source, to=URL, model="m", **changes)


def test_a_plan_says_what_will_be_sent(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"operation": "chat", "session_id": "a"},
        {"operation": "text_completion", "session_id": "a"},
        {"operation": "chat", "session_id": "b"},
        {"outcome": "connect_error"},
        {},
    ]
    plan = make_plan(options(tape(tmp_path / "t", rows), speed=Fraction(2)), offline=True)
    text = plan.text()
    assert text.startswith("plan: 4 of 5 requests (2 completions and 2 chat), 2 sessions\n")
    assert "span: 2.0 s (recorded 4.0 s, speed 2x)" in text
    assert "rate: mean 1.50/s, peak 2 in one second" in text
    assert "tokens: 40 in, 20 out" in text
    assert "left out: 1 never reached an engine (connect_error)" in text
    figures = json.loads(json.dumps(plan.json()))
    assert figures["requests"] == 4 and figures["input_tokens"] == 40
    assert figures["candidate"]["url"] == URL + "/v1"


def test_two_plans_of_one_tape_send_the_same_bytes_and_another_seed_does_not(
    tmp_path: Path,
) -> None:
    source = tape(tmp_path / "t", [{"operation": o} for o in ("chat", "text_completion")])
    made = [
        make_plan(options(source, seed=seed, namespace=name), offline=True)
        for seed, name in ((3, ""), (3, ""), (4, ""), (3, "a"), (3, "a"), (3, None), (3, None))
    ]
    warm, again, *others = [[p.outgoing(i).body for i in range(2)] for p in made]
    assert warm == again and others[1] == others[2]
    distinct = [warm, *others[:2], *others[3:]]
    assert len({body for bodies in distinct for body in bodies}) == 2 * len(distinct)


def test_all_shards_of_a_run_have_the_namespace_of_their_start(tmp_path: Path) -> None:
    source = tape(tmp_path / "t", [{"session_id": str(n)} for n in range(4)])
    shards = [
        make_plan(options(source, shard=Shard(i, 2), start_at_unix_ns=at), offline=True)
        for at in (10**18, 10**18 + 1)
        for i in range(2)
    ]
    names = [plan.json()["namespace"] for plan in shards]
    assert names[0] == names[1] != names[2] == names[3]


def test_each_request_goes_where_it_went_unless_an_endpoint_is_named(tmp_path: Path) -> None:
    source = tape(tmp_path / "t", [{"operation": o} for o in ("chat", "text_completion", None)])
    paths = {
        endpoint: [
            make_plan(options(source, endpoint=endpoint), offline=True).outgoing(i).url.path
            for i in range(3)
        ]
        for endpoint in ("recorded", "chat", "completions")
    }
    chat, completions = "/v1/chat/completions", "/v1/completions"
    assert paths["recorded"] == [chat, completions, completions]
    assert paths["chat"] == [chat] * 3 and paths["completions"] == [completions] * 3


def test_a_row_says_what_its_body_says(tmp_path: Path) -> None:
    block = {"block_tokens": 4, "block_unit": "token", "block_scope": "tape", "prefix_partial": 2}
    rows = [block | {"block_hashes": [1, 2], "stream": False, "session_id": "s", "turn_index": 3}]
    out = make_plan(options(tape(tmp_path / "t", rows)), offline=True).outgoing(0)
    body = json.loads(out.body)
    assert len(body["prompt"]) == out.row["planned_input_tokens"] == 10
    assert body["max_tokens"] == out.row["planned_output_tokens"] == out.row["max_tokens"] == 5
    assert body["stream"] is out.row["stream"] is False
    assert out.row["source_request_id"] == bytes(16)
    assert out.row["block_hashes"] == [1, 2] and out.row["prefix_partial"] == 2
    assert (out.row["session_id"], out.row["turn_index"]) == ("s", 3)
    assert out.row["endpoint"] == "/v1/completions"


def test_prompts_are_made_as_long_as_the_candidates_template_leaves_room_for(
    tmp_path: Path,
) -> None:
    source = tape(tmp_path / "t", [{"operation": "chat", "input_tokens": n} for n in (30, 3)])
    plan = make_plan(options(source), offline=True)
    form = plan.target.forms["chat"]
    plan.target.forms["chat"] = Form(
        "chat", "m", form.writing, Length(8, 1.0), form.pinning, "measured"
    )
    sizes = [
        len(json.loads(plan.outgoing(i).body)["messages"][0]["content"].split()) for i in range(2)
    ]
    assert sizes == [22, 1]
    assert plan.shortest_input_tokens == 9
    assert "1 prompts are shorter than the shortest that can be sent" in plan.text()


def test_an_empty_prompt_is_sent_as_one_token_and_said(tmp_path: Path) -> None:
    source = tape(tmp_path / "t", [{"input_tokens": 0}, {"input_tokens": 1}])
    plan = make_plan(options(source), offline=True)
    assert [len(json.loads(plan.outgoing(i).body)["prompt"]) for i in range(2)] == [1, 1]
    assert plan.figures["too_short_for_template"] == 1
    assert "1 prompts are shorter than the shortest that can be sent" in plan.text()


def test_requests_that_the_candidate_cannot_take_are_said_before(tmp_path: Path) -> None:
    rows = [{"input_tokens": n, "output_tokens": 10} for n in (90, 91, 500)]
    plan = make_plan(options(tape(tmp_path / "t", rows)), offline=True)
    plan.target = replace(plan.target, max_model_tokens=100)
    assert "2 requests are longer than the 100 tokens that the candidate takes" in plan.text()
    with pytest.raises(UsageError, match=r"2 requests are longer .* --clip cuts their prompts"):
        plan.check()
    plan.options.force = True
    plan.check()


def test_clipped_prompts_leave_room_for_their_output_and_keep_their_beginning(
    tmp_path: Path,
) -> None:
    rows: list[dict[str, Any]] = [
        {"input_tokens": 90, "output_tokens": 10},
        {
            "input_tokens": 500,
            "output_tokens": 10,
            "block_hashes": [1, 2, 3, 4],
            "block_tokens": 40,
        },
        {"input_tokens": 500, "output_tokens": 900},
        {"input_tokens": 100, "output_tokens": 0},
    ]
    source = tape(tmp_path / "t", [{"block_unit": "token"} | row for row in rows])
    whole, plan = (make_plan(options(source, namespace=""), offline=True) for _ in range(2))
    plan.target = replace(plan.target, max_model_tokens=100)
    plan.clip()
    plan.check()
    sizes = [
        (len(body["prompt"]), body["max_tokens"])
        for body in (json.loads(plan.outgoing(i).body) for i in range(4))
    ]
    assert sizes == [(90, 10), (90, 10), (1, 99), (99, 1)]
    assert plan.outgoing(1).row["planned_input_tokens"] == 90
    begins = json.loads(whole.outgoing(1).body)["prompt"][:90]
    assert json.loads(plan.outgoing(1).body)["prompt"] == begins
    assert "3 requests are cut to the 100 tokens that the candidate takes" in plan.text()


def test_what_a_replay_does_not_repeat_of_its_requests_is_said(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"response_format": "json_schema"},
        {"response_format": "text", "tool_choice": "required", "image_count": 2},
        {"tool_choice": "auto", "audio_count": 1},
    ]
    said = make_plan(options(tape(tmp_path / "t", rows)), offline=True).text()
    assert "2 requests of the tape had to be answered in a form" in said
    assert "2 requests of the tape had images or sound" in said


def test_what_a_reader_must_know_is_said(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"output_tokens": 0, "n_choices": 4},
        {"parents": [bytes(16)], "input_tokens": None, "prompt_bytes": 80},
        {"block_tokens": 512, "block_unit": "byte", "block_hashes": [1]},
    ]
    source = tape(tmp_path / "t", rows, arrival_resolution_ns=3 * SECOND)
    text = make_plan(options(source), offline=True).text()
    for said in (
        "arrivals are 3.0 s apart or together",
        "turns: after; 1 of 3 requests are sent at their own time, and not before their parents",
        "1 requests had no output: one token is asked",
        "1 requests had several choices",
        "prefix blocks are counted in bytes",
        "1 prompt tokens guessed from bytes",
    ):
        assert said in text


def test_the_share_of_repeated_blocks_counts_scopes_apart(tmp_path: Path) -> None:
    def row(hashes: list[int], scope: str, session: str) -> dict[str, Any]:
        block = {"block_tokens": 4, "block_unit": "token", "block_scope": scope}
        return block | {"block_hashes": hashes, "session_id": session}

    rows = [
        row([1, 2], "tape", "a"),
        row([1, 3], "tape", "b"),
        row([1, 2], "session", "a"),
        row([1, 2], "session", "b"),
        row([1, 2, 4], "session", "a"),
    ]
    figures = make_plan(options(tape(tmp_path / "t", rows)), offline=True).figures
    assert (figures["prefix_blocks"], figures["prefix_blocks_repeated"]) == (11, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"endpoint": "nonsense"}, "--endpoint nonsense"),
        ({"speed": Fraction(0)}, "--speed"),
        ({"to": "ftp://h"}, "unknown URL scheme"),
        ({"window": (3600 * SECOND, None)}, "nothing to replay"),
        ({"max_requests": 0}, "nothing to replay"),
        ({"key_env": "NOT_SET_ANYWHERE"}, "is not set"),
    ],
)
def test_an_option_that_cannot_be_right_is_one_line(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    wanted: dict[str, Any] = {"source": tape(tmp_path / "t", [{}]), "to": URL, "model": "m"}
    with pytest.raises(UsageError, match=said) as caught:
        make_plan(ReplayOptions(**(wanted | changes)), offline=True)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_tape_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TapeError, match="not a tape"):
        make_plan(options(tmp_path), offline=True)


def test_secrets_are_in_no_form_of_the_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_HERE", "sk-one-canary")
    secret = options(
        tape(tmp_path / "t", [{}]),
        headers={"X": "sk-two-canary"},
        key_env="KEY_HERE",
        command=["--header", "X=sk-two-canary"],
    )
    plan = make_plan(secret, offline=True)
    shown = repr(secret) + json.dumps(secret.as_dict()) + plan.text() + json.dumps(plan.json())
    assert "canary" not in shown + repr(plan.target)
    assert plan.outgoing(0).headers["Authorization"] == "Bearer sk-one-canary"


def test_the_azure_trace_is_planned_whole(tmp_path: Path) -> None:
    path = DATA / "azure" / "AzureLLMInferenceTrace_code.csv"
    if not path.exists():
        pytest.skip("sample data is not here")
    import_trace("azure", [path], tmp_path / "t")
    plan = make_plan(options(tmp_path / "t", speed=Fraction(2)), offline=True)
    assert len(plan) == plan.figures["requests_on_tape"] == 8819
    ends = open_tape(tmp_path / "t").read(["arrival_ns"])["arrival_ns"].to_numpy()
    assert plan.schedule.span_ns == (int(ends.max()) - int(ends.min())) // 2
    assert plan.figures["input_tokens"] == int(plan.source.input_tokens.sum())
    assert not plan.figures["left_out"]


def test_mooncake_prompts_repeat_the_blocks_that_the_trace_repeats(tmp_path: Path) -> None:
    path = DATA / "mooncake" / "conversation_trace.jsonl"
    if not path.exists():
        pytest.skip("sample data is not here")
    import_trace("mooncake", [path], tmp_path / "t")
    plan = make_plan(options(tmp_path / "t"), offline=True)
    figures = plan.figures
    assert figures["prefix_blocks_repeated"] / figures["prefix_blocks"] == pytest.approx(
        0.366, abs=0.001
    )
    assert "arrivals are 3.0 s apart" in plan.text()
    for number in (0, 5000, 12_000):
        prompt = json.loads(plan.outgoing(number).body)["prompt"]
        index = plan.schedule.source_index[number]
        assert len(prompt) == plan.source.input_tokens[index]
    assert np.all(np.diff(plan.schedule.due_ns) >= 0)


def test_a_copy_of_a_request_is_another_session_with_another_prompt(tmp_path: Path) -> None:
    blocks = {"block_tokens": 4, "block_unit": "token", "block_scope": "trace"}
    rows: list[dict[str, Any]] = [
        {"session_id": "a", "block_hashes": [7, 8], **blocks},
        {"session_id": None},
    ]
    plan = make_plan(options(tape(tmp_path / "t", rows)), offline=True)
    copies = np.array([0, 0, 0, 2], dtype=np.int16), np.array([0, 1, 0, 0], dtype=np.int32)
    plan.schedule = replace(
        plan.schedule,
        due_ns=np.arange(4) * SECOND,
        copy_index=copies[0],
        source_index=copies[1],
    )
    sent = [plan.outgoing(i) for i in range(4)]
    assert [s.row["copy_index"] for s in sent] == [0, 0, 0, 2]
    assert [s.row.get("session_id") for s in sent] == ["a", None, "a", "a#2"]
    assert sent[0].body == sent[2].body != sent[3].body
    assert sent[0].row["source_request_id"] == sent[3].row["source_request_id"]
    assert not set(sent[0].row["block_hashes"]) & set(sent[3].row["block_hashes"])
    figures = plan.figures
    assert figures["sessions"] == 2
    assert (figures["prefix_blocks"], figures["prefix_blocks_repeated"]) == (6, 2)
    part = plan.whole.part(np.array([1, 3], dtype=np.int32), 1)
    assert part.outgoing(1) == sent[3]


@pytest.mark.parametrize(
    ("owner", "pages", "told"),
    [
        (
            "vllm",
            {"/version": {"version": "0.22.1"}},
            {"engine": "vllm", "engine_version": "0.22.1"},
        ),
        (
            "sglang",
            {
                "/get_server_info": {
                    "version": "0.5",
                    "tp_size": 2,
                    "quantization": None,
                    "speculative_algorithm": "EAGLE",
                    "disable_radix_cache": False,
                    "dtype": "x" * 100,
                }
            },
            {
                "engine": "sglang",
                "engine_version": "0.5",
                "tp": "2",
                "speculation": "EAGLE",
                "prefix_cache_off": "false",
            },
        ),
        ("somebody", {"/version": "no object"}, {}),
    ],
)
def test_what_a_candidate_says_of_itself_is_kept_and_what_the_user_says_outranks_it(
    tmp_path: Path, owner: str, pages: dict[str, Any], told: dict[str, str]
) -> None:
    def script(seen: Seen) -> Sequence[Step]:
        if seen.path.endswith("/models"):
            return plain(200, {"data": [{"id": "m", "owned_by": owner}]})
        return plain(200, pages[seen.path]) if seen.path in pages else streamed(seen)

    with serve(script) as server:
        wanted = replace(options(tape(tmp_path / "t", [{}])), to=server.url, facts={"tp": "8"})
        candidate = make_plan(wanted).candidate()
    assert candidate["tp"] == "8" and candidate["given"] == {"tp": "8"}
    kept = {name: candidate.get(name) for name in told}
    assert kept == told | ({"tp": "8"} if "tp" in told else {})
    assert ("engine" in candidate) == ("engine" in told)


def test_a_sampled_capture_is_replayed_by_its_whole_sessions_and_the_missing_load_is_said(
    tmp_path: Path,
) -> None:
    drawn = {"sample_prob": 0.25, "sample_reason": "session", "session_id": "a"}
    rows: list[dict[str, Any]] = [
        drawn,
        drawn | {"sample_prob": 1.0},  # slow, and of a session that was drawn
        drawn | {"session_id": "b"},
        {"sample_prob": 1.0, "sample_reason": "slow", "session_id": "c"},
        {"sample_prob": 1.0, "sample_reason": "error", "outcome": "http_error", "session_id": "d"},
    ]
    source = tape(tmp_path / "t", rows)
    plan = make_plan(options(source, include_failed=True), offline=True)
    assert plan.figures["requests"] == 3 and plan.figures["sampled_of"] == 4
    (reason,) = plan.figures["left_out"]
    assert "without its session" in reason and plan.figures["left_out"][reason] == 2
    (note,) = [w for w in plan.warnings() if "one session of 4" in w]
    rate = plan.figures["mean_per_s"]
    assert f"this plan's {rate:.4g}/s stand for about {4 * rate:.4g}/s" in note
    assert "--multiply 4x offers as much" in note
    for factor, left in ((4, None), (2, 2)):
        asked = Asked(multiply=Fraction(factor))
        multiplied = make_plan(options(source, operators=asked), offline=True)
        (note,) = [w for w in multiplied.warnings() if "one session of 4" in w]
        assert ("puts their load back" in note) == (left is None)
        if left:
            assert f"about {left * multiplied.figures['mean_per_s']:.4g}/s" in note
    whole = make_plan(options(tape(tmp_path / "u", [{}, {}])), offline=True)
    assert not [w for w in whole.warnings() if "one session of" in w]
