"""Flows that need two rooms. Start at `demo.py`.

A job calls the rooms' public functions or the command line; it must never hold logic that one room
could hold, and never prints: it tells its caller what happens.
"""
