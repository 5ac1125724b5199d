"""Decides the type of `off_us`: INT64 unless dearer than UINT32 by 5 % in bytes or 10 % in time.

Writes the same seeded events in the layout of a tape segment with each type and each encoding, and
times the three questions that read every offset. INT64 is taken if it keeps both limits in one of
the encodings. The files take turns and each run has a connection of its own, so that drift of the
machine falls on all alike; it must never time one file after the other. The rule looks at CPU
seconds of the process, which other load on the machine moves least; wall seconds stand beside them.

    python tests/bench/bench_offsets.py [--requests 80000] [--runs 7]
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tokentape.traces import schema

ROW_GROUP_REQUESTS = 4_000
MEAN_EVENTS = 250
SEED = 20_261_122
LIMITS = {"bytes per event": 0.05, "CPU s": 0.10}  # what INT64 may cost more than UINT32
TYPES = {"INT64": pa.int64(), "UINT32": pa.uint32()}
ENCODINGS = ("DELTA_BINARY_PACKED", "BYTE_STREAM_SPLIT")
Variant = tuple[str, str]  # type, encoding
VARIANTS: tuple[Variant, ...] = tuple((kind, how) for how in ENCODINGS for kind in TYPES)
LISTS = ("off_us", "ntok", "cls")
NAMES = ("request_id", "arrival_ns", "send_ns", "end_ns", "input_tokens", "output_tokens", *LISTS)

# Unsigned subtraction raises in DuckDB, so UINT32 has to be cast first; INT64 need not be.
# A slice includes both ends: [:-2] leaves out the last element.
GAPS = {
    "INT64": "unnest(off_us[2:]) - unnest(off_us[:-2])",
    "UINT32": "unnest(off_us[2:])::BIGINT - unnest(off_us[:-2])::BIGINT",
}
OFFSETS = {"INT64": "unnest(off_us)", "UINT32": "unnest(off_us)::BIGINT"}
QUERIES = {
    "exact ITL counts": """
        SELECT gap_us, count(*) FROM (SELECT {gaps} AS gap_us FROM '{file}') GROUP BY gap_us
        ORDER BY gap_us""",
    "tokens per second": """
        SELECT (send_ns + offset_us * 1000) // 1000000000 AS second, sum(tokens) FROM
        (SELECT send_ns, {offsets} AS offset_us, unnest(ntok) AS tokens FROM '{file}')
        GROUP BY second ORDER BY second""",
    "max and sum": """
        SELECT max(offset_us), sum(offset_us), count(*) FROM
        (SELECT unnest(off_us) AS offset_us FROM '{file}')""",
}


def main() -> None:
    """Writes the files, times them, prints the table and the decision."""
    parser = argparse.ArgumentParser(description="Decide the type of off_us by measurement.")
    parser.add_argument("--requests", type=int, default=80_000)
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each query and file")
    options = parser.parse_args()
    steal_before = steal_s()
    with tempfile.TemporaryDirectory(prefix="tokentape-offsets-") as folder:
        files = {v: Path(folder) / f"{v[0]}-{v[1]}.parquet" for v in VARIANTS}
        events = write(files, options.requests)
        measured = [sizes(files, events)]
        measured += [times(query, files, options.runs) for query in QUERIES]
    print(f"{options.requests} requests, {events} events, seed {SEED}, {options.runs} runs each")
    print(
        f"DuckDB {duckdb.__version__}, pyarrow {pa.__version__}, 2 threads, {os.cpu_count()} CPUs"
    )
    print(f"steal during the bench: {steal_s() - steal_before:.2f} CPU seconds\n")
    report({what: cells for group in measured for what, cells in group.items()})


def write(files: dict[Variant, Path], requests: int) -> int:
    """Writes the same events to each file in that file's layout; returns the number of events."""
    writers = {v: pq.ParquetWriter(path, **layout(*v)) for v, path in files.items()}
    events = 0
    for batch in batches(requests):
        events += len(batch["off_us"].combine_chunks().flatten())
        for writer in writers.values():
            writer.write_table(batch.cast(writer.schema), row_group_size=ROW_GROUP_REQUESTS)
    for writer in writers.values():
        writer.close()
    return events


def layout(kind: str, encoding: str) -> dict[str, object]:
    """The arguments of a ParquetWriter: as a tape segment, but for what is under test."""
    fields = [schema.REQUESTS.field(name) for name in NAMES]
    place = NAMES.index("off_us")
    fields[place] = fields[place].with_type(pa.list_(TYPES[kind]))
    encodings = dict.fromkeys(("arrival_ns", "send_ns", "end_ns"), "DELTA_BINARY_PACKED")
    return {
        "schema": pa.schema(fields),
        "compression": "zstd",
        "compression_level": 3,
        "use_dictionary": ["ntok.list.element", "cls.list.element"],
        "column_encoding": encodings | {"off_us.list.element": encoding},
    }


def batches(requests: int) -> Iterator[pa.Table]:
    """Requests by Poisson arrivals at 20/s, one row group at a time."""
    rng = np.random.default_rng(SEED)
    clock_ns = 0
    for start in range(0, requests, ROW_GROUP_REQUESTS):
        size = min(ROW_GROUP_REQUESTS, requests - start)
        send_ns = clock_ns + np.cumsum(rng.exponential(5e7, size)).astype(np.int64)
        clock_ns = int(send_ns[-1])
        yield batch_of(rng, send_ns)


def batch_of(rng: np.random.Generator, send_ns: np.ndarray) -> pa.Table:
    """One batch: log-normal lengths, and the event times of `event_offsets`."""
    size = len(send_ns)
    counts = np.maximum(1, rng.lognormal(np.log(MEAN_EVENTS) - 0.32, 0.8, size)).astype(np.int64)
    starts = np.concatenate(([0], np.cumsum(counts)))
    offsets_us = event_offsets(rng, counts, starts)
    tokens = np.where(rng.random(starts[-1]) < 0.04, rng.integers(2, 5, starts[-1]), 1)
    lists = {
        "off_us": offsets_us,
        "ntok": tokens.astype(np.uint16),
        "cls": np.zeros(starts[-1], np.uint8),
    }
    columns: dict[str, object] = {
        "request_id": pa.array([rng.bytes(16) for _ in range(size)], pa.uuid()),
        "arrival_ns": send_ns - rng.integers(100_000, 900_000, size),
        "send_ns": send_ns,
        "end_ns": send_ns + offsets_us[starts[1:] - 1] * 1_000 + 40_000,
        "input_tokens": rng.lognormal(6.5, 1.0, size).astype(np.int32),
        "output_tokens": np.add.reduceat(tokens, starts[:-1]).astype(np.int32),
    }
    ends = pa.array(starts, pa.int32())
    columns |= {name: pa.ListArray.from_arrays(ends, pa.array(a)) for name, a in lists.items()}
    return pa.table(columns)


def event_offsets(rng: np.random.Generator, counts: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Offsets in us: 12 % log-normal jitter on each gap, 0.3 % stalls, 1 % coalesced reads."""
    total = int(starts[-1])
    typical_us = np.repeat(rng.lognormal(np.log(18_000), 0.35, len(counts)), counts)
    gaps_us = typical_us * rng.lognormal(0, 0.12, total)
    gaps_us *= np.where(rng.random(total) < 0.003, rng.uniform(3, 30, total), 1)
    gaps_us[rng.random(total) < 0.01] = 5
    gaps_us[starts[:-1]] = rng.lognormal(np.log(180_000), 0.7, len(counts))
    running = np.cumsum(gaps_us.astype(np.int64))
    before = np.concatenate(([0], running))[starts[:-1]]
    offsets_us: np.ndarray = running - np.repeat(before, counts)
    return offsets_us


def sizes(files: dict[Variant, Path], events: int) -> dict[str, dict[Variant, float]]:
    """Bytes per event of the off_us column and of the whole file."""
    column, whole = {}, {}
    for variant, path in files.items():
        footer = pq.read_metadata(path)
        groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
        chunks = [group.column(j) for group in groups for j in range(group.num_columns)]
        offsets = [c for c in chunks if c.path_in_schema.startswith("off_us")]
        column[variant] = sum(c.total_compressed_size for c in offsets) / events
        whole[variant] = path.stat().st_size / events
    return {"off_us, bytes per event": column, "file, bytes per event": whole}


def times(query: str, files: dict[Variant, Path], runs: int) -> dict[str, dict[Variant, float]]:
    """Median CPU and wall seconds of each file; they take turns, and their answers must agree."""
    taken: dict[Variant, list[tuple[float, float]]] = {variant: [] for variant in files}
    for turn in range(runs + 1):
        shift = turn % len(files)
        answers = []
        for variant in [*list(files)[shift:], *list(files)[:shift]]:
            seconds, answer = run_once(query, variant[0], files[variant])
            answers.append(answer)
            if turn:  # the first turn warms the page cache
                taken[variant].append(seconds)
        if any(answer != answers[0] for answer in answers):
            message = f"{query}: the files give different answers"
            raise SystemExit(message)
    return {
        f"{query}, {unit}": {v: statistics.median(run[i] for run in taken[v]) for v in files}
        for i, unit in enumerate(("CPU s", "wall s"))
    }


def run_once(
    query: str, kind: str, path: Path
) -> tuple[tuple[float, float], list[tuple[object, ...]]]:
    """(CPU, wall) seconds and answer of one query on a fresh connection."""
    sql = QUERIES[query].format(gaps=GAPS[kind], offsets=OFFSETS[kind], file=path)
    with duckdb.connect(config={"threads": 2}) as connection:
        cpu, wall = time.process_time(), time.perf_counter()
        answer = connection.execute(sql).fetchall()
        return (time.process_time() - cpu, time.perf_counter() - wall), answer


def report(measured: dict[str, dict[Variant, float]]) -> None:
    """Prints the table, then the type that the rule asks for and what decided it."""
    over: dict[str, list[str]] = {how: [] for how in ENCODINGS}
    print("| what | " + " | ".join(f"{how} INT64 | UINT32 | dearer by" for how in ENCODINGS) + " |")
    print("|---" * (1 + 3 * len(ENCODINGS)) + "|")
    for what, cells in measured.items():
        line = f"| {what} |"
        for how in ENCODINGS:
            wide, narrow = cells["INT64", how], cells["UINT32", how]
            extra = wide / narrow - 1
            line += f" {wide:.3f} | {narrow:.3f} | {extra:+.1%} |"
            if extra > LIMITS.get(what.rsplit(", ", 1)[1], math.inf):
                over[how].append(f"{what} {extra:+.1%}")
        print(line)
    print()
    for how, lines in over.items():
        print(f"{how}: INT64 is over the limit in {'; '.join(lines) or 'nothing'}")
    print("decision:", "UINT32" if all(over.values()) else "INT64")


def steal_s() -> float:
    """CPU seconds that the hypervisor has given to others since boot."""
    ticks = int(Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[8])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
