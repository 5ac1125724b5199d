"""Size: how soon a replay of a very long tape begins to send, and the memory of each worker.

    python tests/bench/bench_replay_size.py FOLDER [--requests 10000000] [--workers 1,2]
        [--seconds 20]

FOLDER gets the synthetic tape, which is kept for the next time (a minute and 0.7 GB for 10 M
requests at 500/s). Each run is a plan and its run, as the command makes them, against the null
server of the calibration, which cannot be asked anything; Ctrl-C ends it. Memory is the
proportional set size (PSS) of the sending processes and of the one that plans, sampled ten times a
second before the start and each 4 s after it; each look stops a process for some ms. Candidate and
writers of the tape do not count.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tokentape.replay.calibrate import null_server
from tokentape.replay.options import ReplayOptions
from tokentape.replay.plan import make_plan
from tokentape.replay.run import run_plan
from tokentape.traces.reader import open_tape
from tokentape.traces.schema import REQUESTS
from tokentape.traces.writer import TapeWriter

NS_PER_S = 1_000_000_000
SEGMENT_ROWS = 100_000
RATE = 500  # per second, on average
BLOCKS = 24  # of 128 tokens, in the segments that have them: each fourth
SAMPLE_S = 0.1
SENDING_SAMPLE_S = 4.0  # each look stops the process for some milliseconds
START_TIMEOUT_S, END_TIMEOUT_S = 100.0, 60.0


def synthetic_tape(path: Path, requests: int) -> Path:
    """Poisson arrivals, sessions of ten turns, lognormal lengths; blocks in each fourth segment."""
    if path.exists() and open_tape(path).rows == requests:
        return path
    random = np.random.default_rng(7)
    writer = TapeWriter.create(path, role="import", command=[], options={}, facts={}, force=True)
    arrival = 0
    for first in range(0, requests, SEGMENT_ROWS):
        rows = min(SEGMENT_ROWS, requests - first)
        gaps = random.exponential(NS_PER_S / RATE, rows).astype(np.int64)
        times = arrival + np.cumsum(gaps)
        arrival = int(times[-1])
        writer.append_table(segment(random, first, times, (first // SEGMENT_ROWS) % 4 == 0))
    writer.close()
    return path


def segment(random: np.random.Generator, first: int, times: Any, with_blocks: bool) -> pa.Table:
    """One segment as an importer of a production trace would write it."""
    rows = len(times)
    number = np.arange(first, first + rows)
    inputs = np.clip(random.lognormal(6.0, 1.0, rows), 8, 8000).astype(np.int64)
    outputs = np.clip(random.lognormal(3.0, 1.0, rows), 1, 500).astype(np.int64)
    ids = np.zeros((rows, 2), dtype=">u8")
    ids[:, 1] = number
    known = {
        "arrival_ns": pa.array(times),
        "end_ns": pa.array(times + NS_PER_S // 2 + outputs * 20_000_000),
        "input_tokens": pa.array(inputs),
        "output_tokens": pa.array(outputs),
        "request_id": pa.ExtensionArray.from_storage(
            pa.uuid(),
            pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(16), rows, [None, pa.py_buffer(ids.tobytes())]
            ),
        ),
        "session_id": pa.array([f"session-{n // 10:032x}" for n in number]),
        "operation": pa.array(["chat"] * rows),
        "outcome": pa.array(["ok"] * rows),
        "stream": pa.array([True] * rows),
    }
    if with_blocks:
        hashes = random.integers(-(2**63), 2**63, rows * BLOCKS)
        shared = np.repeat(number // 10, BLOCKS) * 1000 + np.tile(np.arange(BLOCKS), rows)
        hashes = np.where(np.tile(np.arange(BLOCKS), rows) < BLOCKS // 2, shared, hashes)
        offsets = pa.array(np.arange(0, rows * BLOCKS + 1, BLOCKS, dtype=np.int32))
        known |= {
            "block_tokens": pa.array([128] * rows),
            "block_unit": pa.array(["token"] * rows),
            "block_scope": pa.array(["tape"] * rows),
            "block_hashes": pa.ListArray.from_arrays(offsets, pa.array(hashes)),
        }
    return pa.Table.from_arrays(
        [
            known[f.name].cast(f.type) if f.name in known else pa.nulls(rows, f.type)
            for f in REQUESTS
        ],
        schema=REQUESTS,
    )


def pss_mb(pid: int) -> float:
    """Proportional set size now; 0 when the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def children(pid: int) -> dict[int, str]:
    """Child processes and their command lines."""
    found = {}
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            for word in (task / "children").read_text().split():
                command = Path(f"/proc/{word}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(word)] = command
        except OSError:
            continue
    return found


class Memory:
    """Peaks of the planning process and its workers, before and after the first send."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.peaks: dict[str, float] = {}

    def sample(self, phase: str) -> None:
        """Look once."""
        self._see(f"plan {phase}", pss_mb(self.pid))
        for pid, command in children(self.pid).items():
            if "tokentape.replay.worker" in command:
                self._see(f"worker {phase}", pss_mb(pid))

    def _see(self, name: str, mb: float) -> None:
        self.peaks[name] = max(self.peaks.get(name, 0.0), mb)


def run_once(tape: Path, url: str, out: Path, workers: int, seconds: float) -> dict[str, Any]:
    """One replay, interrupted; what it took."""
    command = [sys.executable, __file__, str(tape), "--to", url, "--tape", str(out)]
    command += ["--workers", str(workers)]
    began = time.time()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        memory = Memory(process.pid)
        while not sending(out) and time.time() < began + START_TIMEOUT_S:
            memory.sample("before")
            time.sleep(SAMPLE_S)
        first_seen = time.time()
        while time.time() < first_seen + seconds:
            time.sleep(SENDING_SAMPLE_S)
            memory.sample("sending")
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        told = json.loads(process.stdout.read())
        process.wait(END_TIMEOUT_S)
    done = open_tape(out)
    t0_s = done.facts["run"]["start"]["t0_unix_ns"] / NS_PER_S
    lag = told["schedule_lag_ns"]
    return {
        "start_s": t0_s - began,
        "peaks": {name: round(mb) for name, mb in sorted(memory.peaks.items())},
        "sent": done.facts["run"]["sent"],
        "lag_us": [round(lag[q] / 1000) for q in ("p50", "p99", "max")],
        "verdict": told["level"],
        "reasons": told["reasons"],
    }


def sending(out: Path) -> bool:
    """Whether the journal of a run holds something: half a second after the first send."""
    return any(f.stat().st_size > 4096 for f in out.glob("journal/*.journal"))


def replay(source: Path, to: str, out: Path, workers: int) -> None:
    """Plan and run in this process; the verdict as JSON."""
    options = ReplayOptions(source=source, to=to, tape=out, model="null", workers=workers)
    plan = make_plan(options, offline=True)
    print(plan.text(), file=sys.stderr)
    plan.probed = True  # as it is, it would be refused: nobody was asked
    print(json.dumps(run_plan(plan).verdict.as_dict()))


def main() -> None:
    """A line for each number of workers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=10_000_000)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--to", help=argparse.SUPPRESS)
    parser.add_argument("--tape", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.to:
        replay(args.folder, args.to, args.tape, int(args.workers))
        return
    tape = synthetic_tape(args.folder / f"source-{args.requests}", args.requests)
    for workers in map(int, args.workers.split(",")):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with null_server(folder / "log", int(args.seconds) * NS_PER_S) as url:
                found = run_once(tape, url, folder / "run", workers, args.seconds)
        print(f"{args.requests:,} requests, {workers} workers: {found}", flush=True)


if __name__ == "__main__":
    main()
