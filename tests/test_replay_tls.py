"""A candidate behind TLS: the same rows with the same stamps, and no request to a stranger."""

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from certificates import Authority
from replay_server import HEAD, LAST, chunk, engine_like, plain, serve
from tokentape.replay.exchange import Exchange
from tokentape.replay.options import ReplayOptions
from tokentape.replay.plan import make_plan
from tokentape.replay.run import run_plan
from tokentape.replay.transport import Body, open_client
from tokentape.traces.blocks import NO_STAMP
from tokentape.traces.errors import TokentapeError, UsageError
from tokentape.traces.reader import open_tape
from tokentape.traces.writer import TapeWriter

MS = 1_000_000
PAUSE_S = 0.1  # far longer than a read takes
TOKENS = 5
TIMES = ("_ns", "off_us")
# What may differ between two runs of one plan: when, where, and the ids that are drawn.
OF_A_RUN = {"request_id", "conn_id", "lag_max_us", "coalesced_reads", "late_cause"}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


def source(path: Path) -> Path:
    writer = TapeWriter.create(path, role="import", command=[], options={}, facts={})
    for n in range(8):
        known = {"request_id": n.to_bytes(16), "arrival_ns": n * 10 * MS, "outcome": "ok"}
        writer.append(known | {"input_tokens": 20 + n, "output_tokens": TOKENS})
    writer.close()
    return path


def rows(tmp_path: Path, name: str, certificate: Path | None, ca: Path | None) -> list[Any]:
    """Rows of a run, in order, without what no two runs share."""
    with serve(engine_like, certificate) as server:
        options = ReplayOptions(
            source=tmp_path / "s.tape", to=server.url, tape=tmp_path / name, ca=ca
        )
        summary = run_plan(make_plan(options))
    found = open_tape(summary.tape).read().to_pylist()
    assert all(len(row["off_us"]) == TOKENS for row in found)
    return [
        {k: v for k, v in row.items() if k not in OF_A_RUN and not k.endswith(TIMES)}
        for row in sorted(found, key=lambda row: row["scheduled_ns"])
    ]


def test_the_rows_of_a_run_are_those_of_cleartext_with_kernel_stamps(
    tmp_path: Path, authority: Authority
) -> None:
    source(tmp_path / "s.tape")
    clear = rows(tmp_path, "clear.tape", None, None)
    hidden = rows(tmp_path, "tls.tape", authority.issue("127.0.0.1"), authority.ca)
    unlike = [
        (k, v, b[k]) for a, b in zip(clear, hidden, strict=True) for k, v in a.items() if v != b[k]
    ]
    assert not unlike
    clocks = [(row["event_clock"], row["send_clock"], row["outcome"]) for row in hidden]
    assert clocks == [("kernel", "kernel", "ok")] * 8


@pytest.mark.parametrize("wrong", ["authority", "name", "expired"])
def test_a_candidate_that_cannot_be_verified_gets_no_request_and_one_line_says_why(
    tmp_path: Path, authority: Authority, wrong: str
) -> None:
    ca = Authority(tmp_path, "another").ca if wrong == "authority" else authority.ca
    certificate = authority.issue(
        "elsewhere" if wrong == "name" else "127.0.0.1", days=-1 if wrong == "expired" else 30
    )
    source(tmp_path / "s.tape")
    with serve(engine_like, certificate) as server:
        with pytest.raises(TokentapeError, match="certificate is not trusted") as caught:
            make_plan(ReplayOptions(source=tmp_path / "s.tape", to=server.url, ca=ca))
        assert not server.seen
    said = str(caught.value)
    assert said.startswith(server.url) and "--ca FILE names the authority" in said
    assert "\n" not in said and len(said) < 300


def test_a_file_without_certificates_and_one_without_use_are_told_before_anything_is_sent(
    tmp_path: Path, authority: Authority
) -> None:
    (tmp_path / "empty.pem").write_text("nothing here")
    for to, ca, what in (
        ("https://127.0.0.1:1", tmp_path / "empty.pem", "need a PEM file with certificates"),
        ("https://127.0.0.1:1", tmp_path / "none.pem", "No such file"),
        ("http://127.0.0.1:1", authority.ca, "for an https:// candidate only"),
    ):
        with pytest.raises(UsageError, match=f"--ca.*{what}"):
            make_plan(ReplayOptions(source=tmp_path / "s.tape", to=to, ca=ca))


class Pieces:
    """Keeps the stamp and the lag of each piece of a body."""

    def __init__(self) -> None:
        self.data: list[tuple[bytes, int, int]] = []

    def reply_head(self, *_: Any, **__: Any) -> None:
        pass

    def reply_data(self, stream: int, t_ns: int, data: bytes, lag_us: int = NO_STAMP) -> None:
        self.data.append((data, t_ns, lag_us))


@contextmanager
def records_cut(certificate: Path, sent_ns: list[int]) -> Iterator[str]:
    """A server whose five records of one event each leave in three writes, two of them cut."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    coming, going = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(coming, going, server_side=True)

    def until_done(peer: socket.socket, what: Any) -> Any:
        while True:
            try:
                return what()
            except ssl.SSLWantReadError:
                if going.pending:
                    peer.sendall(going.read())
                coming.write(peer.recv(65536))

    def record(data: bytes) -> bytes:
        tls.write(data)
        return going.read()

    def answer(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        with peer:
            peer.settimeout(10)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            until_done(peer, tls.do_handshake)
            peer.sendall(going.read())
            while not until_done(peer, lambda: tls.read(65536)).endswith(b"{}"):
                pass
            first, *rest = [record(HEAD + chunk(b"0")), *(record(chunk(b"%d" % i)) for i in (1, 2))]
            last = record(chunk(b"3")), record(chunk(b"4") + LAST)
            for data in (
                first + rest[0][:7],
                rest[0][7:] + rest[1] + last[0][:1],
                last[0][1:] + last[1],
            ):
                sent_ns.append(time.monotonic_ns())
                peer.sendall(data)
                time.sleep(PAUSE_S)  # the client reads what there is
            peer.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        yield f"https://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
        thread.join(10)


def test_an_event_has_the_stamp_of_the_read_that_completed_its_record(authority: Authority) -> None:
    pieces, sent_ns = Pieces(), list[int]()

    async def main(url: str) -> Exchange:
        async with open_client(authority.ca) as client:
            exchange = Exchange(pieces)
            exchange.stream = 1
            body = Body(b"{}", exchange)
            body.release()
            await asyncio.create_task(client.perform(exchange, URL(url), {}, body))
            return exchange

    with records_cut(authority.issue("127.0.0.1"), sent_ns) as url:
        exchange = asyncio.run(main(url))
    assert exchange.outcome == "ok" and exchange.kernel_send_ns >= exchange.send_ns > 0
    assert [data for data, _, _ in pieces.data] == [b"0", b"1", b"2", b"3", b"4"]
    assert all(lag != NO_STAMP for _, _, lag in pieces.data)
    of_write = [sum(t_ns >= at for at in sent_ns) for _, t_ns, _ in pieces.data]
    assert of_write == [1, 2, 2, 3, 3]


def test_a_certificate_that_goes_bad_between_plan_and_run_ends_the_run_in_one_line(
    tmp_path: Path, authority: Authority
) -> None:
    source(tmp_path / "s.tape")
    with serve(engine_like, authority.issue("127.0.0.1")) as server:
        options = ReplayOptions(
            source=tmp_path / "s.tape", to=server.url, tape=tmp_path / "r.tape", ca=authority.ca
        )
        plan = make_plan(options)
    expired = authority.issue("127.0.0.1", days=-1)
    with serve(lambda seen: plain(200, seen.path), expired) as other:
        address = replace(plan.target.address, base=other.url + "/v1")
        plan.target = replace(plan.target, address=address)
        with pytest.raises(TokentapeError, match=r"certificate is not trusted .*expired"):
            run_plan(plan)
