"""The live view: drawn in a process of its own, true to its figures, and gone without a trace."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from replay_server import engine_like, serve
from tokentape.cli.drive import standing
from tokentape.cli.panel import drawn
from tokentape.replay import progress, verdict
from tokentape.replay.progress import Progress, added
from tokentape.traces.reader import open_tape
from tokentape.traces.writer import TapeWriter

TTFT = "gen_ai_server_time_to_first_token_seconds"
SERVED = {
    f'{TTFT}_bucket{{"model": "m", "le": "0.1"}}': 60.0,
    f'{TTFT}_bucket{{"model": "m", "le": "0.2"}}': 98.0,
    f'{TTFT}_bucket{{"model": "m", "le": "+Inf"}}': 100.0,
    f'{TTFT}_count{{"model": "m"}}': 100.0,
    f'{TTFT}_sum{{"model": "m"}}': 11.0,
    'tokentape_requests_total{"outcome": "ok"}': 97.0,
    'tokentape_requests_total{"outcome": "timeout"}': 3.0,
}


def state(**changes: object) -> Progress:
    known: dict[str, object] = {"elapsed_s": 10.0, "total": 400, "sent": 120, "done": 100}
    known |= {"in_flight": 20, "late": 0, "worst_late_ms": 0.4, "span_s": 75.0, "served": SERVED}
    return Progress(**(known | changes))  # type: ignore[arg-type]


def text_of(now: Progress) -> str:
    console = Console(width=120, force_terminal=False)
    with console.capture() as got:
        console.print(drawn(now))
    return got.get()


def test_the_panel_says_what_is_known_and_bounds_what_is_not() -> None:
    text = text_of(state(late=2, late_causes={"scheduler": 2}, worst_late_ms=3.5))
    for said in (
        "100 of 400",
        "0:01:05 of 0:01:15",
        "mean 110.0 ms, p50 at most 100 ms, p99 beyond the scale",
        "2 by over 1 ms (2 by scheduler), worst 3.5 ms",
        "3 timeout; 1.7 % of the requests left late",
        "no request has ended",
    ):
        assert said in text, (said, text)


def test_a_run_without_trouble_is_said_to_have_none() -> None:
    text = text_of(state(served={}))
    assert "nothing speaks against this run" in text and "all sent" not in text
    assert "all sent" in text_of(state(elapsed_s=80.0))
    assert verdict.FAILED_SHARE[0] == progress.FAILED_SHARE


def test_what_a_predecessor_moved_is_told_beside_our_own_lateness_and_is_no_fault_of_ours() -> None:
    moved = state(moved=70, most_moved_s=2.25)
    assert "70 moved by a predecessor, by 2.2 s at most" in text_of(moved)
    assert "moved by a predecessor" in standing(moved)
    assert "moved" not in text_of(state()) + standing(state())
    assert not any("late" in doubt for doubt in moved.doubts())
    both = added([moved, state(moved=5, most_moved_s=9.0)])
    assert (both.moved, both.most_moved_s) == (75, 9.0)


def test_a_reply_that_was_left_as_its_client_left_it_is_no_failure() -> None:
    left = {'tokentape_requests_total{"outcome": "client_abort"}': 50.0}
    assert "client_abort" not in text_of(state(served=SERVED | left))


def test_a_quantile_is_the_bound_of_its_bucket() -> None:
    now = state()
    bounds = [now.at_most_s("TTFT", q) for q in (0.5, 0.6, 0.61, 0.98, 0.99)]
    assert bounds == [0.1, 0.1, 0.2, 0.2, None]
    assert now.at_most_s("TPOT", 0.5) is None


def test_what_several_workers_say_is_added_up_by_cause() -> None:
    causes: list[Mapping[str, int]] = [{"scheduler": 1}, {"scheduler": 2, "write": 4}, {}]
    both = added([state(late_causes=each) for each in causes])
    assert both.late_causes == {"scheduler": 3, "write": 4}


SENDER = """
import json, os, signal, sys, time
from tokentape.cli.panel import live_panel
from tokentape.replay.progress import Progress
with live_panel() as show:
    show(Progress(**json.loads(sys.argv[1])))
    if sys.argv[2] == "stop":
        raise KeyboardInterrupt
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["well", "stop", "killed"])
def test_the_terminal_gets_its_cursor_back_however_the_sender_ends(end: str) -> None:
    ours, theirs = pty.openpty()
    sender = subprocess.Popen(
        [sys.executable, "-c", SENDER, json.dumps(vars(state())), end],
        stderr=theirs,
        env=os.environ | {"TERM": "xterm-256color"},
    )
    os.close(theirs)
    seen = b""
    try:
        while data := os.read(ours, 65536):
            seen += data
    except OSError:  # all writers have gone: Linux says EIO
        pass
    os.close(ours)
    sender.wait(20)
    assert b"100 of 400" in re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", seen)
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")


def test_ctrl_c_on_a_terminal_ends_the_panel_seals_the_tape_and_says_the_verdict(
    tmp_path: Path,
) -> None:
    writer = TapeWriter.create(tmp_path / "s.tape", role="import", command=[], options={}, facts={})
    for n in range(200):
        row = {"request_id": n.to_bytes(16), "arrival_ns": n * 300_000_000, "outcome": "ok"}
        writer.append(row | {"input_tokens": 20, "output_tokens": 5})
    writer.close()
    ours, theirs = pty.openpty()
    with serve(engine_like) as server:
        words = ["replay", str(tmp_path / "s.tape"), "--to", server.url]
        words += ["--tape", str(tmp_path / "r.tape"), "--no-calibrate"]
        running = subprocess.Popen(
            [sys.executable, "-m", "tokentape", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm-256color"},
        )
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # all writers have gone: Linux says EIO
            while data := os.read(ours, 65536):
                if b"in flight" not in seen and b"in flight" in seen + data:
                    running.send_signal(signal.SIGINT)
                seen += data
        os.close(ours)
        said, _ = running.communicate(timeout=20)
    assert running.returncode == 130
    assert b"stopped early" in said and b"run: " in said
    assert 0 < open_tape(tmp_path / "r.tape").rows < 200
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l") and b"Traceback" not in seen
