"""Shards: an exact partition that keeps sessions whole, the same on every host."""

from collections import Counter

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from tokentape.replay.sessions import numbered, shard_of, text_digests

SESSIONS = st.lists(st.integers(-1, 12), max_size=80)


@given(SESSIONS, st.integers(1, 7))
def test_shards_part_a_plan_exactly_and_keep_sessions_whole(sessions: list[int], n: int) -> None:
    shard = shard_of(sessions, n)
    assert len(shard) == len(sessions) and set(shard.tolist()) <= set(range(n))
    homes = {(s, int(k)) for s, k in zip(sessions, shard, strict=True) if s >= 0}
    assert len(homes) == len({s for s in sessions if s >= 0})


@given(SESSIONS, st.integers(1, 7))
def test_shards_differ_by_one_session_at_most(sessions: list[int], n: int) -> None:
    shard = shard_of(sessions, n)
    units = {(s, -1) if s >= 0 else (-1, k): int(shard[k]) for k, s in enumerate(sessions)}
    counts = Counter(units.values())
    sizes = [counts[k] for k in range(n)]
    assert max(sizes) - min(sizes) <= 1


def test_a_tape_that_repeats_itself_gives_no_shard_all_its_long_sessions() -> None:
    sessions = [s for n in range(100) for s in (-1, *[n] * 10, -1)]  # each third unit is long
    sizes = Counter(shard_of(sessions, 3).tolist())
    assert min(sizes.values()) > 250 and max(sizes.values()) < 550


def test_names_of_sessions_do_not_matter_only_their_order() -> None:
    expected = [1, 1, 0, 1, 0, 0]
    assert shard_of([5, 5, 2, -1, 9, 2], 2).tolist() == expected
    assert shard_of([0, 0, 1, -1, 2, 1], 2).tolist() == expected
    assert shard_of([], 3).tolist() == []


@given(st.lists(st.none() | st.text(max_size=40), max_size=30))
def test_equal_ids_have_equal_digests_and_others_have_others(texts: list[str | None]) -> None:
    digests = text_digests(pa.array(texts, pa.string()))
    assert [bool(d) for d in digests] == [t is not None for t in texts]
    assert len(set(digests.tolist())) == len(set(texts))
    codes = numbered(digests)
    first: dict[str, int] = {}
    for text, code in zip(texts, codes.tolist(), strict=True):
        assert code == (-1 if text is None else first.setdefault(text, len(first)))


def test_a_digest_is_the_same_in_every_process_and_version() -> None:
    texts = pa.array(["", "a", "session-0001", None, "ünïcode session", "x" * 100])
    assert text_digests(texts.slice(1))[1] == text_digests(texts)[2]
    assert [f"{d:016x}" for d in text_digests(texts).tolist()] == [
        "e220a8397b1dcdaf",
        "5e025f9ade9eaf3e",
        "53981823532e10e4",
        "0000000000000000",
        "856bfecdc6615823",
        "4a5a4eb781588a2b",
    ]
