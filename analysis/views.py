"""Makes the views and macros of the SQL modules in a connection, and hands on their comments."""

import re
from collections.abc import Iterator

import duckdb
import pyarrow as pa

from tokentape.analysis.modules import Module, ModuleError, SqlObject

# Costly to bind, so made when a query names one of their objects; METRICS.md lists all alike.
ON_DEMAND = {
    "metrics.long",
    "metrics.all",
    "phase.prefill",
    "phase.phases",
    "phase.phases_long",
    "phase.interference",
    "tails.tails",
    "throughput.steady",
    "throughput.prefix",
    "frontier.frontier",
    "telemetry.counters",
    "telemetry.servers",
    "telemetry.speculation",
    "telemetry.calibration",
}
_ABOUT_ALL = re.compile(r"\bduckdb_|\binformation_schema\b|^\s*(show|describe)\b", re.IGNORECASE)
_METRICS = pa.schema(
    [
        (name, pa.string())
        for name in (
            "metric",
            "title",
            "unit",
            "weight",
            "formula",
            "undefined_when",
            "differs_from",
            "source",
            "module",
        )
    ]
)


def named(unmade: list[Module], query: str) -> tuple[list[Module], bool]:
    """Those of the modules that a query needs, in order, and whether it asks about all views."""
    about_all, words = _ABOUT_ALL.search(query) is not None, set(re.findall(r"\w+", query))
    wanted = {m.name for m in unmade if about_all or words & {o.name for o in m.objects}}
    for module in reversed(unmade):
        if module.name in wanted:
            wanted.update(module.requires)
    return [m for m in unmade if m.name in wanted], about_all


def metrics_table(modules: list[Module]) -> pa.Table:
    """What the view `metrics` stands on."""
    rows = [
        {
            "metric": m.name,
            "title": m.title,
            "unit": m.unit,
            "weight": m.weight,
            "formula": m.formula,
            "undefined_when": m.undefined_when,
            "differs_from": m.differs_from,
            "source": m.view,
            "module": m.module,
        }
        for module in modules
        for m in module.metrics
    ]
    return pa.Table.from_pylist(rows, schema=_METRICS)


def make(connection: duckdb.DuckDBPyConnection, modules: list[Module]) -> None:
    """Make the views and macros of the modules, in order."""
    for module in modules:
        for made in module.objects:
            try:
                connection.execute(made.sql)
            except duckdb.Error as error:
                raise ModuleError(f"{module.path}:{made.line}: {error}") from error


def comment(connection: duckdb.DuckDBPyConnection, modules: list[Module]) -> None:
    """Hand the comments of the modules to DuckDB's catalogue."""
    for module in modules:
        for made in module.objects:
            connection.execute("; ".join(_comments(made)))


def _comments(made: SqlObject) -> Iterator[str]:
    args = "".join(f"\n{a.name} {a.type}: {a.comment}" for a in made.args)
    columns = made.columns if made.kind == "VIEW" else []
    told = "".join(f"\n-> {c.name} {c.type}: {c.comment}" for c in made.columns if not columns)
    yield f"COMMENT ON {made.kind} {made.name} IS {quoted(made.text + args + told)}"
    for column in columns:
        yield f'COMMENT ON COLUMN {made.name}."{column.name}" IS {quoted(column.comment)}'


def quoted(text: str) -> str:
    """Text as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"
