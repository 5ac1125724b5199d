"""Weka / AgentX traces: a folder with one JSON file for each agent, its subagents nested.

A session is an agent. A session whose name is another's, a slash and more is its subagent; only the
import of a Weka trace makes such names. Times are seconds from the start of the trace, inside a
subagent from its own start. Ids are local to a file, full blocks only. Rows without a session are
counted and left out: the format has no place for them.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from tokentape.traces.exporters.rows import PREFIX, Exported, Prefixes, Requests, Row, Window
from tokentape.traces.importers.weka import namespace_of
from tokentape.traces.reader import Tape

NS_PER_S = 1_000_000_000
COLUMNS = (
    *("input_tokens", "output_tokens", "prefix_partial", "stream", "model_requested", "model"),
    *("finish_reason", "first_content_ns", "end_ns", "think_ns", "extra", *PREFIX),
)
DEFAULT_BLOCK = 64


def write(tape: Tape, out: Path, window: Window) -> Exported:
    """One file a trace, in order of their first request."""
    requests = Requests(tape, COLUMNS, window)
    done = Exported()
    nested = tape.facts.get("source", {}).get("format") == "weka"
    traces: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in requests.generations(done):
        name = row["session_id"]
        if name is None:
            done.written -= 1
            done.drop("no_session")
            continue
        root = name.partition("/")[0] if nested else name
        traces[root][name].append(row)
    prefixes = Prefixes(requests, keep=False, first_id=1)
    for number, (root, sessions) in enumerate(traces.items(), 1):
        own = prefixes.afresh()
        zero_ns = requests.zero_ns if not requests.dated else sessions[root][0]["arrival_ns"]
        document = _trace(
            root, sessions, zero_ns, own, strip=namespace_of(root) if nested else None
        )
        (out / f"trace_{number:05d}.json").write_text(json.dumps(document) + "\n")
    done.notes += prefixes.notes()
    if requests.dated:
        done.notes.append("each trace counts from its own start: what lay between them is lost")
    return done


def _trace(
    root: str,
    sessions: dict[str, list[Row]],
    zero_ns: int,
    prefixes: Prefixes,
    strip: int | None,
) -> dict[str, Any]:
    models = sorted({_model(row) for rows in sessions.values() for row in rows})
    return {
        "id": root,
        "models": models,
        "block_size": prefixes.block_tokens or DEFAULT_BLOCK,
        "hash_id_scope": "local",
        "tool_tokens": 0,
        "system_tokens": 0,
        "requests": _agent(root, sessions, zero_ns, prefixes, strip),
    }


def _agent(
    name: str,
    sessions: dict[str, list[Row]],
    zero_ns: int,
    prefixes: Prefixes,
    strip: int | None,
) -> list[dict[str, Any]]:
    """The requests of an agent and the subagents that it started, in order."""
    items = [(row["arrival_ns"], 1, _call(row, zero_ns, prefixes, strip)) for row in sessions[name]]
    children = [n for n in sessions if n.startswith(f"{name}/") and "/" not in n[len(name) + 1 :]]
    for child in children:
        start_ns = sessions[child][0]["arrival_ns"]
        inside = _agent(child, sessions, start_ns, prefixes, strip)
        entry = {
            "t": (start_ns - zero_ns) / NS_PER_S,
            "type": "subagent",
            "agent_id": child[len(name) + 1 :],
            "subagent_type": "unknown",
            "status": "completed",
            "requests": inside,
            "models": sorted({_model(row) for row in sessions[child]}),
        }
        items.append((start_ns, 0, entry))
    return [item for *_, item in sorted(items, key=lambda item: item[:2])]


def _call(row: Row, zero_ns: int, prefixes: Prefixes, strip: int | None) -> dict[str, Any]:
    since = row["arrival_ns"]
    extra = json.loads(row["extra"] or "{}")
    said: dict[str, Any] = {
        "t": (since - zero_ns) / NS_PER_S,
        "type": "s" if row["stream"] else "n",
        "model": _model(row),
        "in": row["input_tokens"],
        "out": row["output_tokens"],
        "hash_ids": _ids(row, prefixes, strip),
        "stop": (row["finish_reason"] or [""])[0],
    }
    for kind in ("input_types", "output_types"):
        if kind in extra:
            said[kind] = extra[kind].split(",")
    for name, column in (("api_time", "end_ns"), ("ttft", "first_content_ns")):
        if row[column] is not None and (name != "ttft" or row["stream"]):
            said[name] = (row[column] - since) / NS_PER_S
    if row["think_ns"] is not None and row["think_ns"] >= 0:
        said["think_time"] = row["think_ns"] / NS_PER_S
    return said


def _ids(row: Row, prefixes: Prefixes, strip: int | None) -> list[int]:
    """Local ids: a Weka trace's own without the name in their upper half, others numbered."""
    hashes = row["block_hashes"]
    if strip is not None and hashes is not None and all(h >> 32 == strip for h in hashes):
        return [h & 0xFFFFFFFF for h in hashes]
    return prefixes.of(row, part_block=False) or []


def _model(row: Row) -> str:
    return row["model_requested"] or row["model"] or "unknown"
