"""Words that a tape is made of and that need no library: light enough for every process."""

from typing import Literal

FORMAT_VERSION = "1.0"

ROLES = ("capture", "replay", "simulation", "import")
OUTCOMES = (
    "ok",
    "http_error",
    "stream_error",
    "client_abort",
    "upstream_abort",
    "timeout",
    "connect_error",
    "cut",
)
CLOCKS = ("kernel", "callback", "coroutine", "wall")  # best first; a row keeps its worst

Mode = Literal["none", "structure", "full"]
MODES: tuple[Mode, ...] = ("none", "structure", "full")  # each holds what the one before it holds
