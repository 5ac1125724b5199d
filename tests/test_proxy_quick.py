"""The quick replacements answer as mitmproxy's own functions do."""

from collections.abc import Mapping
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from mitmproxy import connection, http, options, optmanager
from mitmproxy.proxy import context, server_hooks

from tokentape.proxy import quick

_NAMES = st.sampled_from([b"Host", b"host", b"X-A", b"x-a", b"x-\xff", b"Content-Length", b""])
_FIELDS = st.lists(st.tuples(_NAMES, st.binary(max_size=6)), max_size=5)
_KEYS = st.one_of(_NAMES, st.sampled_from(["host", "HOST", "x-a", "x-\udcff", "content-length"]))


def _context() -> context.Context:
    client = connection.Client(peername=("a", 1), sockname=("b", 2), timestamp_start=0)
    return context.Context(client, options.Options())


def test_this_mitmproxy_is_one_whose_sources_are_known() -> None:
    assert quick.digest() in quick.KNOWN_SOURCES


@given(fields=_FIELDS, key=_KEYS)
def test_headers_are_looked_up_as_by_mitmproxy(
    fields: list[tuple[bytes, bytes]], key: str | bytes
) -> None:
    headers: Any = http.Headers(fields)
    assert quick._headers_get(headers, key, "none") == Mapping.get(headers, key, "none")
    assert quick._headers_contains(headers, key) == Mapping.__contains__(headers, key)


def test_a_fork_shares_connections_and_has_layers_of_its_own() -> None:
    parent = _context()
    parent.layers.append("a layer")  # type: ignore[arg-type]
    fork = quick._fork(parent)
    assert type(fork) is context.Context
    assert vars(fork) == vars(parent)
    assert fork.layers is not parent.layers


def test_an_option_that_can_change_is_copied_and_any_other_is_itself() -> None:
    option = optmanager._Option("many", list, ["a"], "", None)
    quick._current(option).append("b")
    assert quick._current(option) == ["a"]
    option = optmanager._Option("one", int, 4, "", None)
    assert quick._current(option) == 4
    option.set(5)
    assert quick._current(option) == 5


def test_a_hook_s_arguments_are_its_fields() -> None:
    hook = server_hooks.ClientConnectedHook(_context().client)
    assert quick._args(hook) == [hook.client]
