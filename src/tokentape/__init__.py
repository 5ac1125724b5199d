"""Record LLM traffic once, replay it on any hardware, find the latency tails in SQL.

`tokentape.open(path_or_glob)` opens tapes: `.rows`, `.read()`, `.sql("select ...")`, `.report()`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokentape.traces.reader import open_any as open  # noqa: A004 - tokentape.open is the word

__version__ = "0.1.0"
__all__ = ["__version__", "open"]


def __getattr__(name: str) -> Any:
    """`open`, loaded when it is first asked for: `tokentape --help` must not wait for pyarrow."""
    if name == "open":
        return importlib.import_module("tokentape.traces.reader").open_any
    raise AttributeError(f"module 'tokentape' has no attribute {name!r}")
