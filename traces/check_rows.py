"""What must hold for every row of a tape by itself; each rule says what is broken and marks rows.

Start at `broken_rules`. A rule looks at columns as numpy arrays; NULL never breaks one, except
where a value makes no sense without another.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tokentape.traces.keep import ERROR, SESSION, SLOW
from tokentape.traces.schema import AUX_CLASSES, EVENT_CLASSES, REQUESTS
from tokentape.traces.words import CLOCKS, OUTCOMES

Mask = NDArray[np.bool_]
Broken = Iterator[tuple[str, Mask]]

# Instants of one row in the order in which they can happen; a later one may not precede an earlier.
IN_ORDER = (
    "arrival_ns",
    "send_ns",
    "response_headers_ns",
    "first_content_ns",
    "last_content_ns",
    "end_ns",
)
NOT_NEGATIVE = (
    *("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens"),
    *("planned_input_tokens", "planned_output_tokens", "max_tokens", "turn_index", "prompt_bytes"),
    *("response_bytes", "block_tokens", "prefix_partial", "connect_ns", "tls_ns"),
    *("server_queue_ns", "server_prefill_ns", "server_decode_ns", "backpressure_ns"),
    *("events_dropped", "events_overflowed", "clamped_events", "coalesced_reads"),
)
PARTS = (("cached_tokens", "input_tokens"), ("reasoning_tokens", "output_tokens"))
WORDS = {
    "outcome": OUTCOMES,
    "event_clock": CLOCKS,
    "arrival_clock": CLOCKS,
    "send_clock": CLOCKS,
    "origin": ("upstream", "proxy"),
    "block_unit": ("token", "byte"),
    "block_scope": ("tape", "key", "trace", "session"),
    "sample_reason": (SESSION, ERROR, SLOW),
}
ADDS_UP = ("token_ids", "usage_cumulative", "usage_spread", "one_per_event")


class Rows:
    """Some rows of a segment, columns on demand; those that an old segment lacks are NULL."""

    def __init__(self, batch: pa.RecordBatch, first_row: int) -> None:
        self._batch = batch
        self._first_row = first_row

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def column(self, name: str) -> Any:
        """An Arrow array."""
        if name in self._batch.schema.names:
            return self._batch.column(self._batch.schema.get_field_index(name))
        return pa.nulls(len(self), REQUESTS.field(name).type)

    def ints(self, name: str) -> tuple[NDArray[np.int64], Mask]:
        """(values, which of them are known)."""
        column = self.column(name)
        values = pc.fill_null(column.cast(pa.int64()), 0).to_numpy(zero_copy_only=False)
        return values, np.asarray(column.is_valid(), dtype=bool)

    def is_in(self, name: str, words: tuple[str, ...]) -> Mask:
        """False for NULL too."""
        return np.asarray(pc.is_in(self.column(name), pa.array(words, pa.string())), dtype=bool)

    def sizes(self, name: str) -> NDArray[np.int64]:
        """Length of each list, -1 for NULL."""
        sizes = pc.fill_null(pc.list_value_length(self.column(name)), -1)
        return np.asarray(sizes.to_numpy(zero_copy_only=False), dtype=np.int64)

    def flat(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(values of all lists, the row that each belongs to)."""
        column = self.column(name)
        values = pc.list_flatten(column).to_numpy(zero_copy_only=False).astype(np.int64)
        return values, pc.list_parent_indices(column).to_numpy(zero_copy_only=False)

    def ids(self, name: str) -> NDArray[Any]:
        """16 bytes each; all 0 for NULL."""
        return _wide(pc.fill_null(self.column(name).storage, bytes(16)))

    def id_lists(self, name: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """(the row that each belongs to, ids of all lists)."""
        column = self.column(name)
        owner = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
        flat = pc.list_flatten(column)
        return owner, _wide(flat.storage if isinstance(flat, pa.ExtensionArray) else flat)

    def name(self, index: int) -> str:
        """Row number in the file, from 0, and the request's id."""
        return f"row {self._first_row + index} ({self.column('request_id')[index].as_py()})"


def _wide(storage: Any) -> NDArray[Any]:
    """The values of an Arrow array of 16 bytes each, none of them NULL."""
    values = np.frombuffer(storage.buffers()[1] or b"", dtype="V16")
    return values[storage.offset : storage.offset + len(storage)]


def broken_rules(rows: Rows) -> Broken:
    """(what is broken, in which rows) for each rule that some row breaks."""
    for rules in (_identity, _order, _numbers, _words, _events, _offsets, _tokens, _blocks):
        for what, mask in rules(rows):
            if mask.any():
                yield what, mask


def _identity(rows: Rows) -> Broken:
    for name in ("request_id", "arrival_ns"):
        yield f"{name} is missing", ~np.asarray(rows.column(name).is_valid(), dtype=bool)


def _order(rows: Rows) -> Broken:
    instants = {name: rows.ints(name) for name in IN_ORDER}
    for i, later in enumerate(IN_ORDER[1:], 1):
        for earlier in IN_ORDER[:i]:
            (late_ns, late_known), (early_ns, early_known) = instants[later], instants[earlier]
            yield f"{later} precedes {earlier}", late_known & early_known & (late_ns < early_ns)


def _numbers(rows: Rows) -> Broken:
    for name in NOT_NEGATIVE:
        values, known = rows.ints(name)
        yield f"{name} is negative", known & (values < 0)
    prob = pc.fill_null(rows.column("sample_prob"), 1.0).to_numpy(zero_copy_only=False)
    yield "sample_prob is no probability above 0", ~((prob > 0) & (prob <= 1))
    for part, whole in PARTS:
        (few, few_known), (all_, all_known) = rows.ints(part), rows.ints(whole)
        yield f"{part} is more than {whole}", few_known & all_known & (few > all_)


def _words(rows: Rows) -> Broken:
    for name, known in WORDS.items():
        there = np.asarray(rows.column(name).is_valid(), dtype=bool)
        yield f"{name} is none of {', '.join(known)}", there & ~rows.is_in(name, known)


def _events(rows: Rows) -> Broken:
    """The lists of a stream belong together."""
    offsets = rows.sizes("off_us")
    for name in ("ntok", "cls", "choice"):
        sizes = rows.sizes(name)
        yield f"{name} and off_us differ in length", (sizes >= 0) & (sizes != offsets)
    aux, aux_classes = rows.sizes("aux_off_us"), rows.sizes("aux_cls")
    both = (aux >= 0) & (aux_classes >= 0)
    yield "aux_cls and aux_off_us differ in length", both & (aux != aux_classes)
    for name, classes in (("cls", EVENT_CLASSES), ("aux_cls", AUX_CLASSES)):
        values, owner = rows.flat(name)
        yield f"{name} is of no known class", _marked(owner[values >= len(classes)], len(rows))


def _offsets(rows: Rows) -> Broken:
    """Offsets count from send_ns and never fall."""
    for name in ("off_us", "aux_off_us"):
        values, owner = rows.flat(name)
        falls = (np.diff(values) < 0) & (np.diff(owner) == 0)
        yield f"{name} decreases", _marked(owner[1:][falls], len(rows))
    _, sent = rows.ints("send_ns")
    yield "events without send_ns, which they count from", (rows.sizes("off_us") > 0) & ~sent


def _tokens(rows: Rows) -> Broken:
    """Rows that ended well, whose events do not add up to the tokens that the server counted."""
    values, owner = rows.flat("ntok")
    sums = np.bincount(owner, weights=values, minlength=len(rows)).astype(np.int64)
    stated, known = rows.ints("output_tokens")
    adds_up = rows.is_in("outcome", ("ok",)) & rows.is_in("ntok_source", ADDS_UP)
    counted = rows.sizes("ntok") >= 0
    yield (
        "the sum of ntok is not output_tokens and ntok_source gives no reason",
        adds_up & counted & known & (sums != stated),
    )


def _blocks(rows: Rows) -> Broken:
    """Prefix hashes have a size, and stand for no more tokens than there are, or for bytes."""
    hashes = rows.sizes("block_hashes")
    size, sized = rows.ints("block_tokens")
    yield "block_hashes without block_tokens", (hashes > 0) & (~sized | (size <= 0))
    tokens, known = rows.ints("input_tokens")
    in_tokens = (hashes > 0) & sized & known & rows.is_in("block_unit", ("token",))
    yield (
        "block_hashes stand for more than input_tokens",
        in_tokens & ((hashes - 1) * size >= tokens),
    )


def _marked(owners: NDArray[np.int64], size: int) -> Mask:
    mask = np.zeros(size, dtype=np.bool_)
    mask[owners] = True
    return mask
