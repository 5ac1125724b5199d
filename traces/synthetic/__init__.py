"""Tapes that nobody recorded: a described load is drawn and written as a tape like any other.

So that synthetic load goes down the same path as real load. The same description and seed make the
same rows, and prompts, on every host. Nothing here may pass for a record: the tape's role is
`simulation`, no row has an outcome, and the description is in its facts. Start at `described.py`
(what can be asked for), then `draw.py` (the numbers), `write.py` (the tape).
"""

from tokentape.traces.synthetic.described import (
    Described,
    Empirical,
    Lengths,
    Part,
    Prefixes,
    Turns,
)
from tokentape.traces.synthetic.write import GenerateSummary, generate

__all__ = [
    "Described",
    "Empirical",
    "GenerateSummary",
    "Lengths",
    "Part",
    "Prefixes",
    "Turns",
    "generate",
]
