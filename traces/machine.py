"""What this machine's cores did so far, the hypervisor's theft among it; nothing but on Linux."""

import json
import os
from pathlib import Path

SOURCE = "machine"
MODES = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")


def cpu_seconds() -> list[tuple[str, str, float]]:
    """Samples of seconds since boot, of all cores together, by mode; node_exporter's name."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
        ticks = [int(word) for word in first.split()[1 : 1 + len(MODES)]]
    except (OSError, ValueError):
        return []
    hertz = os.sysconf("SC_CLK_TCK")
    return [
        ("node_cpu_seconds_total", json.dumps({"mode": mode}), count / hertz)
        for mode, count in zip(MODES, ticks, strict=False)
    ]
