"""Capture: a transparent reverse proxy that records timing and streams to a tape.

Promise: production never notices. Bodies and streams pass byte for byte, streaming both ways, and
nothing here may raise into traffic or make it wait for the recording.
Start at `capture.py` (the command) and `worker.py` (a process), then `master.py` (mitmproxy, set
up), `addon.py` and `exchange.py` (hooks to raw records), `relay.py` (the fast path) and `traps.py`
(where mitmproxy would break traffic). mitmproxy is imported only here.
This room imports only traces, and knows nothing of replay or analysis.
"""
