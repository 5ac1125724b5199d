"""A capture of real streams, replayed: the same tokens are offered at the same instants."""

import gzip
import http.client
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from playback import playback
from proxied import Proxied, capturing
from recordings import CHAT, load
from replay_server import engine_like, serve
from tokentape.replay.options import ReplayOptions
from tokentape.replay.run import make_plan, run_plan
from tokentape.traces.reader import open_tape

VLLM = Path(__file__).parents[2] / "shared/data/vllm-h100"
MS = 1_000_000


def send_all(proxy: Proxied, recorded: Path) -> None:
    """Send each request of a recording at its planned time; its reply is heard to the end."""
    recordings = load([recorded])
    with gzip.open(recorded, "rt", encoding="utf-8") as lines:
        planned = {one["rid"]: one["t_sched"] for one in map(json.loads, lines)}
    start_ns, first_ns = time.monotonic_ns() + 300 * MS, min(planned.values())

    def send(rid: str) -> None:
        recording = recordings[rid]
        prompt = " ".join([rid] * recording.prompt_words)
        said: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
        body = said if recording.path == CHAT else {"prompt": prompt}
        body |= {"model": "m", "stream": True, "max_tokens": recording.output_tokens}
        connection = http.client.HTTPConnection(proxy.host, proxy.port)
        connection.connect()
        time.sleep(max(0, start_ns + planned[rid] - first_ns - time.monotonic_ns()) / 1e9)
        connection.request("POST", recording.path, json.dumps(body), {"x-playback": rid})
        assert connection.getresponse().read()
        connection.close()

    threads = [threading.Thread(target=send, args=(rid,)) for rid in recordings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.slow
@pytest.mark.skipif(not VLLM.exists(), reason=f"{VLLM} is not here")
def test_a_replay_of_captured_streams_offers_the_same_tokens_at_the_same_instants(
    tmp_path: Path,
) -> None:
    recorded = VLLM / "warm.jsonl.gz"
    with playback([recorded]) as upstream, capturing(upstream.url, tmp_path / "prod") as proxy:
        send_all(proxy, recorded)
        proxy.stop()
    with serve(engine_like) as candidate:
        summary = run_plan(make_plan(ReplayOptions(proxy.tape, candidate.url, tmp_path / "run")))
    assert summary.outcomes == {"ok": 20}
    names = ["request_id", "arrival_ns", "input_tokens", "output_tokens"]
    taped = {r["request_id"]: r for r in open_tape(proxy.tape).read(names).to_pylist()}
    names = ["source_request_id", "planned_input_tokens", "planned_output_tokens", "arrival_ns"]
    names += ["output_tokens", "send_end_ns", "late_cause"]
    run = open_tape(summary.tape).read(names).to_pylist()
    assert {r["source_request_id"] for r in run} == set(taped)
    first, began = min(r["arrival_ns"] for r in taped.values()), min(r["arrival_ns"] for r in run)
    late_ns = []
    for r in run:
        source = taped[r["source_request_id"]]
        assert r["planned_input_tokens"] == source["input_tokens"]
        assert r["output_tokens"] == r["planned_output_tokens"] == source["output_tokens"]
        assert r["arrival_ns"] - began == source["arrival_ns"] - first  # to the nanosecond
        late_ns.append(r["send_end_ns"] - r["arrival_ns"])
        assert (late_ns[-1] > MS) == (r["late_cause"] is not None)
    assert np.median(late_ns) < MS
