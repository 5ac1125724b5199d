"""Reads the SQL modules: their heads, their objects, and the comment on every one of them.

One file is one module, `latency/ttft.sql` is `latency.ttft`. The grammar is strict, so that the
catalogue, the comments in DuckDB and METRICS.md all come from the same lines. A module may only
create views and macros; names that begin with `_` are private. This file must never run SQL.

    -- module: latency.ttft          the head: name, what must be loaded before it, what it is about
    -- requires: prelude.schema
    --
    -- Text.

    -- metric: ttft                  then its metrics: Title, Formula, Unit, Weight, View,
    -- Title: TTFT from send         Undefined when, Differs from

    -- Text.                         then its objects, each with a comment right above it
    -- arg NAME TYPE (unit): text
    -- col NAME TYPE (unit): text    `cols OBJECT except A, B: text` takes over others
    CREATE VIEW ttft AS              or CREATE MACRO; ends with a `;` at the end of a line

A line that goes on is indented by two more spaces.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokentape.traces import schema

SQL_FOLDER = Path(__file__).parent / "sql"
METRIC_FIELDS = ("Title", "Formula", "Unit", "Weight", "View", "Undefined when", "Differs from")

_ENTRY = re.compile(r"(arg|col) (\w+) ([A-Z]+(?:\[\])?)(?: \(([^)]+)\))?: (.+)")
_SAME = re.compile(r"cols (\w+)(?: except ([\w, ]+))?: .+")
_FIELD = re.compile(rf"({'|'.join(METRIC_FIELDS)}): (.+)")
_CREATE = re.compile(r"CREATE (VIEW|MACRO) (\w+)(?:\((.*?)\))? AS\b(\s+TABLE\b)?")


class ModuleError(Exception):
    """A module that is written wrongly: a defect of the package, never of what the user did."""


@dataclass(frozen=True)
class Entry:
    """A column or an argument."""

    name: str
    type: str
    unit: str
    text: str

    @property
    def comment(self) -> str:
        """The text with its unit, as the catalogue of DuckDB gets it."""
        return f"{self.text} [{self.unit}]" if self.unit else self.text


@dataclass(frozen=True)
class SqlObject:
    """One view or macro with its comment; `kind` is VIEW, MACRO or MACRO TABLE."""

    kind: str
    name: str
    text: str
    args: list[Entry]
    columns: list[Entry]
    sql: str
    line: int

    @property
    def public(self) -> bool:
        """Part of what users may rely on."""
        return not self.name.startswith("_")


@dataclass(frozen=True)
class Metric:
    """One metric as its module defines it."""

    name: str
    title: str
    formula: str
    unit: str
    weight: str
    view: str
    undefined_when: str
    differs_from: str
    module: str


@dataclass
class Module:
    """One SQL file."""

    name: str
    path: Path
    requires: list[str]
    text: str = ""
    metrics: list[Metric] = field(default_factory=list)
    objects: list[SqlObject] = field(default_factory=list)


def load_order(folder: Path = SQL_FOLDER) -> list[Module]:
    """All modules, each after those that it requires; ModuleError names file and line.

    The one that requires most comes first with its list, which so gives the order of the catalogue.
    """
    found = {m.name: m for m in map(read_module, sorted(folder.glob("**/*.sql")))}
    order: dict[str, Module] = {}

    def visit(module: Module, chain: tuple[str, ...]) -> None:
        if module.name in chain:
            raise ModuleError(f"{module.path}:1: circle {' -> '.join((*chain, module.name))}")
        for name in module.requires:
            if name not in found:
                raise ModuleError(f"{module.path}:2: requires {name}, which does not exist")
            visit(found[name], (*chain, module.name))
        order.setdefault(module.name, module)

    for module in sorted(found.values(), key=lambda m: -len(m.requires)):
        visit(module, ())
    return list(order.values())


def read_module(path: Path) -> Module:
    """Parse one file; ModuleError where it breaks the grammar."""
    blocks = list(_blocks(path.read_text().splitlines()))
    module = _head(path, blocks[0][1] if blocks else [])
    for line, comment, sql in blocks[1:]:
        where = f"{path}:{line}"
        if sql:
            module.objects.append(_object(where, module, comment, sql, line + len(comment)))
        elif comment[0].startswith("-- metric: "):
            module.metrics.append(_metric(where, module.name, comment))
        else:
            raise ModuleError(f"{where}: a comment that belongs to nothing")
    return module


def _blocks(lines: list[str]) -> Iterator[tuple[int, list[str], str]]:
    """(first line, unfolded comment lines, SQL) of each part of a file."""
    at = 0
    while at < len(lines):
        start = at
        while at < len(lines) and lines[at].startswith("--"):
            at += 1
        comment = lines[start:at]
        code = at
        while at < len(lines) and lines[at].strip() and not lines[at].startswith("--"):
            while at < len(lines) and not lines[at].endswith(";"):
                at += 1
            at += 1
        if at > start:
            yield start + 1, comment, "\n".join(lines[code:at])
        at = max(at, start + 1)


def _unfold(comment: list[str]) -> list[str]:
    """Comment lines without their dashes, indented ones joined to the line that they go on with."""
    unfolded: list[str] = []
    for line in comment:
        text = line.removeprefix("--").removeprefix(" ")
        if text.startswith("  ") and unfolded:
            unfolded[-1] += " " + text.strip()
        else:
            unfolded.append(text.rstrip())
    return unfolded


def _head(path: Path, comment: list[str]) -> Module:
    lines = _unfold(comment)
    name = ".".join(path.with_suffix("").parts[-2:])
    if not lines or lines[0] != f"module: {name}":
        raise ModuleError(f"{path}:1: must begin with `-- module: {name}`")
    if len(lines) < 2 or not lines[1].startswith("requires:"):
        raise ModuleError(f"{path}:2: must be `-- requires: ...`")
    requires = lines[1].removeprefix("requires:").replace(",", " ").split()
    return Module(name, path, requires, " ".join(lines[2:]).strip())


def _metric(where: str, module: str, comment: list[str]) -> Metric:
    first, *rest = _unfold(comment)
    fields = {m[1]: m[2] for line in rest if (m := _FIELD.fullmatch(line))}
    if tuple(fields) != METRIC_FIELDS or len(rest) != len(METRIC_FIELDS):
        raise ModuleError(
            f"{where}: a metric has exactly {', '.join(METRIC_FIELDS)}, in this order"
        )
    return Metric(
        name=first.removeprefix("metric: "),
        title=fields["Title"],
        formula=fields["Formula"],
        unit=fields["Unit"],
        weight=fields["Weight"],
        view=fields["View"],
        undefined_when=fields["Undefined when"],
        differs_from=fields["Differs from"],
        module=module,
    )


def _object(where: str, module: Module, comment: list[str], sql: str, line: int) -> SqlObject:
    create = _CREATE.match(sql)
    if not create:
        raise ModuleError(
            f"{where}: only CREATE VIEW or CREATE MACRO, found `{sql.splitlines()[0]}`"
        )
    kind, name, parameters, table = create.groups()
    texts: list[str] = []
    entries: dict[str, list[Entry]] = {"arg": [], "col": []}
    for text in _unfold(comment):
        if same := _SAME.fullmatch(text):
            entries["col"] += _columns_of(where, module, same[1], same[2] or "")
        elif entry := _ENTRY.fullmatch(text):
            entries[entry[1]].append(Entry(entry[2], entry[3], entry[4] or "", entry[5]))
        elif text.startswith(("arg ", "col ", "cols ")):
            raise ModuleError(f"{where}: must be `col NAME TYPE (unit): text`, found `{text}`")
        else:
            texts.append(text)
    if not texts:
        raise ModuleError(f"{where}: {name} has no comment")
    names = [p.split(":=")[0].strip() for p in (parameters or "").split(",") if p.strip()]
    if not name.startswith("_") and names != [a.name for a in entries["arg"]]:
        raise ModuleError(
            f"{where}: {name} must document its arguments {', '.join(names)}, in order"
        )
    kind = f"{kind} TABLE" if table else kind
    return SqlObject(kind, name, " ".join(texts), entries["arg"], entries["col"], sql, line)


def _columns_of(where: str, module: Module, name: str, unwanted: str) -> list[Entry]:
    """Columns documented elsewhere: in traces/schema.py, or at an object above."""
    objects = {known.name: known.columns for known in module.objects}
    objects["schema"] = [Entry(c.name, "", c.unit, c.meaning) for c in schema.COLUMNS]
    if name not in objects:
        raise ModuleError(f"{where}: {name} is not above")
    return [c for c in objects[name] if c.name not in unwanted.replace(",", " ").split()]
