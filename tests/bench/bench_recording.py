"""Cost of recording: CPU per event in the hot process and in the writer, and bytes on disk.

    ./run bench recording [--requests 2000] [--events 250]

The control is the same loop with `list.append` in place of the recorder.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

from tokentape.traces.reader import open_tape
from tokentape.traces.recording import Recorder

TEXT = (
    b'data: {"id":"cmpl-7f4e2a11","object":"text_completion","created":1795331367,"model":"m",'
    b'"choices":[{"index":0,"text":" dokar","logprobs":null,"finish_reason":null}]}\n\n'
)
USAGE = (
    b'data: {"id":"cmpl-7f4e2a11","choices":[],"usage":{"completion_tokens":%d}}\n\n'
    b"data: [DONE]\n\n"
)
HEAD = (b"POST", b"/v1/completions", [(b"content-type", b"application/json")])
BODY = b'{"model":"m","prompt":"a b c","stream":true}'
IN_FLIGHT = 100


def record(recorder: Recorder, requests: int, events: int) -> float:
    """CPU seconds that the hot side spent on reply data, IN_FLIGHT streams interleaved."""
    spent = 0.0
    now = time.monotonic_ns()
    for batch in range(0, requests, IN_FLIGHT):
        streams = []
        for _ in range(min(IN_FLIGHT, requests - batch)):
            stream = recorder.open(now, {}, HEAD)
            recorder.request_body(stream, now, BODY)
            recorder.mark(stream, "request_end_ns", now)
            recorder.mark(stream, "send_ns", now)
            recorder.reply_head(stream, now, 200, [(b"content-type", b"text/event-stream")])
            streams.append(stream)
        for step in range(events):
            begin = time.process_time()
            at = now + 20_000_000 * (step + 1)
            for n, stream in enumerate(streams):
                recorder.reply_data(stream, at + n * 13_000, TEXT)
            spent += time.process_time() - begin
        for stream in streams:
            recorder.reply_data(stream, now + 20_000_000 * (events + 1), USAGE % events)
            recorder.close(
                stream, now + 20_000_000 * (events + 1), {"outcome": "ok", "send_ns": now}
            )
    return spent


def control(requests: int, events: int) -> float:
    """CPU seconds to append (stamp, bytes) tuples to a list instead."""
    kept: list[tuple[int, bytes]] = []
    begin = time.process_time()
    for n in range(requests * events):
        kept.append((n, TEXT))  # noqa: PERF401 - the loop is what is measured
    return time.process_time() - begin


def once(requests: int, events: int) -> tuple[float, float, float, float]:
    """(hot ns per event, control ns per event, writer CPU us per event, bytes per event)."""
    total = requests * events
    with tempfile.TemporaryDirectory() as folder:
        tape = Path(folder) / "a.tape"
        recorder = Recorder.start(
            tape, role="capture", command=[], options={}, facts={}, key=os.urandom(32)
        )
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        hot_s = record(recorder, requests, events)
        summary = recorder.finish()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert summary.events + summary.losses.get("events", 0) <= total
        writer_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        size = sum(s.path.stat().st_size for s in open_tape(tape).segments)
        kept = max(open_tape(tape).events, 1)
    return (
        hot_s / total * 1e9,
        control(requests, events) / total * 1e9,
        writer_s / kept * 1e6,
        size / kept,
    )


def main() -> None:
    """Print medians of three runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=800)
    parser.add_argument("--events", type=int, default=250)
    options = parser.parse_args()
    runs = [once(options.requests, options.events) for _ in range(3)]
    hot_ns, control_ns, writer_us, size = (
        statistics.median(column) for column in zip(*runs, strict=True)
    )
    print(
        f"hot side      {hot_ns:8.0f} ns per event   control (list of tuples) {control_ns:.0f} ns"
    )
    print(f"writer        {writer_us:8.2f} us CPU per event, start of the process included")
    print(f"segments      {size:8.2f} bytes per event")


if __name__ == "__main__":
    main()
