"""Imports: rows a second and peak memory of a large trace, each in a process of its own.

BurstGPT's third form with 5 M rows (250 MB of CSV, 4.5 % in sessions) and Mooncake with 300,000
rows of 24 block ids (70 MB of JSON). Both are drawn from a seed. Budget: under 500 MB, and 200,000
rows a second where the format allows it.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

BURST_ROWS, MOONCAKE_ROWS, IDS = 5_000_000, 300_000, 24
IMPORT = """
import re, sys, time
from pathlib import Path
from tokentape.traces.importers import import_trace
start = time.perf_counter()
done = import_trace(sys.argv[1], [Path(sys.argv[2])], Path(sys.argv[3]))
rows_per_s = done.written / (time.perf_counter() - start)
peak_kb = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
print(f"{sys.argv[1]:10} {done.written:>9,} rows {rows_per_s:>9,.0f}/s {int(peak_kb) >> 10} MB")
"""


def burstgpt(path: Path) -> None:
    """About 4.5 % conversations of some 12 turns, the rest API calls without a session."""
    random = np.random.default_rng(0)
    seconds = np.cumsum(random.exponential(1.9, BURST_ROWS)).astype(int)
    talk = random.random(BURST_ROWS) < 0.045
    columns = {
        "Timestamp": [f"{s}.0" for s in seconds],
        "Session ID": np.where(talk, [f"s{s // 500}" for s in seconds], ""),
        "Elapsed time": random.integers(1, 60, BURST_ROWS),
        "Model": np.where(random.random(BURST_ROWS) < 0.8, "ChatGPT", "GPT-4"),
        "Request tokens": random.integers(1, 4_000, BURST_ROWS),
        "Response tokens": random.integers(0, 800, BURST_ROWS),
        "Total tokens": random.integers(1, 4_800, BURST_ROWS),
        "Log Type": np.where(talk, "Conversation log", "API log"),
    }
    pa_csv.write_csv(pa.table({name: pa.array(some) for name, some in columns.items()}), path)


def mooncake(path: Path) -> None:
    """Prompts of 24 blocks, of which all but the last few are shared."""
    with path.open("w") as file:
        for n in range(MOONCAKE_ROWS):
            ids = list(range(n // 10, n // 10 + IDS))
            row = {"timestamp": 300 * n, "input_length": 512 * IDS, "output_length": 300}
            file.write(json.dumps(row | {"hash_ids": ids}) + "\n")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for form, make in (("burstgpt", burstgpt), ("mooncake", mooncake)):
            make(trace := folder / f"{form}.txt")
            line = [sys.executable, "-c", IMPORT, form, str(trace), str(folder / f"{form}.tape")]
            subprocess.run(line, check=True)


if __name__ == "__main__":
    main()
