"""Keep an engine's Prometheus page, once a second, until killed: scrape.py URL OUT.jsonl.gz

One line per scrape: [monotonic ns before, wall ns before, monotonic ns after, page]. The last is
taken when the signal comes, so that first and last bracket everything in between.
"""

import gzip
import json
import signal
import sys
import time
import urllib.request
from types import FrameType


def scrape(url: str) -> list[object]:
    """One page between two stamps."""
    before, wall = time.monotonic_ns(), time.time_ns()  # noqa: TID251 - no tokentape needed here
    with urllib.request.urlopen(url, timeout=10) as page:
        text = page.read().decode()
    return [before, wall, time.monotonic_ns(), text]


def main() -> None:
    """Scrape until SIGTERM or SIGINT."""
    url, out = sys.argv[1:3]
    going = True

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal going
        going = False

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with gzip.open(out, "at") as lines:  # a phase that goes on adds to what was kept
        while going:
            lines.write(json.dumps(scrape(url)) + "\n")
            time.sleep(1)
        lines.write(json.dumps(scrape(url)) + "\n")


if __name__ == "__main__":
    main()
