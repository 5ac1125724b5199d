"""How far runs are from their capture, and from each other: distances.py CAPTURE RUN...

For each pair of tapes: the Kolmogorov-Smirnov distance of TTFT from arrival, TTFT from send, TPOT
and E2E over the requests that both have, beside the distance that chance alone exceeds once in
twenty (independent requests; they are not, so it is too small), and mean requests in flight.
"""

import sys
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokentape.traces.reader import open_tape

COLUMNS = [
    *("request_id", "source_request_id", "outcome", "arrival_ns", "send_ns", "send_end_ns"),
    *("first_content_ns", "last_content_ns", "end_ns", "output_tokens"),
]
Values = NDArray[np.float64]


def measured(path: Path) -> dict[str, dict[bytes, float]]:
    """Milliseconds by metric and request of the capture; TPOT where there are two tokens."""
    found: dict[str, dict[bytes, float]] = {
        name: {} for name in ("TTFT from arrival", "TTFT from send", "TPOT", "E2E")
    }
    for row in open_tape(path).read(COLUMNS).to_pylist():
        if row["outcome"] != "ok" or row["first_content_ns"] is None:
            continue
        name = row["source_request_id"] or row["request_id"]
        key = getattr(name, "bytes", name)
        first, begin = row["first_content_ns"], row["arrival_ns"]
        found["TTFT from arrival"][key] = (first - begin) / 1e6
        found["TTFT from send"][key] = (first - (row["send_end_ns"] or row["send_ns"])) / 1e6
        found["E2E"][key] = (row["end_ns"] - begin) / 1e6
        if (row["output_tokens"] or 0) > 1:
            span = row["last_content_ns"] - first
            found["TPOT"][key] = span / 1e6 / (row["output_tokens"] - 1)
    return found


def distance(a: Values, b: Values) -> float:
    """The largest gap between two empirical distribution functions."""
    at = np.sort(np.concatenate([a, b]))
    below = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


def in_flight(found: dict[str, dict[bytes, float]], path: Path) -> float:
    """Mean over the time from the first arrival to the last end."""
    rows = open_tape(path).read(["outcome", "arrival_ns", "end_ns", "first_content_ns"]).to_pylist()
    kept = [r for r in rows if r["outcome"] == "ok" and r["first_content_ns"] is not None]
    begin, end = min(r["arrival_ns"] for r in kept), max(r["end_ns"] for r in kept)
    return sum(found["E2E"].values()) * 1e6 / (end - begin)


def main() -> None:
    """Print a table for each pair."""
    paths = [Path(name) for name in sys.argv[1:]]
    tapes = {path.stem: measured(path) for path in paths}
    for path in paths:
        print(f"{path.stem}: mean in flight {in_flight(tapes[path.stem], path):.2f}")
    for a, b in combinations(tapes, 2):
        for metric in tapes[a]:
            both = sorted(tapes[a][metric].keys() & tapes[b][metric].keys())
            x, y = (np.array([tapes[t][metric][key] for key in both]) for t in (a, b))
            medians = f"{np.median(x):.1f} / {np.median(y):.1f} ms"
            critical = 1.358 * np.sqrt(2 / len(both))
            print(
                f"{a} {b} {metric}: KS {distance(x, y):.3f} (5 %: {critical:.3f}), medians "
                f"{medians}, paired median {np.median(y - x):+.2f} ms, n = {len(both)}"
            )


if __name__ == "__main__":
    main()
