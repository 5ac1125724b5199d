"""A tokenizer file (Hugging Face's tokenizer.json) that counts prompts before a candidate does.

It needs the extra `tokenizer`. It only ever counts: what a candidate counts is asked all the same,
and believed where the two differ.
"""

from pathlib import Path
from typing import Any

from tokentape.traces.errors import UsageError


class TokenizerFile:
    """Counts tokens as the model whose file it is does."""

    def __init__(self, path: Path) -> None:
        """UsageError where the extra is missing or the file is no tokenizer."""
        try:
            from tokenizers import Tokenizer  # noqa: PLC0415 - an extra
        except ImportError:
            raise UsageError(
                "--tokenizer: needs the extra: pip install 'tokentape[tokenizer]'"
            ) from None
        self.path = path
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - the library raises no narrower one
            why = str(error).splitlines()[0][:120]
            raise UsageError(f"--tokenizer {path}: not a tokenizer.json ({why})") from None

    @property
    def tokens(self) -> int:
        """How many different tokens there are."""
        return int(self._tokenizer.get_vocab_size())

    def count(self, text: str) -> int:
        """Tokens of a prompt, with those that the model begins or ends one with."""
        return len(self._tokenizer.encode(text).ids)

    def one_token(self, word: str) -> bool:
        """True for a word that is one token behind another word and before it."""
        alone = self._tokenizer.encode("the the", add_special_tokens=False).ids
        between = self._tokenizer.encode(f"the {word} the", add_special_tokens=False).ids
        return len(between) == len(alone) + 1
