"""What may be written: keyed digests and chained block hashes instead of text and secrets.

Every value that leaves here is a keyed BLAKE2b digest, so it means nothing without the tape's key.
The key lies beside the tape, never inside it: a tape can be given away without its key.
"""

import hashlib
import os
import re
import secrets
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokentape.traces.errors import UsageError
from tokentape.traces.words import Mode

if TYPE_CHECKING:
    from tokentape.traces.wire import Prompt

KEY_BYTES = 32
CONTENT_KEY_SIZES = (16, 32)  # bytes: AES-128 and AES-256
BLOCK_TOKENS = 128  # keeps a long prompt's hashes at one 64-bit number for about 512 bytes of text
BLOCK_TEXT_BYTES = 512
# Parts of a path that no API names: known beginnings of keys, addresses and user:password, long
# runs of letters and digits. A short word is kept, whatever it is.
_SECRET_PART = re.compile(
    r"(?:^|[^a-z])(?:sk|pk|rk|ghp|gho|hf|xox[a-z]|pat|key|token|bearer)[-_]|@|%40"
    r"|akia[0-9a-z]{12}|aiza|eyj|[0-9a-f]{8}-[0-9a-f]{4}-"
    r"|(?=[a-z]*[0-9])(?=[0-9]*[a-z])[0-9a-z]{20}",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Privacy:
    """One mode and one key; the same key over several tapes lets their prefixes match."""

    mode: Mode
    key: bytes

    @property
    def key_id(self) -> str:
        """Names the key without telling it."""
        return self.digest(b"tokentape key id", "key-id")

    def digest(self, value: bytes, domain: str) -> str:
        """16 hex digits that stand for a secret within this key and domain (at most 16 bytes)."""
        return hashlib.blake2b(
            value, digest_size=8, key=self.key, person=domain.encode()
        ).hexdigest()

    def path(self, endpoint: str) -> str:
        """A request path in which a part that looks like a key or an address is a digest."""
        parts = endpoint.split("/")
        return "/".join(
            f"~{self.digest(part.encode(), 'path')}" if _SECRET_PART.search(part) else part
            for part in parts
        )

    def blocks(self, prompt: "Prompt | None") -> dict[str, Any]:
        """The block columns of a prompt; none where the mode forbids them or there is no prompt."""
        if self.mode == "none" or prompt is None:
            return {}
        data: bytes | bytearray
        if prompt.tokens is not None:
            try:
                data = array("I", prompt.tokens).tobytes()
            except (OverflowError, TypeError):  # no token ids, whatever they are
                return {}
            unit, size, width = "token", BLOCK_TOKENS, 4
        else:
            data, unit, size, width = prompt.text or b"", "byte", BLOCK_TEXT_BYTES, 1
        length = len(data) // width
        return {
            "block_tokens": size,
            "block_unit": unit,
            "block_scope": "key",
            "block_hashes": self._chain(data, size * width),
            "prefix_partial": length % size,
        }

    def _chain(self, data: bytes | bytearray, step: int) -> list[int]:
        """A signed 64-bit hash per full block; each stands for the whole prompt up to its end."""
        hashes: list[int] = []
        previous = b""
        for at in range(0, len(data) - step + 1, step):
            block = previous + step.to_bytes(4, "little") + data[at : at + step]
            previous = hashlib.blake2b(
                block, digest_size=8, key=self.key, person=b"prefix block"
            ).digest()
            hashes.append(int.from_bytes(previous, "little", signed=True))
        return hashes


def load_key(tape: Path, key_file: Path | None) -> bytes:
    """The tape's key from `key_file`, or from TAPE.key beside the tape, made there when missing.

    Raises UsageError for a file that is not 32 bytes (raw, or 64 hex digits).
    """
    beside = tape.absolute()
    path = key_file or beside.with_name(beside.name + ".key")
    if key_file is None and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "wb") as out:
            out.write(secrets.token_bytes(KEY_BYTES).hex().encode() + b"\n")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--key-file {path}: {error.strerror}") from None
    key = raw
    if len(raw) != KEY_BYTES:
        try:
            key = bytes.fromhex(raw.decode().strip())
        except ValueError:
            key = b""
    if len(key) != KEY_BYTES:
        raise UsageError(f"--key-file {path}: need {KEY_BYTES} bytes, raw or as 64 hex digits")
    return key


def load_content_key(path: Path) -> bytes:
    """The key of a file of 16 or 32 bytes, raw or as hex digits, that its owner alone may read.

    UsageError for any other file.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(4096)
    except OSError as error:
        raise UsageError(f"--content-key-file {path}: {error.strerror}") from None
    if mode & 0o077:
        raise UsageError(f"--content-key-file {path}: others may read it; chmod 600 {path}")
    if len(raw) in CONTENT_KEY_SIZES:
        return raw
    try:
        key = bytes.fromhex(raw.decode().strip())
    except ValueError:
        key = b""
    if len(key) not in CONTENT_KEY_SIZES:
        raise UsageError(
            f"--content-key-file {path}: need 16 or 32 bytes, raw or as 32 or 64 hex digits"
        )
    return key


def content_key_id(key: bytes) -> str:
    """Names a content key without telling it."""
    named = hashlib.blake2b(
        b"tokentape content key id", digest_size=8, key=key, person=b"content-key"
    )
    return named.hexdigest()
