"""Values with units: exact, never guessed, refused in one clear line."""

from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tokentape.cli import units
from tokentape.traces.errors import UsageError

NS = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
PARSERS: list[Callable[[str, str], object]] = [
    units.duration_ns,
    units.window_ns,
    units.factor,
    units.times,
    units.repeats,
    units.percent,
    units.rate_per_s,
    units.address,
]
decimals = st.tuples(st.integers(0, 10**9), st.integers(0, 999)).map(lambda p: f"{p[0]}.{p[1]:03}")


@given(st.integers(0, 10**6), st.sampled_from(sorted(NS)))
def test_a_whole_duration_is_its_nanoseconds(number: int, unit: str) -> None:
    assert units.duration_ns("--timeout", f"{number}{unit}") == number * NS[unit]


@given(decimals, st.sampled_from(["us", "ms", "s"]))
def test_a_decimal_duration_is_exact(number: str, unit: str) -> None:
    assert units.duration_ns("--timeout", f"{number}{unit}") == Fraction(number) * NS[unit]


@given(st.integers(0, 10**5), st.integers(1, 10**5))
def test_a_window_is_its_two_ends(begin: int, length: int) -> None:
    end = begin + length
    assert units.window_ns("--window", f"{begin}ms..{end}ms") == (begin * 10**6, end * 10**6)


def test_a_window_may_be_open_on_one_side() -> None:
    assert units.window_ns("--window", "30s..") == (30 * 10**9, None)
    assert units.window_ns("--window", "..10m") == (None, 600 * 10**9)


@pytest.mark.parametrize(
    "text", ["..", "", "10m", "5m..5m", "5m..1s", "0..5m", "1s..2s..3s", "1s...2s"]
)
def test_a_window_of_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--window .*need a window"):
        units.window_ns("--window", text)


@given(decimals.filter(lambda d: Fraction(d) > 0))
def test_a_factor_is_exact(number: str) -> None:
    assert units.factor("--speed", number + "x") == Fraction(number)


@given(st.integers(0, 100_000))
def test_a_percent_is_a_hundredth(thousandths: int) -> None:
    text = f"{thousandths // 1000}.{thousandths % 1000:03}%"
    assert units.percent("--thin", text) == Fraction(thousandths, 100_000)


@pytest.mark.parametrize(
    ("text", "per_s"),
    [("10/s", 10), ("600/m", 10), ("0.5/s", Fraction(1, 2)), ("1/h", Fraction(1, 3600))],
)
def test_a_rate_is_per_second(text: str, per_s: Fraction) -> None:
    assert units.rate_per_s("--rate", text) == per_s


@given(st.ip_addresses(v=4), st.ip_addresses(v=6), st.integers(0, 65535))
def test_an_address_is_host_and_port(v4: object, v6: object, port: int) -> None:
    assert units.address("--listen", f"{v4}:{port}") == (str(v4), port)
    assert units.address("--listen", f"[{v6}]:{port}") == (str(v6), port)
    assert units.address("--listen", f"localhost:{port}") == ("localhost", port)


@pytest.mark.parametrize(
    "text",
    [
        "8080",
        ":8080",
        "host:",
        "host:65536",
        "host:-1",
        "host:٣",
        "::1:80",
        "http://host:80",
        "a b:80",
        "[]:80",
    ],
)
def test_an_address_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--listen .*need HOST:PORT"):
        units.address("--listen", text)


@pytest.mark.parametrize(
    "text",
    [
        "5",
        "5 s",
        "s",
        "-5s",
        "+5s",
        "5S",
        "5sec",
        "0.5ns",
        "1e3s",
        "1_0s",
        "٣s",
        "99999999999h",
        "1.s",
        ".5s",
        "nan",
    ],
)
def test_a_duration_is_never_guessed(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        units.duration_ns("--timeout", text)
    assert str(refused.value) == f"--timeout {text}: need {units.DURATION_FORM}"


@pytest.mark.parametrize("text", ["2", "0x", "0.0x", "-1x", "2X", "x", "infx", "1/2x"])
def test_a_factor_needs_its_x_and_a_value(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--speed .*need a factor"):
        units.factor("--speed", text)


@pytest.mark.parametrize("text", ["101%", "50", "-1%", "%", "100.001%"])
def test_a_percent_lies_between_none_and_all(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--thin .*need a share"):
        units.percent("--thin", text)


@example("1" * 10_000 + "s")
@example("\n")
@example("5s\n")
@given(st.text() | st.from_regex(r"[0-9]{1,30}(\.[0-9]{1,30})?(ns|s|h|x|%|/s)", fullmatch=True))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    for parse in PARSERS:
        try:
            parse("--option", text)
        except UsageError as refused:
            line = str(refused)
            assert line.startswith("--option ")
            assert line.isprintable()
            assert len(line) < 250


def test_pairs_are_split_at_the_first_equals_sign() -> None:
    assert units.pairs("--fact", ["gpu=H100", "url=a=b", "empty="]) == {
        "gpu": "H100",
        "url": "a=b",
        "empty": "",
    }


@pytest.mark.parametrize("text", ["secret", "=secret", ""])
def test_a_pair_without_a_name_is_refused_and_its_value_not_shown(text: str) -> None:
    with pytest.raises(UsageError, match="NAME=VALUE") as refused:
        units.pairs("--header", [text])
    assert "secret" not in str(refused.value)


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="--fact gpu: is given twice"):
        units.pairs("--fact", ["gpu=H100", "gpu=A100"])


@pytest.mark.parametrize(("text", "wanted"), [("0/1", (0, 1)), ("3/4", (3, 4)), ("07/12", (7, 12))])
def test_a_part_is_one_of_so_many(text: str, wanted: tuple[int, int]) -> None:
    assert units.part("--shard", text) == wanted


@pytest.mark.parametrize("text", ["", "4/4", "1/0", "-1/4", "1", "1/", "a/b", "1/4/2", "1 / 4"])
def test_what_is_no_part_is_refused_with_a_form_that_would_do(text: str) -> None:
    with pytest.raises(UsageError, match=r"--shard .*: need I/N with I from 0 to N-1"):
        units.part("--shard", text)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1795771800", 1_795_771_800_000_000_000),
        ("1795771800.25", 1_795_771_800_250_000_000),
        ("2026-11-27T09:30:00Z", 1_795_771_800_000_000_000),
        ("2026-11-27t10:30:00.000000001+01:00", 1_795_771_800_000_000_001),
        ("2026-11-27 09:30:00.5-00:00", 1_795_771_800_500_000_000),
    ],
)
def test_an_instant_is_read_to_the_nanosecond(text: str, wanted: int) -> None:
    assert units.instant_unix_ns("--start-at", text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "soon",
        "2026-11-27",
        "2026-11-27T09:30:00",
        "2026-13-27T09:30:00Z",
        "-5",
        "9" * 30,
        "1e9",
    ],
)
def test_what_is_no_instant_is_refused_and_an_offset_is_a_must(text: str) -> None:
    with pytest.raises(UsageError, match=r"--start-at .*: need an instant"):
        units.instant_unix_ns("--start-at", text)


def test_how_often_is_a_number_with_or_without_its_x() -> None:
    assert units.times("--multiply", "3") == 3
    assert units.times("--multiply", "2.5x") == Fraction(5, 2)
    assert units.repeats("--loop", "30m") == (1800 * 10**9, None)
    assert units.repeats("--loop", "2.5x") == (None, Fraction(5, 2))
    for text in ("0x", "0s", "3", "x"):
        with pytest.raises(UsageError, match=r"^--loop .*need how long or how often"):
            units.repeats("--loop", text)


def test_a_value_that_is_no_json_is_answered_with_the_form_that_would_be() -> None:
    given = ["a=1", 'b={"c": null}', 'd="x=y"']
    assert units.json_pairs("--body", given) == {"a": 1, "b": {"c": None}, "d": "x=y"}
    with pytest.raises(UsageError, match=r"""--body a: not JSON.*--body 'a="high"'"""):
        units.json_pairs("--body", ["a=high"])
