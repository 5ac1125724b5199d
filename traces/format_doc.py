"""FORMAT.md, generated: a tape column by column, for those who read it without tokentape.

All facts come from schema.py; a test compares the committed page with this one. Write the page anew
with `python -m tokentape.traces.format_doc >FORMAT.md` whenever the schema changes.
"""

import sys
from collections.abc import Iterator
from itertools import groupby

from tokentape.traces import schema, words
from tokentape.traces.content import CONTENT

HEAD = """\
# The tape, format {version}

Generated from `traces/schema.py` by `python -m tokentape.traces.format_doc`; do not edit.

A tape is a directory:

```
prod.tape/
  tape.json        what it is: format version, id, role, command, versions, options, facts, losses,
                   sampled_out, deleted, and after compact or merge the clocks of the incarnations
  requests/        Parquet segments; one row per finished request, its events as lists in the row
  content/         Parquet; bodies, in the mode `full` only, encrypted where a key was given
  telemetry/       Parquet; samples of /metrics pages and of tokentape's own health
  journal/         rows that are not sealed yet; `tokentape recover` seals what a dead process left
```

- Instants are INT64 nanoseconds since the tape's wall epoch (`wall_epoch_unix_ns` in tape.json),
  measured on a monotonic clock; each segment's footer names the clock and its anchors to the wall.
- NULL means not known or not applicable. 0 means a measured zero.
- Privacy modes are {modes}; each may hold what the one before it may, and
  the column "mode" below names the first that may hold the value.
- `role` is one of {roles}.
- A new nullable column is a minor version; a changed meaning is a major one, and readers refuse a
  major version that they do not know.
"""

CONTENT_HEAD = """\
`content/*.parquet`, in the mode `full` only: a row for each request whose bodies were kept. A file
that begins with `PARE` is encrypted whole (Parquet modular encryption, AES-GCM, the content key for
footer and columns); `content_key_id` in tape.json names the key. Readers of `requests/` need none.
A request of which a killed writer held the bodies has no row here.
"""

# Run as it stands, with nothing but pyarrow, by a test that then replays what it wrote.
EXAMPLE = """\
import json
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MS = 1_000_000  # ns
tape = Path("mine.tape")
(tape / "requests").mkdir(parents=True)
facts = {{
    "format_version": "{version}",
    "tape_id": uuid.uuid4().hex,
    "role": "import",
    "wall_epoch_unix_ns": 1_700_000_000_000 * MS,
}}
(tape / "tape.json").write_text(json.dumps(facts))

first, second = uuid.uuid4(), uuid.uuid4()
columns = {{
    "request_id": pa.array([first.bytes, second.bytes], pa.uuid()),
    "session_id": pa.array(["chat-1", "chat-1"]),
    "turn_index": pa.array([0, 1], pa.int32()),
    "operation": pa.array(["chat", "chat"]),
    "stream": pa.array([True, False]),
    "arrival_ns": pa.array([0, 120 * MS], pa.int64()),
    "send_ns": pa.array([0, None], pa.int64()),
    "first_content_ns": pa.array([20 * MS, None], pa.int64()),
    "last_content_ns": pa.array([40 * MS, None], pa.int64()),
    "end_ns": pa.array([41 * MS, 180 * MS], pa.int64()),
    "think_ns": pa.array([None, 79 * MS], pa.int64()),
    "off_us": pa.array([[20_000, 30_000, 40_000], None], pa.list_(pa.uint32())),
    "ntok": pa.array([[1, 1, 1], None], pa.list_(pa.uint16())),
    "cls": pa.array([[0, 0, 0], None], pa.list_(pa.uint8())),
    "ntok_source": pa.array(["one_per_event", None]),
    "input_tokens": pa.array([50, 70], pa.int32()),
    "output_tokens": pa.array([3, 5], pa.int32()),
    "outcome": pa.array(["ok", "ok"]),
}}
table = pa.table(columns)
counts = {{"tokentape.rows": str(table.num_rows), "tokentape.events": "3"}}
pq.write_table(table.replace_schema_metadata(counts), tape / "requests" / "0.parquet")
"""
WRITING = """\
## Write one yourself

Any Parquet library will do. A tape needs `tape.json` with the four keys below, and files named
`*.parquet` anywhere under `requests/`, each with its number of rows (`tokentape.rows`) and of
events (`tokentape.events`, the values of `off_us`) as text in the footer's key-value metadata: a
reader takes a file without them, or with other counts, for damaged. Columns may be missing, but not
have another type; `request_id` and `arrival_ns` are in every row. `tokentape check` says what else
is wrong. Columns that a reader does not know are ignored, those that are missing are NULL.
"""


def markdown() -> str:
    """The whole page."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield HEAD.format(
        version=words.FORMAT_VERSION,
        modes=", ".join(f"`{m}`" for m in words.MODES),
        roles=", ".join(f"`{r}`" for r in words.ROLES),
    )
    yield f"## Requests\n\n{len(schema.COLUMNS)} columns, in groups; every one may be NULL.\n"
    for group, columns in groupby(schema.COLUMNS, key=lambda c: c.group):
        yield f"### {group}\n"
        yield from _table("column", "type", "unit", "meaning", "mode", "OpenTelemetry")
        for c in columns:
            yield _row(f"`{c.name}`", _type(str(c.type)), c.unit, c.meaning, c.mode, c.otel)
        yield ""
    yield "## Telemetry\n"
    yield from _table("column", "type", "unit", "meaning")
    for field in schema.TELEMETRY:
        told = {k.decode(): v.decode() for k, v in (field.metadata or {}).items()}
        yield _row(f"`{field.name}`", _type(str(field.type)), told.get("unit", ""), told["meaning"])
    yield "\n## Content\n"
    yield CONTENT_HEAD
    yield from _table("column", "type", "meaning")
    for field in CONTENT:
        yield _row(f"`{field.name}`", _type(str(field.type)), field.metadata[b"meaning"].decode())
    yield "\n## Values\n"
    yield f"- `outcome`: {_named(words.OUTCOMES)}"
    yield f"- clocks, best first: {_named(words.CLOCKS)}; a row keeps its worst"
    yield f"- `cls`: {_numbered(schema.EVENT_CLASSES)}"
    yield f"- `aux_cls`: {_numbered(schema.AUX_CLASSES)}"
    yield ""
    yield WRITING
    yield f"```python\n{EXAMPLE.format(version=words.FORMAT_VERSION)}```\n"


def modes_markdown() -> str:
    """What docs/privacy.md says of each mode: the columns that it adds, group by group."""
    lines = [*_table("mode", "group", "columns that it may hold, beside those of the modes above")]
    for mode in words.MODES:
        for group, columns in groupby(schema.COLUMNS, key=lambda c: c.group):
            names = [f"`{c.name}`" for c in columns if c.mode == mode]
            lines += [_row(f"`{mode}`", group, ", ".join(names))] if names else []
    bodies = ", ".join(f"`{name}`" for name in CONTENT.names)
    return "\n".join([*lines, _row("`full`", "`content/`", bodies)])


def _table(*names: str) -> Iterator[str]:
    yield _row(*names)
    yield _row(*("---" for _ in names))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '\\|') for cell in cells)} |"


def _type(arrow: str) -> str:
    """DuckDB's and Parquet's readers say list where Arrow says list<element: ...>."""
    return (
        arrow.replace("extension<arrow.uuid>", "uuid")
        .replace("element: ", "")
        .replace("item: ", "")
    )


def _named(values: tuple[str, ...]) -> str:
    return ", ".join(f"`{v}`" for v in values)


def _numbered(values: tuple[str, ...]) -> str:
    return ", ".join(f"{n} {v}" for n, v in enumerate(values))


if __name__ == "__main__":
    sys.stdout.write(modes_markdown() + "\n" if "modes" in sys.argv else markdown())
