"""Text-like prompts: English sentences without sense, one draw and one usual token a word.

Random token ids are no text to a draft model or to a router of experts. Here each place of a
sentence takes a word of its kind, so that grammar can be guessed and content cannot: closer to
text, and still no text of a user. A word depends on its own draw and its place alone, so prompts
share exactly the prefixes whose draws they share.
"""

from collections.abc import Callable

import numpy as np

from tokentape.replay.prompts import Draws

# Never reorder or change them: the position of a word is part of what makes two replays send the
# same prompt. All are common, so that each is one token, with its space, in the usual vocabularies.
_KINDS = {
    "which": "the a this that each every another some",
    "how": """
        small large old young long short new great good bad high low early late open clear strong
        weak hard soft warm cold dark light quick slow rich poor public private local foreign human
        natural common simple special final whole single double green white black red blue quiet
    """,
    "who": """
        man woman child friend teacher doctor student worker writer king city town house street road
        river garden school market company office paper letter book story picture song machine train
        ship car horse dog bird tree field mountain island village bank window door table chair
        plan game team group family father mother brother sister night morning summer winter
    """,
    "did": """
        found made took saw left kept held lost built opened closed moved followed reached called
        helped watched passed changed started stopped turned played worked lived walked waited stood
        looked spoke returned appeared
    """,
    "where": "in on under over near behind with without before after against through around by",
    "then": "and but while because when until where so",
}
_SENTENCE = ("which", "how", "who", "did", "where", "which", "how", "who", "then")
WORDS_OF = {kind: tuple(words.split()) for kind, words in _KINDS.items()}
_S32 = np.uint64(32)


class Prose:
    """Writes draws as sentences with one space between words; safe inside a JSON string."""

    def __init__(self, usable: Callable[[str], bool] = lambda _: True) -> None:
        """Args: usable: False for a word that is not to be used; a kind keeps one at least."""
        kept = {k: [w for w in words if usable(w)] or [words[0]] for k, words in WORDS_OF.items()}
        flat = [f"{word} ".encode() for kind in _SENTENCE for word in kept[kind]]
        sizes = [len(kept[kind]) for kind in _SENTENCE]
        width = max(map(len, flat))
        cells = b"".join(word.ljust(width, b"\0") for word in flat)
        self._table = np.frombuffer(cells, dtype=f"V{width}")  # one width, padding taken out last
        self._sizes = np.array(sizes, dtype=np.uint64)
        self._firsts = np.cumsum([0, *sizes[:-1]], dtype=np.uint64)

    def write(self, draws: Draws) -> bytes:
        """The words with spaces between them; about 25 ns each."""
        sizes = np.resize(self._sizes, len(draws))
        places = np.resize(self._firsts, len(draws)) + (((draws >> _S32) * sizes) >> _S32)
        return self._table.take(places.astype(np.intp)).tobytes().translate(None, b"\0")[:-1]
