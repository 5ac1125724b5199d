"""The tape: what is recorded, how it reaches disk, and how it is read back.

Start at `schema.py` (the columns). Writing: raw records (`blocks.py`) cross shared memory to the
writer process (`recording.py`), become rows (`assemble.py`, `wire/`), are journaled (`journal.py`)
and sealed (`writer.py`). Reading: `reader.py`, `check.py`. Public traces: `importers/`.
This room must never import proxy, replay, analysis, jobs or cli, and opens no socket to the world.
"""
