"""Numbers for people: three digits that are true."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokentape.analysis import display


@pytest.mark.parametrize(
    ("value_ns", "text"),
    [
        (None, "-"),
        (0, "0 ms"),
        (1, "1.00 ns"),
        (0.25, "0.250 ns"),
        (999, "999 ns"),
        (45_100, "45.1 us"),
        (999_499, "999 us"),
        (999_500, "1.00 ms"),
        (1_234_567, "1.23 ms"),
        (99_960_000, "100 ms"),
        (61_500_000_000, "61.5 s"),
        (12_345_600_000_000, "12,346 s"),
        (-2_000_000, "-2.00 ms"),
    ],
)
def test_durations_have_three_digits_and_the_unit_that_fits(
    value_ns: float | None, text: str
) -> None:
    assert display.duration(value_ns) == text


@given(st.floats(min_value=1e-3, max_value=1e18))
def test_a_shown_duration_is_within_half_a_digit_of_the_true_one(value_ns: float) -> None:
    shown, unit = display.duration(value_ns).split()
    size = {"s": 1e9, "ms": 1e6, "us": 1e3, "ns": 1.0}[unit]
    assert float(shown.replace(",", "")) * size == pytest.approx(value_ns, rel=0.0051)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (0.00966, "0.00966"),
        (9.5, "9.50"),
        (99.94, "99.9"),
        (12345.6, "12,346"),
    ],
)
def test_figures_have_three_digits_or_all_before_the_point(value: float | None, text: str) -> None:
    assert display.figure(value) == text


def test_tiny_figures_are_written_with_a_power_of_ten() -> None:
    assert display.figure(1.5e-7) == "1.50e-07"


def test_only_all_of_it_is_a_hundred_per_cent() -> None:
    assert [display.share(p) for p in (None, 1, 0.999999, 0.5)] == [
        "-",
        "100 %",
        "99.99 %",
        "50.00 %",
    ]


def test_a_ratio_needs_both_values() -> None:
    assert [display.ratio(*p) for p in ((3, 2), (None, 2), (3, None), (3, 0))] == [
        "1.50x",
        "-",
        "-",
        "-",
    ]


def test_tables_are_aligned_and_cut_words_but_never_figures() -> None:
    head, row = ["name", "n"], ["a" * 40 + "end", "123456"]
    lines = display.table(head, [row], 30)
    assert [len(line) for line in lines] == [30, 30]
    assert lines[1].split() == ["aaaaaaaaaaa…aaaaaaaend", "123456"]
    assert display.table(head, [["b", "1"]], 30) == ["name  n", "b     1"]
