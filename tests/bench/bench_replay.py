"""Errors of a replay, by a server that knows the truth: event arrivals and the schedule.

    python tests/bench/bench_replay.py REFSERVER_DIR [--rates 100,200,500] [--seconds 8]
        [--tokens 50] [--gap-ms 20] [--step] [--burst 0] [--think-ms T] [--stall-ms 0] [--precise]
        [--runs 1]
        [--control] [--first] [--metrics-url URL]

REFSERVER_DIR holds `refserver` (built) and its `truth.py`. Every rate is one whole replay: a
synthetic tape, plan, run, tape, verdict; the errors are read from the run's tape. The server has
core 0, the client core 1. `--step` makes all streams of the server step together; `--burst N` sends
N requests at the first instant; `--think-ms` makes each request wait for the one a second before
it, and so long after its end; `--stall-ms` blocks the replay's own event loop for so long twice a
second; `--control` runs the server's naive client in the same minute; `--first` gives server and
clients (not the tape's writer) real-time priority, where that is allowed; `--metrics-url` samples
that page meanwhile. All errors in us. Trust a
line only if the server's own lateness is low and steal is under 1 %.
"""

import argparse
import asyncio
import dataclasses
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokentape.replay.ahead import Outgoing
from tokentape.replay.options import ReplayOptions
from tokentape.replay.plan import Plan, make_plan
from tokentape.replay.progress import Progress
from tokentape.replay.run import run_plan
from tokentape.traces.reader import Tape, open_tape
from tokentape.traces.sampler import Sources
from tokentape.traces.writer import TapeWriter

NS_PER_S = 1_000_000_000
PROMPT_TOKENS = 200
PORT = 18_080
SERVER_CORE, CLIENT_CORE = {0}, {1}
URL = f"http://127.0.0.1:{PORT}"


class TaggedPlan(Plan):
    """A plan whose requests carry their number, so that the server's log can be joined."""

    def outgoing(self, number: int) -> Outgoing:
        if number == 0:  # the tape's writer has been started by now, and may run where it likes
            os.sched_setaffinity(0, CLIENT_CORE)
        out = super().outgoing(number)
        return dataclasses.replace(out, headers=out.headers | {"x-tag": str(number)})


def synthetic_tape(
    path: Path, rate: int, seconds: float, tokens: int, burst: int, think_ms: float | None = None
) -> Path:
    """Constant rate, one length; before that as many at once as `burst` says.

    think_ms: each request waits for the one a second before it, and so long after its end.
    """
    writer = TapeWriter.create(path, role="import", command=[], options={}, facts={})
    for number in range(burst + int(rate * seconds)):
        at_ns = max(0, number - burst) * NS_PER_S // rate
        row = {"request_id": number.to_bytes(16), "arrival_ns": at_ns}
        counts = {"input_tokens": PROMPT_TOKENS, "output_tokens": tokens}
        turn: dict[str, Any] = {}
        if think_ms is not None and number >= burst + rate:
            turn["parents"] = [(number - rate).to_bytes(16)]
            turn["think_ns"] = int(think_ms * 1e6)
        writer.append(row | counts | turn | {"outcome": "ok"})
    writer.close()
    return path


def seen_by_replay(tape: Tape) -> tuple[pa.Table, Any]:
    """(request, seq, monotonic ns) of every event, and the due instants by number in the plan."""
    table = tape.read(["response_id", "send_ns", "off_us", "arrival_ns", "source_request_id"])
    anchor = tape.segments[0].anchors[0]
    epoch = int(tape.facts["wall_epoch_unix_ns"])
    to_monotonic = epoch + anchor["monotonic_ns"] - anchor["wall_unix_ns"]
    numbers = [int.from_bytes(r.bytes) for r in table["source_request_id"].to_pylist()]
    due = np.empty(len(numbers), dtype=np.int64)
    due[numbers] = table["arrival_ns"].to_numpy() + to_monotonic  # in a run's own order with turns
    kept = table.filter(pc.is_valid(table["response_id"])).combine_chunks()
    off = kept["off_us"].combine_chunks()
    parent = pc.list_parent_indices(off).to_numpy()
    flat = pc.list_flatten(off).to_numpy().astype(np.int64)
    first = np.r_[0, np.cumsum(pc.list_value_length(off).to_numpy())][:-1]
    t_ns = kept["send_ns"].to_numpy()[parent] + flat * 1000 + to_monotonic
    seq = np.arange(len(parent)) - first[parent]
    names = kept["response_id"].take(pa.array(parent))
    return pa.table({"response_id": names, "seq": seq, "t_ns": t_ns}), due


def load_truth(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("truth", folder / "truth.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(truth: ModuleType, prefix: Path, seen: pa.Table, due: Any) -> dict[str, Any]:
    """The server's log against what was seen."""
    urllib.request.urlopen(URL + "/__dump").read()
    requests = np.fromfile(f"{prefix}.req.bin", truth.REQ)
    events = np.fromfile(f"{prefix}.ev.bin", truth.EV)
    if due is not None:
        tagged = requests["ntok"] > 1  # the probes ask for one token
        requests["due"][tagged] = due[requests["tag"][tagged].astype(np.int64)]
    number = truth.request_number(seen["response_id"].combine_chunks())
    seq, t_ns = (seen[n].combine_chunks().to_numpy() for n in ("seq", "t_ns"))
    return dict(truth.compare(requests, events, number, seq, t_ns))


def line(name: str, found: dict[str, Any], more: str) -> str:
    def spread(key: str) -> str:
        stats = found[key]
        if not stats["n"]:
            return "-"
        return " / ".join(f"{stats[q]:,.0f}" for q in ("p50", "p99", "p99.9"))

    return (
        f"{name:24} arrival {spread('arrival_error_us'):>22}"
        f"  first {spread('first_event_error_us'):>22}"
        f"  schedule {spread('schedule_error_us'):>22}  server {spread('server_lateness_us'):>20}"
        f"  joined {found['events_joined']}/{found['events_server']}  {more}"
    )


def stalling(seconds: float) -> Callable[[Progress], None]:
    """Told of progress each second, it blocks the event loop now and half a second later."""

    def progress(_: Progress) -> None:
        time.sleep(seconds)
        asyncio.get_running_loop().call_later(0.5, time.sleep, seconds)

    return progress


def replay_once(args: argparse.Namespace, truth: ModuleType, folder: Path, rate: int) -> str:
    path = folder / f"source-{rate}"
    source = synthetic_tape(path, rate, args.seconds, args.tokens, args.burst, args.think_ms)
    options = ReplayOptions(source=source, to=URL, tape=folder / f"run-{rate}", seed=1)
    options.precise = args.precise
    options.telemetry = Sources(tuple(args.metrics_url))
    plan = make_plan(options)
    tagged = TaggedPlan(**{f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)})
    urllib.request.urlopen(URL + "/__reset").read()
    summary = run_plan(tagged, stalling(args.stall_ms / 1000) if args.stall_ms else None)
    os.sched_setaffinity(0, SERVER_CORE | CLIENT_CORE)
    seen, due = seen_by_replay(open_tape(summary.tape))
    found = compare(truth, args.log, seen, due)
    figures = summary.verdict.figures
    ends = open_tape(summary.tape).read(["arrival_ns", "end_ns"])
    lasted_s = (pc.max(ends["end_ns"]).as_py() - pc.min(ends["arrival_ns"]).as_py()) / NS_PER_S
    cpu_us = figures["cpu_share"] * lasted_s * 1e6
    more = (
        f"{summary.verdict.level}, coalesced {100 * (figures['coalesced_share'] or 0):.2f} %, "
        f"rate {100 * (figures['rate']['achieved_over_offered'] or 0):.2f} %, "
        f"cpu {cpu_us / max(1, summary.events):.1f} us/event "
        f"{cpu_us / max(1, summary.rows):.0f} us/request, steal {figures['steal_share']}"
    )
    reasons = "".join(f"\n    {reason}" for reason in summary.verdict.reasons)
    return line(f"replay {rate}/s", found, more + reasons)


def control_once(args: argparse.Namespace, truth: ModuleType, folder: Path, rate: int) -> str:
    urllib.request.urlopen(URL + "/__reset").read()
    out = folder / f"control-{rate}.parquet"
    client = [
        "taskset",
        "-c",
        *map(str, CLIENT_CORE),
        *(["chrt", "-f", "40"] if args.first else []),
    ]
    client += [sys.executable, str(args.refserver / "example_client.py")]
    subprocess.run([*client, str(rate), str(args.seconds), str(args.tokens), str(out)], check=True)
    table = pq.read_table(out)
    seen = pa.table(
        {
            "response_id": truth.pick(table, "req", None).cast(pa.string()),
            "seq": truth.pick(table, "seq", None),
            "t_ns": truth.pick(table, "t", None),
        }
    )
    return line(f"naive client {rate}/s", compare(truth, args.log, seen, None), "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("refserver", type=Path)
    parser.add_argument("--rates", default="100,200,500")
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--gap-ms", type=float, default=20)
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--burst", type=int, default=0)
    parser.add_argument("--think-ms", type=float)
    parser.add_argument("--stall-ms", type=float, default=0)
    parser.add_argument("--precise", action="store_true")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--metrics-url", action="append", default=[])
    args = parser.parse_args()
    truth = load_truth(args.refserver)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        args.log = folder / "log"
        flags = ["-b"] if args.step else ["-j"]
        command = [str(args.refserver / "refserver"), "-p", str(PORT), "-1", "100000"]
        command += ["-2", str(int(args.gap_ms * 1000)), "-l", str(folder / "log"), *flags]
        server = subprocess.Popen(command)
        os.sched_setaffinity(server.pid, SERVER_CORE)
        if args.first:
            os.sched_setscheduler(server.pid, os.SCHED_FIFO, os.sched_param(50))
            clients = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
            os.sched_setscheduler(0, clients, os.sched_param(40))
        try:
            time.sleep(0.3)
            for n in range(args.runs):
                (folder / str(n)).mkdir()
            for run, rate in itertools.product(range(args.runs), map(int, args.rates.split(","))):
                print(replay_once(args, truth, folder / str(run), rate), flush=True)
                if args.control:
                    print(control_once(args, truth, folder / str(run), rate), flush=True)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
