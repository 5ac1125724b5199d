"""Stock mitmproxy as most would use it for streams: a reverse proxy with a small addon script.

    python proxy_stock.py UPSTREAM PORT

mitmdump with its default addons and options but for quiet output and the Host header; the addon
streams every body both ways and appends each reply's chunks, with their time, to a list.
"""

import sys
import time

from mitmproxy import http
from mitmproxy.tools.main import mitmdump


class Chunks:
    def __init__(self) -> None:
        self.open: dict[str, list[tuple[int, bytes]]] = {}

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        flow.request.stream = True

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        kept = self.open.setdefault(flow.id, [])

        def chunk(data: bytes) -> bytes:
            kept.append((time.monotonic_ns(), data))
            return data

        assert flow.response is not None
        flow.response.stream = chunk

    def response(self, flow: http.HTTPFlow) -> None:
        self.open.pop(flow.id, None)

    error = response


addons = [Chunks()]

if __name__ == "__main__":
    where = ["--mode", f"reverse:{sys.argv[1]}", "--listen-host", "127.0.0.1", "-p", sys.argv[2]]
    mitmdump(["-q", *where, "--set", "keep_host_header=true", "-s", __file__])
