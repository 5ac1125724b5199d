"""Descriptions of loads: read with units, refused in one line that says what would do."""

from fractions import Fraction
from pathlib import Path

import pytest

from tokentape.cli.describe import described
from tokentape.traces.errors import TokentapeError
from tokentape.traces.synthetic import Described, Lengths, Part, Prefixes, Turns

SECOND = 1_000_000_000
FULL = """
arrivals = ["poisson 2/s for 5m", "poisson 2/s..20/s for 10m", "gamma 600/m for 90s cv=3"]
input = "lognormal mean=800 cv=1.5 max=8000"
output = 200
prefixes = "count=20 tokens=2048 share=80% zipf=1.1"
turns = "mean=3 max=20"
think = "lognormal mean=8s cv=1 max=10m"
reply = "400ms 40/s"
context = 32000
block_tokens = 64
chat = true
seed = 9
"""


def test_a_file_describes_all_that_can_be_asked_for(tmp_path: Path) -> None:
    (tmp_path / "load.toml").write_text(FULL)
    expected = Described(
        (
            Part("poisson", Fraction(2), Fraction(2), 300 * SECOND),
            Part("poisson", Fraction(2), Fraction(20), 600 * SECOND),
            Part("gamma", Fraction(10), Fraction(10), 90 * SECOND, 3.0),
        ),
        Lengths(800, 1.5, most=8000),
        Lengths(200),
        Prefixes(20, 2048, Fraction(4, 5), 1.1),
        Turns(
            3,
            20,
            Lengths(8.0 * SECOND, 1.0, least=0, most=600 * SECOND),
            400_000_000,
            25_000_000,
        ),
        context_tokens=32_000,
        block_tokens=64,
        chat=Fraction(1),
        seed=9,
    )
    assert described(str(tmp_path / "load.toml")) == expected
    assert described(str(tmp_path / "load.toml"), seed=3).seed == 3


def test_a_description_fits_on_the_command_line() -> None:
    found = described('arrivals="constant 0/s..5/s for 1m"; input=800; output="lognormal mean=9"')
    assert found.arrivals == (Part("constant", Fraction(0), Fraction(5), 60 * SECOND),)
    assert (found.input_tokens, found.output_tokens) == (Lengths(800), Lengths(9))


GOOD = 'arrivals="poisson 5/s for 1m"; input=8; output=2'
MISTAKES = [
    ("nothing.toml", "nothing.toml: No such file or directory; give a TOML file, or text such as"),
    ("arrivals=", "SPEC: not TOML"),
    ("input=8; output=2", "SPEC: lacks arrivals; give poisson 5/s for 10m"),
    ('arrivals="poisson 5/s for 1m"; input=8', "SPEC: lacks output; give a number, lognormal"),
    (f"{GOOD}; outputs=1", "SPEC: unknown key outputs; did you mean output?"),
    (f"{GOOD}; think='5s'", "SPEC: think without turns; add turns = 'mean=3 max=20'"),
    (f"{GOOD}; turns='3'", "SPEC: turns = '3': it: an argument is not NAME=VALUE"),
    (f"{GOOD}; turns='mean=0.5'", "SPEC: turns = 'mean=0.5': turns: mean from 1 to most"),
    (f"{GOOD}; prefixes='count=x tokens=1'", "need count=20 tokens=2048 share=80% zipf=1"),
    (f"{GOOD}; chat=1", "SPEC: chat = 1: need true, false, or a share"),
    (f"{GOOD}; context=1", "SPEC: context_tokens 1: give at least 2"),
    ('arrivals="poisson 5 for 1m"; input=8; output=2', "rate 5: need a rate above zero such as"),
    ('arrivals="poisson 5/s for 1"; input=8; output=2', "for 1: need a duration such as 500ms"),
    ('arrivals="weibull 5/s for 1m"; input=8; output=2', "need poisson 5/s for 10m, gamma"),
    ('arrivals="poisson 5/s for 1m cv=2"; input=8; output=2', "need poisson 5/s for 10m, gamma"),
    ('arrivals="constant 0/s for 1m"; input=8; output=2', "nothing would arrive in a part"),
    ("arrivals=[]; input=8; output=2", "arrivals: give at least one part"),
    ('arrivals="poisson 9000000/s for 1h"; input=8; output=2', "requests are more than"),
    ('arrivals="poisson 5/s for 1m"; input=0; output=2', "a mean of 0 is not from 1 to 10,000,000"),
    ('arrivals="poisson 5/s for 1m"; input=true; output=2', "input = True: need a number, logn"),
    ('arrivals="poisson 5/s for 1m"; input="tape no.tape"; output=2', "no.tape: no such tape"),
]


@pytest.mark.parametrize(("spec", "said"), MISTAKES, ids=[said for _, said in MISTAKES])
def test_a_mistake_in_a_description_is_one_line(spec: str, said: str) -> None:
    with pytest.raises(TokentapeError) as told:
        described(spec)
    assert said in str(told.value) and "\n" not in str(told.value)
