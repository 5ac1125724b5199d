"""One word is one token, in text and in ids alike."""

from hypothesis import given
from hypothesis import strategies as st

from tokentape.replay.engine import tokenizer

vocabulary_ids = st.lists(st.integers(0, len(tokenizer.WORDS) - 1))


@given(st.text())
def test_every_run_of_non_space_characters_is_one_token(text: str) -> None:
    assert len(tokenizer.encode(text)) == len(text.split())


@given(vocabulary_ids)
def test_text_of_the_vocabulary_reads_back_as_the_same_ids(ids: list[int]) -> None:
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


@given(vocabulary_ids, vocabulary_ids)
def test_joining_texts_joins_their_tokens(one: list[int], two: list[int]) -> None:
    assert tokenizer.encode(tokenizer.decode(one) + tokenizer.decode(two)) == one + two


@given(st.text(), st.text())
def test_unknown_words_have_ids_of_their_own_that_are_never_special(one: str, two: str) -> None:
    for token in tokenizer.encode(f"{one} {two}"):
        assert 0 <= token < tokenizer.ID_LIMIT
        assert token < tokenizer.END_OF_TEXT or token >= tokenizer.FIRST_HASHED
    assert max(tokenizer.ROLE_TOKENS.values()) < tokenizer.FIRST_HASHED


def test_ids_are_the_same_on_every_host() -> None:
    assert tokenizer.encode("hello babal wörld\tvuvus") == [907093638, 0, 1705779779, 31999]


def test_all_words_are_distinct_and_equally_long() -> None:
    assert len(set(tokenizer.WORDS)) == len(tokenizer.WORDS) == 32_000
    assert {len(word) for word in tokenizer.WORDS} == {5}


def test_a_user_message_costs_two_tokens_beside_its_words() -> None:
    assert len(tokenizer.encode_chat([("user", "one two three")])) == 3 + 2
    assert len(tokenizer.encode_chat([("system", "a"), ("user", "b c")])) == 3 + 3
    without = tokenizer.encode_chat([("user", "one")], generation_prompt=False)
    assert len(without) == 1 + 1


@given(vocabulary_ids, vocabulary_ids)
def test_the_next_turn_has_the_whole_turn_before_as_its_prefix(
    ask: list[int], say: list[int]
) -> None:
    first = [("user", tokenizer.decode(ask))]
    second = [*first, ("assistant", tokenizer.decode(say)), ("user", "more")]
    before = tokenizer.encode_chat(first) + say
    assert tokenizer.encode_chat(second)[: len(before)] == before


def test_an_output_depends_on_the_prompt_and_the_seed_alone() -> None:
    def output(prompt: list[int], seed: int) -> list[int]:
        return tokenizer.synthesize(50, tokenizer.generator_for(prompt, seed))

    assert output([1, 2], 7) == output([1, 2], 7)
    assert output([1, 2], 7) != output([1, 3], 7)
    assert output([1, 2], 7) != output([1, 2], 8)
    assert len(set(output([1, 2], 7))) == 50
