"""Reads a tape as the source of a replay: what was asked, how long it was, what it shared.

It keeps a few numbers per request, not rows, and reads a bounded part of the tape at a time. It
invents nothing silently: every count that the tape does not hold is guessed by one stated rule and
counted in `guessed`. It never decides when a request is sent.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tokentape.replay.aborts import Aborts, AbortScan
from tokentape.replay.apis import CHAT, COMPLETIONS, OF_FORMAT
from tokentape.replay.links import Links, LinkScan, digests_of, together
from tokentape.replay.operators import Kin
from tokentape.replay.rows import Group, TapeRows
from tokentape.replay.schedule import NS_PER_S, Ints, Offered, Schedule
from tokentape.replay.sessions import numbered, of_copies, text_digests
from tokentape.traces.errors import TapeError
from tokentape.traces.keep import ERROR, SESSION, SLOW
from tokentape.traces.reader import Tape
from tokentape.traces.schema import REQUESTS
from tokentape.traces.wire.dialects import UNKNOWN

# Only to size the connection pool where a tape holds no durations: 50 tokens/s after 0.5 s.
GUESSED_START_NS, GUESSED_NS_PER_TOKEN = NS_PER_S // 2, NS_PER_S // 50
GUESSED_BYTES_PER_TOKEN = 4.0  # English text in common vocabularies, where a tape cannot tell
BATCH_ROWS = 64_000  # read at a time
MOST_TOKENS = (1 << 31) - 1  # of one request

GENERATING = ("chat", "text_completion")
NO_ENGINE = "never reached an engine ({})"
NO_TOKENS = "has no output token count"
KEPT_ALONE = "kept only for being slow or failed, without its session (sampled capture)"
UNSPOKEN = "came in an API that a replay does not speak, {}: --endpoint NAME asks it in another"
CONSTRAINED = (
    "requests of the tape had to be answered in a form (JSON, grammar, tool): replayed free"
)
MEDIA = "requests of the tape had images or sound: replayed as text of as many tokens"
_COLUMNS = (
    *(
        "arrival_ns",
        "scheduled_ns",
        "send_ns",
        "end_ns",
        "outcome",
        "http_status",
        "operation",
        "wire_format",
        "stream",
    ),
    *("n_choices", "max_tokens", "prompt_bytes", "parents", "think_ns", "session_id"),
    *("input_tokens", "planned_input_tokens", "output_tokens", "planned_output_tokens"),
    *("block_tokens", "block_unit", "prefix_partial"),
    *("response_format", "tool_choice", "image_count", "audio_count"),
    *("sample_prob", "sample_reason"),
)

Flags = NDArray[np.bool_]
Small = NDArray[np.int32]


@dataclass(frozen=True)
class Source:
    """The requests of a tape; every array has one entry per row, in the order of the tape.

    sessions: the same number for the same session, -1 where there is none. kept_together: the same
    where sessions that wait for each other are one, as those of an agent and its subagents. links:
    who waited for whom when they were recorded. apis: the API that each came in, by its number in
    `apis.ENDPOINTS`.
    """

    tape_id: str
    rows: TapeRows
    input_tokens: Small
    output_tokens: Small
    apis: NDArray[np.int8]
    stream: Flags
    several_choices: Flags
    sessions: Small
    kept_together: Small
    links: Links
    aborts: Aborts
    with_blocks: bool
    approximate_blocks: bool  # counted in bytes, so that shared prefixes are about right only
    guessed: dict[str, int]
    unlike: dict[str, int] = field(default_factory=dict)  # what a replay does not repeat
    sampled_of: float = 1.0  # sessions of the traffic for each one on the tape

    def clipped(self, most_tokens: int) -> "Source":
        """With prompts cut so that prompt and output fit; an output that does not fit is cut."""
        outputs = np.minimum(self.output_tokens, most_tokens - 1)
        room = most_tokens - np.maximum(outputs, 1)
        return replace(
            self, input_tokens=np.minimum(self.input_tokens, room), output_tokens=outputs
        )

    def __len__(self) -> int:
        return len(self.input_tokens)

    def groups(self, schedule: Schedule) -> Small:
        """Who must be sent by one worker, for each request of a schedule; -1: by itself."""
        return of_copies(self.kept_together[schedule.source_index], schedule.copy_index)


def read_source(
    tape: Tape,
    *,
    include_failed: bool = False,
    with_kin: bool = False,
    with_aborts: bool = True,
    any_api: bool = False,
) -> tuple[Source, Offered]:
    """Read what a replay needs; TapeError when the tape holds no request at all.

    `with_aborts`: tell where clients left; else replies end there by themselves. `with_kin`:
    operators will choose, so tell them who stays together (8 bytes a request). `any_api`: all will
    be asked in one API, so those that came in one that a replay cannot speak count, too.
    """
    if not tape.rows:
        rest = f" ({tape.unsealed_rows} rows unsealed: run recover)" if tape.unsealed_rows else ""
        raise TapeError(f"{tape.path}: holds no request{rest}")
    groups: list[Group] = []
    scan = _Scan(tape.rows, include_failed=include_failed, any_api=any_api)
    for table in _batches(tape, groups):
        scan.take(table)
    pa.default_memory_pool().release_unused()
    guessed: dict[str, int] = {}
    inputs, outputs = scan.input_tokens(guessed), scan.output_tokens(guessed)
    links = scan.links.links(tape, scan.arrival_ns, scan.duration_ns)
    scan.guess_durations()
    reason, reasons = scan.reasons()
    sessions = numbered(scan.sessions)
    kept_together = together(sessions, links)
    if with_kin and kept_together is not sessions:
        scan.sessions = digests_of(kept_together, scan.sessions)
    offered = Offered(
        arrival_ns=scan.arrival_ns,
        input_tokens=inputs,
        output_tokens=outputs,
        duration_ns=scan.duration_ns,
        reason=reason,
        reasons=reasons,
        kin=Kin(kept_together, scan.sessions, scan.duration_ns) if with_kin else None,
    )
    source = Source(
        tape_id=str(tape.facts["tape_id"]),
        rows=TapeRows(groups, scan.bytes_per_token),
        input_tokens=inputs,
        output_tokens=outputs,
        apis=scan.apis,
        stream=scan.stream,
        several_choices=scan.several_choices,
        sessions=sessions,
        kept_together=kept_together,
        links=links,
        aborts=scan.aborts.aborts(groups) if with_aborts else Aborts(),
        with_blocks=scan.with_blocks,
        approximate_blocks=scan.approximate_blocks,
        guessed={name: n for name, n in guessed.items() if n},
        unlike={name: n for name, n in scan.unlike.items() if n},
        sampled_of=scan.sampled_of,
    )
    return source, offered


def _batches(tape: Tape, groups: list[Group]) -> Iterator[pa.Table]:
    """The tape's columns in batches; `groups` gets all row groups on the way."""
    position = 0
    for segment in tape.segments:
        with pq.ParquetFile(segment.path) as file:
            names = set(file.schema_arrow.names)
            batch: list[int] = []
            rows = 0
            for number in range(file.num_row_groups):
                count = file.metadata.row_group(number).num_rows
                groups.append(Group(segment.path, number, position, count))
                position += count
                batch.append(number)
                rows += count
                if rows >= BATCH_ROWS:
                    yield _whole(file.read_row_groups(batch, _wanted(names, file, batch)), rows)
                    batch, rows = [], 0
            if batch:
                yield _whole(file.read_row_groups(batch, _wanted(names, file, batch)), rows)


def _wanted(present: set[str], file: pq.ParquetFile, batch: list[int]) -> list[str]:
    """The columns to read; lists of hashes only where their number must be known."""
    wanted = [name for name in _COLUMNS if name in present]
    if "block_unit" in present:
        units = file.read_row_groups(batch, ["block_unit"])["block_unit"]
        if pc.any(pc.equal(units, "byte")).as_py():
            wanted.append("block_hashes")
    return wanted


def _whole(table: pa.Table, rows: int) -> pa.Table:
    """With every column that is read, NULL where the segment is too old to have it."""
    for name in _COLUMNS:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(rows, REQUESTS.field(name).type))
    return table.combine_chunks()


class _Scan:
    """Adds up a tape, batch after batch. Arrays have one entry per row of the tape."""

    def __init__(self, rows: int, *, include_failed: bool, any_api: bool) -> None:
        self._include_failed, self._any_api = include_failed, any_api
        self._at = 0
        self.arrival_ns = np.empty(rows, dtype=np.int64)
        self.duration_ns = np.empty(rows, dtype=np.int64)  # 0 or less where it is not known
        self.sessions = np.empty(rows, dtype=np.uint64)
        self._inputs = np.empty(rows, dtype=np.int32)  # -1 where it is not known
        self._outputs = np.empty(rows, dtype=np.int32)
        self._reason = np.zeros(rows, dtype=np.int8)
        self.apis = np.empty(rows, dtype=np.int8)
        self.stream, self.several_choices = (np.empty(rows, dtype=np.bool_) for _ in range(2))
        self._names: list[tuple[int, str]] = [(0, "")]  # (rank, reason) by number
        self._failed = _Some()  # output tokens asked for by failed requests
        self._lengthless = _Some()  # prompt bytes of requests without prompt tokens
        self._bytes = self._tokens = 0  # of prompts that have both
        self._block_units = self._block_tokens = 0  # of prompts with blocks of bytes
        self.links = LinkScan()
        self.aborts = AbortScan()
        self.unlike = dict.fromkeys((CONSTRAINED, MEDIA), 0)
        self.with_blocks = self.approximate_blocks = False
        self._drawn, self._drawn_of = 0, 0.0  # rows that were drawn, requests that they stand for

    def take(self, table: pa.Table) -> None:
        """Add a batch."""
        here = slice(self._at, self._at + table.num_rows)
        self.arrival_ns[here] = _ints(pc.coalesce(table["arrival_ns"], table["scheduled_ns"]))
        self.duration_ns[here] = _ints(pc.subtract(table["end_ns"], table["arrival_ns"]), -1)
        self.sessions[here] = text_digests(table["session_id"].combine_chunks())
        self.apis[here] = _apis(table)
        self.stream[here] = _flags(pc.fill_null(table["stream"], fill_value=True))
        self.several_choices[here] = _flags(pc.greater(table["n_choices"], 1))
        self._reason[here] = self._reasons(table)
        self.links.take(table, here.start)
        self.aborts.take(table, here.start)
        self.with_blocks |= table["block_unit"].null_count < table.num_rows
        self._take_drawn(table)
        self._take_unlike(table)
        self._take_inputs(table, here)
        self._take_outputs(table, here)
        if "block_hashes" in table.column_names:
            self._take_byte_blocks(table)
        self._at = here.stop

    def _take_drawn(self, table: pa.Table) -> None:
        """Slow and failed rows weigh 1 in any case, so only the others tell the sampled share."""
        prob = table["sample_prob"].to_numpy()
        drawn = _flags(pc.equal(table["sample_reason"], SESSION)) & (prob < 1)
        self._drawn += int(drawn.sum())
        self._drawn_of += float((1 / prob[drawn].astype(np.float64)).sum())

    @property
    def sampled_of(self) -> float:
        """Sessions of the traffic for each one on the tape; 1 where it was not sampled."""
        return self._drawn_of / self._drawn if self._drawn else 1.0

    def _take_unlike(self, table: pa.Table) -> None:
        """Output that had to have a form is faster or slower to make than output that is free."""
        form = pc.fill_null(table["response_format"], "text")
        choice = pc.is_in(table["tool_choice"], pa.array(["required", "named"]))
        self.unlike[CONSTRAINED] += int(np.sum(_flags(pc.not_equal(form, "text")) | _flags(choice)))
        media = (_ints(table["image_count"]) > 0) | (_ints(table["audio_count"]) > 0)
        self.unlike[MEDIA] += int(media.sum())

    def _take_inputs(self, table: pa.Table, here: slice) -> None:
        known = pc.coalesce(table["input_tokens"], table["planned_input_tokens"])
        self._inputs[here] = _tokens(known, -1)
        prompt_bytes = _ints(table["prompt_bytes"], -1)
        counted = _ints(table["input_tokens"])
        both = (prompt_bytes >= 0) & (counted > 0)
        self._bytes += int(prompt_bytes[both].sum())
        self._tokens += int(counted[both].sum())
        missing = np.flatnonzero(self._inputs[here] < 0)
        self._lengthless.add(missing + here.start, np.maximum(prompt_bytes[missing], 0))

    def _take_outputs(self, table: pa.Table, here: slice) -> None:
        """Aborted requests keep what they had; a failed one gets its limit, or the median."""
        known = _tokens(pc.coalesce(table["output_tokens"], table["planned_output_tokens"]), -1)
        self._outputs[here] = np.maximum(known, 0)
        outcome = pc.fill_null(table["outcome"], "")
        failed = _flags(pc.is_in(outcome, pa.array(["http_error", "connect_error"]))) & (known <= 0)
        limit = _tokens(table["max_tokens"], -1)
        self._failed.add(np.flatnonzero(failed) + here.start, limit[failed])

    def _take_byte_blocks(self, table: pa.Table) -> None:
        byte = pc.fill_null(pc.equal(table["block_unit"], "byte"), fill_value=False)
        self.approximate_blocks |= bool(pc.any(byte).as_py())
        rows = table.filter(pc.and_(byte, pc.greater(table["input_tokens"], 0)))
        full = pc.multiply(pc.list_value_length(rows["block_hashes"]), rows["block_tokens"])
        self._block_units += int(pc.sum(full).as_py() or 0)
        self._block_units += int(pc.sum(rows["prefix_partial"]).as_py() or 0)
        self._block_tokens += int(pc.sum(rows["input_tokens"]).as_py() or 0)

    def _reasons(self, table: pa.Table) -> NDArray[np.int8]:
        """Why a row is not replayed, as numbers of `_names`; 0 means that it is."""
        operation = pc.fill_null(table["operation"], "text_completion")
        outcome = pc.fill_null(table["outcome"], "")
        status = _ints(table["http_status"])
        tokens = _ints(pc.coalesce(table["output_tokens"], table["planned_output_tokens"]), -1)
        delivered = _ints(table["output_tokens"], -1)  # what was planned says nothing of a refusal
        failed = _flags(pc.equal(outcome, "http_error")) & (delivered <= 0)
        rules: list[tuple[int, str, Flags]] = [
            (1, f"operation {name}", _flags(pc.equal(operation, name)))
            for name in sorted(set(pc.unique(operation).to_pylist()) - set(GENERATING))
        ]
        alone = pc.is_in(table["sample_reason"], pa.array([ERROR, SLOW]))
        rules.append((2, KEPT_ALONE, _flags(alone)))
        if not self._any_api:
            rules += [
                (6, UNSPOKEN.format(name), _flags(pc.equal(table["wire_format"], name)))
                for name in _unspoken(table)
            ]
        if not self._include_failed:
            refused = _flags(pc.equal(outcome, "connect_error"))
            rules += [(3, NO_ENGINE.format("connect_error"), refused)]
            rules += [
                (4, NO_ENGINE.format(f"http_error {code}"), failed & (status == code))
                for code in np.unique(status[failed]).tolist()
            ]
            unknown = (tokens < 0) & _flags(pc.is_in(outcome, pa.array(["ok", ""])))
            rules += [(5, NO_TOKENS, unknown)]
        reason = np.zeros(table.num_rows, dtype=np.int8)
        for rank, name, mask in rules:
            if mask.any():
                if (rank, name) not in self._names:
                    self._names.append((rank, name))
                reason[mask & (reason == 0)] = self._names.index((rank, name))
        return reason

    # -- what the whole tape says -----------------------------------------------------------------

    def reasons(self) -> tuple[NDArray[np.int8], tuple[str, ...]]:
        """Numbers of a list of reasons, in one order however the tape is cut into segments."""
        ordered = sorted(self._names)
        places = np.array([ordered.index(name) for name in self._names], dtype=np.int8)
        return places[self._reason], tuple(name for _, name in ordered)

    def input_tokens(self, guessed: dict[str, int]) -> Small:
        """Prompt tokens; where there are none they follow from the prompt's bytes."""
        ratio = self._bytes / self._tokens if self._tokens else GUESSED_BYTES_PER_TOKEN
        places, sizes = self._lengthless.all()
        self._inputs[places] = np.minimum(np.maximum(1, sizes / ratio), MOST_TOKENS)
        guessed[f"prompt tokens guessed from bytes ({ratio:.1f} per token)"] = len(places)
        return self._inputs

    def output_tokens(self, guessed: dict[str, int]) -> Small:
        """Completion tokens, those that failed requests had asked for included."""
        places, limits = self._failed.all()
        if len(places):
            answered = self._outputs[self._outputs > 0]
            median = int(np.median(answered)) if len(answered) else 1
            self._outputs[places] = np.where(limits < 0, median, limits)
        guessed["output tokens of failed requests guessed"] = len(places)
        return self._outputs

    def guess_durations(self) -> None:
        """Put durations where none were recorded."""
        for at in range(0, len(self.duration_ns), BATCH_ROWS):
            some = slice(at, at + BATCH_ROWS)
            missing = self.duration_ns[some] <= 0
            tokens = self._outputs[some][missing].astype(np.int64)
            self.duration_ns[some][missing] = GUESSED_START_NS + GUESSED_NS_PER_TOKEN * tokens

    @property
    def bytes_per_token(self) -> float:
        """Bytes of prompt text per token, by the rows whose blocks are counted in bytes.

        One ratio for the whole tape: equal blocks must get equal lengths, or they would not be
        shared.
        """
        known = self._block_units and self._block_tokens
        return self._block_units / self._block_tokens if known else GUESSED_BYTES_PER_TOKEN


@dataclass
class _Some:
    """A value for some rows."""

    places: list[NDArray[np.int64]] = field(default_factory=list)
    values: list[Ints] = field(default_factory=list)

    def add(self, places: NDArray[np.int64], values: Any) -> None:
        if len(places):
            self.places.append(places)
            self.values.append(np.asarray(values, dtype=np.int64))

    def all(self) -> tuple[NDArray[np.int64], Ints]:
        nothing = np.empty(0, dtype=np.int64)
        return (
            np.concatenate(self.places) if self.places else nothing,
            np.concatenate(self.values) if self.values else nothing,
        )


def _apis(table: pa.Table) -> NDArray[np.int8]:
    """The API of each row: by its wire format, else by its operation."""
    formats = pa.array(list(OF_FORMAT), pa.string())
    numbers = np.array([*OF_FORMAT.values(), -1], dtype=np.int8)
    found = numbers[_ints(pc.index_in(table["wire_format"], formats), len(formats))]
    by_operation = np.where(_flags(pc.equal(table["operation"], "chat")), CHAT, COMPLETIONS)
    chosen: NDArray[np.int8] = np.where(found >= 0, found, by_operation).astype(np.int8)
    return chosen


def _unspoken(table: pa.Table) -> list[str]:
    """Wire formats of rows that a replay has no API for."""
    return sorted(set(pc.unique(table["wire_format"]).to_pylist()) - {*OF_FORMAT, None, UNKNOWN})


def _ints(column: Any, missing: int = 0) -> Ints:
    filled = pc.fill_null(column.cast(pa.int64()), missing)
    return np.asarray(
        filled.to_numpy(zero_copy_only=False)
        if isinstance(filled, pa.Array)
        else filled.to_numpy(),
        dtype=np.int64,
    )


def _tokens(column: Any, missing: int) -> Small:
    return np.minimum(_ints(column, missing), MOST_TOKENS).astype(np.int32)


def _flags(column: Any) -> Flags:
    return np.asarray(pc.fill_null(column, fill_value=False), dtype=np.bool_)
