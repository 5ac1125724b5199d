"""Answers questions about tapes in DuckDB SQL: every number with its definition, weight and n.

It reads tapes and never writes one; it imports nothing of the proxy and the replay. Estimates are
never shown as measurements, and no failed request is left out silently.
Start reading at session.py, then sql/prelude/schema.sql, then any module of sql/latency/.
"""
