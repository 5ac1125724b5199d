"""Simulated steps in real time: never early, never drifting, and honest about being late."""

import asyncio
import time
from collections.abc import Callable
from itertools import pairwise

from tokentape.replay.engine.batching import Sequence
from tokentape.replay.engine.counters import Counters
from tokentape.replay.engine.profile import Profile
from tokentape.replay.engine.steps import Alarm, StepLoop

STEP_NS = 5_000_000
PROFILE = Profile(
    frontend_ms=0.0,
    step_ms=5.0,
    step_ms_per_sequence=0.0,
    step_ns_per_kv_token=0.0,
    prefill_tokens_per_s=1e12,
    step_jitter=0.0,
)


class Watch:
    """Notes when each token came beside when it was due; calls `at_token` with the count so far."""

    finish_reason = "length"

    def __init__(self, at_token: Callable[[int], None] = lambda _: None) -> None:
        self.done = asyncio.Event()
        self.came: list[tuple[int, int]] = []
        self.at_token = at_token

    def on_token(self, sequence: Sequence) -> None:
        self.came.append((time.monotonic_ns(), sequence.last_token_ns or 0))
        self.at_token(sequence.made)
        if sequence.finished:
            self.done.set()


def request(tokens: int) -> Sequence:
    return Sequence(list(range(8 + tokens)), 8, arrived_ns=time.monotonic_ns())


def watch_one(tokens: int, at_token: Callable[[int], None]) -> tuple[Watch, Counters]:
    async def drive() -> tuple[Watch, Counters]:
        counters = Counters()
        loop, watch = StepLoop(PROFILE, counters), Watch(at_token)
        loop.submit(request(tokens), watch)
        await watch.done.wait()
        loop.close()
        return watch, counters

    return asyncio.run(drive())


def stall_at(token: int, stall_s: float) -> Callable[[int], None]:
    """Block the event loop once: the fault that the step loop must live with."""
    return lambda made: time.sleep(stall_s) if made == token else None


def test_no_token_comes_before_its_time_and_steps_do_not_drift() -> None:
    watch, counters = watch_one(40, lambda _: None)
    due = [due_ns for _, due_ns in watch.came]
    assert [after - before for before, after in pairwise(due)] == [STEP_NS] * 39
    assert all(came_ns >= due_ns for came_ns, due_ns in watch.came)
    assert counters.steps == 40


def test_a_short_stall_is_counted_as_lateness_and_caught_up() -> None:
    watch, counters = watch_one(40, stall_at(10, 0.06))
    due = [due_ns for _, due_ns in watch.came]
    assert due[-1] - due[0] == 39 * STEP_NS
    assert counters.steps_slipped == 0
    assert counters.step_late.sum >= 0.05
    assert counters.step_written.sum >= 0.06


def test_after_a_long_stall_simulated_time_is_lost_once_and_counted() -> None:
    watch, counters = watch_one(40, stall_at(10, 0.4))
    due = [due_ns for _, due_ns in watch.came]
    gaps = [after - before for before, after in pairwise(due)]
    assert counters.steps_slipped >= 1
    assert max(gaps) >= 300_000_000
    assert sorted(gaps)[: 39 - counters.steps_slipped] == [STEP_NS] * (39 - counters.steps_slipped)


def test_the_front_end_holds_a_request_back_before_it_is_queued() -> None:
    async def drive() -> Sequence:
        profile = Profile(frontend_ms=20.0, step_ms=1.0)
        loop, watch, sequence = StepLoop(profile, Counters()), Watch(), request(1)
        loop.submit(sequence, watch)
        await watch.done.wait()
        loop.close()
        return sequence

    sequence = asyncio.run(drive())
    assert sequence.queued_ns - sequence.arrived_ns >= 20_000_000
    assert sequence.admitted_ns == sequence.queued_ns


def test_an_idle_loop_sleeps_and_wakes_for_the_next_request() -> None:
    async def drive() -> int:
        counters = Counters()
        loop = StepLoop(PROFILE, counters)
        for _ in range(3):
            watch = Watch()
            loop.submit(request(2), watch)
            await watch.done.wait()
        loop.close()
        return counters.steps

    assert asyncio.run(drive()) == 6


def test_an_aborted_sequence_is_told_of_no_more_tokens() -> None:
    async def drive() -> tuple[int, Counters]:
        counters = Counters()
        loop, kept, sequence = StepLoop(PROFILE, counters), Watch(), request(20)

        def abort_at_the_third(made: int) -> None:
            if made == 3:
                loop.abort(sequence)

        dropped = Watch(abort_at_the_third)
        loop.submit(sequence, dropped)
        loop.submit(request(20), kept)
        await kept.done.wait()
        loop.abort(sequence)
        loop.close()
        return len(dropped.came), counters

    came, counters = asyncio.run(drive())
    assert came == 3
    assert counters.finished == {"stop": 0, "length": 1, "abort": 1}


def test_an_alarm_set_anew_fires_once_at_the_last_instant() -> None:
    async def drive() -> list[int]:
        fired: list[int] = []
        done = asyncio.Event()

        def note() -> None:
            fired.append(time.monotonic_ns())
            done.set()

        alarm = Alarm(asyncio.get_running_loop(), note)
        now_ns = time.monotonic_ns()
        alarm.set(now_ns - 1)
        alarm.set(now_ns + 10_000_000)
        await done.wait()
        alarm.close()
        return [fired_ns - now_ns for fired_ns in fired]

    (after_ns,) = asyncio.run(drive())
    assert after_ns >= 10_000_000
