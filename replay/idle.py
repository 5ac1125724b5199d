"""Waits until a candidate has nothing left to do, so that one run does not pay for the one before.

It asks the candidate's /metrics how many requests run and wait; where there is no such page, short
requests show whether the first token comes as fast as it did when nothing else was asked. It adds
at most a one-token request a second to the candidate's load.
"""

import asyncio
from dataclasses import dataclass, field
from time import monotonic_ns

from tokentape.replay.probe import PROBE_TIMEOUT_S
from tokentape.replay.prompts import PromptSource
from tokentape.replay.targets import Target
from tokentape.replay.transport import NO_REPLY, fetch
from tokentape.traces.errors import TokentapeError
from tokentape.traces.pages import PageError, parse

NS_PER_S = 1_000_000_000
LOOK_EVERY_S = 0.5
BUSY = frozenset(  # requests that run, and that wait: vLLM, SGLang, TGI
    {
        *("vllm:num_requests_running", "vllm:num_requests_waiting"),
        *("sglang:num_running_reqs", "sglang:num_queue_reqs"),
        *("tgi_batch_current_size", "tgi_queue_size"),
    }
)
IDLE_FACTOR, IDLE_NS = 1.5, 20_000_000  # a reply that takes this much longer waited for others
BASELINE = 3  # short requests that show how fast an idle candidate is
SHORT = 8  # units of such a prompt


@dataclass
class Idle:
    """What is known of a candidate at rest; `wait` before each run, the first included."""

    target: Target
    timeout_s: float
    usual_ns: int | None = field(default=None)  # of a short reply when nothing else was asked
    asked: int = field(default=0)

    async def wait(self) -> str:
        """Until it is idle; what told. TokentapeError when it is not within the timeout."""
        end_ns = monotonic_ns() + int(self.timeout_s * NS_PER_S)
        if self.usual_ns is None and await self._busy() is None:
            self.usual_ns = min([await self._short() for _ in range(BASELINE)])
        while True:
            busy = await self._busy()
            if busy == 0:
                return "/metrics"
            if busy is None and await self._is_fast() and await self._is_fast():
                return "short requests"
            if monotonic_ns() > end_ns:
                left = f"{busy:.0f} requests in it" if busy else "slow replies"
                raise TokentapeError(
                    f"{self.target.address.base}: not idle after {self.timeout_s:.0f} s ({left}); "
                    "is somebody else asking it? --drain-timeout waits longer"
                )
            await asyncio.sleep(LOOK_EVERY_S)

    async def _is_fast(self) -> bool:
        usual_ns = self.usual_ns or 0
        return await self._short() <= max(IDLE_FACTOR * usual_ns, usual_ns + IDLE_NS)

    async def _busy(self) -> float | None:
        """Requests that it runs and keeps waiting by its /metrics; None where it does not say."""
        address = self.target.address
        try:
            status, _, page = await fetch(
                "GET", address.root + "/metrics", {}, None, PROBE_TIMEOUT_S, address.ca
            )
            samples = parse(page.decode(errors="replace")) if status == 200 else []
        except (PageError, TimeoutError, *NO_REPLY):
            return None
        told = [value for name, _, value in samples if name in BUSY]
        return sum(told) if told else None

    async def _short(self) -> int:
        """How long a reply of one token takes, in ns."""
        form = next(iter(self.target.forms.values()))
        prompts = PromptSource(f"idle {monotonic_ns()}", 0)  # never cached by the candidate
        self.asked += 1
        body = form.body(prompts.draws(self.asked.to_bytes(8), SHORT), 1, stream=False)
        address, headers = self.target.address, self.target.headers.for_sending()
        began_ns = monotonic_ns()
        try:
            await fetch(
                "POST", address.url(form.endpoint), headers, body, PROBE_TIMEOUT_S, address.ca
            )
        except (TimeoutError, *NO_REPLY):
            return int(PROBE_TIMEOUT_S * NS_PER_S)
        return monotonic_ns() - began_ns


async def answers(target: Target) -> bool:
    """Whether the candidate takes a connection and replies at all."""
    address = target.address
    headers = target.headers.for_sending()
    try:
        await fetch("GET", address.base + "/models", headers, None, PROBE_TIMEOUT_S, address.ca)
    except (TimeoutError, *NO_REPLY):
        return False
    return True
