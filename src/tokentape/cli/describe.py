"""Reads the description of a load, a TOML file or its text, into what `generate` draws from.

Each key is a number, or a short text of words with units: `poisson 5/s..50/s for 10m`. A text that
cannot be read is one line that names key, text and a form that would do.
"""

import difflib
import tomllib
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokentape.cli import units
from tokentape.traces.errors import UsageError

if TYPE_CHECKING:
    from tokentape.traces.synthetic import Described, Empirical, Lengths, Part, Prefixes, Turns
    from tokentape.traces.synthetic.described import Process

ARRIVALS_FORM = "poisson 5/s for 10m, gamma 5/s..50/s for 10m cv=3, or constant 10/s for 1m"
LENGTHS_FORM = "a number, lognormal mean=800 cv=1.2 max=8000, or tape prod.tape"
PREFIXES_FORM = "count=20 tokens=2048 share=80% zipf=1"
TURNS_FORM = "mean=3 max=20"
THINK_FORM = "5s, or lognormal mean=8s cv=1 max=10m"
REPLY_FORM = "500ms 50/s: until the first token, then tokens/s"
CHAT_FORM = "true, false, or a share of the sessions such as 50%"
KEYS = (
    *("arrivals", "input", "output", "prefixes", "turns", "think", "reply"),
    *("context", "block_tokens", "chat", "seed"),
)
PROCESSES: "dict[str, Process]" = {"constant": "constant", "poisson": "poisson", "gamma": "gamma"}
NS_PER_S = 1_000_000_000


def described(spec: str, seed: int | None = None) -> "Described":
    """The load that a file, or a text with `=` in it, describes; `;` ends a line of a text.

    `seed` goes before the description's own. Raises UsageError for what cannot be read.
    """
    path = Path(spec)
    if "=" not in spec or path.is_file():
        try:
            text, where, folder = path.read_text(encoding="utf-8"), str(path), path.parent
        except OSError as error:
            raise UsageError(
                f"{spec}: {error.strerror}; give a TOML file, or text such as "
                "'arrivals = \"poisson 5/s for 10m\"; input = 800; output = 200'"
            ) from None
        except UnicodeDecodeError:
            raise UsageError(f"{spec}: not UTF-8 text; give a TOML file") from None
    else:
        text, where, folder = spec.replace(";", "\n"), "SPEC", Path()
    try:
        keys = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where}: not TOML ({error})") from None
    return _Reading(keys, where, folder).described(seed)


class _Reading:
    """One description; every refusal names where it stands."""

    def __init__(self, keys: Mapping[str, Any], where: str, folder: Path) -> None:
        self._keys = keys
        self._where = where
        self._folder = folder

    def described(self, seed: int | None) -> "Described":
        from tokentape.traces.synthetic import Described

        for key in self._keys:
            if key not in KEYS:
                near = difflib.get_close_matches(key, KEYS, 1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(KEYS)}"
                raise UsageError(f"{self._where}: unknown key {key}; {hint}")
        for key in ("arrivals", "input", "output"):
            if key not in self._keys:
                form = ARRIVALS_FORM if key == "arrivals" else LENGTHS_FORM
                raise UsageError(f"{self._where}: lacks {key}; give {form}")
        turns = self._read("turns", self._turns, TURNS_FORM)
        for key in ("think", "reply"):
            if key in self._keys and turns is None:
                raise UsageError(f"{self._where}: {key} without turns; add turns = {TURNS_FORM!r}")
        try:
            return Described(
                arrivals=self._read("arrivals", self._arrivals, ARRIVALS_FORM),
                input_tokens=self._read("input", self._lengths, LENGTHS_FORM),
                output_tokens=self._read("output", self._lengths, LENGTHS_FORM),
                prefixes=self._read("prefixes", _prefixes, PREFIXES_FORM),
                turns=turns,
                context_tokens=self._read("context", _whole, "a number of tokens"),
                block_tokens=self._read("block_tokens", _whole, "a number of tokens") or 128,
                chat=self._read("chat", _share, CHAT_FORM) or Fraction(0),
                seed=seed if seed is not None else self._read("seed", _whole, "a number") or 0,
            )
        except UsageError as error:
            prefix = "" if str(error).startswith(self._where) else f"{self._where}: "
            raise UsageError(f"{prefix}{error}") from None

    def _read[T](self, key: str, read: Callable[[Any], T], form: str) -> T:
        """The value of a key; None where it is missing."""
        if key not in self._keys:
            return None  # type: ignore[return-value]
        value = self._keys[key]
        try:
            return read(value)
        except UsageError as error:
            raise UsageError(f"{self._where}: {key} = {value!r}: {error}") from None
        except (ValueError, KeyError, TypeError, ArithmeticError):
            raise UsageError(f"{self._where}: {key} = {value!r}: need {form}") from None

    def _arrivals(self, value: Any) -> "tuple[Part, ...]":
        parts = [value] if isinstance(value, str) else value
        return tuple(_part(text) for text in parts)

    def _lengths(self, value: Any) -> "Lengths | Empirical":
        from tokentape.traces.synthetic import Empirical, Lengths

        if isinstance(value, int) and not isinstance(value, bool):
            return Lengths(float(value))
        kind, *rest = _words(value)
        if kind == "tape":
            path = " ".join(rest)
            found = Empirical(self._folder / path)
            assert len(found.pairs), "read now, so that a mistake is told before anything is made"
            return found
        if kind != "lognormal":
            raise ValueError(kind)
        options = _options(rest, {"mean", "cv", "min", "max"})
        limits = {name: int(options[name]) for name in ("min", "max") if name in options}
        return Lengths(
            float(options["mean"]),
            float(options.get("cv", "0")),
            least=limits.get("min", 1),
            most=limits.get("max", Lengths.most),
        )

    def _turns(self, value: Any) -> "Turns":
        from tokentape.traces.synthetic import Turns

        options = _options(_words(value), {"mean", "max"})
        known: dict[str, Any] = {"mean": float(options["mean"])}
        if "max" in options:
            known["most"] = int(options["max"])
        if (think := self._read("think", _think, THINK_FORM)) is not None:
            known["think"] = think
        if (reply := self._read("reply", _reply, REPLY_FORM)) is not None:
            known["reply_start_ns"], known["reply_ns_per_token"] = reply
        return Turns(**known)


def _words(value: Any) -> list[str]:
    if not isinstance(value, str) or not value.split():
        raise ValueError(value)
    return value.split()


def _options(words: list[str], known: set[str]) -> dict[str, str]:
    options = units.pairs("it", words)
    if options.keys() - known:
        raise ValueError(words)
    return options


def _part(text: Any) -> "Part":
    from tokentape.traces.synthetic import Part

    process, rate, word, lasting, *rest = _words(text)
    if word != "for":
        raise ValueError(text)
    options = _options(rest, {"cv"} if process == "gamma" else set())
    first, dots, last = rate.partition("..")
    return Part(
        PROCESSES[process],
        _rate(first),
        _rate(last) if dots else _rate(first),
        units.duration_ns("for", lasting),
        float(options.get("cv", "1")),
    )


def _rate(text: str) -> Fraction:
    """A rate, or none at all, at which a ramp may begin or end."""
    return Fraction(0) if text in {"0/s", "0/m", "0/h"} else units.rate_per_s("rate", text)


def _prefixes(value: Any) -> "Prefixes":
    from tokentape.traces.synthetic import Prefixes

    options = _options(_words(value), {"count", "tokens", "share", "zipf"})
    return Prefixes(
        int(options["count"]),
        int(options["tokens"]),
        units.percent("share", options.get("share", "100%")),
        float(options.get("zipf", "1")),
    )


def _think(value: Any) -> "Lengths":
    from tokentape.traces.synthetic import Lengths

    kind, *rest = _words(value)
    limits = {"least": 0, "most": 86_400 * NS_PER_S}
    if not rest:
        return Lengths(float(units.duration_ns("think", kind)), **limits)
    if kind != "lognormal":
        raise ValueError(value)
    options = _options(rest, {"mean", "cv", "max"})
    if "max" in options:
        limits["most"] = units.duration_ns("max", options["max"])
    mean_ns = units.duration_ns("mean", options["mean"])
    return Lengths(float(mean_ns), float(options.get("cv", "1")), **limits)


def _reply(value: Any) -> tuple[int, int]:
    start, rate = _words(value)
    return units.duration_ns("reply", start), round(NS_PER_S / units.rate_per_s("reply", rate))


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(value)
    return value


def _share(value: Any) -> Fraction:
    if isinstance(value, bool):
        return Fraction(int(value))
    if not isinstance(value, str):
        raise TypeError(value)
    return units.percent("it", value)
