"""What differs between a run and its tape is found, with its size, and nothing else is."""

from pathlib import Path
from typing import Any

import pytest

from rows import MS, make_tape, streamed_row
from tokentape.replay.fidelity import Fidelity, fidelity
from tokentape.traces.errors import TapeError
from tokentape.traces.reader import open_tape

N = 100
SAMPLE = Path(__file__).parents[1] / "src" / "tokentape" / "sample"


def tapes(folder: Path, speed: int = 1, **changed: Any) -> Fidelity:
    """A tape of N requests, 10 ms apart, and its run; `changed` are columns by request number."""
    recorded = [streamed_row(10 * n, request_id=n.to_bytes(16)) for n in range(N)]
    source = open_tape(make_tape(folder / "source", recorded))
    rows = []
    for n in range(N):
        row = streamed_row(10 * n // speed, source_request_id=n.to_bytes(16), copy_index=0)
        rows.append(row | {name: of(n, row[name]) for name, of in changed.items()})
    run = make_tape(
        folder / "run",
        rows,
        role="replay",
        source={"tape_id": source.facts["tape_id"], "path": str(source.path)},
    )
    facts = (
        (run / "tape.json")
        .read_text()
        .replace('"options": {}', f'"options": {{"speed": "{speed}"}}')
    )
    (run / "tape.json").write_text(facts)
    return fidelity(open_tape(run))


def differing(found: Fidelity) -> dict[str, float]:
    return {d.name: d.value for d in found.found if d.differs}


def test_a_run_that_is_its_tape_differs_in_nothing(tmp_path: Path) -> None:
    found = tapes(tmp_path)
    assert differing(found) == {}
    assert found.pairs == N and found.line == "as on the tape"
    assert found.unknown == ["prefix reuse"]


def test_a_faster_run_is_held_against_the_tape_at_its_speed(tmp_path: Path) -> None:
    found = tapes(tmp_path, speed=2)
    assert differing(found) == {}
    [arrivals] = [d for d in found.found if d.name == "arrivals"]
    assert arrivals.value == 0


def test_a_request_that_leaves_its_place_is_told_in_ns(tmp_path: Path) -> None:
    late = dict.fromkeys((40, 41), 30 * MS)
    found = tapes(tmp_path, send_ns=lambda n, at: at + late.get(n, 0))
    assert differing(found)["arrivals"] == 30 * MS
    assert "p99 30.00 ms" in found.line


def test_copies_say_nothing_of_the_arrivals_that_were_recorded(tmp_path: Path) -> None:
    found = tapes(
        tmp_path,
        source_request_id=lambda n, _: (n - n % 2).to_bytes(16),
        copy_index=lambda n, _: n % 2,
        send_ns=lambda n, at: at + 5 * MS * (n % 2),
    )
    [arrivals] = [d for d in found.found if d.name == "arrivals"]
    assert arrivals.text == "p99 0.00 ms from the tape's instants, CV of gaps 0, recorded 0"


def test_a_slower_candidate_has_more_in_flight_than_the_tape(tmp_path: Path) -> None:
    found = tapes(tmp_path, end_ns=lambda _, at: at + 4 * MS)  # 9 ms instead of 5
    assert differing(found) == {"concurrency": pytest.approx(4 / 5, abs=0.05)}


def test_other_lengths_are_told_as_a_share_of_the_tokens(tmp_path: Path) -> None:
    found = tapes(
        tmp_path,
        input_tokens=lambda n, t: t + (n < 50),
        output_tokens=lambda n, t: t - (n == 0),
    )
    assert differing(found) == {"input tokens": pytest.approx(50 / (10 * N))}
    assert "50 of 100 requests differ" in found.line
    [outputs] = [d for d in found.found if d.name == "output tokens"]
    assert outputs.value == pytest.approx(1 / (3 * N)) and not outputs.differs


def test_failures_that_the_tape_has_not_are_told(tmp_path: Path) -> None:
    found = tapes(tmp_path, outcome=lambda n, was: "http_error" if n < 20 else was)
    assert differing(found)["outcomes"] == pytest.approx(0.2)
    assert "http_error 20.0%, recorded 0.0%" in found.line


def test_another_stream_of_the_same_tokens_is_told(tmp_path: Path) -> None:
    found = tapes(tmp_path, off_us=lambda _, __: [1000, 1001, 1002], ntok=lambda _, __: [1, 1, 1])
    assert differing(found)["stream shape"] == 1.0


def test_a_real_run_of_a_real_capture_is_as_on_the_tape() -> None:
    found = fidelity(open_tape(SAMPLE / "run.tape"), SAMPLE / "capture.tape")
    assert found.pairs == 467 and differing(found) == {}
    [reuse] = [d for d in found.found if d.name == "prefix reuse"]
    assert reuse.value < 0.0002 and "recorded 9.1%" in reuse.text


def test_a_tape_that_is_no_run_or_has_another_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TapeError, match="is not a run of replay"):
        fidelity(open_tape(make_tape(tmp_path / "capture", [streamed_row()])))
    with pytest.raises(TapeError, match=r"is not the tape that .* name it: --source"):
        fidelity(open_tape(SAMPLE / "run.tape"), SAMPLE / "run.tape")
