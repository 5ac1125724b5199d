"""Seals rows into a tape's Parquet segments; a segment appears whole or not at all.

One TapeWriter is one incarnation of one worker: its segments carry its own name, so nothing is ever
written twice. It never reads what others wrote and never touches the journal.
"""

import contextlib
import json
import os
import platform
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokentape.traces import facts as tape_facts
from tokentape.traces.clock import wall_unix_ns
from tokentape.traces.columns import content_table, requests_table, telemetry_table
from tokentape.traces.content import CONTENT, FOLDER, encryption, size_bytes
from tokentape.traces.identity import incarnation
from tokentape.traces.schema import REQUESTS, TELEMETRY
from tokentape.traces.words import FORMAT_VERSION

ROW_GROUP_ROWS = (
    4_000  # about 1 M events: the size that DuckDB reads fastest, see docs/performance.md
)
SEAL_BYTES = 64 << 20  # a guess of the rows' size in memory that closes a segment
WRITE_BYTES = 1 << 20  # at once; pyarrow alone asks the disk 400 times for a small segment
ZSTD_LEVEL = 3
WITHHELD = "withheld"  # ntok_source of a tape that shall not have the tokens of each event
TRACE_CLOCK: dict[str, Any] = {"clock_id": "trace", "anchors": []}  # an import's clock is its trace
_UNWRITABLE = (pa.ArrowException, ValueError, OverflowError, TypeError)
_ROW_BYTES, _EVENT_BYTES = 3_600, 12  # in memory, measured

_LISTS = [f.name for f in REQUESTS if pa.types.is_list(f.type)]
_DELTA = {  # sorted or slowly changing numbers: deltas are small
    f"{f.name}.list.element" if pa.types.is_list(f.type) else f.name: "DELTA_BINARY_PACKED"
    for f in REQUESTS
    if f.type == pa.int64() or f.name in ("off_us", "aux_off_us")
}
_PLAIN = {"request_id": "PLAIN", "source_request_id": "PLAIN", "block_hashes.list.element": "PLAIN"}
_ENCODING = _DELTA | _PLAIN
_DICTIONARY = [
    f"{f.name}.list.element" if f.name in _LISTS else f.name
    for f in REQUESTS
    if f"{f.name}.list.element" not in _ENCODING and f.name not in _ENCODING
]
_TELEMETRY_ENCODING = {"ts_ns": "DELTA_BINARY_PACKED", "end_ns": "DELTA_BINARY_PACKED"}
_TELEMETRY_DICTIONARY = [n for n in TELEMETRY.names if n not in {*_TELEMETRY_ENCODING, "value"}]
_CONTENT_DICTIONARY = [n for n in CONTENT.names if n.endswith(("_type", "_coding"))]


def _stored(schema: pa.Schema) -> tuple[dict[str, str], list[str]]:
    """(encodings, columns with a dictionary) of requests, content or telemetry."""
    if "request_body" in schema.names:
        return {}, _CONTENT_DICTIONARY
    if "request_id" in schema.names:
        return _ENCODING, _DICTIONARY
    return _TELEMETRY_ENCODING, _TELEMETRY_DICTIONARY


@contextlib.contextmanager
def segment_file(
    final: Path, schema: pa.Schema, footer: dict[str, Any], key: bytes = b""
) -> Iterator[tuple[pq.ParquetWriter, BinaryIO]]:
    """(writer, file) of a segment of requests, telemetry or content, there when the block ends.

    `key` encrypts it whole. When the block raises, nothing is left of it.
    """
    named = {f"tokentape.{k}": _text(v) for k, v in footer.items()}
    # Meanings are in FORMAT.md: in every footer they would be half of a small segment.
    bare = pa.schema([field.remove_metadata() for field in schema], named)
    encoding, dictionary = _stored(schema)
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        with temporary.open("wb", buffering=WRITE_BYTES) as out:
            with pq.ParquetWriter(
                out,
                bare,
                compression="zstd",
                compression_level=ZSTD_LEVEL,
                use_dictionary=dictionary,
                column_encoding=encoding,
                write_page_checksum=True,
                encryption_properties=encryption(key),
            ) as writer:
                yield writer, out
            out.flush()
            os.fsync(out.fileno())
        temporary.rename(final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    tape_facts.sync_folder(final.parent)


class TapeWriter:
    """Appends rows to a tape and seals them; `close` seals what is left.

    Rows are dictionaries of column names, instants already ns since the tape's epoch. `clock` is
    what every segment says of the clock that took them: TapeClock.footer, or TRACE_CLOCK.
    """

    def __init__(
        self,
        tape: Path,
        lock_fd: int,
        clock: dict[str, Any],
        worker: str,
        *,
        name: str = "",
        heir_of: str = "",
        content_key: bytes = b"",
    ) -> None:
        """`content_key` encrypts bodies (`append_content`); without one they lie in the clear."""
        self.tape = tape
        self.facts = tape_facts.read_facts(tape)
        self.worker = worker
        # What a dead incarnation left is sealed under its name, so that nothing is sealed twice.
        own = name or incarnation(worker)
        self.incarnation = f"{heir_of}-r{secrets.token_hex(3)}" if heir_of else own
        self.clock = clock
        self.rows_written = 0
        self.events_written = 0
        self.segments_sealed = 0
        self.losses: dict[str, int] = {}
        self.seen = 0  # requests opened; 0 for an import, which counts its own
        self.sampled_out = 0  # requests that get no row by intent
        self.lost_reads = 0  # pieces of replies that were seen and are in no row
        self.pending_bytes = 0
        self._lock_fd = lock_fd
        self._content_key = content_key
        self._content: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        self._telemetry: list[tuple[int, int, str, str, str, float]] = []

    @classmethod
    def create(
        cls,
        tape: Path,
        *,
        role: str,
        command: list[str],
        options: dict[str, Any],
        facts: dict[str, Any],
        wall_epoch_unix_ns: int | None = None,
        force: bool = False,
        worker: str = "w0",
    ) -> "TapeWriter":
        """A writer on a new tape; TapeError where one exists and `force` is not given."""
        first = tape_facts.new_facts(
            role,
            command=command,
            options=options,
            facts=facts,
            wall_epoch_unix_ns=wall_epoch_unix_ns,
        )
        tape_facts.create_tape(tape, first, force=force)
        return cls(tape, tape_facts.lock(tape), TRACE_CLOCK, worker)

    def append(self, row: dict[str, Any]) -> None:
        """Keep a finished row for the next segment."""
        events = row.get("off_us")
        if events is not None and not self.facts.get("event_sizes", True):
            row = row | {"ntok": None, "ntok_source": WITHHELD}
        self._rows.append(row)
        self.pending_bytes += _ROW_BYTES + _EVENT_BYTES * (len(events) if events is not None else 0)

    def append_telemetry(self, sample: tuple[int, int, str, str, str, float]) -> None:
        """Keep one telemetry sample (ts_ns, end_ns, source, name, labels, value)."""
        self._telemetry.append(sample)
        self.pending_bytes += 120

    def append_content(self, row: dict[str, Any]) -> None:
        """Keep the bodies of a request (a row of content.CONTENT) for the next segment."""
        self._content.append(row)
        self.pending_bytes += size_bytes(row)

    @property
    def pending(self) -> tuple[list[dict[str, Any]], list[tuple[int, int, str, str, str, float]]]:
        """(rows, telemetry samples) that wait for the next segment."""
        return self._rows, self._telemetry

    def append_table(self, table: pa.Table) -> None:
        """Seal a table of the requests schema as a segment of its own."""
        self._write_requests(table.select(REQUESTS.names).cast(REQUESTS))

    def drop_pending(self, reason: str) -> int:
        """Give up the rows that could not be sealed; they are counted as lost under `reason`."""
        dropped = len(self._rows)
        if dropped:
            self.losses[reason] = self.losses.get(reason, 0) + dropped
        self._rows.clear()
        self._content.clear()
        self._telemetry.clear()
        self.pending_bytes = 0
        return dropped

    def seal(self) -> bool:
        """Write what is pending as segments; True when there was something.

        An OSError (a full disk) leaves everything pending as it was.
        """
        wrote = bool(self._rows or self._telemetry or self._content)
        if self._content:  # first: rows that are sealed have their bodies beside them
            self._write_content(content_table(self._content))
            self._content = []
        if self._rows:
            self._drop_unwritable()
            self._write_requests(requests_table(self._rows))
            self._rows = []
        if self._telemetry:
            self._write_telemetry(telemetry_table(self._telemetry))
            self._telemetry = []
        self.pending_bytes = 0
        return wrote

    def _drop_unwritable(self) -> None:
        """Rows that Arrow cannot hold would keep all others from disk: they are counted instead."""
        try:
            requests_table(self._rows)
        except _UNWRITABLE:
            sound = [row for row in self._rows if _is_writable(row)]
            bad = len(self._rows) - len(sound)
            self.losses["unwritable"] = self.losses.get("unwritable", 0) + bad
            self._rows = sound

    def update_facts(self, **changes: Any) -> None:
        """Change tape.json, losses included; atomic."""
        with tape_facts.changing(self.tape) as facts:
            facts.update(changes)
            for name, mine in (
                ("losses", self.losses),
                ("seen", self.seen),
                ("lost_reads", self.lost_reads),
                ("sampled_out", self.sampled_out),
            ):
                if mine:
                    facts[name] = facts.get(name, {}) | {self.incarnation: mine}
            self.facts = facts

    def close(self, **changes: Any) -> None:
        """Seal the rest, write the last facts, let go of the lock."""
        try:
            self.seal()
            self.update_facts(**changes)
        finally:
            os.close(self._lock_fd)

    def _write_requests(self, table: pa.Table) -> None:
        n_events = int(pc.sum(pc.list_value_length(table["off_us"])).as_py() or 0)
        now = datetime.fromtimestamp(wall_unix_ns() / 1e9, tz=UTC)
        folder = self.tape / "requests" / f"date={now:%Y-%m-%d}" / f"hour={now:%H}"
        self._write(folder, table, {"rows": table.num_rows, "events": n_events})
        self.rows_written += table.num_rows
        self.events_written += n_events
        self.segments_sealed += 1

    def _write_content(self, table: pa.Table) -> None:
        self._write(self.tape / FOLDER, table, {"rows": table.num_rows}, self._content_key)
        self.segments_sealed += 1

    def _write_telemetry(self, table: pa.Table) -> None:
        self._write(self.tape / "telemetry", table, {"rows": table.num_rows})
        self.segments_sealed += 1

    def _write(
        self, folder: Path, table: pa.Table, counts: dict[str, int], key: bytes = b""
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        final = folder / f"{self.incarnation}-{self.segments_sealed:05d}.parquet"
        with segment_file(final, table.schema, self._footer() | counts, key) as (writer, _):
            writer.write_table(table.cast(writer.schema), ROW_GROUP_ROWS)

    def _footer(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "tape_id": self.facts["tape_id"],
            "role": self.facts["role"],
            "content": self.facts.get("content", "structure"),
            "wall_epoch_unix_ns": self.facts["wall_epoch_unix_ns"],
            "host": platform.node(),
            "worker": self.worker,
            "incarnation": self.incarnation,
            "clock_id": self.clock["clock_id"],
            "anchors": self.clock["anchors"],
        }


def _is_writable(row: dict[str, Any]) -> bool:
    try:
        requests_table([row])
    except _UNWRITABLE:
        return False
    return True


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
