"""Invariants of a tape, checked on every sealed row: what is broken, where, and how often.

An `error` means that numbers from this tape would be wrong, a `warning` that something is missing
and counted. Works segment by segment.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokentape.traces.reader import Tape
from tokentape.traces.schema import REQUESTS
from tokentape.traces.words import CLOCKS, OUTCOMES

# Instants of one row in the order in which they can happen; a later one may not precede an earlier.
IN_ORDER = (
    "arrival_ns",
    "send_ns",
    "response_headers_ns",
    "first_content_ns",
    "last_content_ns",
    "end_ns",
)


@dataclass(frozen=True)
class Finding:
    """One broken or missing thing; `where` names the file, `count` the rows."""

    severity: Literal["error", "warning"]
    where: str
    what: str
    count: int = 1


def check(tape: Tape) -> list[Finding]:
    """All findings of a tape, errors first; empty when there is nothing to say.

    Cost: one segment in memory at a time, and 16 bytes and more for each request id.
    """
    found: list[Finding] = [
        Finding("error", str(path), f"damaged segment: {why}") for path, why in tape.damaged
    ]
    ids: Counter[bytes] = Counter()
    for segment in tape.segments:
        try:
            table = pq.read_table(segment.path, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            why = str(error).splitlines()[0][:160]
            found.append(Finding("error", str(segment.path), f"cannot be read: {why}"))
            continue
        found += [Finding("error", str(segment.path), w, n) for w, n in segment_problems(table)]
        ids.update(table["request_id"].combine_chunks().storage.to_pylist())
    twice = sum(1 for n in ids.values() if n > 1)
    if twice:
        found.append(Finding("error", str(tape.path), "request_id is not unique", twice))
    found += _missing(tape)
    return sorted(found, key=lambda f: f.severity)


def _missing(tape: Tape) -> list[Finding]:
    """What was seen and is not here: counted losses, and rows that a journal still holds."""
    where = str(tape.path)
    found = [Finding("warning", where, f"lost: {reason}", n) for reason, n in tape.losses.items()]
    if tape.unsealed_rows or tape.open_rows:
        what = "rows not sealed yet: still being written, or `tokentape recover` seals them"
        found.append(Finding("warning", where, what, tape.unsealed_rows + tape.open_rows))
    seen = sum(tape.facts.get("seen", {}).values())
    unexplained = seen - tape.rows - sum(tape.losses.values())
    if tape.facts.get("seen") and unexplained > tape.unsealed_rows + tape.open_rows:
        found.append(
            Finding(
                "error", where, "requests seen but neither written nor counted as lost", unexplained
            )
        )
    return found


def segment_problems(table: pa.Table) -> list[tuple[str, int]]:
    """(what is broken, rows) for the rows of one segment."""
    problems = [
        (f"{field.name} is of type {field.type}", table.num_rows)
        for field in table.schema
        if field.name in REQUESTS.names and field.type != REQUESTS.field(field.name).type
    ]
    for field in REQUESTS:  # an older segment may lack columns
        if field.name not in table.schema.names:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    problems += _order_problems(table)
    problems += _list_problems(table)
    for name, known in (("outcome", OUTCOMES), ("event_clock", CLOCKS), ("arrival_clock", CLOCKS)):
        odd = pc.sum(pc.invert(pc.is_in(table[name].drop_null(), pa.array(known)))).as_py() or 0
        problems.append((f"{name} is none of {', '.join(known)}", odd))
    return [(what, n) for what, n in problems if n]


def _order_problems(table: pa.Table) -> list[tuple[str, int]]:
    problems = []
    for i, later in enumerate(IN_ORDER[1:], 1):
        for earlier in IN_ORDER[:i]:
            backwards = pc.less(table[later], table[earlier])
            problems.append((f"{later} precedes {earlier}", pc.sum(backwards).as_py() or 0))
    return problems


def _list_problems(table: pa.Table) -> list[tuple[str, int]]:
    lists = {n: table[n].combine_chunks() for n in ("off_us", "ntok", "cls", "choice")}
    sizes = {n: _sizes(a) for n, a in lists.items()}
    problems = [
        (
            f"{n} and off_us differ in length",
            int(np.count_nonzero((sizes[n] >= 0) & (sizes[n] != sizes["off_us"]))),
        )
        for n in ("ntok", "cls", "choice")
    ]
    problems.append(("off_us decreases", _decreasing_rows(lists["off_us"])))
    return [
        *problems,
        (
            "the sum of ntok is not output_tokens and ntok_source gives no reason",
            _token_mismatches(table, lists["ntok"]),
        ),
    ]


def _sizes(column: Any) -> Any:
    """Length of each list, -1 for NULL."""
    return pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)


def _decreasing_rows(column: Any) -> int:
    values = pc.list_flatten(column).to_numpy(zero_copy_only=False).astype(np.int64)
    owner = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
    falls = (np.diff(values) < 0) & (np.diff(owner) == 0)
    return len(np.unique(owner[1:][falls]))


def _token_mismatches(table: pa.Table, ntok: Any) -> int:
    """Rows that ended well, whose events do not add up to the tokens that the server counted."""
    values = pc.list_flatten(ntok).to_numpy(zero_copy_only=False).astype(np.int64)
    owner = pc.list_parent_indices(ntok).to_numpy(zero_copy_only=False)
    sums = np.bincount(owner, weights=values, minlength=table.num_rows).astype(np.int64)
    stated = pc.fill_null(table["output_tokens"], -1).to_numpy().astype(np.int64)
    ok = pc.fill_null(pc.equal(table["outcome"], "ok"), False).to_numpy(zero_copy_only=False)
    spread = pc.fill_null(
        pc.is_in(
            table["ntok_source"],
            pa.array(["token_ids", "usage_cumulative", "usage_spread", "one_per_event"]),
        ),
        False,
    ).to_numpy(zero_copy_only=False)
    return int(
        np.count_nonzero(ok & spread & (_sizes(ntok) >= 0) & (stated >= 0) & (sums != stated))
    )
