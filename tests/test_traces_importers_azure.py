"""Azure traces: every digit of a time survives, every bad line is named."""

import csv
import gzip
import itertools
from calendar import timegm
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokentape.traces.errors import TapeError
from tokentape.traces.importers import azure, csv_text, import_trace
from tokentape.traces.reader import open_tape

CODE = Path(__file__).parents[2] / "shared/data/azure/AzureLLMInferenceTrace_code.csv"
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
ROWS_2023 = [
    "2023-11-16 18:17:03.9799600,4808,10",
    "2023-11-16 18:17:04.0319601,3180,8",
    "2023-11-16 18:17:04.0781490,110,27",
]

ticks = st.integers(0, (2**63 - 1) // 100)  # 100 ns since 1970, as far as 64 bits of ns reach: 2262
tokens = st.integers(0, 2**31 - 1)


def trace(folder: Path, *lines: str, header: str = HEADER, end: str = "") -> Path:
    path = folder / "trace.csv"
    path.write_bytes(("\r\n".join([header, *lines]) + end).encode())
    return path


def read(path: Path) -> tuple[list[int], list[int], list[int]]:
    batches = list(azure.read_batches(path))
    return (
        [int(t) for b in batches for t in b.time_ns],
        [n for b in batches for n in b.columns["input_tokens"].to_pylist()],
        [n for b in batches for n in b.columns["output_tokens"].to_pylist()],
    )


def refusal(path: Path) -> str:
    with pytest.raises(TapeError) as raised:
        list(azure.read_batches(path))
    assert str(path) in str(raised.value)
    return str(raised.value)


def oracle_ns(text: str) -> int:
    """Independent of the importer: calendar arithmetic on the seconds, digits for the rest."""
    seconds = timegm(datetime.fromisoformat(text[:19]).timetuple())
    digits = text[20:].removesuffix("+00:00") if len(text) > 19 else ""
    return seconds * 10**9 + int(digits.ljust(9, "0") or 0)


def test_crlf_no_final_newline_and_seven_digits_are_read_exactly(tmp_path: Path) -> None:
    times, inputs, outputs = read(trace(tmp_path, *ROWS_2023))
    assert times == [1700158623979960000, 1700158624031960100, 1700158624078149000]
    assert inputs == [4808, 3180, 110]
    assert outputs == [10, 8, 27]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(ticks, tokens, tokens), min_size=1), st.booleans(), st.booleans())
def test_any_instant_survives_in_either_year_s_spelling(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[int, int, int]],
    zoned: bool,
    crlf: bool,
) -> None:
    lines = []
    for tick, n_in, n_out in rows:
        second, rest = divmod(tick, 10**7)
        stamp = datetime.fromtimestamp(second, tz=UTC).strftime("%Y-%m-%d %H:%M:%S")
        fraction = f"{rest // 10:06d}+00:00" if zoned else f"{rest:07d}"
        lines.append(f"{stamp}.{fraction},{n_in},{n_out}")
    path = tmp_path_factory.mktemp("azure") / "trace.csv"
    path.write_bytes(("\r\n" if crlf else "\n").join([HEADER, *lines]).encode())
    step = 10 if zoned else 1
    expected = [t // step * step * 100 for t, _, _ in rows]
    assert read(path) == (expected, [n for _, n, _ in rows], [n for _, _, n in rows])


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("2024-05-10 00:00:00.009930+00:00", 9_930_000),
        ("2024-05-10T00:00:00.009930Z", 9_930_000),
        ("2024-05-10 00:00:00+00:00", 0),
        ("2024-05-10 00:00:00.123456789", 123_456_789),
    ],
)
def test_other_spellings_of_utc_are_read(tmp_path: Path, text: str, nanoseconds: int) -> None:
    times, _, _ = read(trace(tmp_path, f"{text},1,2"))
    assert times == [1715299200 * 10**9 + nanoseconds]


def test_columns_are_found_by_name_and_images_are_kept(tmp_path: Path) -> None:
    header = "GeneratedTokens,Region,NumImages,TIMESTAMP,ContextTokens"
    (batch,) = azure.read_batches(
        trace(tmp_path, "7,west,2,2024-10-15 00:00:00.5,300", header="\ufeff" + header)
    )
    assert {name: column.to_pylist() for name, column in batch.columns.items()} == {
        "input_tokens": [300],
        "output_tokens": [7],
        "image_count": [2],
    }


def test_a_packed_file_is_read_like_its_contents(tmp_path: Path) -> None:
    plain = trace(tmp_path, *ROWS_2023)
    packed = tmp_path / "trace.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read(packed) == read(plain)


def test_a_damaged_packed_file_is_refused(tmp_path: Path) -> None:
    packed = tmp_path / "trace.csv.gz"
    packed.write_bytes(gzip.compress(trace(tmp_path, *ROWS_2023 * 50).read_bytes())[:-20])
    assert "fetch it again" in refusal(packed)


def test_batches_number_their_rows_through_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_text, "BLOCK_BYTES", 256)
    path = trace(tmp_path, *ROWS_2023 * 40)
    batches = list(azure.read_batches(path))
    assert len(batches) > 5
    assert np.concatenate([b.row for b in batches]).tolist() == list(range(120))
    assert read(path)[0][:3] * 40 == read(path)[0]


def test_rows_out_of_order_are_sorted_and_rows_without_output_are_kept(tmp_path: Path) -> None:
    rows = [ROWS_2023[2], "2023-11-16 18:17:03.0,55,0", ROWS_2023[0]]
    summary = import_trace("azure", [trace(tmp_path, *rows, end="\r\n")], tmp_path / "a.tape")
    tape = open_tape(summary.tape)
    table = tape.read(["arrival_ns", "scheduled_ns", "input_tokens", "output_tokens", "outcome"])
    assert table["input_tokens"].to_pylist() == [55, 4808, 110]
    assert table["arrival_ns"].to_pylist() == [0, 979_960_000, 1_078_149_000]
    assert table["scheduled_ns"] == table["arrival_ns"]
    assert table["outcome"].to_pylist() == [None, "ok", "ok"]
    assert tape.facts["wall_epoch_unix_ns"] == 1700158623 * 10**9
    assert tape.facts["source"]["files"][0]["rows_without_output"] == 1
    assert summary.written == 3


def test_a_row_that_lacks_a_value_is_dropped_and_counted(tmp_path: Path) -> None:
    rows = [ROWS_2023[0], "2023-11-16 18:17:04.0319600,,8", ",1,2", ROWS_2023[2]]
    summary = import_trace("azure", [trace(tmp_path, *rows)], tmp_path / "a.tape")
    assert (summary.read, summary.written, summary.dropped) == (4, 2, {"no_value": 2})
    source = open_tape(summary.tape).facts["source"]
    assert source["read"] == source["written"] + sum(source["dropped"].values())


def test_two_files_make_one_tape_with_the_earliest_arrival_as_epoch(tmp_path: Path) -> None:
    late, early = tmp_path / "late.csv", tmp_path / "early.csv"
    late.write_text("\n".join([HEADER, *ROWS_2023]))
    early.write_text(f"{HEADER}\n2023-11-16 18:17:03.5,1,2")
    summary = import_trace("azure", [late, early], tmp_path / "a.tape")
    table = open_tape(summary.tape).read(["arrival_ns", "input_tokens"])
    assert table["arrival_ns"].to_pylist() == [0, 479_960_000, 531_960_100, 578_149_000]
    assert table["input_tokens"].to_pylist() == [1, 4808, 3180, 110]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("2023-11-16 18:17:04.5,549", "line 5: 2 fields where the header has 3 (cut off?)"),
        ("2023-11-16 18:17:04.5,549,1x3", "line 5: GeneratedTokens is '1x3', not a whole number"),
        ("2023-11-16 18:17:04.5,5.0,1", "line 5: ContextTokens is '5.0', not a whole number"),
        ("2023-11-16 18:17:04.5,-5,1", "line 5: ContextTokens is '-5', not a whole number"),
        ("2023-11-16 18:17:04.5,2147483648,1", "line 5: ContextTokens is '2147483648', too large"),
        ("1700158623.97,549,1", "line 5: TIMESTAMP is '1700158623.97', not a UTC time"),
        ("2023-11-16 18:17:04+02:00,5,1", "line 5: TIMESTAMP is '2023-11-16 18:17:04+02:00', not"),
        ("2023-13-16 18:17:04.5,549,1", "line 5: TIMESTAMP is '2023-13-16 18:17:04.5', no such"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(tmp_path: Path, row: str, says: str) -> None:
    message = refusal(trace(tmp_path, ROWS_2023[0], "", ROWS_2023[1], row))
    assert says in message
    assert "remove the line" in message


def test_a_bad_line_far_into_the_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_text, "BLOCK_BYTES", 256)
    good = ROWS_2023 * 40
    assert "line 122: 1 fields" in refusal(trace(tmp_path, *good, "cut"))
    assert "line 122: ContextTokens is 'x'" in refusal(
        trace(tmp_path, *good, "2023-11-16 18:17:04,x,1", *good)
    )


def test_a_missing_column_is_named_with_what_was_found(tmp_path: Path) -> None:
    message = refusal(trace(tmp_path, "1,2", header="Timestamp,ContextTokens"))
    assert 'no column TIMESTAMP, GeneratedTokens; found "Timestamp", "ContextTokens"' in message


@pytest.fixture(scope="module")
def code_rows() -> list[dict[str, str]]:
    if not CODE.exists():
        pytest.skip("the Azure code trace is not beside this checkout")
    with CODE.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_azure_code_trace_is_imported_whole(
    tmp_path: Path, code_rows: list[dict[str, str]]
) -> None:
    summary = import_trace("azure", [CODE], tmp_path / "code.tape")
    tape = open_tape(summary.tape)
    assert (summary.read, summary.written, summary.dropped) == (8_819, 8_819, {})
    assert tape.rows == 8_819
    epoch_ns = tape.facts["wall_epoch_unix_ns"]
    assert epoch_ns == oracle_ns("2023-11-16 18:17:03.9799600")
    table = tape.read(["arrival_ns", "input_tokens", "output_tokens", "request_id"])
    arrivals = table["arrival_ns"].to_pylist()
    assert [epoch_ns + a for a in arrivals] == [oracle_ns(r["TIMESTAMP"]) for r in code_rows]
    for column, name in (("input_tokens", "ContextTokens"), ("output_tokens", "GeneratedTokens")):
        assert table[column].to_pylist() == [int(row[name]) for row in code_rows]
    ids = table["request_id"].to_pylist()
    assert all(a < b for a, b in itertools.pairwise(ids))
    assert tape.facts["arrival_resolution_ns"] == np.diff(arrivals).min()
