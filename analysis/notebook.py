"""A report as a notebook shows it: the page of `report --html` in a frame, or text by print()."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tokentape import __version__
from tokentape.analysis.report import report
from tokentape.analysis.report_page import page_of
from tokentape.analysis.session import connect
from tokentape.traces.reader import Tape

_HEIGHT_PX = 800


@dataclass(frozen=True)
class Shown:
    """The text and the page of one report."""

    text: str
    page: str

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        """The page in a frame of its own: its scripts cannot reach the notebook."""
        style = f"width: 100%; height: {_HEIGHT_PX}px; border: 0"
        page = escape(self.page, quote=True)
        frame = f'<iframe title="Report" sandbox="allow-scripts" style="{style}"'
        return f'{frame} srcdoc="{page}"></iframe>'


def shown(tapes: Sequence[Tape]) -> Shown:
    """The report on some tapes; TapeError where they cannot be read."""
    with connect(tapes) as session:
        found = report(session)
        return Shown(found.text(), page_of(session, found, __version__))
