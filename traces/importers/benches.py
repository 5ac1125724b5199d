"""Results of other benches: `vllm bench serve --save-result --save-detailed`, AIPerf's records.

Both are what a client saw with its own clocks, so `event_clock` is coroutine, and their offsets are
rebuilt from the gaps they kept. vLLM's times count from the bench's own zero; a result without
`start_times` has no arrivals and is refused. A piece of a stream is an event; where as many came as
there are tokens each stands for one, elsewhere how many is not known.
"""

from collections.abc import Iterator
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np

from tokentape.traces.errors import TapeError
from tokentape.traces.importers.reading import LAST_NS, Record, exact_ns, json_document, json_lines
from tokentape.traces.importers.rows import (
    MAX_TOKENS,
    NO_VALUE,
    NS_PER_MS,
    NS_PER_S,
    Batch,
    Format,
    add_counts,
    batch_of,
    counted,
)

VLLM_LISTS = ("start_times", "input_lens", "output_lens", "ttfts", "itls", "errors")
UNIT_NS = {"ns": 1, "us": 1_000, "ms": NS_PER_MS, "s": NS_PER_S, "sec": NS_PER_S}
WARMUP = "warmup"
NOT_TOKENS = "events_not_tokens"  # why `ntok` is not known: pieces and tokens differ in number
BATCH_ROWS = 5_000
LAST_US = 2**32 - 1


def read_vllm(path: Path) -> Iterator[Batch]:
    """The requests of a result file, in its order."""
    document = json_document(path)
    if "start_times" not in document.data:
        document.need("input_lens", "output_lens")
        raise TapeError(
            f"{path}: no start_times, so no arrivals; save the result with --save-detailed, by a "
            "vLLM that writes them"
        )
    document.need(*VLLM_LISTS)
    lists = {name: document.data[name] for name in VLLM_LISTS}
    sizes = {len(some) if isinstance(some, list) else -1 for some in lists.values()}
    if len(sizes) > 1:
        raise TapeError(f"{path}: its lists differ in length (cut off?); run the bench again")
    model = document.word("model_id")
    for some in batched(zip(range(max(sizes)), *lists.values(), strict=True), BATCH_ROWS):
        rows = [_vllm_row(path, one, model) for one in some]
        kept = [row for row in rows if row is not None]
        dropped = counted(**{NO_VALUE: len(rows) - len(kept)})
        yield batch_of(kept, dropped, {"failed": sum(r["outcome"] != "ok" for r in kept)})


def _vllm_row(path: Path, values: tuple[Any, ...], model: str | None) -> dict[str, Any] | None:
    number, start, n_in, n_out, ttft, gaps, error = values
    record = Record(
        path,
        f"request {number}",
        {"start_time": start, "input_len": n_in, "output_len": n_out, "ttft": ttft},
    )
    time_ns = record.ns("start_time", NS_PER_S)
    if time_ns is None or n_in is None:
        return None
    failed = bool(error)
    gaps_ns = _gaps_ns(record, "itls", gaps, NS_PER_S)
    ttft_ns = record.ns("ttft", NS_PER_S)
    output_tokens = record.count("output_len")
    row = {
        "time_ns": time_ns,
        "row": number,
        "model": model,
        "input_tokens": record.count("input_len"),
        "output_tokens": output_tokens,
        "outcome": "http_error" if failed else "ok",
        "error_type": "unspecified" if failed else None,
    }
    streamed = not failed and bool(output_tokens) and bool(ttft_ns)
    return row | _stream(time_ns, ttft_ns if streamed else None, gaps_ns, output_tokens)


def read_aiperf(path: Path) -> Iterator[Batch]:
    """The records of a `profile_export.jsonl`, in file order, without the warm-up."""
    for numbered in batched(enumerate(json_lines(path)), BATCH_ROWS):
        dropped: dict[str, int] = {}
        rows = []
        for number, record in numbered:
            found = _aiperf_row(number, record)
            if isinstance(found, str):
                add_counts(dropped, {found: 1})
            else:
                rows.append(found)
        yield batch_of(rows, dropped, {"failed": sum(row["outcome"] != "ok" for row in rows)})


def _aiperf_row(number: int, record: Record) -> dict[str, Any] | str:
    record.need("metadata", "metrics")
    metadata, metrics = record.inner("metadata"), record.inner("metrics")
    metadata.need("request_start_ns")
    if metadata.data.get("benchmark_phase") == WARMUP:
        return WARMUP
    time_ns = metadata.count("request_start_ns", LAST_NS)
    error = record.inner("error")
    failed = bool(error.data)
    input_tokens = _metric_count(metrics, "error_isl" if failed else "input_sequence_length")
    if time_ns is None or (input_tokens is None and not failed):
        return NO_VALUE
    canceled = metadata.data.get("was_cancelled") is True
    code = error.count("code") if type(error.data.get("code")) is int else None
    output_tokens = _metric_count(metrics, "output_sequence_length")
    ttft_ns = _metric_ns(metrics, "time_to_first_token")
    gaps = metrics.inner("inter_chunk_latency")
    unit_ns = UNIT_NS.get(str(gaps.data.get("unit")), 0)
    gaps_ns = _gaps_ns(gaps, "value", gaps.data.get("value"), unit_ns)
    session = metadata.word("x_correlation_id")
    row = {
        "time_ns": time_ns,
        "row": number,
        "operation": "chat",
        "session_id": session,
        "session_source": "trace" if session else None,
        "turn_index": metadata.count("turn_index"),
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "outcome": "client_abort" if canceled else ("http_error" if failed else "ok"),
        "http_status": code if code is not None and 100 <= code < 600 and not canceled else None,
        "error_type": error.word("type"),
        "response_headers_ns": metadata.count("request_ack_ns", LAST_NS),
    }
    stream = _stream(time_ns, ttft_ns, gaps_ns, output_tokens)
    end_ns = metadata.count("request_end_ns", LAST_NS)
    last_ns = stream["last_content_ns"]
    stream["end_ns"] = max(filter(None, (end_ns, last_ns)), default=None)
    return row | stream


def _stream(
    time_ns: int, ttft_ns: int | None, gaps_ns: list[int], output_tokens: int | None
) -> dict[str, Any]:
    """The stream's columns from its first event and the gaps after it; all NULL without one."""
    if ttft_ns is None:
        none = ("first_content_ns", "last_content_ns", "off_us", "ntok", "ntok_source", "end_ns")
        return dict.fromkeys((*none, "send_ns", "stream", "event_clock"))
    offsets_ns = np.cumsum([ttft_ns, *gaps_ns])
    offsets_us = np.minimum(offsets_ns // 1_000, LAST_US)
    last_ns = time_ns + int(offsets_ns[-1])
    each_is_one = len(offsets_us) == output_tokens
    return {
        "stream": True,
        "send_ns": time_ns,
        "first_content_ns": time_ns + ttft_ns,
        "last_content_ns": last_ns,
        "end_ns": last_ns,
        "off_us": offsets_us.tolist(),
        "ntok": [1] * len(offsets_us) if each_is_one else None,
        "ntok_source": "one_per_event" if each_is_one else NOT_TOKENS,
        "event_clock": "coroutine",
    }


def _gaps_ns(record: Record, name: str, gaps: Any, unit_ns: int) -> list[int]:
    if gaps is None:
        return []
    good = isinstance(gaps, list) and all(type(g) in (int, float) and 0 <= g < 1e7 for g in gaps)
    if not good or not unit_ns:
        raise record.refusal(name, "not a list of gaps in a known unit")
    return [exact_ns(float(gap), unit_ns) for gap in gaps]


def _metric_count(metrics: Record, name: str) -> int | None:
    value = metrics.inner(name).data.get("value")
    if value is None or (type(value) is int and 0 <= value <= MAX_TOKENS):
        return value
    raise metrics.refusal(name, "not a count of tokens")


def _metric_ns(metrics: Record, name: str) -> int | None:
    metric = metrics.inner(name)
    unit = metric.data.get("unit")
    if not metric.has("value"):
        return None
    if unit not in UNIT_NS:
        raise metrics.refusal(name, f"in the unit {unit}, which is not one of {', '.join(UNIT_NS)}")
    return metric.ns("value", UNIT_NS[unit])


VLLM = Format(
    origin="vllm bench serve, result with details",
    licence="the user's own result",
    wall_clock=False,
    one_file=True,
    read=read_vllm,
    marks=("input_lens", "output_lens", "ttfts", "itls"),
    facts={"events": "offsets rebuilt from the gaps that the bench kept"},
    pattern="*.json*",
)
AIPERF = Format(
    origin="AIPerf, profile_export.jsonl",
    licence="the user's own result",
    wall_clock=True,
    one_file=False,
    read=read_aiperf,
    marks=("metadata", "metrics", "request_start_ns"),
    facts={"events": "offsets rebuilt from the gaps that the bench kept"},
    pattern="*.jsonl*",
)
