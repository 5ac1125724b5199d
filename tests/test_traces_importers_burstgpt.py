"""BurstGPT traces: columns by name in both forms, failures kept, sessions only where there are."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokentape.traces.errors import TapeError
from tokentape.traces.importers import burstgpt, import_trace
from tokentape.traces.reader import open_tape

FIRST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
# Both as quoted in third-party documents of the real files.
ROWS_1 = [
    "5,ChatGPT,472,18,490,Conversation log",
    "45,ChatGPT,1087,230,1317,Conversation log",
    "118,GPT-4,417,276,693,Conversation log",
]
THIRD = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"
)
ROWS_3 = [
    "19440110.0,1722ac82-0a46-4bf0-aa08-89794e7a2b3f,43,GPT-4,906,446,1352,Conversation log",
    "19440161.0,d5983bf9-4b48-497b-892b-a58995247443,2,ChatGPT,36,29,65,Conversation log",
    "19440192.0,a5c69b35-4fbc-45e9-955e-18715e376d74,8,GPT-4,1779,123,1902,Conversation log",
]


def imported(folder: Path, header: str, *lines: str, end: str = "\n") -> list[dict[str, Any]]:
    path = folder / "burst.csv"
    path.write_bytes(end.join([header, *lines]).encode())
    tape = import_trace("burstgpt", [path], folder / "b.tape", force=True).tape
    found: list[dict[str, Any]] = open_tape(tape).read().to_pylist()
    return found


def test_the_first_form_has_neither_sessions_nor_ends(tmp_path: Path) -> None:
    rows = imported(tmp_path, FIRST, *ROWS_1)
    assert [row["arrival_ns"] for row in rows] == [0, 40 * 10**9, 113 * 10**9]
    assert [(r["input_tokens"], r["output_tokens"]) for r in rows] == [
        (472, 18),
        (1087, 230),
        (417, 276),
    ]
    assert [row["model_requested"] for row in rows] == ["ChatGPT", "ChatGPT", "GPT-4"]
    assert {row["session_id"] for row in rows} == {row["end_ns"] for row in rows} == {None}
    assert json.loads(rows[0]["extra"]) == {"log_type": "Conversation log"}
    facts = open_tape(tmp_path / "b.tape").facts
    assert facts["source"]["wall_epoch_known"] is False
    assert facts["wall_epoch_unix_ns"] == 5 * 10**9


def test_the_third_form_s_two_more_columns_are_found_by_name(tmp_path: Path) -> None:
    rows = imported(tmp_path, THIRD, *ROWS_3, end="\r\n")
    assert [row["input_tokens"] for row in rows] == [906, 36, 1779]
    assert rows[0]["session_id"] == "1722ac82-0a46-4bf0-aa08-89794e7a2b3f"
    assert [row["end_ns"] - row["arrival_ns"] for row in rows] == [43 * 10**9, 2 * 10**9, 8 * 10**9]
    assert {row["first_content_ns"] for row in rows} == {None}, "elapsed is no time to first token"


def test_no_output_is_a_failure_that_is_kept(tmp_path: Path) -> None:
    rows = imported(tmp_path, FIRST, "5,ChatGPT,472,0,472,API log", ROWS_1[1])
    assert [row["outcome"] for row in rows] == ["http_error", "ok"]
    assert [row["error_type"] for row in rows] == ["unspecified", None]
    (file,) = open_tape(tmp_path / "b.tape").facts["source"]["files"]
    assert file["rows_without_output"] == 1


def turn(t_s: float, session: str, elapsed_s: str) -> str:
    return f"{t_s},{session},{elapsed_s},GPT-4,9,5,14,Conversation log"


def test_a_turn_waits_for_those_of_its_session_that_had_ended(tmp_path: Path) -> None:
    rows = imported(
        tmp_path,
        THIRD,
        turn(10, "a", "5"),
        turn(12, "b", "3"),
        turn(20.5, "a", "9"),
        turn(21, "a", "2"),  # beside the one before: it waited for what that one waited for
        turn(40, "a", ""),
        turn(50, "a", "1"),  # the one before has no end
        "60,,4,GPT-4,9,5,14,API log",
    )
    ids = [row["request_id"] for row in rows]
    a0, b0, a1, a2, a3, a4, alone = rows
    assert [row["parents"] for row in (a0, b0, alone)] == [None] * 3
    assert (a1["parents"], a1["think_ns"]) == ([ids[0]], 5_500_000_000)
    assert (a2["parents"], a2["think_ns"]) == ([ids[0]], 6_000_000_000)
    assert (a3["parents"], a3["think_ns"]) == ([ids[2], ids[3]], 10_500_000_000)
    assert a4["parents"] == [ids[2], ids[3]]
    assert [row["turn_index"] for row in rows] == [0, 0, 1, 2, 3, 4, None]
    assert alone["session_source"] is None
    assert a3["end_ns"] is None


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9 * 10**18), min_size=1, max_size=30), st.booleans())
def test_seconds_keep_every_digit(
    tmp_path_factory: pytest.TempPathFactory, times: list[int], trim: bool
) -> None:
    texts = [f"{t // 10**9}.{t % 10**9:09d}" for t in times]
    if trim:
        texts = [text.rstrip("0").rstrip(".") for text in texts]
    path = tmp_path_factory.mktemp("burst") / "b.csv"
    path.write_text("\n".join([FIRST, *(f"{text},m,1,2,3,API log" for text in texts)]))
    assert [int(t) for b in burstgpt.read_batches(path) for t in b.time_ns] == times


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("1e9,ChatGPT,1,2,3,API log", "Timestamp is '1e9', not a time in seconds"),
        ("-5,ChatGPT,1,2,3,API log", "Timestamp is '-5', not a time in seconds"),
        ("1700000000000,ChatGPT,1,2,3,API log", "Timestamp is '1700000000000', not a time"),
        ("nan,ChatGPT,1,2,3,API log", "Timestamp is 'nan'"),
        ("5,ChatGPT,-1,2,3,API log", "Request tokens is '-1', not a whole number"),
        ("5,ChatGPT,1", "3 fields where the header has 6"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(tmp_path: Path, row: str, says: str) -> None:
    with pytest.raises(TapeError, match="line 3") as raised:
        imported(tmp_path, FIRST, ROWS_1[0], row)
    assert says in str(raised.value)


def test_a_total_that_differs_is_counted_and_a_missing_time_is_dropped(tmp_path: Path) -> None:
    imported(tmp_path, FIRST, "5,ChatGPT,472,18,999,API log", ",ChatGPT,1,2,3,API log")
    source = open_tape(tmp_path / "b.tape").facts["source"]
    assert (source["read"], source["written"], source["dropped"]) == (2, 1, {"no_value": 1})
    assert source["files"][0]["rows_with_another_total"] == 1
