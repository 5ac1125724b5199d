"""Seeing a capture run: a Prometheus page, a health page, and one line for people.

Reads what the workers told the supervisor last; it is never in the way of traffic.
"""

import asyncio
import json
import shutil
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric

from tokentape.proxy.options import CaptureOptions, checked_listen
from tokentape.proxy.supervisor import Samples, Supervisor
from tokentape.traces.errors import UsageError

LINE_EVERY_S = 1.0
_HISTOGRAM_PARTS = ("_bucket", "_count", "_sum")
_RELAYED = 'tokentape_reply_reads_total{"path":"relay"}'
_STOCK = 'tokentape_reply_reads_total{"path":"mitmproxy"}'


class Watching:
    """Serves the pages and writes the line until it is closed."""

    def __init__(
        self, supervisor: Supervisor, options: CaptureOptions, tell: Callable[[str], None]
    ) -> None:
        """UsageError when the address of --metrics cannot be had."""
        self._supervisor = supervisor
        self._tape = options.tape
        self._tell = tell
        self._reads = 0.0
        self._server: ThreadingHTTPServer | None = None
        if options.metrics is not None:
            self._server = _serve(options.metrics, supervisor)
        self._timer = asyncio.get_running_loop().call_later(LINE_EVERY_S, self._line)

    def _line(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(LINE_EVERY_S, self._line)
        self._tell(self.text())

    def text(self) -> str:
        """What matters, in one line: load, our own delay, losses, disk."""
        by_slot = self._supervisor.samples()
        total = summed(by_slot.values())
        reads = total.get(_RELAYED, 0.0) + total.get(_STOCK, 0.0)
        rate, self._reads = max(reads - self._reads, 0.0) / LINE_EVERY_S, reads
        alive = [s for name, s in by_slot.items() if name and s]
        added = [_worst(alive, f'tokentape_added_seconds{{"quantile":"{q}"}}') for q in (0.5, 0.99)]
        lost = sum(v for n, v in total.items() if n.startswith("tokentape_requests_lost_total"))
        out = total.get("tokentape_requests_sampled_out_total{}", 0.0)
        requests = sum(v for n, v in total.items() if n.startswith("tokentape_requests_total"))
        parts = [
            f"{requests:,.0f} requests",
            f"{total.get('tokentape_open_requests', 0):,.0f} open",
            f"{rate:,.0f} reads/s",
            f"added p50 {added[0] * 1e3:.2f} p99 {added[1] * 1e3:.2f} ms",
            f"late {_worst(alive, 'tokentape_loop_lag_max_seconds') * 1e3:.1f} ms",
            f"{lost:,.0f} lost",
            *([f"{out:,.0f} sampled out"] if out else []),
            f"{shutil.disk_usage(self._tape).free / 1e9:,.1f} GB free",
        ]
        if any(s.get("tokentape_recording") == 0.0 for s in alive):
            parts.append("recording paused: too late")
        return ", ".join(parts)

    def close(self) -> None:
        """End the line and the pages."""
        self._timer.cancel()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


def summed(samples: Iterable[Samples]) -> Samples:
    """Samples of all workers added up."""
    total: Samples = {}
    for one in samples:
        for name, value in one.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _worst(samples: list[Samples], name: str) -> float:
    return max((s.get(name, 0.0) for s in samples), default=0.0)


class _Collector:
    """What prometheus_client asks for at each scrape: every sample, by slot."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def collect(self) -> Iterable[Metric]:
        """Metric families: counters by their _total, histograms by their buckets, else gauges."""
        families: dict[str, Metric] = {}
        for slot, samples in self._supervisor.samples().items():
            for key, value in samples.items():
                name, brace, rest = key.partition("{")
                labels = {"worker": slot or "ended"} | json.loads(brace + rest or "{}")
                family, kind = _family(name)
                metric = families.setdefault(family, Metric(family, f"see README: {family}", kind))
                metric.add_sample(name, labels, value)
        yield from families.values()


def _family(name: str) -> tuple[str, str]:
    if name.endswith("_total"):
        return name.removesuffix("_total"), "counter"
    for part in _HISTOGRAM_PARTS:
        if name.startswith("gen_ai_") and name.endswith(part):
            return name.removesuffix(part), "histogram"
    return name, "gauge"


def _serve(address: str, supervisor: Supervisor) -> ThreadingHTTPServer:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(supervisor))

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, "text/plain; version=0.0.4", generate_latest(registry))
            elif self.path == "/healthz":
                found = health(supervisor)
                code = 200 if found["status"] in ("ok", "degraded") else 503
                self._answer(code, "application/json", json.dumps(found).encode())
            else:
                self._answer(404, "text/plain", b"/metrics and /healthz are here\n")

        def _answer(self, code: int, kind: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Scrapes are not news."""

    host, port = checked_listen(address, "--metrics")
    try:
        server = ThreadingHTTPServer((host, port), Pages)
    except OSError as error:
        raise UsageError(f"--metrics {address}: {error.strerror}; choose another port") from None
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.2,), daemon=True).start()
    return server


def health(supervisor: Supervisor) -> dict[str, Any]:
    """ok; degraded (traffic passes, something is not recorded); starting or draining."""
    alive = [s for name, s in supervisor.samples().items() if name and s]
    recording = all(s.get("tokentape_recording", 1.0) for s in alive)
    status = "ok" if recording else "degraded"
    if not supervisor.healthy:
        status = "draining" if supervisor.stopping else "starting"
    return {"status": status, "recording": recording, "workers": len(supervisor.slots)}
