"""Bodies of the mode `full`: where they lie, how they are sealed, and how they are read back.

`content/<incarnation>-<n>.parquet` holds one row for each request whose bodies were kept, joined to
`requests/` by `request_id`. With a content key each file is encrypted whole, footer included, by
Parquet's own modular encryption (AES-GCM, one key for footer and columns). Bodies are in no other
file: not in the journal, so what a kill finds unsealed is lost, and said by the rows without one.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe

from tokentape.traces.errors import TapeError

FOLDER = "content"
MAX_RESPONSE_BYTES = 16 << 20  # of one response; what comes after is passed on and not kept
MAX_HELD_BYTES = 256 << 20  # of all open requests of one writer together


def _field(name: str, type_: pa.DataType, meaning: str) -> pa.Field:
    return pa.field(name, type_, metadata={"meaning": meaning})


CONTENT = pa.schema(
    [
        _field("request_id", pa.uuid(), "joins `requests`"),
        _field("request_type", pa.string(), "content-type of the request, as it came"),
        _field("request_coding", pa.string(), "content-encoding of the request, as it came"),
        _field("request_body", pa.binary(), "the request's body, byte for byte, still encoded"),
        _field("request_whole", pa.bool_(), "request_body is all of it; else its beginning"),
        _field("response_type", pa.string(), "content-type of the response, as it came"),
        _field("response_coding", pa.string(), "content-encoding of the response, as it came"),
        _field("response_body", pa.binary(), "body without transfer framing, still encoded"),
        _field("response_whole", pa.bool_(), "response_body is all that came; else its beginning"),
    ]
)


class Bodies:
    """The bodies of one open request."""

    __slots__ = ("holes", "request", "response", "types")

    def __init__(self) -> None:
        self.request: bytes | bytearray = b""
        self.response = bytearray()
        self.types: dict[str, str] = {}
        self.holes: set[str] = set()  # of "request" and "response": pieces are missing

    def told(self, side: str, headers: list[tuple[bytes, bytes]]) -> None:
        """Keep type and coding of a side, "request" or "response", of its headers."""
        for name, value in headers:
            lower = name.lower()
            if lower == b"content-type":
                self.types[f"{side}_type"] = value.decode("latin-1")
            elif lower == b"content-encoding":
                self.types[f"{side}_coding"] = value.decode("latin-1")

    def row(self, request_id: bytes, request_bytes: int, response_bytes: int) -> dict[str, Any]:
        """A row of CONTENT, given how many bytes of each body passed."""
        whole_request = len(self.request) == request_bytes and "request" not in self.holes
        whole_response = len(self.response) == response_bytes and "response" not in self.holes
        return {
            "request_id": request_id,
            "request_body": bytes(self.request),
            "request_whole": whole_request,
            "response_body": bytes(self.response),
            "response_whole": whole_response,
            **self.types,
        }


class Keeper:
    """Takes bodies of open requests to hold, within MAX_HELD_BYTES."""

    def __init__(self) -> None:
        self.held_bytes = 0

    def request(self, kept: Bodies, body: bytes | bytearray) -> None:
        """Hold a request's body: the buffer itself, not a copy, so that nobody may alter it now."""
        if self.held_bytes + len(body) > MAX_HELD_BYTES:
            kept.holes.add("request")
            return
        self.held_bytes += len(body)
        kept.request = body

    def response(self, kept: Bodies, piece: bytes) -> None:
        """Hold a piece of a response, unless one before it is missing."""
        if "response" in kept.holes:
            return
        too_long = len(kept.response) + len(piece) > MAX_RESPONSE_BYTES
        if too_long or self.held_bytes + len(piece) > MAX_HELD_BYTES:
            kept.holes.add("response")
            return
        self.held_bytes += len(piece)
        kept.response += piece

    def release(self, kept: Bodies) -> None:
        """The request has ended; its row has the bodies."""
        self.held_bytes -= len(kept.request) + len(kept.response)


def size_bytes(row: dict[str, Any]) -> int:
    """What the bodies of a row of CONTENT take in memory."""
    return len(row["request_body"]) + len(row["response_body"]) + 600


def encryption(key: bytes) -> Any:
    """What a ParquetWriter needs to encrypt with a key; None for no key."""
    return pe.create_encryption_properties(key) if key else None


def content_files(tape: Path) -> list[Path]:
    """The sealed content of a tape, oldest first for each worker."""
    return sorted((tape / FOLDER).glob("*.parquet"))


def is_encrypted(file: Path) -> bool:
    """Whether a Parquet file's footer is encrypted, by its first four bytes (PARE, not PAR1)."""
    with file.open("rb") as opened:
        return opened.read(4) == b"PARE"


def read_content(
    tape: Path, key: bytes = b"", columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """The content of a tape, a file at a time, with the columns of CONTENT that are asked for.

    TapeError where a file is encrypted and the key is missing or another one, or it is damaged.
    """
    names = columns or CONTENT.names
    for file in content_files(tape):
        secret = is_encrypted(file)
        if secret and not key:
            raise TapeError(f"{file}: encrypted; give --content-key-file")
        decryption = pe.create_decryption_properties(key) if secret else None
        try:
            with pq.ParquetFile(file, decryption_properties=decryption) as parquet:
                table = parquet.read(names)
        except (pa.ArrowException, OSError) as error:
            why = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            hint = "another content key, or damaged" if secret else "damaged"
            raise TapeError(f"{file}: {hint} ({why})") from None
        yield table.cast(pa.schema([CONTENT.field(n) for n in names]))


def content_datasets(tape: Path, key: bytes = b"") -> Iterator[ds.Dataset]:
    """The content of a tape as lazy Arrow datasets; encrypted files only with a key."""
    files = content_files(tape)
    for secret in (False, True):
        found = [str(file) for file in files if is_encrypted(file) == secret]
        if not found or (secret and not key):
            continue
        decryption = pe.create_decryption_properties(key) if secret else None
        options = ds.ParquetFragmentScanOptions(decryption_properties=decryption)
        form = ds.ParquetFileFormat(default_fragment_scan_options=options)
        yield ds.dataset(found, format=form, schema=CONTENT)


def bodies(tape: Path) -> dict[str, Any]:
    """Files and bytes of a tape's content, and its rows, which need the key where it has one."""
    files = content_files(tape)
    secret = [is_encrypted(file) for file in files]
    rows = None if any(secret) else sum(pq.read_metadata(file).num_rows for file in files)
    size = sum(file.stat().st_size for file in files)
    return {"encrypted": all(secret), "files": len(files), "bytes": size, "requests": rows}
