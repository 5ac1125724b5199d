"""The engine's own counters beside what tapes of the same time hold.

    python compare_counters.py SCRAPES.jsonl.gz TAPE... [--json]

SCRAPES comes from scrape.py (first and last line bracket the traffic). Every tape's requests are
taken to have reached the engine in between; differences are printed, not judged.
"""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import tokentape

COUNTERS = {
    "requests": "vllm:request_success_total",
    "prompt tokens": "vllm:prompt_tokens_total",
    "generation tokens": "vllm:generation_tokens_total",
    "prefix tokens asked": "vllm:prefix_cache_queries_total",
    "prefix tokens hit": "vllm:prefix_cache_hits_total",
    "preemptions": "vllm:num_preemptions_total",
    "TTFT samples": "vllm:time_to_first_token_seconds_count",
    "inter-token samples": "vllm:inter_token_latency_seconds_count",
    "E2E samples": "vllm:e2e_request_latency_seconds_count",
}
SECONDS = {
    "TTFT, summed": "vllm:time_to_first_token_seconds_sum",
    "inter-token, summed": "vllm:inter_token_latency_seconds_sum",
    "E2E, summed": "vllm:e2e_request_latency_seconds_sum",
    "queue, summed": "vllm:request_queue_time_seconds_sum",
    "prefill, summed": "vllm:request_prefill_time_seconds_sum",
    "decode, summed": "vllm:request_decode_time_seconds_sum",
}
TAPE_SQL = """
SELECT count(*) FILTER (http_status = 200) AS requests,
       sum(input_tokens) AS "prompt tokens",
       sum(output_tokens) AS "generation tokens",
       sum(input_tokens) AS "prefix tokens asked",
       sum(cached_tokens) AS "prefix tokens hit",
       count(first_content_ns) AS "TTFT samples",
       sum(output_tokens) FILTER (first_content_ns IS NOT NULL) - count(first_content_ns)
         AS "inter-token samples",
       count(*) FILTER (http_status = 200) AS "E2E samples",
       sum(first_content_ns - send_end_ns) / 1e9 AS "TTFT, summed",
       sum(last_content_ns - first_content_ns) / 1e9 AS "inter-token, summed",
       sum(coalesce(last_content_ns, end_ns) - send_end_ns) FILTER (http_status = 200) / 1e9
         AS "E2E, summed"
FROM requests
WHERE operation IN ('chat', 'text_completion')
"""


def totals(page: str) -> dict[str, float]:
    """Sum of each series over its labels."""
    found: dict[str, float] = {}
    for line in page.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def engine_counts(scrapes: Path) -> dict[str, float]:
    """Last minus first scrape, by the names of COUNTERS and SECONDS."""
    with gzip.open(scrapes, "rt") as lines:
        pages = [json.loads(line)[3] for line in lines]
    first, last = totals(pages[0]), totals(pages[-1])
    return {
        what: last[name] - first.get(name, 0.0)
        for what, name in (COUNTERS | SECONDS).items()
        if name in last
    }


def tape_counts(tapes: list[Path]) -> dict[str, float]:
    """The same over all tapes."""
    summed: dict[str, float] = {}
    for path in tapes:
        relation: Any = tokentape.open(path).sql(TAPE_SQL)
        for what, value in zip(relation.columns, relation.fetchall()[0], strict=True):
            summed[what] = summed.get(what, 0.0) + float(value or 0)
    return summed


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scrapes", type=Path)
    parser.add_argument("tapes", type=Path, nargs="+")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    engine, tape = engine_counts(options.scrapes), tape_counts(options.tapes)
    if options.json:
        print(json.dumps({"engine": engine, "tape": tape}, indent=1))
        return
    print(f"{'':24}{'engine':>14}{'tape':>14}{'tape - engine':>16}")
    for what, counted in engine.items():
        digits = 3 if what in SECONDS else 0
        held = tape.get(what)
        shown = f"{held:14,.{digits}f}{held - counted:+16,.{digits}f}" if held is not None else ""
        print(f"{what:24}{counted:14,.{digits}f}{shown}")


if __name__ == "__main__":
    main()
