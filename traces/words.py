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

# Request headers by which clients name a session; the first that is there counts.
SESSION_HEADERS = (
    *(b"x-session-id", b"session-id", b"session_id"),
    *(b"x-conversation-id", b"conversation-id", b"conversation_id"),
    *(b"helicone-session-id", b"x-litellm-session-id"),
)
