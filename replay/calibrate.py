"""The noise floor of a replay: its plan's shape sent to a server that does nothing, and subtracted.

The busiest seconds of the plan go out by the very code of a run, to a null server of this machine
that stamps what it sends. What is left is the client's own error on this machine, now. It says
nothing of a network, and it must never be subtracted from a result in silence.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokentape.replay.measures import CLOCKS, Ints
from tokentape.replay.null_server import Truth, read_log
from tokentape.replay.options import ReplayOptions
from tokentape.replay.plan import Plan, make_plan
from tokentape.replay.run import run_plan
from tokentape.replay.schedule import NS_PER_S, most_in_flight, most_within
from tokentape.replay.targets import Address, Headers, unprobed
from tokentape.replay.turns import NO_TURNS
from tokentape.traces import facts as tape_facts
from tokentape.traces.errors import TokentapeError
from tokentape.traces.reader import Tape, open_tape
from tokentape.traces.writer import TapeWriter

SPAN_NS = 10 * NS_PER_S  # of the plan; no stream lasts longer, so it takes about twice that
FIRST_NS, GAP_NS = 100_000_000, 20_000_000  # pace of the null server
START_TIMEOUT_S, END_TIMEOUT_S = 20.0, 60.0
PROMPT_TOKENS = 200  # of the shape that is used where no tape is given


@dataclass(frozen=True)
class Floor:
    """The client's own error; spreads have p50, p99, p999 and max in ns.

    arrival_error_ns: our stamp of an event minus the instant before its send.
    gap_error_ns: size of the error of a gap between two events.
    ttft_error_ns: our TTFT (from the last request byte handed over) minus the server's own.
    schedule_error_ns: whole request at the server minus the instant at which it was due.
    """

    requests: int
    events: int
    missing_events: int
    span_ns: int
    peak_per_s: int
    events_per_s: float
    event_clock: str | None
    coalesced_share: float | None
    cpu_share: float
    steal_share: float | None
    arrival_error_ns: dict[str, int | None]
    gap_error_ns: dict[str, int | None]
    ttft_error_ns: dict[str, int | None]
    schedule_error_ns: dict[str, int | None]

    def as_dict(self) -> dict[str, Any]:
        """For JSON and the tape."""
        return asdict(self)

    def text(self) -> str:
        """Lines for a terminal."""
        shared = self.coalesced_share
        steal = f", steal {100 * self.steal_share:.2f} %" if self.steal_share is not None else ""
        load = f"{self.requests} requests, {self.events} events at {self.events_per_s:,.0f}/s"
        notes = f"  own CPU {100 * self.cpu_share:.0f} % of a core{steal}"
        if shared:
            notes += f"; at least {100 * shared:.2f} % of events in shared reads"
        if self.missing_events:
            notes += f"; {self.missing_events} events are missing"
        lines = [
            f"noise floor: {load}, stamped by the {self.event_clock or 'unknown'} clock",
            f"  arrival error: {_spread_text(self.arrival_error_ns)}",
            f"  gap error: {_spread_text(self.gap_error_ns)}",
            f"  TTFT error: {_spread_text(self.ttft_error_ns)}",
            f"  schedule error: {_spread_text(self.schedule_error_ns)}",
            notes,
        ]
        return "\n".join(lines)


def calibrate(plan: Plan, span_ns: int = SPAN_NS) -> Floor:
    """Send the busiest `span_ns` of a plan to a null server; what the client made of it.

    TokentapeError when the server does not start or a run cannot be recorded; a signal that stops
    the run is a KeyboardInterrupt here: half a floor is none.
    """
    with tempfile.TemporaryDirectory(prefix="tokentape-calibrate-") as name:
        folder = Path(name)
        with null_server(folder / "log", span_ns) as url:
            part = busiest(plan, url, folder / "run.tape", span_ns)
            summary = run_plan(part)
            if summary.stopped:
                raise KeyboardInterrupt
        return floor_of(open_tape(summary.tape), read_log(folder / "log"), summary.verdict.figures)


def plain_plan(folder: Path, per_s: float, output_tokens: int, span_ns: int = SPAN_NS) -> Plan:
    """A plan of a constant rate, where there is no tape to take a shape from."""
    writer = TapeWriter.create(
        folder / "shape.tape", role="import", command=[], options={}, facts={}
    )
    counts = {"input_tokens": PROMPT_TOKENS, "output_tokens": output_tokens, "outcome": "ok"}
    for number in range(max(2, int(per_s * span_ns / NS_PER_S))):
        due = {"request_id": number.to_bytes(16), "arrival_ns": int(number * NS_PER_S / per_s)}
        writer.append(due | counts)
    writer.close()
    options = ReplayOptions(source=folder / "shape.tape", to="http://127.0.0.1:1", model="null")
    return make_plan(options, offline=True)


@contextmanager
def null_server(log: Path, longest_ns: int) -> Iterator[str]:
    """The URL of a running null server, whose log is there after the block."""
    command = [sys.executable, "-m", "tokentape.replay.null_server"]
    command += [str(n) for n in (FIRST_NS, GAP_NS, longest_ns)]
    with subprocess.Popen(
        [*command, str(log)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for us; the server ends when its input closes
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            port = server.stdout.readline().strip()
            if not port:
                raise TokentapeError("the null server of the calibration did not start")
            yield f"http://127.0.0.1:{port}"
            server.stdin.close()
            server.wait(END_TIMEOUT_S)
        finally:
            if server.poll() is None:
                server.kill()


def busiest(plan: Plan, url: str, tape: Path, span_ns: int) -> Plan:
    """The part of a plan that asks for most tokens within `span_ns`, aimed at the null server."""
    schedule, source = plan.schedule, plan.source
    due = schedule.due_ns
    tokens = np.cumsum(np.maximum(1, source.output_tokens[schedule.source_index]))
    ends = np.searchsorted(due, due + span_ns, side="left")
    inside = tokens[ends - 1] - np.r_[0, tokens[:-1]]
    start = int(np.argmax(inside))
    stop = int(ends[start])
    index = schedule.source_index[start:stop]
    due = due[start:stop] - due[start]
    lasting = FIRST_NS + np.minimum(span_ns, GAP_NS * source.output_tokens[index].astype(np.int64))
    part = replace(
        schedule,
        due_ns=due,
        source_index=index,
        copy_index=schedule.copy_index[start:stop],
        recorded_span_ns=int(due[-1]),
        peak_per_s=most_within(due, NS_PER_S),
        peak_in_flight=most_in_flight(due, lasting),
        left_out={},
    )
    options = replace(
        plan.options,
        to=url,
        tape=tape,
        headers={},
        key_env=None,
        prompt="random",
        content_key_file=None,
        ca=None,
        shard=None,  # the part is one already
        start_at_unix_ns=None,
        command=[],
        facts={},
    )
    target = unprobed(Address.parse(url), Headers({}), "null", plan.target.forms)
    return Plan(options, source, part, target, {}, probed=True, turns=NO_TURNS)


def floor_of(tape: Tape, truth: Truth, figures: dict[str, Any]) -> Floor:
    """Join what was recorded with what the server knows, by the number in the response's id."""
    names = ["response_id", "arrival_ns", "send_ns", "send_end_ns", "first_content_ns", "off_us"]
    table = tape.read(names)
    table = table.filter(pc.is_valid(table["response_id"])).combine_chunks()
    ids = pc.utf8_slice_codeunits(table["response_id"].combine_chunks().cast(pa.string()), 5)
    number = ids.cast(pa.int64()).to_numpy(zero_copy_only=False)
    columns = {n: table[n].cast(pa.int64()).to_numpy() + _to_monotonic(tape) for n in names[1:5]}
    lists = table["off_us"].combine_chunks()
    parent = pc.list_parent_indices(lists).to_numpy()
    lengths = pc.list_value_length(lists).to_numpy()
    place = np.arange(len(parent)) - (np.cumsum(lengths) - lengths)[parent]
    known = place < truth.counts[number[parent]]
    parent, place = parent[known], place[known]
    flat = pc.list_flatten(lists).to_numpy().astype(np.int64)[known]
    seen = columns["send_ns"][parent] + 1000 * flat
    sent = truth.sent_ns[truth.first[number[parent]] + place]
    same = (parent[1:] == parent[:-1]) & (np.diff(place) == 1)
    first_sent = truth.sent_ns[truth.first[number]]
    full = truth.full_ns[number]
    span_ns = int(sent.max() - sent.min()) if len(sent) else 0
    return Floor(
        requests=len(number),
        events=len(seen),
        missing_events=int(truth.counts.sum()) - len(seen),
        span_ns=span_ns,
        peak_per_s=most_within(np.sort(columns["arrival_ns"]), NS_PER_S),
        events_per_s=round(len(seen) * NS_PER_S / span_ns, 1) if span_ns else 0.0,
        event_clock=max(figures["clocks"]["event"], default=None, key=CLOCKS.index),
        coalesced_share=figures["coalesced_share"],
        cpu_share=figures["cpu_share"],
        steal_share=figures["steal_share"],
        arrival_error_ns=_spread(seen - sent),
        gap_error_ns=_spread(np.abs(np.diff(seen) - np.diff(sent))[same]),
        ttft_error_ns=_spread(
            columns["first_content_ns"] - columns["send_end_ns"] - (first_sent - full)
        ),
        schedule_error_ns=_spread(full - columns["arrival_ns"]),
    )


def _to_monotonic(tape: Tape) -> int:
    """What is added to tape time to get this machine's CLOCK_MONOTONIC."""
    anchor = tape.segments[0].anchors[0]
    epoch = int(tape.facts["wall_epoch_unix_ns"])
    return epoch + anchor["monotonic_ns"] - anchor["wall_unix_ns"]


def keep_floor(tape: Path, floor: Floor) -> None:
    """Put the floor beside the verdict of a sealed run."""
    held = tape_facts.lock(tape)
    try:
        facts = tape_facts.read_facts(tape) | {"noise_floor": floor.as_dict()}
        tape_facts.replace_facts(tape, facts)
    finally:
        with contextlib.suppress(OSError):
            os.close(held)


def _spread(values: Ints) -> dict[str, int | None]:
    if not len(values):
        return dict.fromkeys(("p50", "p99", "p999", "max"))
    p50, p99, p999 = np.quantile(values, [0.5, 0.99, 0.999], method="higher")
    return {"p50": int(p50), "p99": int(p99), "p999": int(p999), "max": int(values.max())}


def _spread_text(spread: dict[str, int | None]) -> str:
    shown = ((name, ns) for name, ns in spread.items() if ns is not None)
    return ", ".join(f"{n.replace('p999', 'p99.9')} {ns / 1000:,.0f} us" for n, ns in shown) or "-"
