"""Cost of the proxy: added latency, CPU, requests a second and memory, beside nginx and stock.

    ./run bench proxy [--only direct,nginx,tokentape,stock] [--rates 1000,20000] [--runs 3]
        [--loads events,requests] [--seconds 5] [--json FILE]

Added latency is the difference to `direct` in the same run: from the server's send stamp to the
client's kernel receive stamp. CPU is the proxy's own, by role (the writer is a process of its own).
A line counts only while the server's own lateness is low; it is printed. Needs a C compiler.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from proxy_load import Seen, Server, compiled, drive
from proxy_targets import TARGETS, Absent, Target, versions

Row = dict[str, Any]
DEFAULT = "direct,nginx,tokentape,stock"
REWRITES = ("litellm",)  # events lose the server's stamp there, so only the first is timed
STREAM_RATE = 20  # events a second of a stream, but at the lowest rate
TOKENS = 200  # of a stream; the next begins when it ends
RAMP_S = 1.0
SETTLE_S = 2.0  # between the ramp and the window


def steal_s() -> float:
    """CPU seconds that the host took from this machine so far."""
    return int(Path("/proc/stat").read_text().split()[8]) / 100


def one(
    folder: Path,
    name: str,
    server: dict[str, int],
    load: list[str],
    seconds: float,
    ramp_s: float = RAMP_S,
) -> tuple[Row, Seen]:
    """One run of a load through a target: its figures, and what the client saw."""
    truth = Server(folder, **server, pinned=True)
    target: Target | None = None
    try:
        target = TARGETS[name](folder, truth.port)
        edges: list[tuple[float, dict[str, float]]] = []

        def edge() -> None:
            assert target is not None
            edges.append((time.monotonic(), target.cpu_s()))

        stolen = steal_s()
        seen = drive(
            folder,
            target.port,
            *load,
            *(["-c"] if name in REWRITES else []),
            *("-w", str(ramp_s + SETTLE_S), "-s", str(seconds), "-a", str(ramp_s)),
            pinned=True,
            on_begin=edge,
            on_end=edge,
        )
        memory = target.pss_mb()
        lateness = truth.lateness_us()
        late = float(np.quantile(lateness, 0.99)) if len(lateness) else float("nan")
    finally:
        if target is not None:
            target.stop()
        truth.stop()
    (begun, before), (ended, after) = edges
    row: Row = {"target": name, "server_late_p99_us": late, "steal_s": steal_s() - stolen}
    row["refused"] = seen.refused()
    row |= {f"{role}_mb": mb for role, mb in memory.items()}
    for role, used in after.items():
        row[f"{role}_cpu"] = (used - before.get(role, 0.0)) / (ended - begun)
    if target.said:
        row["said"] = target.said.strip().splitlines()[-1]
    return row, seen


def quantiles(values: "np.ndarray[Any, Any]", prefix: str) -> Row:
    """p50, p99 and p99.9 in ms."""
    if not len(values):
        return {}
    found = np.quantile(values, (0.5, 0.99, 0.999)) / 1e3
    return dict(zip((f"{prefix}_p50", f"{prefix}_p99", f"{prefix}_p999"), found, strict=True))


def events(folder: Path, name: str, rate: int, seconds: float) -> Row:
    """Streams at a rate of events in all."""
    per_stream = 50 if rate <= 1000 else STREAM_RATE  # few fast ones, or many
    streams, gap_us = rate // per_stream, 1_000_000 // per_stream
    load = ["-n", str(streams), "-t", str(TOKENS)]
    life_s = TOKENS * gap_us / 1e6  # begun over one life, so that ends and beginnings are spread
    server = {"first_us": 20_000, "gap_us": gap_us}
    row, seen = one(folder, name, server, load, seconds, ramp_s=life_s)
    latency = seen.latency_us()
    row |= {"events_per_s": len(latency) / seen.window_s} | quantiles(latency, "ms")
    for role in ("worker", "writer"):
        if row.get(f"{role}_cpu") and len(latency):
            row[f"{role}_us_per_event"] = row[f"{role}_cpu"] / row["events_per_s"] * 1e6
    return row


def requests(folder: Path, name: str, load: list[str], seconds: float) -> Row:
    """Replies of one token: time to the first event, requests a second."""
    row, seen = one(folder, name, {"first_us": 0, "gap_us": 1000}, [*load, "-t", "1"], seconds)
    first = seen.ttft_us()
    row |= {"requests_per_s": len(first) / seen.window_s} | quantiles(first, "ttft_ms")
    if row.get("worker_cpu") and len(first):
        row["worker_ms_per_request"] = row["worker_cpu"] / row["requests_per_s"] * 1e3
    return row


def median_of(runs: list[Row]) -> Row:
    """The median of each number; of words, the last."""
    out: Row = {}
    for key in runs[-1]:
        values = [r[key] for r in runs if key in r]
        numbers = all(isinstance(v, int | float | np.floating) for v in values)
        out[key] = float(statistics.median(values)) if numbers else values[-1]
    return out


def measured(what: Callable[[], Row], runs: int) -> Row:
    """Medians of several runs."""
    return median_of([what() for _ in range(runs)])


def table(title: str, rows: list[Row], columns: list[str]) -> None:
    """Markdown, with the difference to `direct` where there is one."""
    print(f"\n**{title}**\n\n| target | {' | '.join(columns)} |")
    print(f"|---|{'---|' * len(columns)}")
    for row in rows:
        cells = (f"{row[c]:.3g}" if c in row else "-" for c in columns)
        print(f"| {row['target']} | {' | '.join(cells)} |")


def with_added(rows: list[Row], prefix: str) -> list[Row]:
    """Add the difference of each quantile to that of `direct`."""
    control = next((r for r in rows if r["target"] == "direct"), {})
    for row in rows:
        for q in ("p50", "p99"):
            if f"{prefix}_{q}" in row and f"{prefix}_{q}" in control:
                row[f"added_{q}"] = row[f"{prefix}_{q}"] - control[f"{prefix}_{q}"]
    return rows


def main() -> None:
    """Run what is asked for; tables on stdout, everything in --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=DEFAULT)
    parser.add_argument("--rates", default="1000,8000,20000")
    parser.add_argument("--loads", default="events,requests")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        compiled("load")
    except FileNotFoundError:
        parser.exit(1, "this bench needs a C compiler (apt-get install gcc libc6-dev)\n")
    names = options.only.split(",")
    found: dict[str, list[Row]] = {}
    print(", ".join(f"{k} {v}" for k, v in versions().items()))

    def all_targets(title: str, columns: list[str], prefix: str, what: Any, *args: Any) -> None:
        rows = []
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    run = lambda n=name, f=folder: what(Path(f), n, *args, options.seconds)  # noqa: E731
                    rows.append(measured(run, options.runs))
                except Absent as why:
                    print(f"{name}: {why}")
        found[title] = with_added(rows, prefix)
        table(title, rows, columns)

    for rate in map(int, options.rates.split(",") if "events" in options.loads else ()):
        columns = ["events_per_s", "ms_p50", "ms_p99", "added_p50", "added_p99", "worker_cpu"]
        columns += ["worker_us_per_event", "writer_us_per_event", "worker_mb", "server_late_p99_us"]
        all_targets(f"{rate} events/s (ms)", columns, "ms", events, rate)
    columns = ["requests_per_s", "ttft_ms_p50", "ttft_ms_p99", "added_p50", "added_p99"]
    columns += ["worker_ms_per_request", "worker_cpu"]
    of_one_token = (
        ("time to first token, 20 requests/s, keep-alive (ms)", ["-r", "20"]),
        ("time to first token, 20 requests/s, new connections (ms)", ["-r", "20", "-f"]),
        ("closed loop of 16, keep-alive (ms)", ["-n", "16"]),
    )
    for title, load in of_one_token if "requests" in options.loads else ():
        all_targets(title, columns, "ttft_ms", requests, load)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, default=float))


if __name__ == "__main__":
    main()
