"""The catalogue of metrics and views, read from the comments of the SQL modules.

METRICS.md is what `markdown` returns. Nothing is defined here: a definition that is not in a
module's comment does not exist.
"""

from collections.abc import Iterator

from tokentape.analysis.modules import Entry, Metric, Module, SqlObject, load_order

_INTRODUCTION = """# Metrics

Generated from the comments in `analysis/sql/` by `analysis/catalogue.py`; do not edit.

- Failed requests are never dropped. Latency stands on requests with outcome `ok`; `n` says how many
  samples a number has, `attempted` how many requests the tape holds, `coverage` which part of what
  was seen that is.
- NULL means not known or not applicable. 0 is a measured zero.
- A percentile is the smallest value that at least that part of the weight does not exceed. It is
  always a value that was seen. numpy's default, vLLM bench, SGLang and AIPerf interpolate.
- A percentile is given when at least one sample lies beyond its rank: p90 from 10 samples, p99 from
  100, p99.9 from 1,000; else it is NULL and the report prints `too few`.
- Each sample counts 1 / `sample_prob` where the recorder sampled, else 1.
- Times are on one clock. "From send" begins when the last request byte was handed to the socket.
"""


def metrics() -> list[Metric]:
    """All metrics, in the order in which their modules are loaded."""
    return [metric for module in load_order() for metric in module.metrics]


def markdown() -> str:
    """The text of METRICS.md."""
    modules = load_order()
    lines = [_INTRODUCTION, "## Metrics", ""]
    for module in modules:
        for metric in module.metrics:
            lines += _metric(metric)
    lines += ["## Views and macros", ""]
    lines += [
        "All of them are there in `tokentape sql` and in `tokentape.open(path).sql(...)`.",
        "",
    ]
    for module in modules:
        lines += _module(module)
    return "\n".join(lines).rstrip() + "\n"


def _metric(metric: Metric) -> list[str]:
    return [
        f"### `{metric.name}`: {metric.title}",
        "",
        f"- Formula: {metric.formula}",
        f"- Unit: {metric.unit}",
        f"- Weight: {metric.weight}",
        f"- Undefined when: {metric.undefined_when}",
        f"- Differs from: {metric.differs_from}",
        f"- Raw values: `{metric.view}` (module `{metric.module}`)",
        "",
    ]


def _module(module: Module) -> Iterator[str]:
    public = [made for made in module.objects if made.public]
    yield from (f"### Module `{module.name}`", "", module.text, "")
    for made in public:
        yield from (f"#### `{_signature(made)}`", "", made.text, "")
        yield from _table("argument", made.args)
        yield from _table("column", made.columns)


def _signature(made: SqlObject) -> str:
    if made.kind == "VIEW":
        return made.name
    return f"{made.name}({', '.join(a.name for a in made.args)})"


def _table(what: str, entries: list[Entry]) -> Iterator[str]:
    if not entries:
        return
    yield from (f"| {what} | type | unit | meaning |", "|---|---|---|---|")
    for entry in entries:
        meaning = entry.text.replace("|", "\\|")
        yield f"| `{entry.name}` | {entry.type} | {entry.unit} | {meaning} |"
    yield ""
