"""KV blocks are never lent twice, never lost, and forget the longest unused prefix first."""

from hypothesis import given
from hypothesis import strategies as st

from tokentape.replay.engine.kv import KvBlocks

TOTAL = 6


def test_taking_more_than_is_free_takes_nothing() -> None:
    kv = KvBlocks(TOTAL)
    assert kv.take(TOTAL + 1) is None
    assert kv.free == TOTAL
    taken = kv.take(TOTAL)
    assert taken is not None
    assert sorted(taken) == list(range(TOTAL))
    assert kv.take(1) is None


def test_only_a_named_block_is_found_and_only_as_part_of_its_prefix() -> None:
    kv = KvBlocks(TOTAL)
    one, two, _ = kv.take(3) or []
    kv.name(one, 11)
    kv.name(two, 22)
    assert kv.find([11, 22, 33]) == [one, two]
    assert kv.find([22]) == [two]
    assert kv.find([33, 22]) == []


def test_the_prefix_that_was_released_first_is_forgotten_first_and_its_end_before_its_start() -> (
    None
):
    kv = KvBlocks(4)
    old, new = kv.take(2) or [], kv.take(2) or []
    for block, name in zip(old + new, (1, 2, 3, 4), strict=True):
        kv.name(block, name)
    kv.release(old)
    kv.release(new)
    assert kv.free == 4
    for old_found, new_found in ((1, 2), (0, 2), (0, 1), (0, 0)):
        assert kv.take(1) is not None
        assert (len(kv.find([1, 2])), len(kv.find([3, 4]))) == (old_found, new_found)


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    kv = KvBlocks(2)
    (block,) = kv.take(1) or []
    kv.name(block, 5)
    kv.share([block])
    kv.release([block])
    assert kv.free == 1
    kv.release([block])
    assert kv.free == 2
    kv.share(kv.find([5]))
    assert kv.free == 1


def test_a_name_stays_with_the_block_that_had_it_first() -> None:
    kv = KvBlocks(2)
    one, two = kv.take(2) or []
    kv.name(one, 5)
    kv.name(two, 5)
    assert kv.find([5]) == [one]
    kv.release([two])
    assert kv.find([5]) == [one]


@given(st.lists(st.tuples(st.sampled_from(["take", "share", "release"]), st.integers(0, 5))))
def test_blocks_held_and_blocks_free_always_add_up(moves: list[tuple[str, int]]) -> None:
    kv = KvBlocks(TOTAL)
    held: list[list[int]] = []
    for move, number in moves:
        if move == "take" and (taken := kv.take(number)) is not None:
            assert not {b for blocks in held for b in blocks}.intersection(taken)
            for block in taken:
                kv.name(block, number * 10 + block % 2)
            held.append(taken)
        elif move == "share":
            found = kv.find([number * 10, number * 10 + 1])
            kv.share(found)
            held.append(found)
        elif move == "release" and held:
            kv.release(held.pop(number % len(held)))
        assert kv.free == TOTAL - len({b for blocks in held for b in blocks})
