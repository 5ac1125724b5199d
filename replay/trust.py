"""Whom a replay trusts to say that a server is the candidate: this machine's authorities, or one.

Certificates are always verified; there is no switch that turns it off. A candidate that cannot be
verified gets no request, since each carries its credentials.
"""

import ssl
from pathlib import Path

import aiohttp

from tokentape.traces.errors import UsageError

PROTOCOLS = ("http/1.1",)  # offered by ALPN: all that this client speaks


def trust(ca: Path | None) -> ssl.SSLContext:
    """A client's TLS settings: certificates signed by `ca` (PEM), else as the machine trusts.

    UsageError for a file that cannot be read or holds no certificate.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
    except ssl.SSLError as error:
        why = error.reason or error
        raise UsageError(f"--ca {ca}: need a PEM file with certificates ({why})") from None
    except OSError as error:
        raise UsageError(f"--ca {ca}: {error.strerror}") from None
    context.set_alpn_protocols(PROTOCOLS)
    return context


def why_untrusted(error: BaseException) -> str | None:
    """What is wrong with the certificate that ended a connect, with a way out; None: nothing."""
    if not isinstance(error, aiohttp.ClientConnectorCertificateError):
        return None
    found = error.certificate_error
    why = getattr(found, "verify_message", None) or str(found)
    return f"its certificate is not trusted ({why}); --ca FILE names the authority that signed it"
