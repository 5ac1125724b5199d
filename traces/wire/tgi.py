"""Hugging Face's text-generation-inference: requests and replies of /generate and /generate_stream.

Each message of a stream is one token with its id, special ones included, so tokens per event are
exact. The last one has the details. Its chat API is OpenAI's. Text is measured and forgotten.
Source: the OpenAPI schema of TGI, and `TextGenerationStreamOutput` of huggingface_hub, whose client
the tests run.
"""

from collections.abc import Mapping
from typing import Any, Final

from tokentape.traces import schema
from tokentape.traces.wire import untrusted
from tokentape.traces.wire.objects import ObjectStream, ObjectWhole, scaled_ns, take_usage
from tokentape.traces.wire.request import Prompt, RequestFacts
from tokentape.traces.wire.request_body import (
    I64,
    Body,
    Reading,
    columns_of,
    extra_json,
    few,
    known,
    utf8,
)

_READING: Final = Reading(
    values={
        "stream": ("stream", untrusted.truth),
        "max_tokens": ("max_new_tokens", untrusted.whole_number),
        "temperature": ("temperature", untrusted.real_number),
        "top_p": ("top_p", untrusted.real_number),
        "top_k": ("top_k", untrusted.whole_number),
        "best_of": ("best_of", lambda v: untrusted.whole_number(v, untrusted.I16_MAX)),
        "sampling_seed": ("seed", lambda v: untrusted.whole_number(v, I64, -I64)),
    },
    told=frozenset(("inputs", "stop", "grammar")),
    scalars=frozenset(
        (
            *("do_sample", "repetition_penalty", "frequency_penalty", "typical_p", "truncate"),
            *("watermark", "details", "decoder_input_details", "return_full_text", "top_n_tokens"),
        )
    ),
)
_GRAMMARS: Final = {"json": "json_schema", "json_schema": "json_schema", "regex": "regex"}
TIMES: Final = (b"x-queue-time", b"x-inference-time")  # of a whole reply's head
_PLACES: Final = {"input_tokens": ("input_length",), "output_tokens": ("generated_tokens",)}


def read_generate(data: bytes | bytearray) -> RequestFacts:
    """Facts of a request; the path tells of /generate_stream that it streams.

    Raises: anything, where the body is no JSON object.
    """
    body = Body(data)
    body.lift("parameters")
    columns = columns_of(body, _READING)
    if "stream" not in body.raw:
        del columns["stream"]
    stop, grammar = body.get("stop"), untrusted.at(body.get("grammar"), "type")
    columns["stop_count"] = few(len(stop)) if isinstance(stop, list) else None
    columns["response_format"] = _GRAMMARS.get(grammar) if isinstance(grammar, str) else None
    columns["extra"] = extra_json(body, _READING, {})
    text = body.get("inputs")
    prompt = Prompt(text=b"".join(utf8(text))) if isinstance(text, str) and text else None
    return RequestFacts(known(columns), prompt)


def head_columns(headers: Mapping[bytes, str]) -> dict[str, Any]:
    """What the head of a whole reply tells of its wait in the queue; of a stream it tells nothing.

    Args: headers: values by lower-case name; the times are whole milliseconds.
    """
    asked = headers.get(TIMES[0], "")
    if TIMES[1] not in headers or not asked.isascii() or not asked.isdigit():
        return {}
    waited_ns = scaled_ns(int(asked), 1e6)
    if waited_ns is None:
        return {}
    return {"server_queue_ns": waited_ns, "server_timing_source": "headers"}


def _usage(details: Any) -> dict[str, Any]:
    return {k: v for k, v in details.items() if k in ("generated_tokens", "input_length")}


class Stream(ObjectStream):
    """A streamed reply."""

    def _counts(self, usage: dict[str, Any]) -> dict[str, int]:
        return untrusted.counts(usage, _PLACES)

    def _object(self, name: bytes, value: dict[str, Any]) -> None:
        if error := value.get("error"):
            self._error({"type": value.get("error_type")} if isinstance(error, str) else error)
            return
        token, details = value.get("token"), value.get("details")
        if not isinstance(token, dict):
            raise TypeError("no message of a reply")
        over = self.facts.finish.get(0) is not None
        if isinstance(details, dict):
            self._use(_usage(details))
            self.facts.finish[0] = untrusted.reason(details.get("finish_reason"))
        size = 0 if token.get("special") is True else untrusted.size(token.get("text"))
        ids = 1 if type(token.get("id")) is int else -1
        if size:
            self.events.event(schema.TEXT, size, 0, ids)
        else:
            self.events.empty(0, isinstance(details, dict), over, ids)


class Whole(ObjectWhole):
    """A whole reply, alone or in a list, or an error body."""

    def _object(self, value: dict[str, Any]) -> bool:
        details = value.get("details")
        if isinstance(details, dict):
            self.facts.finish[0] = untrusted.reason(details.get("finish_reason"))
            prefill = details.get("prefill")
            usage = _usage(details)
            if isinstance(prefill, list) and prefill:  # the prompt's tokens, if they were asked for
                usage.setdefault("input_length", len(prefill))
            take_usage(self.facts, usage, untrusted.counts(usage, _PLACES))
        return isinstance(value.get("generated_text"), str)
