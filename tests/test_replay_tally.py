"""What became of several workers, added up; the dead are counted by what the tape has of them."""

from dataclasses import replace

from tokentape.replay.health import Health
from tokentape.replay.progress import Progress, added
from tokentape.replay.sender import Sent
from tokentape.replay.tally import WorkerEnd, tally, worst

HEALTHY = Health(100, 10, 50, 90, 0, 0.25, 0.0, windows_closed=3)


def sent(done: int, health: Health = HEALTHY, **changes: object) -> Sent:
    made = Sent(5, done, 10 - done, False, 4, health, {"ok": done})
    return replace(made, **changes)  # type: ignore[arg-type]


def test_counts_are_added_and_the_worst_health_is_the_runs() -> None:
    slow = replace(HEALTHY, late_p99_ns=900, cpu_share=0.9, gc_runs=2, gc_ns=70, ticks=60)
    ends = [WorkerEnd("w0", 10, sent(10)), WorkerEnd("w1", 10, sent(8, slow, stopped=True))]
    found = tally(ends, 5, {"w0": 10, "w1": 8}, {})
    assert (found.t0_ns, found.sent, found.not_sent, found.warmed) == (5, 18, 2, 8)
    assert found.stopped and found.outcomes == {"ok": 18} and found.dead == []
    assert found.health == replace(slow, windows_closed=3)
    assert found.workers["w1"]["health"]["late_p99_ns"] == 900
    assert found.workers["w0"]["rows"] == found.workers["w0"]["sent"] == 10


def test_a_dead_worker_had_sent_what_the_tape_has_or_lost_of_it() -> None:
    ends = [WorkerEnd("w0", 10, sent(10)), WorkerEnd("w1", 10, None, "signal 9")]
    found = tally(ends, 5, {"w0": 10, "w1": 3}, {"w1": 2})
    assert (found.sent, found.not_sent) == (15, 5)
    assert found.dead == [
        "worker w1 died (signal 9): 3 of its 10 requests are on the tape, 5 were never sent"
    ]
    assert found.workers["w1"] == {"requests": 10, "sent": 5, "rows": 3, "died": "signal 9"}


def test_when_all_have_died_nothing_is_known_of_their_health() -> None:
    found = tally([WorkerEnd("w0", 10, None, "exit 1")], 5, {}, {})
    assert (found.sent, found.not_sent, found.health.ticks) == (0, 10, 0)
    assert worst([]).steal_share is None


def test_progress_of_several_is_added_up_and_means_are_those_of_all() -> None:
    name = "gen_ai_server_time_per_output_token_seconds_"
    one = Progress(3.0, 10, 5, 4, 1, 2, 7.5, 9.0, {name + "sum": 1.0, name + "count": 10.0})
    other = Progress(3.5, 20, 6, 3, 3, 0, 9.5, 8.0, {name + "sum": 5.0, name + "count": 20.0})
    both = added([one, other])
    assert (both.total, both.sent, both.done, both.in_flight, both.late) == (30, 11, 7, 4, 2)
    assert (both.elapsed_s, both.worst_late_ms, both.span_s) == (3.5, 9.5, 9.0)
    assert both.mean_s("TPOT") == 0.2
    assert added([one]) == one
