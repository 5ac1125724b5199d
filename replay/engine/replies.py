"""Replies as vLLM 0.22 words them: stream events, whole replies, usage, and errors.

Field order and nulls follow recorded vLLM streams; `prompt_tokens_details` is always told, where
vLLM tells it on request. Pure: objects in, bytes out. Nothing here knows about sockets or steps.
"""

from typing import Any

import msgspec

from tokentape.replay.engine import tokenizer
from tokentape.replay.engine.asks import Ask
from tokentape.replay.engine.batching import Sequence

Json = dict[str, Any]

# The one event that needs no JSON encoder: these are a token's text in JSON, quotes included.
WORDS_JSON: tuple[bytes, ...] = tuple(f'" {word}"'.encode() for word in tokenizer.WORDS)
DONE = b"data: [DONE]\n\n"


def event(data: Json) -> bytes:
    """One SSE message."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


class Reply:
    """The wording of one request's reply, stream or whole."""

    def __init__(self, ask: Ask, reply_id: str, created_unix_s: int, *, with_metrics: bool) -> None:
        self.finish_reason = ask.finish_reason
        self._ask = ask
        self._created = created_unix_s
        self._id = f"{'chatcmpl' if ask.chat else 'cmpl'}-{reply_id}"
        self._with_metrics = with_metrics
        told = ask.continuous_usage or ask.return_token_ids
        probe = event(self._chunk([self._choice("\0", None, None, None)]))
        head, _, tail = probe.rpartition(b'"\\u0000"')
        self._between = None if told else (head, tail)

    @property
    def between(self) -> tuple[bytes, bytes] | None:
        """Head and tail around the text of an interior event; None where events differ further."""
        return self._between

    def first(self, sequence: Sequence) -> list[bytes]:
        """What goes before the first token: the role of a chat."""
        if not self._ask.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        chunk = self._chunk([choice]) | {
            "prompt_token_ids": self._prompt_ids(),
            "prompt_text": None,
        }
        if self._ask.continuous_usage:
            chunk["usage"] = self._usage(sequence, 0)
        return [event(chunk)]

    def token(self, sequence: Sequence) -> bytes:
        """The event of the newest token."""
        token = sequence.newest_token
        ids = [token] if self._ask.return_token_ids else None
        prompt_ids = self._prompt_ids() if sequence.made == 1 else None
        reason = self.finish_reason if sequence.finished else None
        chunk = self._chunk([self._choice(tokenizer.decode([token]), reason, ids, prompt_ids)])
        if self._ask.continuous_usage:
            chunk["usage"] = self._usage(sequence, sequence.made)
        return event(chunk)

    def last(self, sequence: Sequence) -> list[bytes]:
        """What goes after the last token: usage where asked for, and the end mark."""
        if not self._ask.include_usage:
            return [DONE]
        chunk = self._chunk([]) | {"usage": self._full_usage(sequence)}
        if self._with_metrics:
            chunk["metrics"] = timing_metrics(sequence)
        return [event(chunk), DONE]

    def whole(self, sequence: Sequence) -> bytes:
        """The reply in one piece."""
        ask = self._ask
        output = sequence.tokens[sequence.prompt_tokens :]
        ids = output if ask.return_token_ids else None
        choice = self._whole_choice(tokenizer.decode(output), ids)
        reply: Json = {
            "id": self._id,
            "object": "chat.completion" if ask.chat else "text_completion",
            "created": self._created,
            "model": ask.model,
            "choices": [choice],
            "service_tier": None,
            "system_fingerprint": None,
            "usage": self._full_usage(sequence),
        }
        if ask.chat:
            reply |= {"prompt_logprobs": None, "prompt_token_ids": self._prompt_ids()}
        reply["kv_transfer_params"] = None
        if self._with_metrics:
            reply["metrics"] = timing_metrics(sequence)
        return msgspec.json.encode(reply)

    def _chunk(self, choices: list[Json]) -> Json:
        kind = "chat.completion.chunk" if self._ask.chat else "text_completion"
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._ask.model,
            "choices": choices,
        }

    def _choice(
        self, text: str, reason: str | None, ids: list[int] | None, prompt_ids: list[int] | None
    ) -> Json:
        if self._ask.chat:
            choice: Json = {"index": 0, "delta": {"content": text}, "logprobs": None}
            choice["finish_reason"] = reason
            return choice | ({"stop_reason": None} if reason else {}) | {"token_ids": ids}
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        return choice | {"stop_reason": None, "prompt_token_ids": prompt_ids, "token_ids": ids}

    def _whole_choice(self, text: str, ids: list[int] | None) -> Json:
        end = {"finish_reason": self.finish_reason, "stop_reason": None, "token_ids": ids}
        if not self._ask.chat:
            choice = {"index": 0, "text": text, "logprobs": None} | end
            return choice | {"prompt_logprobs": None, "prompt_token_ids": self._prompt_ids()}
        message: Json = {
            "role": "assistant",
            "content": text,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "tool_calls": [],
            "reasoning": None,
        }
        return {"index": 0, "message": message, "logprobs": None} | end

    def _prompt_ids(self) -> list[int] | None:
        ask = self._ask
        return ask.tokens[: ask.prompt_tokens] if ask.return_token_ids else None

    def _usage(self, sequence: Sequence, made: int) -> Json:
        return {
            "prompt_tokens": sequence.prompt_tokens,
            "total_tokens": sequence.prompt_tokens + made,
            "completion_tokens": made,
        }

    def _full_usage(self, sequence: Sequence) -> Json:
        details = {"cached_tokens": sequence.cached_tokens}
        return self._usage(sequence, sequence.made) | {"prompt_tokens_details": details}


def timing_metrics(sequence: Sequence) -> Json:
    """A finished sequence's `metrics`, as vLLM tells them with --enable-per-request-metrics.

    The time to first token runs from admission, not from arrival: the queue is told beside it.
    """
    admitted_ns, first_ns, last_ns = (
        sequence.admitted_ns or 0,
        sequence.first_token_ns or 0,
        sequence.last_token_ns or 0,
    )
    gaps = sequence.made - 1
    return {
        "time_to_first_token_ms": (first_ns - admitted_ns) / 1e6,
        "generation_time_ms": (last_ns - first_ns) / 1e6,
        "queue_time_ms": (admitted_ns - sequence.queued_ns) / 1e6,
        "mean_itl_ms": (last_ns - first_ns) / 1e6 / gaps if gaps else None,
        "tokens_per_second": sequence.made / ((last_ns - admitted_ns) / 1e9),
    }


def error_body(message: str, status: int, param: str | None = None) -> bytes:
    """An error as vLLM words it."""
    kind = {400: "BadRequestError", 404: "NotFoundError"}.get(status, "Error")
    body = {"message": message, "type": kind, "param": param, "code": status}
    return msgspec.json.encode({"error": body})
