"""Recorded streams of a real engine, as tests/data/README.md describes them.

Reads the files and says what a recording holds; it must never change a byte or a time of one.
"""

import gzip
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

SLICE = Path(__file__).parent / "data" / "vllm-h100-slice.jsonl.gz"
CHAT = "/v1/chat/completions"
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Recording:
    """One recorded reply; times are ns after the request, `chunks` are the non-empty entries."""

    rid: str
    path: str
    prompt_words: int
    output_tokens: int
    headers: tuple[tuple[str, str], ...]
    headers_ns: int
    chunks: tuple[tuple[int, bytes], ...]
    end_ns: int

    @property
    def body(self) -> bytes:
        """The whole body as it was recorded."""
        return b"".join(data for _, data in self.chunks)

    @cached_property
    def messages(self) -> list[dict[str, Any]]:
        """The JSON of each SSE message but [DONE]: in these recordings a chunk is a message."""
        return [json.loads(data[6:]) for _, data in self.chunks if data != DONE]

    @property
    def whole(self) -> bytes:
        """The same completion as the one JSON body that an unstreamed request gets."""
        messages = self.messages
        choices = [choice for message in messages for choice in message["choices"]]
        reason = next(c["finish_reason"] for c in choices if c["finish_reason"])
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason}
        if self.path == CHAT:
            text = "".join(c["delta"].get("content") or "" for c in choices)
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = "".join(c["text"] for c in choices)
        same = {key: messages[0][key] for key in ("id", "created", "model")}
        kind = messages[0]["object"].removesuffix(".chunk")
        usage = messages[-1]["usage"]
        return json.dumps(same | {"object": kind, "choices": [choice], "usage": usage}).encode()


def load(files: list[Path]) -> dict[str, Recording]:
    """The recordings of some files by rid, in file order."""
    recordings = {}
    for path in files:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                recording = _recording(json.loads(line))
                recordings[recording.rid] = recording
    return recordings


def _recording(raw: dict[str, Any]) -> Recording:
    t0 = raw["t0"]
    entries = [(t - t0, text.encode("latin-1")) for t, text in raw["chunks"]]
    return Recording(
        rid=raw["rid"],
        path=raw["url"],
        prompt_words=raw["n_in"],
        output_tokens=raw["n_out"],
        headers=tuple(raw["headers"].items()),
        headers_ns=raw["t_headers"] - t0,
        chunks=tuple(entry for entry in entries if entry[1]),
        end_ns=entries[-1][0],
    )
