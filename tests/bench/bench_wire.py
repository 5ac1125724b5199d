"""Cost of reading one event, beside json.loads of the same event in the same run.

Run: .venv/bin/python tests/bench/bench_wire.py. Best of 7 rounds; the ratio to the control is what
to compare between machines.
"""

import json
import sys
import time
from collections.abc import Callable

from tokentape.traces import wire
from tokentape.traces.wire.sse import SseReader

EVENTS = 4_000
ROUNDS = 7
HEAD = '{"id":"chatcmpl-99a06c61e551a289","object":"chat.completion.chunk","created":1795331360,'
CHAT = HEAD + (
    '"model":"m","choices":[{"index":0,"delta":{"content":" pebut"},"logprobs":null,'
    '"finish_reason":null,"token_ids":null}]}'
)
TEXT = (
    '{"id":"cmpl-9a62bc6f21e08cca","object":"text_completion","created":1795331367,"model":"m",'
    '"choices":[{"index":0,"text":" zihul","logprobs":null,"finish_reason":null,'
    '"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}'
)
USAGE = (
    '"usage":{"prompt_tokens":1100,"total_tokens":%d,"completion_tokens":%d,'
    '"prompt_tokens_details":{"cached_tokens":64}}}'
)


def best_us(work: Callable[[], object]) -> float:
    """Least time per event over the rounds, in us."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter_ns()
        work()
        rounds.append(time.perf_counter_ns() - start)
    return min(rounds) / EVENTS / 1e3


def read(wire_format: str, reads: list[bytes]) -> None:
    """One whole stream, as the writer does it."""
    parser = wire.reply_parser(wire_format, True, 200, "text/event-stream", "")
    for i, data in enumerate(reads):
        parser.feed(data, i, i)
    reply = parser.finish(len(reads), True)
    if len(reply.t_ns) != EVENTS:
        sys.exit(f"read {len(reply.t_ns)} events of {EVENTS}")


def main() -> None:
    """Prints one line per shape of stream."""
    chat, text = CHAT.encode(), TEXT.encode()
    counted = [(CHAT[:-1] + "," + USAGE % (1100 + i, i)).encode() for i in range(1, EVENTS + 1)]
    control_us = best_us(lambda: [json.loads(chat) for _ in range(EVENTS)])
    print(f"{'control: json.loads of a chat event':44s} {control_us:6.2f} us/event")

    def framing() -> None:
        reader = SseReader()
        for _ in range(EVENTS):
            reader.feed(b"data: " + chat + b"\n\n")

    one = [b"data: " + chat + b"\n\n"] * EVENTS
    cases: dict[str, Callable[[], object]] = {
        "framing alone": framing,
        "chat, one event per read": lambda: read("openai.chat", one),
        "chat, 16 events per read": lambda: read(
            "openai.chat", [b"".join(one[:16])] * (EVENTS // 16)
        ),
        "chat, two reads per event": lambda: read(
            "openai.chat", [part for e in one for part in (e[:100], e[100:])]
        ),
        "chat, usage on every event": lambda: read(
            "openai.chat", [b"data: " + c + b"\n\n" for c in counted]
        ),
        "completions, one event per read": lambda: read(
            "openai.completions", [b"data: " + text + b"\n\n"] * EVENTS
        ),
    }
    for name, work in cases.items():
        us = best_us(work)
        print(f"{name:44s} {us:6.2f} us/event  {us / control_us:5.2f} of control")


if __name__ == "__main__":
    main()
