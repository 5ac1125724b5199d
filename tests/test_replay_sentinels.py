"""Fixed questions before and after a run: an answer that changes, or that never comes, is said."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from replay_server import Script, Seen, Step, engine_like, plain, serve
from tokentape.analysis.compare import compare
from tokentape.analysis.session import connect
from tokentape.replay.options import ReplayOptions
from tokentape.replay.run import RunSummary, make_plan, run_plan
from tokentape.replay.sentinels import QUESTIONS
from tokentape.traces.reader import open_tape
from tokentape.traces.writer import TapeWriter


def asked(seen: Seen) -> bool:
    return bool(seen.body) and seen.json.get("temperature") == 0


def answering(text: Any) -> Script:
    """An engine that answers sentinels with `text(number)`, and else as usual."""
    numbers = itertools.count()

    def script(seen: Seen) -> Sequence[Step]:
        if not asked(seen):
            return engine_like(seen)
        found = text(next(numbers))
        if isinstance(found, int):
            return plain(found, {})
        message = {"text": found, "message": {"content": found}}
        return plain(200, {"choices": [message]})

    return script


def run(tape: Path, script: Script) -> tuple[RunSummary, list[Seen]]:
    source = tape.with_suffix(".source")
    writer = TapeWriter.create(source, role="import", command=[], options={}, facts={})
    for n in range(4):
        row = {"request_id": n.to_bytes(16), "arrival_ns": n * 20_000_000}
        writer.append(row | {"input_tokens": 20, "output_tokens": 3})
    writer.close()
    with serve(script) as server:
        wanted = ReplayOptions(source=source, to=server.url, tape=tape, sentinels=True)
        return run_plan(make_plan(wanted)), [s for s in server.seen if asked(s)]


def test_the_same_answers_before_and_after_say_nothing_against_a_run(tmp_path: Path) -> None:
    texts = ["Paris", "7", "return n", "100"]
    summary, seen = run(tmp_path / "a.tape", answering(lambda n: texts[n % 4]))
    assert len(seen) == 2 * len(QUESTIONS)
    assert [s.json.get("prompt") for s in seen] == [*QUESTIONS, *QUESTIONS]
    assert all(s.json["stream"] is False and s.json["max_tokens"] > 0 for s in seen)
    tape = open_tape(tmp_path / "a.tape")
    assert "sentinel" not in summary.verdict.text() and tape.rows == 4  # no row of the run
    kept = tape.facts["sentinels"]
    assert kept["before"] == kept["after"] and len({a["digest"] for a in kept["before"]}) == 4
    assert "Paris" not in json.dumps(tape.facts)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (lambda n: str(n) if n in (1, 5) else "x", "1 of 4 sentinels were answered otherwise"),
        (lambda n: 500 if n == 6 else "x", "1 of 4 sentinels had no answer after it: status 500"),
        (lambda n: "", "4 of 4 sentinels had no answer before it: no text"),
    ],
)
def test_answers_that_change_or_do_not_come_make_a_run_suspect(
    tmp_path: Path, text: Any, said: str
) -> None:
    summary, _ = run(tmp_path / "a.tape", answering(text))
    assert summary.verdict.level != "valid"
    assert said in summary.verdict.text()


def test_compare_says_when_two_candidates_answer_differently(tmp_path: Path) -> None:
    for name, texts in (("a", "wxyz"), ("b", "wxyq"), ("c", "wxyz")):
        run(tmp_path / f"{name}.tape", answering(lambda n, texts=texts: texts[n % 4]))

    def warned(*names: str) -> list[str]:
        with connect([tmp_path / f"{n}.tape" for n in names]) as session:
            found = compare(session, session.labels[:1], session.labels[1:])
            return [w for w in found.warnings if "sentinel" in w]

    assert warned("a", "c") == []
    (said,) = warned("a", "b")
    assert said.startswith("1 of 4 sentinels were answered differently")
