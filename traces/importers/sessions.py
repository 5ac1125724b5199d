"""Which requests a request had to wait for, where a trace tells sessions, starts and ends.

Rule, stated on every tape that it makes: of the earlier requests of the session, those that had
ended when this one came and that no other request of the session had waited for yet; where there
are none, those that the request before it waited for (two requests sent at once wait for the same).
A request whose end is not known is waited for by none. This is time order, not proof of a
dependency; a trace that names parents itself goes without this file.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokentape.traces.importers.rows import Ints, Parents, where_true

MAX_OPEN = 256  # requests of one session that nobody waited for; older ones are forgotten

Member = tuple[int, int, int]  # end_ns, time_ns, row


@dataclass
class Session:
    """The requests of one session so far, in order of arrival."""

    turns: int = 0
    leaves: list[Member] = field(default_factory=list)
    waited_for: list[Member] = field(default_factory=list)

    def add(self, time_ns: int, end_ns: int | None, row: int) -> list[Member]:
        """Takes the next request in; the requests that it waited for."""
        ready = [leaf for leaf in self.leaves if leaf[0] <= time_ns]
        if ready:
            self.leaves = [leaf for leaf in self.leaves if leaf[0] > time_ns]
            self.waited_for = ready
        self.turns += 1
        if end_ns is not None:
            self.leaves.append((end_ns, time_ns, row))
            del self.leaves[:-MAX_OPEN]
        return self.waited_for


@dataclass(frozen=True)
class Linked:
    """What sessions say about the rows of a batch."""

    columns: dict[str, pa.Array]
    parents: Parents | None


class Sessions:
    """All sessions of a trace; rows come in file order, a late one waits for what had ended."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}

    def of_rows(self, rows: Sequence[dict[str, Any]]) -> Linked:
        """As of_batch, for rows that are dictionaries: session_id, end_ns, parent_session."""
        return self.of_batch(
            pa.array([row["session_id"] for row in rows], pa.string()),
            np.array([row["time_ns"] for row in rows], dtype=np.int64),
            np.array([-1 if r["end_ns"] is None else r["end_ns"] for r in rows], dtype=np.int64),
            np.array([row["row"] for row in rows], dtype=np.int64),
            [row.pop("parent_session", None) for row in rows],
        )

    def of_batch(
        self,
        ids: pa.Array,
        time_ns: Ints,
        end_ns: Ints | None,
        row: Ints,
        origins: Sequence[str | None] = (),
    ) -> Linked:
        """Turns and parents of the rows; an empty id is no session, an end of -1 is not known.

        `origins`: the session that started the row's session, where there is one.
        """
        size = len(time_ns)
        known = np.asarray(pc.fill_null(pc.not_equal(ids, ""), fill_value=False), dtype=bool)
        where = np.flatnonzero(known)
        if not len(where):
            return Linked({}, None)
        where = where[np.argsort(time_ns[where], kind="stable")]
        turn, think = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        waits = np.zeros(size, dtype=np.int64)
        parents: dict[int, list[Member]] = {}
        names = ids.take(pa.array(where)).to_pylist()
        for index, name in zip(where.tolist(), names, strict=True):
            start = int(time_ns[index])
            session = self._session(name, origins[index] if origins else None, start)
            turn[index] = session.turns
            end = int(end_ns[index]) if end_ns is not None and end_ns[index] >= 0 else None
            found = session.add(start, end, int(row[index]))
            if found:
                parents[index] = found
                waits[index] = len(found)
                think[index] = start - max(m[0] for m in found)
        columns = {
            "session_id": pc.if_else(pa.array(known), ids, pa.scalar(None, pa.string())),
            "session_source": where_true(pa.array(known), "trace"),
            "turn_index": pa.array(turn, mask=~known),
            "think_ns": pa.array(think, mask=waits == 0),
        }
        members = [member for index in sorted(parents) for member in parents[index]]
        pairs = np.array(members, dtype=np.int64).reshape(-1, 3)
        offsets = np.concatenate([[0], np.cumsum(waits)])
        return Linked(columns, Parents(offsets, pairs[:, 1], pairs[:, 2]))

    def _session(self, name: str, origin: str | None, time_ns: int) -> Session:
        found = self._sessions.get(name)
        if found is None:
            found = self._sessions[name] = Session()
            if origin is not None and origin in self._sessions:
                leaves = self._sessions[origin].leaves
                found.waited_for = [leaf for leaf in leaves if leaf[0] <= time_ns]
        return found
