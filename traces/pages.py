"""Reads Prometheus pages: a URL in, samples out, names and values as the page has them.

Histograms and counters are kept raw: what they mean over a run is for SQL to say. It runs in the
sampling process only, never where requests are sent or relayed.
"""

import json
import math
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from tokentape.traces.errors import UsageError

Sample = tuple[str, str, float]  # name, labels as a JSON object, value

TIMEOUT_S = 5.0
MOST_BYTES = 32 << 20  # of one page
ACCEPT = "text/plain; version=0.0.4"  # OpenMetrics renames counters of some exporters


class PageError(Exception):
    """A page that cannot be read now; its text says why, on one line."""


@dataclass(frozen=True)
class Page:
    """One page: its URL, and PEM of who signed its server's certificate."""

    source: str
    ca: Path | None = None

    @classmethod
    def parse(cls, url: str, ca: Path | None = None) -> "Page":
        """A page from --metrics-url; /metrics is added where no path is given. UsageError."""
        wanted = "need a URL such as http://127.0.0.1:8000/metrics"
        try:
            parts = urlsplit(url)
            known = parts.port is None or parts.port > 0
        except ValueError:
            raise UsageError(
                f"--metrics-url {url}: host or port cannot be read; {wanted}"
            ) from None
        if "@" in parts.netloc:  # not to be repeated
            raise UsageError("--metrics-url: leave user and password out; they would be recorded")
        if parts.scheme not in ("http", "https") or not parts.hostname or not known:
            raise UsageError(f"--metrics-url {url}: {wanted}")
        path = parts.path if parts.path.strip("/") else "/metrics"
        return cls(urlunsplit((parts.scheme, parts.netloc, path, parts.query, "")), ca)

    def read(self) -> list[Sample]:
        """The samples of the page as it is now; PageError when there is none."""
        headers = {"Accept": ACCEPT}
        request = urllib.request.Request(self.source, headers=headers)  # noqa: S310 - http(s) only
        try:
            with self._opener().open(request, timeout=TIMEOUT_S) as reply:
                text = reply.read(MOST_BYTES).decode(errors="replace")
        except urllib.error.HTTPError as error:
            error.close()
            raise PageError(f"answers {error.code}") from None
        except (OSError, ValueError) as error:
            why = getattr(error, "reason", error)
            raise PageError(f"cannot be read ({why})") from None
        return parse(text)

    def _opener(self) -> urllib.request.OpenerDirector:
        context = ssl.create_default_context(cafile=self.ca) if self.ca else None
        return urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )


def parse(text: str) -> list[Sample]:
    """The samples of a page's text, in its order; PageError where it is none."""
    try:
        return list(_samples(text))
    except (ValueError, KeyError, IndexError) as error:
        raise PageError(f"is no Prometheus page ({' '.join(str(error).split())[:80]})") from None


def _samples(text: str) -> Iterator[Sample]:
    from prometheus_client.parser import (  # noqa: PLC0415 - the sampling process alone pays
        text_string_to_metric_families,
    )

    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            value = float(sample.value)
            if not math.isnan(value):  # a summary without a sample yet
                yield sample.name, json.dumps(sample.labels, sort_keys=True), value
