"""What a process may say of its own failures: which error and where, never the values in it.

An exception's text may hold what a client sent (a UnicodeDecodeError holds the whole buffer), and
stderr ends in files that no privacy mode governs.
"""

import sys
import traceback
from pathlib import Path
from types import TracebackType


def told(error: BaseException) -> str:
    """The error's class and its innermost frame, `ValueError at sse.py:12 in feed`."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    inside = f" in {frames[-1].name}" if frames else ""
    return f"{type(error).__name__}{where}{inside}"


def hide_values() -> None:
    """From now on an uncaught error of this process is told by its frames alone."""
    sys.excepthook = _tell


def _tell(kind: type[BaseException], _error: BaseException, tb: TracebackType | None) -> None:
    for frame in traceback.extract_tb(tb):
        sys.stderr.write(f"  {frame.filename}:{frame.lineno} in {frame.name}\n")
    sys.stderr.write(f"tokentape: {kind.__name__}; its text is withheld, it may hold content\n")
