"""Prompts: exact length, exact prefix sharing, the same on every host."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokentape.replay.prompts import (
    WORDS,
    Blocks,
    Length,
    PromptSource,
    TokenIds,
    Words,
    hashes_of_copy,
)
from tokentape.replay.prose import WORDS_OF, Prose

DATA = Path(__file__).parent.parent / ".." / "shared" / "data"
SAMPLE = Path(__file__).parent.parent / "src" / "tokentape" / "sample" / "capture.tape"
IDS, TEXT, PROSE = TokenIds(), Words(), Prose()
hashes = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6)


def blocks(of: list[int], size: int, namespace: str = "") -> Blocks:
    return Blocks(np.array(of, dtype=np.int64), size, namespace)


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How long a beginning two rows of numbers have in common."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


@given(st.integers(0, 3000), hashes, st.integers(1, 512))
def test_a_prompt_has_exactly_the_tokens_asked_for(tokens: int, of: list[int], size: int) -> None:
    draws = PromptSource("t", 0).draws(b"r", tokens, blocks(of, size))
    assert len(draws) == tokens
    ids = json.loads(b"[" + IDS.write(draws) + b"]")
    assert len(ids) == tokens and all(100 <= i <= 31_999 for i in ids)
    text = json.loads(b'"' + TEXT.write(draws) + b'"')
    assert len(text.split()) == tokens and set(text.split()) <= set(WORDS)
    assert text == " ".join(text.split())
    sentences = json.loads(b'"' + PROSE.write(draws) + b'"')
    assert len(sentences.split()) == tokens and sentences == " ".join(sentences.split())


@given(hashes, hashes, hashes, st.integers(16, 64), st.integers(0, 64), st.integers(0, 64))
def test_prompts_share_exactly_the_prefix_whose_hashes_they_share(
    common: list[int], left: list[int], right: list[int], size: int, rest_1: int, rest_2: int
) -> None:
    source = PromptSource("t", 0)
    one, two = common + left, common + right
    a = source.draws(b"one", size * len(one) + rest_1, blocks(one, size)).tolist()
    b = source.draws(b"two", size * len(two) + rest_2, blocks(two, size)).tolist()
    assert shared(a, b) == min(size * shared(one, two), len(a), len(b))


@given(st.lists(st.integers(0, 99), min_size=1, max_size=5), st.integers(1, 31), st.integers(1, 32))
def test_a_last_hash_that_stands_for_a_part_of_a_block_shares_that_part(
    of: list[int], part_1: int, part_2: int
) -> None:
    size = 32
    source = PromptSource("t", 0)
    whole = size * (len(of) - 1)
    a = source.draws(b"one", whole + part_1, blocks(of, size)).tolist()
    b = source.draws(b"two", whole + part_2, blocks(of, size)).tolist()
    assert shared(a, b) == whole + min(part_1, part_2)


def test_without_blocks_no_two_prompts_share_even_a_short_prefix() -> None:
    source = PromptSource("t", 0)
    ids = [IDS.write(source.draws(bytes([i]), 4)) for i in range(200)]
    assert len(set(ids)) == 200


def test_tape_seed_session_and_request_each_change_the_prompt() -> None:
    of = blocks([5, 6], 64)
    variants = [
        PromptSource("t", 0).draws(b"r", 150, of),
        PromptSource("u", 0).draws(b"r", 150, of),
        PromptSource("t", 1).draws(b"r", 150, of),
        PromptSource("t", 0).draws(b"r", 150, blocks([5, 6], 64, "session-1")),
    ]
    assert len({v[:64].tobytes() for v in variants}) == 4
    other = PromptSource("t", 0).draws(b"s", 150, of)
    assert shared(variants[0].tolist(), other.tolist()) == 128


def test_prompts_never_change() -> None:
    draws = PromptSource("tape", 7).draws(b"request", 1000, blocks([1, -2], 300, "s"))
    for writing, digest in (
        (IDS, "6d33170250c2c0b9"),
        (TEXT, "d590637d7cce96fa"),
        (PROSE, "44d69c0befadce5c"),
    ):
        assert blake2b(writing.write(draws), digest_size=8).hexdigest() == digest


BODIES = """
import sys
from hashlib import blake2b
from pathlib import Path
from tokentape.replay.options import ReplayOptions
from tokentape.replay.plan import make_plan
for prompt in ("random", "text"):
    options = ReplayOptions(Path(sys.argv[1]), "http://127.0.0.1:9", namespace="n", prompt=prompt)
    plan = make_plan(options, offline=True)
    digest = blake2b(digest_size=8)
    for number in range(len(plan)):
        digest.update(plan.outgoing(number).body)
    print(len(plan), digest.hexdigest())
"""


def test_all_bodies_of_a_tape_are_the_same_on_two_hosts() -> None:
    hosts: list[dict[str, str]] = [
        {"PYTHONHASHSEED": "1", "TZ": "Asia/Kathmandu", "LANG": "C", "LC_ALL": "C"},
        {"PYTHONHASHSEED": "2", "TZ": "America/St_Johns", "LANG": "de_DE.UTF-8"},
    ]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", BODIES, str(SAMPLE)],
            env={k: v for k, v in os.environ.items() if k != "LC_ALL"} | changes,
            stdout=subprocess.PIPE,
            text=True,
        )
        for changes in hosts
    ]
    first, second = (process.communicate(timeout=60)[0].split() for process in running)
    assert first == second and first[::2] == ["467", "467"] and first[1] != first[3]


def test_sentences_have_a_kind_of_word_at_each_place_and_share_what_their_draws_share() -> None:
    source = PromptSource("t", 0)
    a = PROSE.write(source.draws(b"one", 40, blocks([1, 2], 8))).decode().split()
    b = PROSE.write(source.draws(b"two", 40, blocks([1, 2], 8))).decode().split()
    assert a[:16] == b[:16] and shared_words(a[16:], b[16:]) < 8
    kinds = ["which", "how", "who", "did", "where", "which", "how", "who", "then"]
    assert all(w in WORDS_OF[kinds[i % 9]] for i, w in enumerate(a))
    only = Prose(lambda word: word in ("each", "green"))
    assert set(only.write(source.draws(b"r", 9)).decode().split()) == {
        *("each", "green", "man", "found", "in", "and"),
    }


def shared_words(a: list[str], b: list[str]) -> int:
    """How many words are the same at the same place before the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def test_token_ids_and_words_are_spread_evenly() -> None:
    draws = PromptSource("t", 0).draws(b"r", 128_000)
    counts = np.bincount(np.array(json.loads(b"[" + TokenIds(0, 127).write(draws) + b"]")))
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert len(counts) == 128 and chi_square < 206  # 127 degrees of freedom, alpha 1e-5


def test_words_are_short_distinct_and_in_the_pattern_of_word_level_vocabularies() -> None:
    assert len(set(WORDS)) == 128
    assert all(re.fullmatch("([bcdfghklmnprstvz][aeiou]){2}", word) for word in WORDS)


@given(st.integers(0, 300), st.integers(1, 5000))
def test_a_length_rule_found_by_two_probes_reaches_every_length_past_the_template(
    overhead: int, tokens: int
) -> None:
    length = Length.through((1, overhead + 1), (33, overhead + 33))
    assert length == Length(overhead, 1.0) and length.exact
    sent = length.units(tokens)
    assert sent == 1 if tokens < length.shortest_tokens else overhead + sent == tokens


def test_a_count_that_does_not_follow_the_prompt_gives_no_length_rule() -> None:
    assert Length.through((8, 16), (40, 16)) is None
    assert Length.through((8, 26), (40, 90)) == Length(10.0, 2.0)


def test_mooncake_prompts_share_what_the_trace_says() -> None:
    path = DATA / "mooncake" / "conversation_trace.jsonl"
    if not path.exists():
        pytest.skip("sample data is not here")
    with path.open() as lines:
        rows = [json.loads(next(lines)) for _ in range(120)]
    source, size = PromptSource("mooncake", 0), 512
    prompts = [
        source.draws(str(i).encode(), row["input_length"], blocks(row["hash_ids"], size)).tolist()
        for i, row in enumerate(rows)
    ]
    for i in range(0, 120, 17):
        for j in range(i):
            same = shared(rows[i]["hash_ids"], rows[j]["hash_ids"])
            length = min(len(prompts[i]), len(prompts[j]), size * same)
            assert shared(prompts[i], prompts[j]) == length


@given(hashes, hashes, st.integers(1, 32_767), st.integers(1, 200))
def test_a_copy_shares_what_it_shared_with_its_own_copy_and_nothing_with_another(
    common: list[int], rest: list[int], copy: int, own: int
) -> None:
    source, size = PromptSource("t", 0), 16
    one, two = blocks(common, size), blocks(common + rest, size)
    lengths = [size * len(b.hashes) + own for b in (one, two)]
    a, b = (
        source.draws(name, n, of.of_copy(copy), copy=copy).tolist()
        for name, n, of in zip((b"one", b"two"), lengths, (one, two), strict=True)
    )
    assert shared(a, b) == size * len(common)
    assert a != source.draws(b"one", lengths[0], one).tolist()
    assert shared(a, source.draws(b"one", lengths[0], one).tolist()) == 0
    assert hashes_of_copy(one.hashes, 0).tolist() == common


def test_hashes_of_a_copy_are_the_same_on_every_host() -> None:
    some = np.array([0, 1, -1, 2**63 - 1], dtype=np.int64)
    copies = np.array([0, 1, 1, 300], dtype=np.int16)
    assert hashes_of_copy(some, copies).tolist() == [
        0,
        *hashes_of_copy(some[1:3], 1).tolist(),
        *hashes_of_copy(some[3:], 300).tolist(),
    ]
    assert hashes_of_copy(some, 1).tolist() == [
        722434519817146446,
        -877731822696284322,
        5345224958075667110,
        -4805421519543875386,
    ]
