"""Triton's generate extension: requests and replies of /v2/models/NAME/generate(_stream).

What lies beside `text_output` depends on the model: vLLM's backend may tell finish_reason and the
tokens of each message, TensorRT-LLM may repeat all text so far. Whether it does is told by the text
before, of which length and a hash are kept; the hash never leaves the process. There is no end mark
and, as a rule, no usage. Source: extension_generate.md of Triton's protocol documents, and
additional_outputs.md of its vllm_backend.
"""

from typing import Any, Final

from tokentape.traces import schema
from tokentape.traces.wire import untrusted
from tokentape.traces.wire.objects import ObjectStream, ObjectWhole, name_reply, take_usage
from tokentape.traces.wire.reply import Framing
from tokentape.traces.wire.request import Prompt, RequestFacts
from tokentape.traces.wire.request_body import (
    I64,
    Body,
    Reading,
    columns_of,
    extra_json,
    known,
    utf8,
)

PROVEN: Final = 2  # texts that have grown
_READING: Final = Reading(
    values={
        "max_tokens": ("max_tokens", untrusted.whole_number),
        "min_tokens": ("min_tokens", untrusted.whole_number),
        "ignore_eos": ("ignore_eos", untrusted.truth),
        "temperature": ("temperature", untrusted.real_number),
        "top_p": ("top_p", untrusted.real_number),
        "top_k": ("top_k", untrusted.whole_number),
        "sampling_seed": ("seed", lambda v: untrusted.whole_number(v, I64, -I64)),
    },
    told=frozenset(("text_input", "stream", "stop", "stop_words", "bad_words")),
    scalars=frozenset(
        (
            *("beam_width", "n", "best_of", "repetition_penalty", "presence_penalty"),
            *("frequency_penalty", "exclude_input_in_output", "length_penalty", "end_id", "pad_id"),
            *("return_finish_reason", "return_num_input_tokens", "return_num_output_tokens"),
        )
    ),
)


def read_generate(data: bytes | bytearray) -> RequestFacts:
    """Facts of a request; the path tells the model, and whether it streams.

    Raises: anything, where the body is no JSON object.
    """
    body = Body(data)
    body.lift("parameters")
    if isinstance(body.get("sampling_parameters"), str):  # JSON in a text, for vLLM's backend
        body.raw |= Body(body.get("sampling_parameters").encode()).raw
        del body.raw["sampling_parameters"]
    columns = columns_of(body, _READING)
    del columns["stream"]
    columns["extra"] = extra_json(body, _READING, {})
    text = body.get("text_input")
    prompt = Prompt(text=b"".join(utf8(text))) if isinstance(text, str) and text else None
    return RequestFacts(known(columns), prompt)


def told_by_path(endpoint: str) -> dict[str, Any]:
    """The model and the stream flag, which are part of the path."""
    path = endpoint.partition("?")[0].rstrip("/")
    columns: dict[str, Any] = {"stream": path.endswith("generate_stream")}
    parts = path.split("/")
    if "models" in parts[:-1]:
        columns["model_requested"] = untrusted.label(parts[parts.index("models") + 1])
    return columns


class Stream(ObjectStream):
    """A streamed reply."""

    def __init__(self, http_status: int, framing: Framing) -> None:
        super().__init__(http_status, framing)
        self._before = (0, 0)  # characters and hash of the last text; 0 is not known
        self._bytes = 0  # of it
        self._grown = 0  # texts that began with the one before; -1: one did not

    def _counts(self, usage: dict[str, Any]) -> dict[str, int]:
        found = {"input_tokens": usage.get("num_input_tokens")}
        return untrusted.counts(found, {"input_tokens": ("input_tokens",)})

    def _object(self, name: bytes, value: dict[str, Any]) -> None:
        if error := value.get("error"):
            self._error(error)
            return
        text = value.get("text_output")
        if isinstance(text, list):  # a batch of one
            text = text[0] if len(text) == 1 else "".join(t for t in text if isinstance(t, str))
        if not isinstance(text, str):
            raise TypeError("no message of a reply")
        name_reply(self.facts, value.get("model_name"), value.get("id"))
        over = self.facts.finish.get(0) is not None
        self._use({key: value[key] for key in ("num_input_tokens",) if key in value})
        reason = untrusted.reason(value.get("finish_reason"))
        self.facts.finish[0] = reason or self.facts.finish.get(0)
        ids = untrusted.whole_number(value.get("num_output_tokens"))
        ids = -1 if ids is None else ids
        size = self._new_bytes(text)
        if size:
            self.events.event(schema.TEXT, size, 0, ids)
        else:
            self.events.empty(0, reason is not None, over, ids)

    def _new_bytes(self, text: str) -> int:
        """Bytes that the text before did not have, where texts are repeated; else all of them.

        One text that does not begin with the one before proves that they are not. The same text
        again is nothing new only once two have grown: a model may well say a word twice.
        """
        size, (chars, mark), before = untrusted.size(text), self._before, self._bytes
        if not text:
            return 0
        if chars and self._grown >= 0:
            # After a change of process the text before is not known, only how long it was.
            begins = len(text) >= chars and (not mark or hash(text[:chars]) == mark)
            self._grown = self._grown + (len(text) > chars) if begins else -1
        repeats = self._grown > 0 if len(text) > chars else self._grown >= PROVEN
        self._before, self._bytes = (len(text), hash(text)), size
        return size - before if repeats else size

    def _more(self) -> list[Any]:
        return [*super()._more(), self._before[0], self._bytes, self._grown]

    def _resume(self, more: list[Any]) -> None:
        super()._resume(more)
        self._before, self._bytes, self._grown = (more[4], 0), more[5], more[6]


class Whole(ObjectWhole):
    """A whole reply, or an error body."""

    def _object(self, value: dict[str, Any]) -> bool:
        name_reply(self.facts, value.get("model_name"), value.get("id"))
        self.facts.finish[0] = untrusted.reason(value.get("finish_reason"))
        usage = {k: value[k] for k in ("num_input_tokens", "num_output_tokens") if k in value}
        places = {"input_tokens": ("num_input_tokens",), "output_tokens": ("num_output_tokens",)}
        take_usage(self.facts, usage, untrusted.counts(usage, places))
        return "text_output" in value
