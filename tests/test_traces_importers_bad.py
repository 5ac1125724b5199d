"""Bad input of every kind: refused or counted, never guessed, no other exception, little memory."""

import gzip
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from test_traces_importers import made
from tokentape.traces.errors import TapeError, UsageError
from tokentape.traces.importers import FORMATS, import_trace
from tokentape.traces.reader import open_tape

READERS = ["azure", "mooncake", "otel", "servegen", "weka"]  # each way of reading that there is
LINES = [  # one request a line
    *("agentic-mooncake", "aiperf", "bailian", "dynamo", "litellm", "mooncake", "ragpulse"),
    "servegen",
]
TABLES = ["azure", "burstgpt"]
MOST_MEMORY_MB = 500
# Python that says a process's own peak; its ru_maxrss would begin at that of the tests, its parent.
PEAK_MB = "int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024"


def rewritten(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


def several(path: Path, form: str) -> list[bytes]:
    """Three lines of a format's requests, with ids of their own where it has any."""
    line = path.read_bytes().rstrip(b"\n")
    if form == "servegen":
        return [line.replace(b"0,", b"%d," % start, 1) for start in (0, 600, 1200)]
    if form in TABLES:
        head, row = line.split(b"\n")
        return [head, row, row, row]
    if form in {"aiperf", "mooncake", "ragpulse"}:
        return [line] * 3
    old = {"bailian": b'"chat_id": 0', "agentic-mooncake": b'"request_id": "a"'}.get(form)
    old = old or (b'"request_id": "a"' if form == "dynamo" else b'"id": "a"')
    names = [old[:-1] + b"1", old[:-1] + b"2", old] if form == "bailian" else None
    names = names or [old[:-1] + digit + b'"' for digit in (b"1", b"2", b"3")]
    return [line.replace(old, name) for name in names]


@pytest.mark.parametrize("form", [*LINES, *TABLES])
@pytest.mark.parametrize("ends", [(b"\n",), (b"\r\n",), (b"\n", b"\r\n"), (b"\r\n", b"\n\n")])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
def test_line_ends_and_a_byte_order_mark_change_nothing(
    tmp_path: Path, form: str, ends: tuple[bytes, ...], bom: bytes
) -> None:
    path = made(tmp_path, form)
    lines = several(path, form)
    path.write_bytes(b"\n".join(lines))
    plain = open_tape(import_trace(form, [path], tmp_path / "plain.tape").tape).read()
    assert plain.num_rows >= 3
    mixed = b"".join(line + ends[n % len(ends)] for n, line in enumerate(lines))
    path.write_bytes(bom + mixed)
    again = open_tape(import_trace(form, [path], tmp_path / "again.tape").tape).read()
    same = [name for name in plain.column_names if name not in {"request_id", "parents"}]
    assert again.select(same).equals(plain.select(same))


def mutations(content: bytes, seed: int) -> bytes:
    """A few bytes changed, cut out, doubled, or replaced by what JSON and CSV readers dislike."""
    chance = random.Random(seed)
    broken = bytearray(content)
    nasty = [b"NaN", b"-1", b"1e999", b"null", b"[]", b"{}", b'"', b"\x00", b"\xff", b"true", b""]
    nasty += [b"9" * 25, b'"x"', b"0.5", b"\n", b",", b"\\", b"-0.0", b"[[[[", b"1" * 400]
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(broken) + 1)
        width = chance.choice([0, 1, 1, 2, 8])
        broken[at : at + width] = chance.choice(
            [chance.choice(nasty), bytes([chance.randrange(256)]), bytes(broken[at : at + 40])]
        )
    return bytes(broken)


@pytest.mark.parametrize("form", FORMATS)
def test_a_damaged_file_is_refused_or_counted_and_raises_nothing_else(
    tmp_path: Path, form: str
) -> None:
    content = made(tmp_path, form).read_bytes() * (2 if form in LINES else 1)
    path = tmp_path / f"{form}-trace.csv"
    survived, said = 0, list[str]()
    for seed in range(300 if form in TABLES else 120):
        path.write_bytes(mutations(content, seed))
        try:
            done = import_trace(form, [path], tmp_path / "t.tape", force=True)
        except (TapeError, UsageError) as error:
            said.append(str(error))
        else:
            survived += 1
            assert done.read == done.written + sum(done.dropped.values())
            assert open_tape(done.tape).rows == done.written
    assert survived > 0 or form == "baseten"  # Parquet checks itself
    assert said
    assert all("\n" not in one and len(one) < 2_000 for one in said)


@pytest.mark.parametrize("form", READERS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_a_line_without_end_is_refused_in_little_memory(
    tmp_path: Path, form: str, packed: bool
) -> None:
    """100 MB on one line; packed, 100 KB that unpack to 100 MB: a bomb."""
    path = tmp_path / ("long-trace.csv.gz" if packed else "long-trace.csv")
    opener = gzip.open if packed else open
    with opener(path, "wb") as file:
        file.write(b'{"timestamp": "')
        for _ in range(100):
            file.write(b"0" * (1 << 20))
    code = (
        "import sys; from pathlib import Path\n"
        "from tokentape.traces.importers import import_trace\n"
        "from tokentape.traces.errors import TapeError\n"
        "try: import_trace(sys.argv[1], [Path(sys.argv[2])], Path(sys.argv[3]))\n"
        "except TapeError as error: print(error)\n"
        f"print({PEAK_MB})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, form, str(path), str(tmp_path / "t.tape")],
        capture_output=True,
        text=True,
        check=True,
    )
    message, memory_mb = done.stdout.splitlines()
    assert str(path) in message
    assert int(memory_mb) < MOST_MEMORY_MB
    assert not (tmp_path / "t.tape").exists()


def test_a_document_that_unpacks_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokentape.traces.importers.reading.MAX_DOCUMENT_BYTES", 1 << 20)
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b" " * (2 << 20) + b"{}"))
    for form in ("weka", "vllm-bench", "otel"):
        with pytest.raises(TapeError, match="larger than 1 MiB; split it"):
            import_trace(form, [path], tmp_path / "t.tape")


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(TapeError, match="no such file"):
        import_trace("azure", [tmp_path / "absent.csv"], tmp_path / "t.tape")
    (tmp_path / "folder").mkdir()
    with pytest.raises(TapeError, match=r"no .* in this folder"):
        import_trace("mooncake", [tmp_path / "folder"], tmp_path / "t.tape")
    path = made(tmp_path, "weka")
    with pytest.raises(UsageError, match="a file is given twice"):
        import_trace("weka", [path, path], tmp_path / "t.tape")


def test_a_prompt_in_an_unknown_key_is_kept_as_its_size_only(tmp_path: Path) -> None:
    row = {"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": [1]}
    row |= {"prompt": "hello", "note": "two words", "text_input": "hi", "model": "gpt-4"}
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(row))
    tape = open_tape(import_trace("mooncake", [path], tmp_path / "m.tape").tape)
    (extra,) = tape.read(["extra"])["extra"].to_pylist()
    assert json.loads(extra) == {
        "prompt_json_bytes": 7,
        "note_json_bytes": 11,
        "text_input_json_bytes": 4,
        "model": "gpt-4",
    }


def test_memory_stays_small_while_a_large_file_is_read(tmp_path: Path) -> None:
    """300,000 rows of Mooncake, 60 MB: what is kept does not grow with the file."""
    path = tmp_path / "m.jsonl"
    with path.open("w") as file:
        for n in range(300_000):
            ids = ", ".join(map(str, range(n, n + 20)))
            file.write(
                f'{{"timestamp": {n}, "input_length": 10000, "output_length": 5, '
                f'"hash_ids": [{ids}]}}\n'
            )
    code = (
        "import sys; from pathlib import Path\n"
        "from tokentape.traces.importers import import_trace\n"
        "print(import_trace('mooncake', [Path(sys.argv[1])], Path(sys.argv[2])).written)\n"
        f"print({PEAK_MB})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "t.tape")],
        capture_output=True,
        text=True,
        check=True,
    )
    written, memory_mb = map(int, done.stdout.split())
    assert written == 300_000
    assert memory_mb < MOST_MEMORY_MB
