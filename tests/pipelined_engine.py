"""A model of an engine that schedules one step ahead of its GPU, as vLLM does; for tests only.

First come, first served, chunked prefill under a token budget, seats for so many sequences, and a
cache of the turns before. It can schedule without looking ahead as well. It
says what a client would see, and when each request was queued and scheduled. Units are ns.
"""

from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rows import streamed_row
from tokentape.traces.identity import request_id

FRONTEND_NS, FRONTEND_NS_PER_TOKEN, NETWORK_NS = 12e6, 2e3, 2e6
STEP_NS, STEP_NS_PER_SEQUENCE, NS_PER_PREFILL_TOKEN = 6e6, 3e4, 23e3


@dataclass
class Load:
    """Arrivals of a Poisson process, alone or in bursts, with log-normal lengths."""

    per_s: float
    seconds: int
    prompt: float = 500.0  # median tokens
    burst: int = 1
    seats: int = 256
    budget_tokens: int = 8192
    seed: int = 1
    heads: bool = True  # reply heads are sent when the prompt has been read, as vLLM does
    turns: int = 1  # of a session: each prompt begins with the whole prompt before it
    cache: bool = True  # what the turn before had is not computed again
    ahead: bool = True  # the next step is scheduled while one runs
    write_ns: float = (
        0  # the frontend writes the events of a step one after the other, and at times pauses
    )
    surge: tuple[float, float, float] | None = None  # from and to, seconds, and how many per second


@dataclass
class Run:
    """What happened to each request, in order of arrival."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    queue_ns: list[float] = field(default_factory=list)
    prefill_ns: list[float] = field(default_factory=list)


class _Engine:
    def __init__(self, load: Load, ready_ns: Any, prompts: Any, outputs: Any) -> None:
        self.load, self.ready_ns = load, ready_ns
        self.order = deque(np.argsort(ready_ns, kind="stable").tolist())
        self.left, self.todo = prompts.copy(), outputs.copy()
        self.outputs, self.made = outputs, np.zeros(len(prompts), int)
        self.seen_ns, self.scheduled_ns = np.zeros(len(prompts)), np.zeros(len(prompts))
        self.tokens_ns: list[list[float]] = [[] for _ in prompts]
        self.waiting: deque[int] = deque()
        self.running: list[int] = []

    def schedule(self, now: float) -> tuple[float, list[int]] | None:
        """The next step: how long it takes, and who gets a token at its end."""
        while self.order and self.ready_ns[self.order[0]] <= now:
            self.seen_ns[self.order[0]] = now
            self.waiting.append(self.order.popleft())
        budget, prefill, made, busy = self.load.budget_tokens, 0, list[int](), 0
        members = [i for i in self.running if self.todo[i]]
        while budget > 0 and (members or (self.waiting and len(self.running) < self.load.seats)):
            if members:
                i = members.pop(0)
            else:
                i = self.waiting.popleft()
                self.running.append(i)
                self.scheduled_ns[i] = now
            tokens = min(max(int(self.left[i]), 1), budget)
            prefill += tokens if self.left[i] else 0
            self.left[i] = max(self.left[i] - tokens, 0)
            budget, busy = budget - tokens, busy + 1
            if not self.left[i]:
                made.append(i)
                self.todo[i] -= 1
        took = STEP_NS + STEP_NS_PER_SEQUENCE * busy + NS_PER_PREFILL_TOKEN * max(0, prefill - 150)
        return (took, made) if busy else None

    def run(self) -> None:
        now, current, ahead = 0.0, None, None
        while self.order or self.waiting or self.running or current:
            if current is None:
                current = self.schedule(now)
                if current is None:
                    now = float(self.ready_ns[self.order[0]])
                    continue
                ahead = self.schedule(now) if self.load.ahead else None
            now += current[0]
            for i in current[1]:
                self.tokens_ns[i].append(now)
                self.made[i] += 1
                if self.made[i] == self.outputs[i]:  # its seat is free once its last token is there
                    self.running.remove(i)
            current = ahead if self.load.ahead else self.schedule(now)
            ahead = self.schedule(now) if current and self.load.ahead else None


def simulate(load: Load) -> Run:
    """Serve a load; the rows have what a client sees."""
    rng = np.random.default_rng(load.seed)
    starts = rng.uniform(0, load.seconds, int(load.per_s * load.seconds) // load.burst)
    if load.surge:
        begin, end, per_s = load.surge
        starts = np.append(starts, rng.uniform(begin, end, int(per_s * (end - begin))))
    starts = np.sort(starts)
    arrivals = np.sort(
        starts.repeat(load.burst) * 1e9 + rng.uniform(0, 3e6, len(starts) * load.burst)
    )
    prompts = np.clip(rng.lognormal(np.log(load.prompt), 0.8, len(arrivals)), 8, 14000).astype(int)
    outputs = np.clip(rng.lognormal(5, 0.7, len(arrivals)), 2, 1000).astype(int)
    prompts, shared, sessions = _turns(load, prompts)
    frontend = FRONTEND_NS + FRONTEND_NS_PER_TOKEN * prompts + rng.exponential(2e6, len(arrivals))
    engine = _Engine(load, arrivals + frontend, prompts - shared * load.cache, outputs)
    engine.run()
    run = Run()
    ends_ns = [tokens[0] for tokens in engine.tokens_ns]
    if load.write_ns:
        _write_in_turn(engine.tokens_ns, load.write_ns, rng)
    for i, tokens in enumerate(engine.tokens_ns):
        sent = int(arrivals[i])
        delays = NETWORK_NS + rng.exponential(3e5, len(tokens))
        off = np.maximum.accumulate((np.array(tokens) + delays - sent) // 1000).astype(int)
        head = sent + int(frontend[i] + NETWORK_NS) if load.heads else 0
        row = _row(sent, off, int(prompts[i]), head)
        if load.turns > 1:
            row |= _blocks(int(sessions[i]), int(prompts[i]))
        run.rows.append(row)
        run.queue_ns.append(engine.scheduled_ns[i] - engine.seen_ns[i])
        run.prefill_ns.append(ends_ns[i] - engine.scheduled_ns[i])
    return run


def _write_in_turn(streams: list[list[float]], each_ns: float, rng: Any) -> None:
    """Put off each token until those before it are written; one in 500 meets a pause of 4 ms."""
    at = [(t, i, j) for i, tokens in enumerate(streams) for j, t in enumerate(tokens)]
    free_ns = 0.0
    for t, i, j in sorted(at):
        free_ns = max(free_ns, t) + each_ns + (rng.exponential(4e6) if rng.random() < 0.002 else 0)
        streams[i][j] = free_ns


def _turns(load: Load, prompts: Any) -> tuple[Any, Any, Any]:
    """Prompts with those of the turns before in front; the tokens of these; and the sessions."""
    n, streams = len(prompts), max(1, len(prompts) // (load.turns * 3))
    shared, sessions = np.zeros(n, int), np.arange(n)
    if load.turns == 1:
        return prompts, shared, sessions
    prompts = prompts.copy()
    for i in range(streams, n):
        before = i - streams
        if (before // streams) % load.turns < load.turns - 1 and prompts[before] < 12_000:
            shared[i] = prompts[before] // 16 * 16
            prompts[i] += prompts[before]
            sessions[i] = sessions[before]
    return prompts, shared, sessions


def _blocks(session: int, prompt_tokens: int) -> dict[str, Any]:
    names = [session << 20 | i for i in range(prompt_tokens // 16)]
    return {
        "block_tokens": 16,
        "block_unit": "token",
        "block_scope": "tape",
        "prefix_partial": prompt_tokens % 16,
        "block_hashes": array("Q", names),
    }


def simulate_whole_batches(requests: int, per_s: float, seats: int = 8, seed: int = 1) -> Run:
    """A server that takes what waits, up to its seats, and nothing more until all of it is done."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1e9 / per_s, requests))
    prompts = np.clip(rng.lognormal(6, 0.8, requests), 8, 8000).astype(int)
    outputs = np.clip(rng.lognormal(3.5, 0.6, requests), 2, 300).astype(int)
    run, now, begin = Run(), 0.0, 0
    while begin < requests:
        now = start = max(now, float(arrivals[begin]))
        end = begin + max(1, int((arrivals[begin : begin + seats] <= now).sum()))
        now += STEP_NS + NS_PER_PREFILL_TOKEN * int(prompts[begin:end].sum())
        first, step = now, STEP_NS + STEP_NS_PER_SEQUENCE * (end - begin)
        for i in range(begin, end):
            tokens = first + step * np.arange(outputs[i])
            delays = NETWORK_NS + rng.exponential(3e5, len(tokens))
            off = np.maximum.accumulate((tokens + delays - int(arrivals[i])) // 1000).astype(int)
            run.rows.append(_row(int(arrivals[i]), off, int(prompts[i]), 0))
            run.queue_ns.append(start - float(arrivals[i]))
            run.prefill_ns.append(first - start)
        now = first + step * int(outputs[begin:end].max() - 1)
        begin = end
    return run


def _row(sent: int, off_us: Any, prompt_tokens: int, head_ns: int) -> dict[str, Any]:
    first, last = sent + int(off_us[0]) * 1000, sent + int(off_us[-1]) * 1000
    return streamed_row(0, len(off_us)) | {
        "request_id": request_id(sent),
        "arrival_ns": sent,
        "send_ns": sent,
        "send_end_ns": sent,
        "response_headers_ns": head_ns or first,
        "first_byte_ns": head_ns or first,
        "first_content_ns": first,
        "first_answer_ns": first,
        "last_content_ns": last,
        "end_ns": last + 300_000,
        "off_us": array("I", off_us.tolist()),
        "input_tokens": prompt_tokens,
        "output_tokens": len(off_us),
    }
