"""What holds for every format: the way in, the ids, and that no half tape is left behind."""

import hashlib
import inspect
import itertools
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokentape.cli import record
from tokentape.traces.errors import TapeError, UsageError
from tokentape.traces.importers import FORMATS, NAMES, import_trace
from tokentape.traces.importers.rows import request_ids
from tokentape.traces.reader import open_tape

BAILIAN_ROW = (
    '{"chat_id": 0, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 9, '
    '"output_length": 2, "type": "text", "turn": 1, "hash_ids": [7]}\n'
)
BURSTGPT_ROWS = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
)
RAGPULSE_ROW = (
    '{"timestamp": "82", "input_length": 70, "output_length": 2, "hash_ids": {"sys_prompt": [1], '
    '"passages_ids": [], "history": [], "web_search": [], "user_input": [2]}, "session_id": "s"}\n'
)
SERVEGEN_ROW = "0,0.02,1.0,Gamma,1.0,50.0\n"
WEKA_FILE = (
    '{"id": "t", "models": [], "block_size": 64, "hash_id_scope": "local", "requests": [{"t": 0.0, '
    '"type": "n", "model": "m", "in": 70, "out": 2, "hash_ids": [1]}]}\n'
)
AZURE_ROWS = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n"
MOONCAKE_ROW = '{"timestamp": 0, "input_length": 9, "output_length": 2, "hash_ids": [7]}\n'
AGENTIC_ROW = (
    '{"request_id": "a", "session_id": "s", "input_length": 9, "output_length": 2, '
    '"hash_ids": [7], "timestamp": 0, "wait_for": []}\n'
)
AIPERF_ROW = (
    '{"metadata": {"request_start_ns": 1759813207532900363, "request_end_ns": 1759813207838764604},'
    '"metrics": {"input_sequence_length": {"value": 9, "unit": "tokens"}, '
    '"output_sequence_length": {"value": 2, "unit": "tokens"}}, "error": null}\n'
)
DYNAMO_ROW = (
    '{"timestamp": 5, "event": {"schema": "dynamo.request.trace.v1", "event_type": "request_end", '
    '"event_time_unix_ms": 1759813207838, "request": {"request_id": "a", "input_tokens": 9, '
    '"output_tokens": 2, "request_received_ms": 1759813207532}}}\n'
)
LITELLM_ROW = (
    '{"id": "a", "call_type": "acompletion", "startTime": 1759813207.5, "endTime": 1759813208.5, '
    '"prompt_tokens": 9, "completion_tokens": 2, "status": "success"}\n'
)
OTEL_FILE = (
    '{"spans": [{"trace_id": "t", "span_id": "a", "start_time": "2026-02-25T10:00:00.000000", '
    '"end_time": "2026-02-25T10:00:02", "attributes": {"gen_ai.operation.name": "chat"}}]}\n'
)
VLLM_FILE = (
    '{"start_times": [5.0], "input_lens": [9], "output_lens": [2], "ttfts": [0.5], '
    '"itls": [[0.1]], "errors": [""]}\n'
)
MADE = {
    "agentic-mooncake": AGENTIC_ROW,
    "aiperf": AIPERF_ROW,
    "baseten": "",  # binary: see made()
    "dynamo": DYNAMO_ROW,
    "litellm": LITELLM_ROW,
    "otel": OTEL_FILE,
    "vllm-bench": VLLM_FILE,
    "azure": AZURE_ROWS,
    "bailian": BAILIAN_ROW,
    "burstgpt": BURSTGPT_ROWS,
    "mooncake": MOONCAKE_ROW,
    "ragpulse": RAGPULSE_ROW,
    "servegen": SERVEGEN_ROW,
    "weka": WEKA_FILE,
}
LICENCES = dict.fromkeys(MADE, "the user's own") | {
    "azure": "CC-BY",
    "bailian": "Apache",
    "burstgpt": "CC-BY",
    "mooncake": "Apache",
    "ragpulse": "MIT",
    "servegen": "Apache",
    "weka": "Apache",
}
DATASET = '{"0": {"input_tokens": "{3: 0.5, 4: 0.5}", "output_tokens": "{1: 1.0}"}}'


def made(folder: Path, format_name: str) -> Path:
    """A small file of a format, in the name that its companions go by."""
    path = folder / f"{format_name}-trace.csv"
    path.write_text(MADE[format_name])
    if format_name == "baseten":
        row = {"timestamp_start_unix_ms": 1759813207532, "input_tokens": 9, "output_tokens": 2}
        pq.write_table(pa.Table.from_pylist([row]), path)
    if format_name == "servegen":
        (folder / f"{format_name}-dataset.json").write_text(DATASET)
    return path


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="nonsense: unknown trace format; known are agentic-mooncake, aiperf"
    ):
        import_trace("nonsense", [tmp_path / "absent"], tmp_path / "t.tape")


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_file_tells_which_format_it_looks_like(tmp_path: Path, format_name: str) -> None:
    path = made(tmp_path, format_name)
    with pytest.raises(UsageError, match=f"{path.name} looks like {format_name};"):
        import_trace("nonsense", [path], tmp_path / "t.tape")
    other = "azure" if format_name != "azure" else "mooncake"
    with pytest.raises(TapeError, match=f"the file looks like {format_name}$"):
        import_trace(other, [path], tmp_path / "t.tape")


def test_a_file_like_none_is_given_no_name(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"\x00\xff nothing of the kind\n")
    with pytest.raises(UsageError, match="nonsense: unknown trace format; known"):
        import_trace("nonsense", [path], tmp_path / "t.tape")


@pytest.mark.parametrize("format_name", FORMATS)
def test_facts_name_the_file_its_digest_and_its_licence(tmp_path: Path, format_name: str) -> None:
    path = made(tmp_path, format_name)
    command = ["import", format_name, str(path)]
    summary = import_trace(format_name, [path], tmp_path / "t.tape", command=command)
    facts = open_tape(summary.tape).facts
    assert facts["role"] == "import"
    assert facts["command"] == command
    assert facts["source"]["licence"].startswith(LICENCES[format_name])
    (file,) = facts["source"]["files"]
    assert file["name"] == path.name
    assert file["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert file["bytes"] == path.stat().st_size
    assert file["read"] == file["written"] == facts["source"]["read"] == summary.written
    assert summary.written == (1 if format_name != "servegen" else 13)


@pytest.mark.parametrize("format_name", FORMATS)
def test_the_same_file_gives_the_same_rows(tmp_path: Path, format_name: str) -> None:
    path = made(tmp_path, format_name)
    first, second = (
        open_tape(import_trace(format_name, [path], tmp_path / f"{n}.tape").tape) for n in (1, 2)
    )
    assert first.read().equals(second.read())
    assert first.facts["tape_id"] != second.facts["tape_id"]


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("content", ["", "\n\n", "TIMESTAMP,ContextTokens,GeneratedTokens\n"])
def test_a_file_with_no_request_makes_no_tape(
    tmp_path: Path, format_name: str, content: str
) -> None:
    path = tmp_path / "none-trace.csv"
    path.write_text(content)
    with pytest.raises(TapeError, match=r"none-trace\.csv"):
        import_trace(format_name, [path], tmp_path / "t.tape")
    assert not (tmp_path / "t.tape").exists()


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_missing_file_is_named(tmp_path: Path, format_name: str) -> None:
    with pytest.raises(TapeError, match=r"absent\.csv: no such file"):
        import_trace(format_name, [tmp_path / "absent.csv"], tmp_path / "t.tape")


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_bad_last_line_makes_no_tape_and_spares_the_old_one(
    tmp_path: Path, format_name: str
) -> None:
    good = import_trace(format_name, [made(tmp_path, format_name)], tmp_path / "t.tape")
    bad = tmp_path / "bad-trace.csv"
    bad.write_bytes(made(tmp_path, format_name).read_bytes() * 3 + b"cut")
    with pytest.raises(TapeError, match=r"bad-trace\.csv(, line|: not JSON|: not a Parquet)"):
        import_trace(format_name, [bad], good.tape, force=True)
    assert open_tape(good.tape).rows == good.written


def test_an_old_tape_goes_only_with_force(tmp_path: Path) -> None:
    path, tape = made(tmp_path, "azure"), tmp_path / "t.tape"
    import_trace("azure", [path], tape)
    with pytest.raises(TapeError, match="--force"):
        import_trace("azure", [path], tape)
    assert import_trace("azure", [path], tape, force=True).written == 1


def test_two_mooncake_files_cannot_share_a_tape(tmp_path: Path) -> None:
    path = made(tmp_path, "mooncake")
    with pytest.raises(UsageError, match="one file"):
        import_trace("mooncake", [path, path], tmp_path / "t.tape")


def test_a_disk_that_fills_leaves_no_half_tape(tmp_path: Path) -> None:
    path, tape = tmp_path / "big.jsonl", tmp_path / "t.tape"
    path.write_text(MOONCAKE_ROW * 5_000)
    code = (
        "import sys; from pathlib import Path\n"
        "from tokentape.traces.importers import import_trace\n"
        "from tokentape.traces.errors import TapeError\n"
        "try: import_trace('mooncake', [Path(sys.argv[1])], Path(sys.argv[2]))\n"
        "except TapeError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tape)],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000)),
    )
    assert "cannot be written" in done.stdout
    assert not tape.exists()


def test_progress_is_told_the_rows_written(tmp_path: Path) -> None:
    told: list[int] = []
    import_trace("azure", [made(tmp_path, "azure")], tmp_path / "t.tape", progress=told.append)
    assert told == [1]


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**60), min_size=1, unique=True), st.integers(0, 2**31))
def test_ids_are_in_order_of_time_and_no_two_are_alike(times: list[int], first_row: int) -> None:
    times.sort()
    rows = np.arange(first_row, first_row + len(times), dtype=np.int64)
    ids = request_ids(np.array(times, dtype=np.int64), rows, "ab" * 32).to_pylist()
    assert all(i.version == 7 and i.variant == "specified in RFC 4122" for i in ids)
    assert [i.int >> 80 for i in ids] == [t // 1_000_000 for t in times]
    assert len(set(ids)) == len(ids)
    apart = [
        (a, b) for a, b in itertools.pairwise(zip(times, ids, strict=True)) if b[0] - a[0] > 250
    ]
    assert all(a[1] < b[1] for a, b in apart)


def test_two_files_never_give_one_id(tmp_path: Path) -> None:
    ids = set()
    for number in range(10):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(MOONCAKE_ROW + json.dumps({"number": number, **json.loads(MOONCAKE_ROW)}))
        tape = import_trace("mooncake", [path], tmp_path / "t.tape", force=True).tape
        ids |= set(open_tape(tape).read(["request_id"])["request_id"].to_pylist())
    assert len(ids) == 20


def test_the_help_of_import_names_every_format() -> None:
    help_text = inspect.get_annotations(record.import_)["trace_format"].__metadata__[0].help
    assert re.findall(r"[a-z0-9-]{3,}", help_text) == NAMES


def test_the_page_on_formats_tells_of_every_one() -> None:
    page = (Path(__file__).parents[1] / "docs/formats.md").read_text()
    told = re.findall(r"^\| `([a-z0-9-]+)` \|", page.partition("## Out")[0], re.MULTILINE)
    assert sorted(told) == NAMES
