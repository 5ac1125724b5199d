"""Weka traces: subagents nested in time, ids that never meet between traces, the floor rule."""

import json
from pathlib import Path
from typing import Any

import pytest

from tokentape.traces.errors import TapeError
from tokentape.traces.importers import ImportSummary, import_trace
from tokentape.traces.reader import open_tape

REAL = Path(__file__).parents[2] / "shared/data/weka-agentic"


def call(t_s: float, n_in: int = 130, **more: Any) -> dict[str, Any]:
    row = {"t": t_s, "type": "n", "model": "m", "in": n_in, "out": 7, "stop": "end_turn"}
    return row | {"hash_ids": list(range(1, n_in // 64 + 1))} | more


def agent(name: str, t_s: float, *requests: dict[str, Any]) -> dict[str, Any]:
    return {"t": t_s, "type": "subagent", "agent_id": name, "requests": list(requests)}


def trace(*requests: dict[str, Any], name: str = "t1", **more: Any) -> dict[str, Any]:
    head = {"id": name, "models": ["m"], "block_size": 64, "hash_id_scope": "local"}
    return head | {"requests": list(requests)} | more


def imported(folder: Path, *traces: dict[str, Any]) -> tuple[ImportSummary, list[dict[str, Any]]]:
    files = []
    for number, one in enumerate(traces):
        files.append(folder / f"trace_{number}.json")
        files[-1].write_text(json.dumps(one))
    summary = import_trace("weka", files, folder / "w.tape", force=True)
    return summary, open_tape(summary.tape).read().to_pylist()


def test_a_turn_waits_for_the_one_before_and_thinks(tmp_path: Path) -> None:
    _, (first, second) = imported(
        tmp_path,
        trace(
            call(0.0, api_time=2.5, type="s", ttft=0.25, think_time=0.0),
            call(4.0, api_time=1.0, think_time=1.0),
        ),
    )
    assert (first["end_ns"], first["first_content_ns"]) == (2_500_000_000, 250_000_000)
    assert (first["stream"], second["stream"]) == (True, False)
    assert second["parents"] == [first["request_id"]]
    assert second["think_ns"] == 1_500_000_000, "from the times, which are finer than think_time"
    assert [row["session_id"] for row in (first, second)] == ["t1", "t1"]
    assert [row["turn_index"] for row in (first, second)] == [0, 1]
    assert first["finish_reason"] == ["end_turn"]
    assert second["first_content_ns"] is None


def test_where_no_end_is_known_think_time_names_the_parent(tmp_path: Path) -> None:
    _, (first, second, third) = imported(
        tmp_path, trace(call(0.0), call(9.0, think_time=4.0), call(20.0))
    )
    assert (first["end_ns"], first["parents"]) == (None, None)
    assert (second["parents"], second["think_ns"]) == ([first["request_id"]], 4_000_000_000)
    assert (third["parents"], third["think_ns"]) == (None, None)


def test_subagents_start_from_their_parent_and_are_waited_for_when_they_had_ended(
    tmp_path: Path,
) -> None:
    _, rows = imported(
        tmp_path,
        trace(
            call(0.0, api_time=1.0),
            agent("quick", 2.0, call(0.0, api_time=1.0), call(2.0, api_time=1.0)),
            agent("slow", 2.5, call(0.0, api_time=90.0)),
            call(10.0, api_time=1.0),
        ),
    )
    main, quick_0, slow, quick_1, last = rows
    assert [row["arrival_ns"] / 1e9 for row in rows] == [0.0, 2.0, 2.5, 4.0, 10.0]
    assert [row["session_id"] for row in rows] == ["t1", "t1/quick", "t1/slow", "t1/quick", "t1"]
    assert quick_0["parents"] == slow["parents"] == [main["request_id"]]
    assert quick_1["parents"] == [quick_0["request_id"]]
    assert set(last["parents"]) == {main["request_id"], quick_1["request_id"]}
    assert last["think_ns"] == 5_000_000_000
    assert [row["turn_index"] for row in rows] == [0, 0, 0, 1, 1]


def test_times_inside_a_subagent_may_count_from_the_trace_s_zero(tmp_path: Path) -> None:
    _, rows = imported(tmp_path, trace(call(0.0), agent("a", 5.0, call(5.5), call(6.0))))
    assert [row["arrival_ns"] / 1e9 for row in rows] == [0.0, 5.5, 6.0]


def test_full_blocks_only_and_a_broken_rule_is_no_prefix(tmp_path: Path) -> None:
    summary, (part, broken) = imported(tmp_path, trace(call(0.0), call(1.0, hash_ids=[1])))
    assert (len(part["block_hashes"]), part["block_tokens"], part["prefix_partial"]) == (2, 64, 2)
    assert broken["block_hashes"] is None
    source = open_tape(summary.tape).facts["source"]
    assert source["block_rule"] == "floor"
    assert source["files"][0]["rows_without_prefix"] == 1


def test_equal_ids_of_two_traces_never_meet_unless_they_are_global(tmp_path: Path) -> None:
    _, rows = imported(tmp_path, trace(call(0.0)), trace(call(0.0), name="t2"))
    one, other = (set(row["block_hashes"]) for row in rows)
    assert one & other == set()
    assert {i & 0xFFFFFFFF for i in one} == {i & 0xFFFFFFFF for i in other} == {1, 2}
    shared = [trace(call(0.0), name=n, hash_id_scope="global") for n in ("t1", "t2")]
    _, rows = imported(tmp_path, *shared)
    assert [row["block_hashes"] for row in rows] == [[1, 2], [1, 2]]


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (trace(call(-1.0)), "requests[0]: t is -1.0, not a time"),
        (trace(call(0.0), call(0.0, out="7")), 'requests[1]: out is "7", not a whole number'),
        (trace(agent("a", 0.0, call(0.0, n_in=-64))), "requests[0], requests[0]: in is -64"),
        (trace(hash_id_scope="tape"), 'hash_id_scope is "tape", none of local, global'),
        (trace(block_size=0), "block_size is 0, not a number of tokens"),
        ({"id": "t"}, "no column block_size, hash_id_scope, requests"),
        (trace(call(0.0, hash_ids=[1 << 32, 2])), "too large for ids local to a trace"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, document: dict[str, Any], says: str) -> None:
    with pytest.raises(TapeError, match="trace_0") as raised:
        imported(tmp_path, document)
    assert says in str(raised.value)


def test_subagents_without_end_are_refused(tmp_path: Path) -> None:
    nested = call(0.0)
    for _ in range(60):
        nested = agent("a", 0.0, nested)
    with pytest.raises(TapeError, match="more than 32 deep"):
        imported(tmp_path, trace(nested))


def flat(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for one in requests:
        found += flat(one["requests"]) if one["type"] == "subagent" else [one]
    return found


def test_the_real_traces_are_imported_whole(tmp_path: Path) -> None:
    if not REAL.exists():
        pytest.skip("the Weka traces are not beside this checkout")
    documents = [json.loads(file.read_text()) for file in sorted(REAL.glob("*.json"))]
    calls = [call for document in documents for call in flat(document["requests"])]
    summary = import_trace("weka", [REAL], tmp_path / "w.tape")
    assert (summary.read, summary.written, summary.dropped) == (307, 307, {})
    tape = open_tape(summary.tape)
    rows = tape.read().to_pylist()
    assert sum(f["subagents"] for f in tape.facts["source"]["files"]) == 3
    assert sum(f["rows_without_prefix"] for f in tape.facts["source"]["files"]) == 0
    assert sum(row["stream"] for row in rows) == 56
    assert sum(row["first_content_ns"] is not None for row in rows) == 30
    assert sum(row["input_tokens"] for row in rows) == sum(call["in"] for call in calls)
    assert sum(len(row["block_hashes"]) for row in rows) == sum(c["in"] // 64 for c in calls)
    distinct = sum(len({i for c in flat(d["requests"]) for i in c["hash_ids"]}) for d in documents)
    assert len({i for row in rows for i in row["block_hashes"]}) == distinct
    known = {row["request_id"]: row for row in rows}
    waiting = [row for row in rows if row["parents"]]
    assert len(waiting) > 200
    for row in waiting:
        ends = [known[p]["end_ns"] for p in row["parents"]]
        assert all(end is None or end <= row["arrival_ns"] for end in ends)
        assert all(known[p]["arrival_ns"] <= row["arrival_ns"] for p in row["parents"])
