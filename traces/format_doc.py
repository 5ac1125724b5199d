"""FORMAT.md, generated: a tape column by column, for those who read it without tokentape.

All facts come from schema.py; a test compares the committed page with this one. Write the page anew
with `python -m tokentape.traces.format_doc >FORMAT.md` whenever the schema changes.
"""

import sys
from collections.abc import Iterator
from itertools import groupby

from tokentape.traces import schema, words

HEAD = """\
# The tape, format {version}

Generated from `traces/schema.py` by `python -m tokentape.traces.format_doc`; do not edit.

A tape is a directory:

```
prod.tape/
  tape.json        what it is: format version, id, role, command, versions, options, facts, losses
  requests/        Parquet segments; one row per finished request, its events as lists in the row
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
    yield "\n## Values\n"
    yield f"- `outcome`: {_named(words.OUTCOMES)}"
    yield f"- clocks, best first: {_named(words.CLOCKS)}; a row keeps its worst"
    yield f"- `cls`: {_numbered(schema.EVENT_CLASSES)}"
    yield f"- `aux_cls`: {_numbered(schema.AUX_CLASSES)}"
    yield ""


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
    sys.stdout.write(markdown())
