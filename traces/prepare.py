"""Makes a tape ready to be written: a new one, or an old one that is continued."""

from pathlib import Path
from typing import Any

from tokentape.traces import facts as tape_facts
from tokentape.traces.errors import TapeError


def make_ready(
    tape: Path,
    *,
    role: str,
    command: list[str],
    options: dict[str, Any],
    facts: dict[str, Any],
    content: str = "structure",
    force: bool = False,
    append: bool = False,
) -> int:
    """Create the tape, or continue one of the same role when `append` is set; its lock.

    Appending first seals what an earlier life left in the journal. TapeError when the tape cannot
    be written, or is of another role, key, content or upstream.
    """
    if append and (tape / tape_facts.FACTS_NAME).is_file() and not force:
        _refuse_other(tape, role, content, facts)
        lock_fd = tape_facts.lock(tape)
        if any((tape / "journal").glob("*.journal")):
            from tokentape.traces.recover import recover_locked

            recover_locked(tape)
        return lock_fd
    first = tape_facts.new_facts(
        role,
        command=command,
        options=options,
        facts={"content": content, **facts},
        wall_epoch_unix_ns=None,
    )
    tape_facts.create_tape(tape, first, force=force)
    return tape_facts.lock(tape)


def _refuse_other(tape: Path, role: str, content: str, facts: dict[str, Any]) -> None:
    old = tape_facts.read_facts(tape)
    if old["role"] != role or old.get("content") != content:
        raise TapeError(
            f"{tape}: is a {old['role']} with content {old.get('content')}; choose another --tape"
        )
    if old.get("key_id") != facts.get("key_id"):
        raise TapeError(
            f"{tape}: was written under another key, so its prefixes would not match; "
            "give the same --key-file, or choose another --tape"
        )
    if old.get("event_sizes", True) != facts.get("event_sizes", True):
        raise TapeError(
            f"{tape}: --no-event-sizes holds for a whole tape; "
            "give it as before, or choose another --tape"
        )
    if old.get("content_key_id") != facts.get("content_key_id"):
        raise TapeError(
            f"{tape}: its bodies are under another content key, or under none; "
            "give the same --content-key-file, or choose another --tape"
        )
    if old.get("candidate", {}).get("url") != facts.get("candidate", {}).get("url"):
        raise TapeError(
            f"{tape}: was captured from {old.get('candidate', {}).get('url')}; "
            "choose another --tape for another upstream"
        )
