"""Weka / AgentX traces: one JSON object a file, an agent's requests with its subagents nested.

Times are seconds from the start of the trace; those inside a subagent count from the subagent's own
`t` (a subagent whose times do not lie before its `t` counts from the trace's zero instead). Block
ids are local to a file unless it says global: here the trace's id goes into their upper half, so
that many traces can share a tape and never meet. len(hash_ids) = floor(in / block_size).
Each agent and subagent is a session. Who waits for whom follows from the times (sessions.py); where
an end is not known, `think_time` says that a request waited for the one before it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tokentape.traces.errors import TapeError
from tokentape.traces.importers.reading import MAX_WORD, Record, json_document
from tokentape.traces.importers.rows import (
    NO_VALUE,
    NS_PER_S,
    Batch,
    Format,
    Parents,
    batch_of,
    counted,
)
from tokentape.traces.importers.sessions import Member, Session

KNOWN = (
    *("t", "type", "model", "in", "out", "hash_ids", "stop", "api_time", "think_time", "ttft"),
    *("input_types", "output_types"),
)
SCOPES = ("local", "global")
MAX_DEPTH = 32  # of subagents inside subagents


@dataclass
class Trace:
    """What one file gives, row by row."""

    block_tokens: int
    namespace: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    parents: list[list[Member]] = field(default_factory=list)
    dropped: int = 0
    subagents: int = 0

    def add_all(self, items: list[Record], name: str, base_ns: int, session: Session) -> None:
        """Takes the requests of one agent in, subagents at the place where they were started."""
        unknown_end: Member | None = None
        if name.count("/") > MAX_DEPTH:
            raise TapeError(f"{items[0].path}: subagents more than {MAX_DEPTH} deep; not a trace")
        for item in items:
            if item.data.get("type") == "subagent":
                self._add_subagent(item, name, base_ns, session)
                continue
            item.need("t", "in", "out")
            if not item.has("t", "in", "out"):
                self.dropped += 1
                continue
            row = self._row(item, name, base_ns, session.turns)
            number, time_ns = len(self.rows), row["time_ns"]
            parents = session.add(time_ns, row["end_ns"], number)
            if unknown_end and item.has("think_time"):
                parents, row["think_ns"] = [unknown_end], item.ns("think_time", NS_PER_S)
            elif parents:
                row["think_ns"] = time_ns - max(end for end, *_ in parents)
            unknown_end = (0, time_ns, number) if row["end_ns"] is None else None
            self.rows.append(row)
            self.parents.append(parents)

    def _add_subagent(self, item: Record, name: str, base_ns: int, session: Session) -> None:
        self.subagents += 1
        start_ns = base_ns + (item.ns("t", NS_PER_S) or 0)
        inner = item.items("requests")
        first = min((r.ns("t", NS_PER_S) or 0 for r in inner), default=0)
        own_ns = base_ns if start_ns > base_ns and first >= start_ns - base_ns else start_ns
        sub = Session()
        sub.waited_for = [leaf for leaf in session.leaves if leaf[0] <= start_ns]
        agent = item.word("agent_id") or f"agent-{self.subagents}"
        self.add_all(inner, f"{name}/{agent}", own_ns, sub)
        session.leaves += sub.leaves

    def _row(self, item: Record, name: str, base_ns: int, turn: int) -> dict[str, Any]:
        time_ns = base_ns + (item.ns("t", NS_PER_S) or 0)
        input_tokens = item.count("in") or 0
        ids = item.ids("hash_ids")
        known = ids is not None and len(ids) == input_tokens // self.block_tokens
        api_ns, ttft_ns = item.ns("api_time", NS_PER_S), item.ns("ttft", NS_PER_S)
        stop = item.word("stop")
        return {
            "time_ns": time_ns,
            "row": len(self.rows),
            "operation": "chat",
            "session_id": name,
            "session_source": "trace",
            "turn_index": turn,
            "input_tokens": input_tokens,
            "output_tokens": item.count("out"),
            "hashes": [self._hash(item, i) for i in ids] if ids is not None and known else None,
            "block_tokens": self.block_tokens,
            "stream": {"s": True, "n": False}.get(str(item.data.get("type"))),
            "model_requested": item.word("model"),
            "finish_reason": [stop] if stop else None,
            "first_content_ns": None if ttft_ns is None else time_ns + ttft_ns,
            "end_ns": None if api_ns is None else time_ns + api_ns,
            "think_ns": None,
            "extra": _extra(item),
        }

    def _hash(self, item: Record, block_id: int) -> int:
        if self.namespace and block_id >= 1 << 32:
            raise item.refusal("hash_ids", "too large for ids local to a trace")
        return self.namespace << 32 | block_id


def _extra(item: Record) -> str | None:
    """Unknown keys, and the kinds of content that went in and came out, comma between them."""
    kinds = {}
    for name in ("input_types", "output_types"):
        value = item.data.get(name)
        if not isinstance(value, list | None) or not all(isinstance(v, str) for v in value or []):
            raise item.refusal(name, "not a list of words")
        if value:
            kinds[name] = ",".join(value)[:MAX_WORD]
    rest = json.loads(item.extra(*KNOWN) or "{}")
    return json.dumps(rest | kinds) if rest or kinds else None


def read_batches(path: Path) -> Iterator[Batch]:
    """The requests of a file, in order of arrival; TapeError names what cannot be read."""
    document = json_document(path)
    document.need("id", "block_size", "hash_id_scope", "requests")
    block_tokens = document.count("block_size")
    scope = document.data["hash_id_scope"]
    if not block_tokens:
        raise document.refusal("block_size", "not a number of tokens")
    if scope not in SCOPES:
        raise document.refusal("hash_id_scope", f"none of {', '.join(SCOPES)}")
    name = document.word("id") or path.stem
    trace = Trace(block_tokens, namespace_of(name) if scope == "local" else 0)
    trace.add_all(document.items("requests"), name, 0, Session())
    yield _batch(trace, document)


def namespace_of(trace_id: str) -> int:
    """31 bits that keep the ids of one trace apart from those of another."""
    return int.from_bytes(blake2b(trace_id.encode(), digest_size=4).digest(), "big") >> 1


def _batch(trace: Trace, document: Record) -> Batch:
    rows = trace.rows
    notes = {
        "rows_without_output": sum(row["output_tokens"] == 0 for row in rows),
        "rows_without_prefix": sum(row["hashes"] is None for row in rows),
        "subagents": trace.subagents,
        "tool_tokens": document.count("tool_tokens") or 0,
        "system_tokens": document.count("system_tokens") or 0,
    }
    parents = Parents.of([[(m[1], m[2]) for m in some] for some in trace.parents])
    return batch_of(rows, counted(**{NO_VALUE: trace.dropped}), notes, parents)


FORMAT = Format(
    origin="callanjfox/kv-cache-tester, traces",
    licence="Apache-2.0",
    wall_clock=False,
    one_file=False,
    read=read_batches,
    marks=("hash_id_scope", "block_size", "requests", "hash_ids"),
    facts={
        "block_rule": "floor",
        "block_scope": "trace",
        "starts": "every trace of the tape at its zero",
        "parents": "by time, within an agent and its subagents; think_time where no end is known",
    },
    pattern="*.json*",
)
