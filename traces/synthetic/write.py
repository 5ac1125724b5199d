"""Writes a drawn load as a tape, as an import is written: sorted by arrival, a segment at a time.

Memory holds the requests of the sessions that are under way, and one segment.
"""

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokentape.traces.errors import TapeError
from tokentape.traces.importers.rows import Batch, rows_table
from tokentape.traces.synthetic.described import NS_PER_S, Described
from tokentape.traces.synthetic.draw import SESSIONS, batches
from tokentape.traces.writer import TapeWriter

SEGMENT_ROWS = 50_000  # at least; as an import has them
SEGMENT_BYTES = 64 << 20


@dataclass
class GenerateSummary:
    """What was written. input_tokens and output_tokens are sums."""

    tape: Path
    requests: int = 0
    sessions: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    first_ns: int = 0
    last_ns: int = 0

    @property
    def per_s(self) -> float:
        """Mean requests per second from the first to the last."""
        span_ns = self.last_ns - self.first_ns
        return (self.requests - 1) * NS_PER_S / span_ns if span_ns else 0.0

    def text(self) -> str:
        """For people."""
        span_s = (self.last_ns - self.first_ns) / NS_PER_S
        return (
            f"{self.requests:,} requests of {self.sessions:,} sessions written, "
            f"{self.per_s:.2f}/s over {span_s:.1f} s; mean tokens "
            f"{self.input_tokens / self.requests:.1f} in, "
            f"{self.output_tokens / self.requests:.1f} out"
        )

    def as_dict(self) -> dict[str, object]:
        """For machines."""
        return {
            "requests": self.requests,
            "sessions": self.sessions,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "mean_per_s": round(self.per_s, 4),
            "span_ns": self.last_ns - self.first_ns,
        }


def generate(
    described: Described,
    tape: Path,
    *,
    force: bool = False,
    command: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
    sessions_at_once: int = SESSIONS,
) -> GenerateSummary:
    """Make a tape of a description; `progress` is told the rows written.

    TapeError for a tape that exists or cannot be written, or where nothing was drawn: there is no
    new tape then.
    """
    writer = TapeWriter.create(
        tape,
        role="simulation",
        command=list(command),
        options={"seed": described.seed},
        facts={
            "tape_id": described.sha256[:32],  # so prompts are the same on every host
            "source": {
                "format": "generate",
                "drawn": "requests are drawn from a description; none was recorded",
                "description": described.as_dict(),
                "sha256": described.sha256,
            },
        },
        wall_epoch_unix_ns=0,
        force=force,
    )
    sorting = _Sorting(writer, GenerateSummary(tape), progress)
    try:
        for batch in batches(described, sessions_at_once):
            sorting.add(batch, described.sha256)
        sorting.end()
    except BaseException as error:
        with contextlib.suppress(OSError):
            writer.close()
        shutil.rmtree(tape, ignore_errors=True)
        if isinstance(error, OSError):
            raise TapeError(
                f"{tape}: cannot be written ({error.strerror}); no tape made"
            ) from error
        raise
    writer.close()
    return sorting.done


class _Sorting:
    """Holds requests until nothing can come before them, and seals them in order."""

    def __init__(
        self, writer: TapeWriter, done: GenerateSummary, progress: Callable[[int], None] | None
    ) -> None:
        self.done = done
        self._writer = writer
        self._progress = progress or (lambda _: None)
        self._waiting: list[pa.Table] = []

    def add(self, batch: Batch, sha256: str) -> None:
        """Take requests, none of which is before the first of those taken last."""
        rows = sum(table.num_rows for table in self._waiting)
        if rows >= SEGMENT_ROWS or sum(table.nbytes for table in self._waiting) >= SEGMENT_BYTES:
            self._seal(int(batch.time_ns.min()))
        self._waiting.append(rows_table(batch, sha256, 0))
        turn = batch.columns.get("turn_index")
        first_turns = len(batch.time_ns) if turn is None else pc.sum(pc.equal(turn, 0)).as_py()
        self.done.sessions += first_turns
        self.done.input_tokens += pc.sum(batch.columns["input_tokens"]).as_py()
        self.done.output_tokens += pc.sum(batch.columns["output_tokens"]).as_py()

    def end(self) -> None:
        """Seal what is left; TapeError where there was nothing at all."""
        if self._waiting:
            self._seal(None)
        if not self.done.requests:
            raise TapeError(
                f"{self.done.tape}: nothing was drawn: make the load longer, its rate higher or "
                "its context larger; no tape made"
            )

    def _seal(self, before_ns: int | None) -> None:
        """Write what comes before an instant; None: all."""
        table, done = pa.concat_tables(self._waiting), self.done
        arrival_ns = np.asarray(table["arrival_ns"])
        order = np.argsort(arrival_ns, kind="stable")
        count = len(order)
        if before_ns is not None:
            count = int(np.searchsorted(arrival_ns[order], before_ns))
        ready = table.take(pa.array(order[:count]))
        self._waiting = [table.take(pa.array(order[count:]))] if count < len(order) else []
        for at in range(0, count, 2 * SEGMENT_ROWS):
            self._writer.append_table(ready.slice(at, 2 * SEGMENT_ROWS))
        if count:
            done.last_ns = int(arrival_ns[order[count - 1]])
            done.first_ns = int(arrival_ns[order[0]]) if not done.requests else done.first_ns
        done.requests += count
        self._progress(done.requests)
