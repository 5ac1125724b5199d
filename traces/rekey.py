"""A copy of a tape for others, under other digests: the same prefixes, no id that two could join.

Every hash, digest and id goes once more through keyed BLAKE2b, so equal ones stay equal and nothing
else of them is left. Ids that a server or a client gave (trace, response) are left out, and so are
bodies. Times, lengths and names stay: by these two copies of one capture can still be recognised.
"""

import re
import secrets
import shutil
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tokentape.traces import facts as tape_facts
from tokentape.traces.errors import TapeError, UsageError
from tokentape.traces.identity import tape_id
from tokentape.traces.privacy import KEY_BYTES, Privacy, load_key
from tokentape.traces.reader import Tape, open_tape
from tokentape.traces.schema import REQUESTS, TELEMETRY
from tokentape.traces.writer import segment_file

DROPPED = ("trace_id", "response_id")
DIGESTS = ("session_id", "tenant_digest")
IDS = ("request_id", "source_request_id", "retry_of")
_ID_TIME_BYTES = 8  # of a UUID version 7: time and version, which order rows
_PATH_DIGEST = re.compile(r"(?:(?<=/)~|^)[0-9a-f]{16}(?=/|$)")  # see Privacy.path


def rekey(
    source: Path, out: Path, *, key_file: Path | None, command: list[str], force: bool = False
) -> int:
    """Write `out`; the number of its rows. Without `key_file` the key is drawn and forgotten.

    TapeError for a tape with unsealed or damaged parts, UsageError for a key that is none.
    """
    tape = open_tape(source)
    if tape.unsealed_rows + tape.open_rows:
        raise TapeError(f"{source}: has rows that are not sealed; end its capture, or `recover`")
    if out.exists() and source.samefile(out):
        raise TapeError(f"{out}: is the tape itself; choose another OUT")
    key = load_key(out, key_file) if key_file else secrets.token_bytes(KEY_BYTES)
    privacy = Privacy("structure", key)
    if key_file and tape.facts.get("key_id") == privacy.key_id:
        raise UsageError(f"--key-file {key_file}: is the tape's own key; give another")
    facts = _facts(tape, command, privacy.key_id if key_file else None)
    tape_facts.create_tape(out, facts, force=force)
    changed = {name: facts[name] for name in ("tape_id", "content")}
    try:
        for segment in tape.segments:
            _copy(segment.path, out / segment.path.relative_to(source), REQUESTS, changed, privacy)
        for file in tape.telemetry_files:
            _copy(file, out / file.relative_to(source), TELEMETRY, changed, privacy)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # a part must not pass for the whole
        raise
    return tape.rows


def _facts(tape: Tape, command: list[str], key_id: str | None) -> dict[str, Any]:
    facts = {n: v for n, v in tape.facts.items() if n != "content_key_id"}
    content = "none" if facts.get("content") == "none" else "structure"
    told = {"tape_id": tape_id(), "command": command, "key_id": key_id, "content": content}
    return facts | told | {"rekeyed": True}


def _copy(
    file: Path, to: Path, schema: pa.Schema, changed: dict[str, Any], privacy: Privacy
) -> None:
    """Write a segment's copy, a row group at a time."""
    to.parent.mkdir(parents=True, exist_ok=True)
    prefix = b"tokentape."
    with pq.ParquetFile(file) as parquet:
        told = {
            k.removeprefix(prefix).decode(): v.decode()
            for k, v in (parquet.metadata.metadata or {}).items()
            if k.startswith(prefix)
        }
        names = [n for n in schema.names if n in parquet.schema_arrow.names]
        kept = pa.schema([schema.field(n) for n in names])
        with segment_file(to, kept, told | changed) as (writer, _):
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group, columns=names)
                columns = [_column(n, table[n].combine_chunks(), privacy) for n in names]
                made = pa.Table.from_arrays(columns, names=names)
                writer.write_table(made.cast(writer.schema))


def _column(name: str, values: Any, privacy: Privacy) -> Any:
    """The values of a column as the copy has them."""
    if isinstance(values, pa.ChunkedArray):
        values = values.chunk(0) if values.num_chunks else pa.array([], values.type)
    if name in DROPPED:
        return pa.nulls(len(values), values.type)
    if name in DIGESTS:
        return _each(values, lambda v: privacy.digest(v.encode(), f"rekey {name}"[:16]))
    if name == "endpoint":
        return _each(values, lambda v: _PATH_DIGEST.sub(lambda m: _part(m[0], privacy), v))
    return _made_anew(name, values, privacy)


def _part(digest: str, privacy: Privacy) -> str:
    return "~" + privacy.digest(digest.encode(), "rekey path")


def _made_anew(name: str, values: Any, privacy: Privacy) -> Any:
    if name in IDS:
        return pa.ExtensionArray.from_storage(pa.uuid(), _ids(values.storage, privacy))
    if name == "parents":
        ids = pa.ExtensionArray.from_storage(pa.uuid(), _ids(values.values.storage, privacy))
        mask = values.is_null()
        return pa.ListArray.from_arrays(values.offsets, ids, type=values.type, mask=mask)
    if name == "block_hashes":
        mask = values.is_null()
        hashes = pa.array(_hashes(values.values.to_numpy(), privacy), pa.int64())
        return pa.ListArray.from_arrays(values.offsets, hashes, type=values.type, mask=mask)
    return values


def _each(values: Any, change: Any) -> Any:
    """Change each different value once."""
    found = values.dictionary_encode()
    made = pa.array([change(v) for v in found.dictionary.to_pylist()], pa.string())
    return pa.DictionaryArray.from_arrays(found.indices, made).cast(pa.string())


def _ids(storage: Any, privacy: Privacy) -> Any:
    """Ids that sort as they did, with another tail: RFC 9562's variant and 62 bits of a hash."""
    return pa.array(
        [None if v is None else _id(v, privacy) for v in storage.to_pylist()], pa.binary(16)
    )


def _id(value: bytes, privacy: Privacy) -> bytes:
    tail = blake2b(value, digest_size=8, key=privacy.key, person=b"rekey id").digest()
    return value[:_ID_TIME_BYTES] + bytes([tail[0] & 0x3F | 0x80]) + tail[1:]


def _hashes(values: Any, privacy: Privacy) -> Any:
    """Each different hash once more through the key; equal ones stay equal."""
    different, where = np.unique(values.astype("<i8"), return_inverse=True)
    digest = b"".join(
        blake2b(v.tobytes(), digest_size=8, key=privacy.key, person=b"rekey block").digest()
        for v in different
    )
    return np.frombuffer(digest, "<i8")[where]
