"""One very large streamed reply through a capture: bytes compared, peak memory of each process.

./run bench large [--mb 1024]
"""

import argparse
import hashlib
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # what tests share

from proxied import Proxied, capturing, chunk, post, scripted, workers, writers
from tokentape.traces.check import check
from tokentape.traces.reader import open_tape

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT_BYTES = 1 << 16
TEXT = b"x" * (EVENT_BYTES - 80)
EVENT = chunk(b'data: {"model":"m","choices":[{"index":0,"text":"%s"}]}\n\n' % TEXT)
LAST = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def serve(connection: socket.socket, request: bytes) -> None:
    connection.sendall(HEAD)
    for _ in range(int(request.rpartition(b"events ")[2].partition(b'"')[0])):
        connection.sendall(EVENT)
    connection.sendall(LAST)


def received(proxy: Proxied, events: int) -> tuple[int, str]:
    """(bytes, digest) of the reply with so many events."""
    digest, size = hashlib.sha256(), 0
    body = b'{"model":"m","prompt":"events %d","stream":true}' % events
    with socket.create_connection((proxy.host, proxy.port), timeout=60) as client:
        client.sendall(post("/v1/completions", body))
        while piece := client.recv(1 << 20):
            digest.update(piece)
            size += len(piece)
    return size, digest.hexdigest()


def peak_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=1024)
    events = parser.parse_args().mb * (1 << 20) // EVENT_BYTES
    truth = hashlib.sha256(HEAD)
    for _ in range(events):
        truth.update(EVENT)
    truth.update(LAST)
    with (
        tempfile.TemporaryDirectory() as folder,
        scripted(serve) as url,
        capturing(url, Path(folder) / "a.tape") as proxy,
    ):
        received(proxy, 160)  # 10 MB: buffers have their size
        processes = {"worker": workers(proxy)[0], "writer": writers(proxy)[0]}
        before = {name: peak_mb(pid) for name, pid in processes.items()}
        began_s = time.monotonic()
        size, digest = received(proxy, events)
        took_s = time.monotonic() - began_s
        after = {name: peak_mb(pid) for name, pid in processes.items()}
        said = proxy.stop()
        tape = open_tape(proxy.tape)
        rows = tape.read(["outcome", "response_bytes", "events_dropped"]).to_pylist()
        errors = [f.what for f in check(tape) if f.severity == "error"]
    print(
        f"{size:,} bytes in {took_s:.1f} s, {'same' if digest == truth.hexdigest() else 'ALTERED'}"
    )
    for name in processes:
        print(f"{name}: peak {before[name]:.0f} MB after 10 MB, {after[name]:.0f} MB after it")
    print(f"{rows[-1]}; check: {errors or 'no error'}; {said.strip().splitlines()[-1]}")
    sys.exit(digest != truth.hexdigest() or bool(errors))


if __name__ == "__main__":
    main()
