"""Replay: sends a tape's load to a candidate, on time, and records the run as a tape.

Start at `run.py`. `schedule.py` is pure; `sender.py` keeps the time; `transport.py` is the one file
(with the engine's server) that knows aiohttp. This room imports only traces. It must never report
its own lateness as the candidate's: every run ends with a verdict.
"""
