"""Other load tools and a replay, one after the other, against a server that knows the truth.

    python tests/bench/peers.py REFSERVER_DIR PEERS_DIR [--tools tokentape,vllm,aiperf]
        [--loads 10k,500] [--seconds 8] [--cores 1] [--nice -20]

peer_tools.py says how to install them. Each tool runs as its users run it, in its own processes, on
`--cores`, without real-time priority; the server has core 0 and, where that is allowed, real-time
priority. What a tool keeps of each request is joined with the server's log by the request number
in the streamed text. In ms, p50/p99, true -> as the tool has it; true is the server's: first event
sent less request read, and the gaps between its sends. Arrival error: the tool's stamp of an event
less the server's. Schedule error: the server's stamp of the nth request less the nth point of the
ideal grid (the 1st percentile taken as zero). CPU: all processes of the tool, with start-up,
preparation and report.
"""

import argparse
import os
import resource
import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from bench_replay import PORT, URL, load_truth
from peer_tools import KEPT, LOADS, Kept, Load, command, prepare

from tokentape.traces.clock import take_anchor

FIRST_EVENT_US = 100_000


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def stolen_share(before: list[int], after: list[int]) -> float:
    spent = [b - a for a, b in zip(before, after, strict=True)]
    return spent[7] / max(1, sum(spent[:8]))


def ticks() -> list[int]:
    return [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]


def spread(values: Any) -> str:
    """p50 / p99."""
    if not len(values):
        return "-"
    return " / ".join(f"{np.percentile(values, q):.3f}" for q in (50, 99))


def figures(truth: ModuleType, log: Path, load: Load, count: int, records: list[Kept]) -> str:
    """What is true of the load's requests, and what the tool has of them."""
    requests = np.fromfile(f"{log}.req.bin", truth.REQ)
    events = np.sort(np.fromfile(f"{log}.ev.bin", truth.EV), order=["reqid", "idx"])
    planned = np.sort(requests[requests["ntok"] == load.tokens], order="full")[-count:]
    read_ms = (planned["full"] - planned["full"][0]).astype(np.float64) / 1e6
    late_ms = read_ms - np.arange(len(planned)) * 1e3 / load.rate_per_s
    achieved = (len(planned) - 1) / (read_ms[-1] - read_ms[0]) * 1e3
    place = {int(r["reqid"]): n for n, r in enumerate(planned)}
    starts = dict(
        zip(*(a.tolist() for a in np.unique(events["reqid"], return_index=True)), strict=True)
    )
    sent_ns = events["sent"].astype(np.int64)
    lists: dict[str, list[Any]] = {n: [] for n in ("true_ttft", "ttft", "true_gap", "gap", "error")}
    records = [k for k in records if k.number in place]
    for k in records:
        request = planned[place[k.number]]
        true_ns = sent_ns[starts[k.number] :][: load.tokens]
        lists["true_ttft"].append([(int(request["first_send"]) - int(request["full"])) / 1e6])
        lists["ttft"].append([k.ttft_ms])
        true_gaps_ms = np.diff(true_ns) / 1e6
        each = len(k.gaps_ms) == load.tokens - 1
        lists["true_gap"].append(true_gaps_ms if each else [true_gaps_ms.mean()])
        lists["gap"].append(k.gaps_ms)
        errors_ns = k.first_ns + np.r_[0, np.cumsum(k.gaps_ms)] * 1e6 - true_ns[0]
        if each:
            errors_ns -= true_ns - true_ns[0]
        lists["error"].append((errors_ns if each else errors_ns[:1]) / 1e6)
    flat: dict[str, Any] = {
        name: np.concatenate(parts) if parts else [] for name, parts in lists.items()
    }
    lateness_us = (sent_ns - events["planned"].astype(np.int64)) / 1e3
    return (
        f"TTFT {spread(flat['true_ttft'])} -> {spread(flat['ttft'])}  "
        f"ITL {spread(flat['true_gap'])} -> {spread(flat['gap'])}  "
        f"arrival error {spread(flat['error'])} ({len(flat['error'])} stamps)  "
        f"schedule {spread(late_ms - np.percentile(late_ms, 1))}  rate {achieved:.1f} of "
        f"{load.rate_per_s}  kept {len(records)} of {count}, sent {len(planned)}  "
        f"server {spread(lateness_us)} us"
    )


def once(args: argparse.Namespace, truth: ModuleType, tool: str, load: Load, folder: Path) -> str:
    """A fresh server, one tool, one load."""
    argv = [str(args.refserver / "refserver"), "-p", str(PORT), "-1", str(FIRST_EVENT_US)]
    argv += ["-2", str(load.gap_us), "-l", str(folder / "log"), "-j"]
    server = subprocess.Popen(argv)
    os.sched_setaffinity(server.pid, {0})
    try:
        os.sched_setscheduler(server.pid, os.SCHED_FIFO, os.sched_param(50))
    except PermissionError:
        print("the server has no real-time priority")
    run = command(tool, args.peers, folder, load, args.seconds)
    where = ["taskset", "-c", args.cores, "nice", "-n", args.nice]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} if tool == "guidellm" else None
    anchor = take_anchor()
    cpu, before = cpu_s(), ticks()
    with (folder / "said.txt").open("w") as said:
        done = subprocess.run(
            [*where, *run], stdout=said, stderr=said, env=environment, timeout=110, check=False
        )
    used_s, steal = cpu_s() - cpu, stolen_share(before, ticks())
    urllib.request.urlopen(URL + "/__dump").read()
    server.terminate()
    server.wait()
    records = list(KEPT[tool](folder, anchor.wall_unix_ns - anchor.monotonic_ns))
    count = int(load.rate_per_s * args.seconds)
    found = figures(truth, folder / "log", load, count, records)
    return f"{found}  cpu {used_s:.1f} s  steal {100 * steal:.2f} %  rc {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("refserver", type=Path)
    parser.add_argument("peers", type=Path)
    parser.add_argument("--tools", default="tokentape,vllm,aiperf,inference-perf,guidellm")
    parser.add_argument("--loads", default="10k,500")
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--cores", default="1", help="of the tool, as taskset reads them")
    parser.add_argument("--nice", default="-20")
    parser.add_argument("--keep", type=Path, help="where the tools' own files stay")
    args = parser.parse_args()
    args.peers = args.peers.resolve()
    truth = load_truth(args.refserver)
    prepare(args.peers)
    for name in args.loads.split(","):
        for tool in args.tools.split(","):
            folder = Path(tempfile.mkdtemp(prefix=f"{tool}-{name}-", dir=args.keep))
            said = once(args, truth, tool, LOADS[name], folder)
            print(f"{tool:15} {name:4} cores {args.cores:4} {said}", flush=True)
            if args.keep is None:
                shutil.rmtree(folder)


if __name__ == "__main__":
    main()
