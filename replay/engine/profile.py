"""What the simulated engine is: plain numbers with their units, read from a TOML or JSON file.

The defaults were fitted to recordings of vLLM 0.22.1 serving an 8B model on one H100 at low load;
away from that load they are a plausible server, not a prediction. A profile never changes while an
engine runs.
"""

import dataclasses
import difflib
import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

from tokentape.traces.errors import UsageError

MUST_NOT_BE_ZERO = frozenset(
    {
        "prefill_tokens_per_s",
        "step_ms",
        "max_batched_tokens",
        "max_sequences",
        "max_model_tokens",
        "kv_tokens",
        "block_tokens",
        "stream_buffer_bytes",
    }
)
KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", str: "text"}


@dataclass(frozen=True)
class Profile:
    """The engine in numbers.

    A step takes `step_ms` + `step_ms_per_sequence` for each sequence in it + its prefill tokens at
    `prefill_tokens_per_s` + `step_ns_per_kv_token` for each token of context it reads, all times a
    log-normal factor of mean 1 and relative spread `step_jitter`, drawn from `seed`.
    """

    model: str = "simulated-8b"
    seed: int = 0
    # Time
    frontend_ms: float = 14.0  # from the request being read to its place in the queue
    prefill_tokens_per_s: float = 40_000.0
    step_ms: float = 6.1
    step_ms_per_sequence: float = 0.038
    step_ns_per_kv_token: float = 50.0
    step_jitter: float = 0.03
    # Limits
    max_batched_tokens: int = 8_192  # tokens computed in one step
    max_sequences: int = 1_024  # sequences in one step
    max_model_tokens: int = 16_384  # prompt and output of one request
    kv_tokens: int = 472_320
    block_tokens: int = 16
    prefix_cache: bool = True
    # Replies
    natural_output_tokens_mean: float = 256.0  # where nothing pins the length; 0: never stops early
    per_request_metrics: bool = False  # vLLM's `metrics` object beside usage
    stream_buffer_bytes: int = 262_144  # unread bytes after which a slow reader is closed

    def __post_init__(self) -> None:
        """Raise UsageError naming the key that cannot be right."""
        for field in dataclasses.fields(self):
            if problem := _problem(field.name, field.default, getattr(self, field.name)):
                raise UsageError(problem)
        if self.kv_tokens // self.block_tokens < -(-self.max_model_tokens // self.block_tokens):
            raise UsageError(
                f"kv_tokens ({self.kv_tokens}) must hold at least one request of "
                f"max_model_tokens ({self.max_model_tokens})"
            )

    @property
    def kv_blocks(self) -> int:
        """Whole blocks that the KV memory holds."""
        return self.kv_tokens // self.block_tokens


def _problem(name: str, default: object, value: object) -> str | None:
    kind = type(default)
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        return f"{name} must be {KINDS.get(kind, 'a number')}, not {value!r}"
    if not isinstance(value, int | float):
        return None if value else f"{name} must not be empty"
    if value < 0 or (value == 0 and name in MUST_NOT_BE_ZERO):
        least = "more than 0" if name in MUST_NOT_BE_ZERO else "0 or more"
        return f"{name} must be {least}, not {value!r}"
    return None


def load_profile(path: Path | None) -> Profile:
    """The profile in a TOML file (JSON where the name ends in .json); defaults where path is None.

    Raises UsageError, one line with the file and the key, for anything that cannot be read.
    """
    if path is None:
        return Profile()
    values = _read_table(path)
    known = [field.name for field in dataclasses.fields(Profile)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise UsageError(f"{path}: unknown key {key!r}; {hint}")
    try:
        return Profile(**values)  # type: ignore[arg-type]  # __post_init__ checks every type
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _read_table(path: Path) -> dict[str, object]:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{path}: cannot read the profile: {error.strerror}") from None
    except ValueError as error:  # both parsers' errors and bad UTF-8
        raise UsageError(f"{path}: not a valid profile: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a profile is a table of keys and values")
    return values
