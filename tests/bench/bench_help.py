"""How long `tokentape --help` takes, warm, from the installed script; budget 300 ms.

The control is a Python that does nothing, run in turn with it.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 15
SCRIPT = Path(sys.executable).parent / "tokentape"
COMMANDS = {
    "tokentape --help": [str(SCRIPT), "--help"],
    "python -c pass": [sys.executable, "-c", "pass"],
}


def main() -> None:
    taken_ms: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS + 1):
        for name, command in COMMANDS.items():
            begun_ns = time.monotonic_ns()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            taken_ms[name].append((time.monotonic_ns() - begun_ns) / 1e6)
    for name, all_ms in taken_ms.items():
        warm = all_ms[1:]
        print(f"{name}: median {statistics.median(warm):.0f} ms, min {min(warm):.0f} ms, n {RUNS}")


if __name__ == "__main__":
    main()
