"""Seconds and peak memory of the analysis questions, beside a plain pyarrow read of the same file.

    python tests/bench/bench_analysis.py [EVENTS] [--memory-limit 500MB]

Writes a synthetic tape (lognormal lengths and gaps, 4 % events of two tokens, 0.07 % stalls) into
a temporary folder; every question runs in a process of its own, three times, best one printed. The
report that people wait for is that of 25,000,000 events, which are 100,000 requests.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokentape.analysis.report import report
from tokentape.analysis.session import connect
from tokentape.traces.schema import REQUESTS
from tokentape.traces.writer import TapeWriter

EVENTS_PER_REQUEST = 250
REQUESTS_PER_SEGMENT = 20_000
RUNS_OF_EACH = 3
TTFT_S, GAP_S, RATE_PER_S, STALLED = 0.25, 0.02, 40.0, 0.0007

REPORT = "report"

QUESTIONS = {
    "connect and load the modules": "SELECT 1",
    "TTFT, TPOT, E2E quantiles": """
        WITH q AS (
          SELECT quantile_disc(ttft_ns, [.5, .9, .99, .999]) FROM ttft WHERE outcome = 'ok'
          UNION ALL
          SELECT quantile_disc(e2e_ns, [.5, .9, .99, .999]) FROM e2e WHERE outcome = 'ok'
          UNION ALL
          SELECT quantile_disc(tpot_ns::BIGINT, [.5, .9, .99, .999]) FROM tpot WHERE outcome = 'ok'
        ) FROM q""",
    "ICL exact quantiles": """
        WITH s AS (SELECT run AS key, gap_us AS value, weight FROM gaps WHERE outcome = 'ok')
        FROM quantiles('s')""",
    "ICL by model and minute, log2 buckets": """
        WITH s AS (
          SELECT
            {'model': model, 'minute': time_bucket_ns(arrival_ns, 60_000_000_000)} AS key,
            log2_bucket(gap_us) AS value,
            weight
          FROM gaps WHERE outcome = 'ok'
        )
        FROM quantiles('s')""",
    "ICL and both ITL, exact counts": "SELECT metric, sum(n) FROM _gap_counts GROUP BY ALL",
    "concurrency over time": "FROM in_flight_quantiles",
    "tokens per second, each second": """
        SELECT t_ns // 1_000_000_000 AS second, sum(ntok) FROM events GROUP BY ALL""",
    "metrics_long": "FROM metrics_long",
    "report, as text": REPORT,
    "phases of every request": "FROM phases_totals",
    "decode gaps taken apart": "FROM interference",
    "tails of TTFT over p99, groups": "FROM tails_groups('ttft', 0.99)",
}


def write_tape(path: Path, n_events: int) -> None:
    """A capture of about n_events events, in segments of 20,000 requests."""
    writer = TapeWriter.create(path, role="capture", command=["bench"], options={}, facts={})
    left, start_ns = n_events // EVENTS_PER_REQUEST, 0
    rng = np.random.default_rng(1)
    while left > 0:
        table = _segment(rng, min(left, REQUESTS_PER_SEGMENT), start_ns)
        start_ns = table["arrival_ns"][-1].as_py()
        writer.append_table(table)
        left -= table.num_rows
    writer.close()


def _segment(rng: np.random.Generator, n: int, start_ns: int) -> pa.Table:
    lengths = np.clip(rng.lognormal(np.log(EVENTS_PER_REQUEST) - 0.32, 0.8, n), 1, 4000).astype(int)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    first, events = offsets[:-1], int(offsets[-1])
    gaps = np.repeat(rng.uniform(0.4, 1.6, n) * GAP_S * 1e6, lengths) * rng.lognormal(
        0, 0.12, events
    )
    stalled = rng.random(events) < STALLED
    gaps[stalled] = 1e6 * rng.uniform(0.2, 1.5, int(stalled.sum()))
    gaps[first] = TTFT_S * 1e6 * rng.lognormal(0, 0.6, n)
    running = np.cumsum(gaps.astype(np.int64))
    off_us = running - np.repeat(running[first] - gaps[first].astype(np.int64), lengths)
    ntok = np.where(rng.random(events) < 0.04, 2, 1)
    arrival = start_ns + np.cumsum(rng.exponential(1e9 / RATE_PER_S, n)).astype(np.int64)
    send = arrival + 200_000
    ids = pa.array([uuid.UUID(bytes=rng.bytes(16)).bytes for _ in range(n)], pa.binary(16))
    columns: dict[str, Any] = {
        "request_id": pa.ExtensionArray.from_storage(pa.uuid(), ids),
        "arrival_ns": arrival,
        "send_ns": send,
        "send_end_ns": send + 50_000,
        "first_content_ns": send + off_us[first] * 1000,
        "first_answer_ns": send + off_us[first] * 1000,
        "last_content_ns": send + off_us[offsets[1:] - 1] * 1000,
        "end_ns": send + off_us[offsets[1:] - 1] * 1000 + 300_000,
        "input_tokens": rng.integers(10, 4000, n),
        "output_tokens": np.add.reduceat(ntok, first),
        "model": np.where(rng.random(n) < 0.5, "small", "large"),
        "outcome": np.where(rng.random(n) < 0.99, "ok", "client_abort"),
        "off_us": _lists(offsets, off_us, "off_us"),
        "ntok": _lists(offsets, ntok, "ntok"),
        "cls": _lists(offsets, np.zeros(events), "cls"),
    }
    return pa.table(
        [
            pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(n, f.type)
            for f in REQUESTS
        ],
        schema=REQUESTS,
    )


def _lists(offsets: np.ndarray, values: np.ndarray, name: str) -> pa.Array:
    element = REQUESTS.field(name).type.value_type
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(values.astype(np.int64)).cast(element)
    )


def _ask(tape: Path, query: str | None, memory_limit: str | None) -> tuple[float, float, int]:
    """(best wall s, best CPU s, peak RSS MB) of a query, or of the control where it is None."""
    best_wall = best_cpu = float("inf")
    session = connect([tape], memory_limit=memory_limit) if query else None
    for _ in range(RUNS_OF_EACH):
        wall, cpu = time.perf_counter(), time.process_time()
        if query == "SELECT 1":
            connect([tape], memory_limit=memory_limit).close()
        elif session and query == REPORT:
            report(session).text()
        elif session and query:
            session.table(query)
        else:
            for file in sorted(tape.glob("requests/**/*.parquet")):
                column = pq.ParquetFile(file).read(["off_us"])["off_us"]
                pc.sum(pc.list_flatten(column))
        best_wall = min(best_wall, time.perf_counter() - wall)
        best_cpu = min(best_cpu, time.process_time() - cpu)
    return best_wall, best_cpu, _peak_mb()


def _peak_mb() -> int:
    """Largest RSS of this process since it was executed."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def main() -> None:
    """Write the tape, ask every question, print one line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("events", nargs="?", type=int, default=5_000_000)
    parser.add_argument("--memory-limit")
    parser.add_argument("--only", default="", help="questions that hold this text")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tape = Path(folder) / "bench.tape"
        write_tape(tape, options.events)
        size = sum(f.stat().st_size for f in tape.glob("requests/**/*.parquet"))
        print(
            json.dumps(
                {"events": options.events, "bytes_per_event": round(size / options.events, 2)}
            )
        )
        print(f"{'question':<42}{'wall s':>9}{'CPU s':>9}{'peak MB':>9}")
        spawn = multiprocessing.get_context("spawn")
        asked = {"control: pyarrow reads and sums off_us": None} | QUESTIONS
        for name, query in ((n, q) for n, q in asked.items() if options.only in n):
            with spawn.Pool(1) as pool:
                wall, cpu, peak_mb = pool.apply(_ask, (tape, query, options.memory_limit))
            print(f"{name:<42}{wall:>9.3f}{cpu:>9.3f}{peak_mb:>9}", flush=True)


if __name__ == "__main__":
    main()
