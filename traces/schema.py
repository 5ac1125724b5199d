"""The only definition of a tape's columns: name, type, unit, meaning, and who may hold them.

FORMAT.md is generated from this file (`python -m tokentape.traces.format_doc`). Adding a nullable column is
a minor version, changing the meaning of one is a major version; readers refuse a higher major.
This module must never import anything of tokentape but its words.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

from tokentape.traces.words import MODES, Mode

# `cls`: what an event carries. EMPTY stands for tokens that left no text (a special token).
TEXT, REASONING, TOOL, EMPTY = 0, 1, 2, 3
EVENT_CLASSES = ("text", "reasoning", "tool", "empty")
# `aux_cls`: stream messages that are not events.
ROLE, USAGE, FINISH, DONE, PING, ERROR, OTHER = 0, 1, 2, 3, 4, 5, 6
AUX_CLASSES = ("role", "usage", "finish", "done", "ping", "error", "other")

uuid_t = pa.uuid()
text = pa.string()
i16, i32, i64 = pa.int16(), pa.int32(), pa.int64()
u32 = pa.uint32()  # event offsets: measured against INT64, see docs/performance.md
f32 = pa.float32()
flag = pa.bool_()


@dataclass(frozen=True)
class Column:
    """One column: `unit` is "" for names, `instant` marks ns since the tape's wall epoch.

    `mode` is the least privacy mode that may hold the column; `otel` its OpenTelemetry GenAI name.
    """

    group: str
    name: str
    type: pa.DataType
    meaning: str
    unit: str = ""
    mode: Mode = "none"
    otel: str = ""

    @property
    def instant(self) -> bool:
        """True for a point in time, False for a duration or anything else."""
        return self.unit == "ns since epoch"


NS = "ns since epoch"


def _columns() -> Iterable[Column]:
    def c(
        name: str,
        type_: pa.DataType,
        meaning: str,
        unit: str = "",
        mode: Mode = "none",
        otel: str = "",
    ) -> Column:
        return Column(group, name, type_, meaning, unit, mode, otel)

    group = "identity"
    yield c("request_id", uuid_t, "this attempt: 128 bit, time-ordered, unique across hosts")
    yield c(
        "session_id",
        text,
        "conversation or agent; a keyed digest in a capture",
        otel="gen_ai.conversation.id",
    )
    yield c("session_source", text, "how the session was found: header, body, prefix, trace, plan")
    yield c("turn_index", i32, "position in the session, from 0; a capture counts along parents")
    yield c("parents", pa.list_(uuid_t), "requests that had to end before this one was offered")
    yield c("attempt", i16, "1 for the first try; a retry is a row of its own")
    yield c("retry_of", uuid_t, "the attempt that this one repeats")
    yield c("trace_id", text, "W3C trace id of the client's traceparent header", mode="structure")
    yield c("tenant_digest", text, "keyed digest of the caller's credential; never the credential")
    yield c(
        "source_request_id", uuid_t, "the request of the replayed tape; pairs runs with copy_index"
    )
    yield c("copy_index", i16, "which copy of the source request, from 0")

    group = "what"
    yield c(
        "operation", text, "chat, text_completion, embeddings, ...", otel="gen_ai.operation.name"
    )
    yield c("wire_format", text, "dialect: openai.chat, openai.completions, unknown, ...")
    yield c("endpoint", text, "request path without its query")
    yield c("stream", flag, "the reply was asked for as a stream", otel="gen_ai.request.stream")
    yield c("model_requested", text, "model named by the request", otel="gen_ai.request.model")
    yield c("model", text, "model named by the reply", otel="gen_ai.response.model")
    yield c("n_choices", i16, "replies asked for", otel="gen_ai.request.choice.count")
    yield c("max_tokens", i32, "limit of output tokens", "tokens", otel="gen_ai.request.max_tokens")
    yield c("min_tokens", i32, "least output tokens", "tokens")
    yield c("ignore_eos", flag, "the end token does not stop the output")
    yield c("temperature", f32, "sampling temperature", otel="gen_ai.request.temperature")
    yield c("top_p", f32, "nucleus sampling", otel="gen_ai.request.top_p")
    yield c("top_k", i32, "sampling among the k likeliest", otel="gen_ai.request.top_k")
    yield c("best_of", i16, "sequences computed for one reply")
    yield c("sampling_seed", i64, "sampling seed", otel="gen_ai.request.seed")
    yield c("stop_count", i16, "number of stop sequences")
    yield c("logprobs", i16, "log probabilities asked for per token")
    yield c("include_usage", flag, "the request asked for usage in the stream")
    yield c("tool_count", i16, "tools offered")
    yield c("tool_choice", text, "auto, none, required or named")
    yield c("response_format", text, "text, json_object, json_schema, grammar, ...")
    yield c("reasoning_effort", text, "asked depth of reasoning")
    yield c("message_count", i32, "messages in the prompt")
    yield c("image_count", i16, "images in the prompt")
    yield c("audio_count", i16, "audio parts in the prompt")
    yield c(
        "extra",
        text,
        "JSON: other allow-listed scalars; anything else as size and keyed digest",
        mode="structure",
    )

    group = "path"
    yield c("host", text, "host that recorded the row")
    yield c("worker", text, "worker slot that recorded the row")
    yield c(
        "conn_id", i64, "client connection (capture) or own connection (replay), within the worker"
    )
    yield c("upstream_reused", flag, "the upstream connection had carried a request before")
    yield c("connect_ns", i64, "time to open the upstream connection; NULL when reused", "ns")
    yield c("tls_ns", i64, "time of the upstream TLS handshake", "ns")
    yield c("server_id", text, "replica or worker, where a reply header tells")
    yield c("http_status", i16, "status of the reply")
    yield c("retry_after_s", i32, "what the reply's Retry-After asked for, from the reply on", "s")
    yield c("content_encoding", text, "content-encoding of the reply body")
    yield c("prompt_bytes", i64, "request body", "bytes")
    yield c("response_bytes", i64, "reply body, without transfer framing", "bytes")
    yield c(
        "deviations",
        pa.list_(text),
        "where the proxy could not be transparent: interim, trailers, ...",
    )

    group = "time"
    yield c("scheduled_ns", i64, "when the plan alone wanted the request sent (replay, import)", NS)
    yield c(
        "arrival_ns",
        i64,
        "when the request was offered: head complete at the proxy, or due in a replay",
        NS,
    )
    yield c("late_cause", text, "why a replay sent late: predecessor, scheduler, connection, write")
    yield c("request_end_ns", i64, "last byte of the client's request received", NS)
    yield c("armed_ns", i64, "request built and holding a connection, ready to be released", NS)
    yield c("send_ns", i64, "first request byte handed to the upstream socket; base of off_us", NS)
    yield c("send_end_ns", i64, "last request byte handed to the upstream socket", NS)
    yield c("kernel_send_ns", i64, "kernel stamp of the request leaving", NS)
    yield c("acked_ns", i64, "kernel stamp of the peer's acknowledgement", NS)
    yield c("response_headers_ns", i64, "status line and headers complete", NS)
    yield c("first_byte_ns", i64, "first byte of the reply body", NS)
    yield c("first_content_ns", i64, "first event of any class; NULL for a whole reply", NS)
    yield c("first_answer_ns", i64, "first event that is text or tool arguments", NS)
    yield c("last_content_ns", i64, "last event", NS)
    yield c("end_ns", i64, "end of the reply, or of the attempt", NS)
    yield c("think_ns", i64, "arrival minus the last parent's end; negative means parallel", "ns")
    yield c(
        "early_reply",
        flag,
        "the reply began before the request was sent: from-send times use send_ns",
    )

    group = "stream"
    yield c(
        "off_us",
        pa.list_(u32),
        "arrival of each event after send_ns, non-decreasing; cast before subtracting",
        "us",
    )
    yield c(
        "ntok", pa.list_(pa.uint16()), "tokens of each event; the sum is output_tokens", "tokens"
    )
    yield c(
        "cls", pa.list_(pa.uint8()), "class of each event: 0 text, 1 reasoning, 2 tool, 3 empty"
    )
    yield c("choice", pa.list_(pa.uint8()), "choice of each event; NULL when there is one")
    yield c("aux_off_us", pa.list_(u32), "arrival of each other message after send_ns", "us")
    yield c(
        "aux_cls",
        pa.list_(pa.uint8()),
        "0 role, 1 usage, 2 finish, 3 done, 4 ping, 5 error, 6 other",
    )

    group = "tokens"
    yield c(
        "input_tokens",
        i32,
        "prompt tokens, cached ones included",
        "tokens",
        otel="gen_ai.usage.input_tokens",
    )
    yield c(
        "cached_tokens",
        i32,
        "prompt tokens read from a cache",
        "tokens",
        otel="gen_ai.usage.cache_read.input_tokens",
    )
    yield c(
        "cache_write_tokens",
        i32,
        "prompt tokens written to a cache",
        "tokens",
        otel="gen_ai.usage.cache_creation.input_tokens",
    )
    yield c(
        "output_tokens",
        i32,
        "tokens generated, reasoning included",
        "tokens",
        otel="gen_ai.usage.output_tokens",
    )
    yield c(
        "reasoning_tokens",
        i32,
        "tokens of reasoning",
        "tokens",
        otel="gen_ai.usage.reasoning.output_tokens",
    )
    yield c("input_tokens_source", text, "usage, token_ids, trace, estimate")
    yield c("cached_tokens_source", text, "as input_tokens_source")
    yield c("cache_write_tokens_source", text, "as input_tokens_source")
    yield c("output_tokens_source", text, "usage, token_ids, events, trace")
    yield c("reasoning_tokens_source", text, "as output_tokens_source")
    yield c(
        "ntok_source",
        text,
        "token_ids, usage_cumulative, usage_spread, one_per_event, or why the sum differs or is not there",
    )
    yield c("usage_raw", text, "the server's usage object, JSON of numbers")
    yield c("planned_input_tokens", i32, "prompt tokens that a replay set out to send", "tokens")
    yield c("planned_output_tokens", i32, "output tokens that a replay asked for", "tokens")
    yield c("block_tokens", i32, "size of a prefix block, in block_unit", "block_unit")
    yield c("block_unit", text, "token or byte; byte blocks are approximate")
    yield c(
        "block_scope", text, "where equal hashes mean equal prefixes: tape, key, trace, session"
    )
    yield c(
        "block_hashes",
        pa.list_(i64),
        "keyed hash of the prompt up to the end of each full block",
        mode="structure",
    )
    yield c("prefix_partial", i32, "units left after the last full block", "block_unit")

    group = "end"
    yield c(
        "outcome",
        text,
        "ok, http_error, stream_error, client_abort, upstream_abort, timeout, connect_error, cut; "
        "ok too where the client hung up behind the end of the answer",
    )
    yield c("origin", text, "who answered: upstream or proxy")
    yield c(
        "finish_reason", pa.list_(text), "one per choice", otel="gen_ai.response.finish_reasons"
    )
    yield c("error_type", text, "class of the error, never its text", otel="error.type")
    yield c("parse_status", text, "ok, partial, truncated (too large, or a bomb), encoded (unknown coding), unknown_format, error")
    yield c(
        "response_id",
        text,
        "id that the server gave the reply",
        mode="structure",
        otel="gen_ai.response.id",
    )

    group = "server truth"
    yield c("server_queue_ns", i64, "queueing as the server reported it", "ns")
    yield c("server_prefill_ns", i64, "prefill as the server reported it", "ns")
    yield c("server_decode_ns", i64, "decode as the server reported it", "ns")
    yield c("server_timing_source", text, "which field or header told")

    group = "quality"
    yield c("arrival_clock", text, "kernel, callback, coroutine, wall")
    yield c("send_clock", text, "as arrival_clock")
    yield c("event_clock", text, "as arrival_clock; worst in the row")
    yield c("lag_max_us", i32, "longest kernel-to-user delay of a read in this row", "us")
    yield c(
        "coalesced_reads",
        i32,
        "socket reads that held more than one event: all but the last have an upper bound",
    )
    yield c("clamped_events", i32, "stamps lowered to their neighbour because they ran backwards")
    yield c("events_dropped", i32, "events seen but not kept")
    yield c(
        "events_overflowed",
        i32,
        "events later than 71.6 minutes after send_ns, which off_us cannot hold",
    )
    yield c("backpressure_ns", i64, "time that a slow client stopped upstream reads", "ns")
    yield c("sample_prob", f32, "probability that a row like this is kept: 1 if error or slow; its inverse is the weight")
    yield c("sample_reason", text, "session: drawn with its session; error, slow: kept for that alone, no whole session")


COLUMNS: tuple[Column, ...] = tuple(_columns())
BY_NAME: dict[str, Column] = {c.name: c for c in COLUMNS}
INTEGER_BOUNDS: dict[str, tuple[int, int]] = {  # what a column's type can hold
    c.name: (-(1 << (c.type.bit_width - 1)), (1 << (c.type.bit_width - 1)) - 1)
    for c in COLUMNS
    if c.type in (i16, i32, i64)
}
INSTANTS: frozenset[str] = frozenset(c.name for c in COLUMNS if c.instant)


def _field(c: Column) -> pa.Field:
    meta = {"unit": c.unit, "meaning": c.meaning, "mode": c.mode} | (
        {"otel": c.otel} if c.otel else {}
    )
    return pa.field(c.name, c.type, metadata=meta)


REQUESTS = pa.schema([_field(c) for c in COLUMNS])
TELEMETRY = pa.schema(
    [
        pa.field("ts_ns", i64, metadata={"unit": NS, "meaning": "when the sample began"}),
        pa.field("end_ns", i64, metadata={"unit": NS, "meaning": "when the sample was complete"}),
        pa.field("source", text, metadata={"meaning": "URL, device or process sampled"}),
        pa.field("name", text, metadata={"meaning": "metric name as the source gives it"}),
        pa.field("labels", text, metadata={"meaning": "JSON object of labels"}),
        pa.field("value", pa.float64(), metadata={"meaning": "sampled value"}),
    ]
)


def allowed(mode: Mode) -> frozenset[str]:
    """Names of the columns that may be written in a privacy mode."""
    level = MODES.index(mode)
    return frozenset(c.name for c in COLUMNS if MODES.index(c.mode) <= level)


def row_problem(row: dict[str, object]) -> str | None:
    """First name in a row that is no column, or None."""
    return next((name for name in row if name not in BY_NAME), None)
