"""Running counts of finished requests, under the names that OpenTelemetry has for them.

What a scrape shows while the tape is written; the tape has every request, this has histograms.
Source: OpenTelemetry semantic conventions for generative AI metrics (names, units, buckets).
"""

import json
from bisect import bisect_left
from typing import Any

import numpy as np

MAX_MODELS = 5  # further ones are counted as "other": a label must not grow without end
DURATION_BUCKETS = (
    *(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
)
TOKEN_TIME_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_BUCKETS = {
    "gen_ai_server_request_duration_seconds": DURATION_BUCKETS,
    "gen_ai_server_time_to_first_token_seconds": DURATION_BUCKETS,
    "gen_ai_server_time_per_output_token_seconds": TOKEN_TIME_BUCKETS,
    "gen_ai_client_operation_time_per_output_chunk_seconds": TOKEN_TIME_BUCKETS,
}
_CHUNK_BUCKETS_US = np.rint(np.array(TOKEN_TIME_BUCKETS) * 1e6).astype(np.int64)


class Served:
    """Counts rows; `samples` gives them as NAME{"label":"value"} -> value, totals of this life."""

    def __init__(self) -> None:
        self._models: set[str] = set()
        self._counters: dict[str, float] = {}
        self._histograms: dict[tuple[str, str], list[float]] = {}

    def add(self, row: dict[str, Any], *, kept: bool = True) -> None:
        """Count one finished request; instants are ns of one clock. `kept`: it gets a row."""
        if not kept:
            self._count("tokentape_requests_sampled_out_total", {}, 1)
        model = self._model(row.get("model") or row.get("model_requested") or "unknown")
        labels = {
            "gen_ai_operation_name": row.get("operation") or "unknown",
            "gen_ai_response_model": model,
        }
        self._count("tokentape_requests_total", {"outcome": row["outcome"]}, 1)
        for kind in ("input", "output"):
            tokens = row.get(f"{kind}_tokens")
            if tokens is not None:
                usage = labels | {"gen_ai_token_type": kind}
                self._count("gen_ai_client_token_usage_total", usage, tokens)
        begin, end = row["arrival_ns"], row.get("end_ns")
        if row["outcome"] != "ok" or end is None:
            return
        self._observe("gen_ai_server_request_duration_seconds", labels, end - begin)
        first, last = row.get("first_content_ns"), row.get("last_content_ns")
        if first is not None:
            self._observe("gen_ai_server_time_to_first_token_seconds", labels, first - begin)
            tokens = row.get("output_tokens") or 0
            if tokens > 1 and last is not None:
                name = "gen_ai_server_time_per_output_token_seconds"
                self._observe(name, labels, (last - first) / (tokens - 1))
        if row.get("off_us") is not None and row.get("choice") is None:
            self._observe_gaps(labels, np.asarray(row["off_us"]), np.asarray(row["ntok"]))

    def _model(self, name: str) -> str:
        if len(self._models) < MAX_MODELS:
            self._models.add(name)
        return name if name in self._models else "other"

    def _count(self, name: str, labels: dict[str, str], n: float) -> None:
        key = name + json.dumps(labels)
        self._counters[key] = self._counters.get(key, 0.0) + n

    def _observe(self, name: str, labels: dict[str, str], value_ns: float) -> None:
        buckets = _BUCKETS[name]
        key = (name, json.dumps(labels))
        found = self._histograms.setdefault(key, [0.0] * (len(buckets) + 2))  # counts, +Inf, sum
        found[bisect_left(buckets, value_ns / 1e9)] += 1
        found[-1] += value_ns / 1e9

    def _observe_gaps(self, labels: dict[str, str], off_us: Any, ntok: Any) -> None:
        """The gaps between the events of one choice that carry tokens: the ICL of METRICS.md."""
        gaps_us = np.diff(off_us[ntok > 0].astype(np.int64))
        if not len(gaps_us):
            return
        name = "gen_ai_client_operation_time_per_output_chunk_seconds"
        places = np.searchsorted(_CHUNK_BUCKETS_US, gaps_us)
        key = (name, json.dumps(labels))
        found = self._histograms.setdefault(key, [0.0] * (len(_CHUNK_BUCKETS_US) + 2))
        for place, n in enumerate(np.bincount(places).tolist()):
            found[place] += n
        found[-1] += int(gaps_us.sum()) / 1e6

    def samples(self) -> dict[str, float]:
        """Everything so far; histograms as Prometheus writes them, cumulative."""
        out = dict(self._counters)
        for (name, labels), found in self._histograms.items():
            total = 0.0
            for bound, n in zip((*map(str, _BUCKETS[name]), "+Inf"), found[:-1], strict=True):
                total += n
                out[f"{name}_bucket{json.dumps(json.loads(labels) | {'le': bound})}"] = total
            out[f"{name}_count{labels}"] = total
            out[f"{name}_sum{labels}"] = found[-1]
        return out
