"""How other load tools are installed, told a load, and read afterwards.

Install, with Python 3.12, each into PEERS_DIR/NAME (for peers.py):

    python -m venv aiperf;         aiperf/bin/pip install aiperf==0.13.0
    python -m venv inference-perf; inference-perf/bin/pip install inference-perf==0.7.0
    python -m venv guidellm;       guidellm/bin/pip install guidellm==0.8.1  # with torch: 5 GB
    python -m venv vllm;           vllm/bin/pip install aiohttp numpy tqdm regex pybase64 pillow \
                                       transformers jinja2
    and from the wheel vllm==0.33.0 only its folder vllm/benchmarks, as vllm/src/vllm/benchmarks:
    that runs unmodified, the rest of the package is stubs (VLLM_SERVE).

The tokenizers that they ask for are made here: whole words, and bytes for GuideLLM, whose prompts
are ordinary text.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_replay import PROMPT_TOKENS, URL, synthetic_tape

from tokentape.traces.reader import open_tape


@dataclass(frozen=True)
class Load:
    rate_per_s: int
    tokens: int
    gap_us: int


LOADS = {
    "10k": Load(200, 50, 20_000),
    "50k": Load(1000, 50, 20_000),
    "500": Load(500, 8, 5_000),
}


@dataclass(frozen=True)
class Kept:
    """What a tool keeps of one request: of each gap, or one mean; `first_ns` is monotonic."""

    number: int  # the server's, from the text
    ttft_ms: float
    gaps_ms: Any
    first_ns: int


VLLM_SERVE = '''"""vLLM's own benchmark module; the rest of its package is stubs."""
import argparse, gc, importlib.abc, importlib.machinery, logging, sys, types
class Any:
    def __init__(self, *_, **__): pass
    def __call__(self, *_, **__): return self
    def __getattr__(self, name): return self
class Stub(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"): raise AttributeError(name)
        return type(name, (Any,), {})
class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "vllm" and not name.startswith("vllm.benchmarks"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec): return Stub(spec.name)
    def exec_module(self, module): pass
sys.meta_path.insert(0, Stubs())
import vllm
vllm.__path__ = [sys.argv.pop(1) + "/vllm"]
import vllm.logger, vllm.tokenizers, vllm.utils.argparse_utils, vllm.utils.gc_utils
import vllm.utils.network_utils
from transformers import AutoTokenizer
vllm.tokenizers.get_tokenizer = lambda name, **_: AutoTokenizer.from_pretrained(name)
vllm.utils.argparse_utils.FlexibleArgumentParser = argparse.ArgumentParser
vllm.utils.gc_utils.freeze_gc_heap = lambda: (gc.collect(), gc.freeze())
vllm.utils.network_utils.join_host_port = lambda host, port: f"{host}:{port}"
vllm.logger.init_logger = logging.getLogger
from vllm.benchmarks import serve
parser = argparse.ArgumentParser()
serve.add_cli_args(parser)
serve.main(parser.parse_args())
'''

TOKENIZERS = """
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
def save(model, split, join, folder):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = split, join
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>",
        eos_token="</s>", pad_token="</s>", model_max_length=100000)
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
special = ["<unk>", "<s>", "</s>"]
words = {w: n for n, w in enumerate(special + [f"w{n}" for n in range(4000)])}
save(models.WordLevel(words, "<unk>"), pre_tokenizers.WhitespaceSplit(), None, "words")
letters = special + sorted(pre_tokenizers.ByteLevel.alphabet())
letters = {w: n for n, w in enumerate(letters)}
save(models.BPE(letters, [], unk_token="<unk>"), pre_tokenizers.ByteLevel(False),
    decoders.ByteLevel(), "bytes")
"""


def prepare(peers: Path) -> None:
    """The two tokenizers and vLLM's launcher, in PEERS_DIR."""
    (peers / "vllm_serve.py").write_text(VLLM_SERVE)
    python = str(peers / "vllm/bin/python")
    subprocess.run([python, "-c", TOKENIZERS], cwd=peers, check=True)


def command(tool: str, peers: Path, folder: Path, load: Load, seconds: float) -> list[str]:
    """How each tool is told the same: constant rate, one output length, streamed, all kept."""
    count, rate, words = int(load.rate_per_s * seconds), load.rate_per_s, str(peers / "words")
    tokens, prompt = load.tokens, PROMPT_TOKENS
    own = str(peers / tool / "bin" / tool)
    match tool:
        case "tokentape":
            synthetic_tape(folder / "source", rate, seconds, tokens, 0)
            python = [sys.executable, "-m", "tokentape", "replay", str(folder / "source")]
            return [*python, "--to", URL, "--tape", str(folder / "run"), "--no-calibrate"]
        case "vllm":
            argv = f"""--backend openai-chat --model m --tokenizer {words} --base-url {URL}
                --endpoint /v1/chat/completions --dataset-name random --random-input-len {prompt}
                --random-output-len {tokens} --num-prompts {count} --request-rate {rate}
                --burstiness inf --ignore-eos --save-result --save-detailed --result-dir {folder}
                --result-filename vllm.json --ready-check-timeout-sec 0 --disable-tqdm"""
            start = [str(peers / "vllm/bin/python"), str(peers / "vllm_serve.py")]
            return [*start, str(peers / "vllm/src"), *argv.split()]
        case "aiperf":
            argv = f"""profile --model m --url {URL} --endpoint-type chat --streaming
                --tokenizer {words} --request-rate {rate} --arrival-pattern constant
                --request-count {count} --isl {prompt} --osl {tokens}
                --extra-inputs ignore_eos:true --use-server-token-count --export-level raw
                --ui none --no-gpu-telemetry --no-server-metrics --artifact-dir {folder}"""
            return [own, *argv.split()]
        case "inference-perf":
            lengths = {"type": "fixed", "std_dev": 0, "total_count": count}
            config = {
                "api": {"type": "completion", "streaming": True},
                "data": {"type": "random"}
                | {
                    f"{k}_distribution": lengths | {"min": n, "max": n + (k == "input"), "mean": n}
                    for k, n in (("input", prompt), ("output", tokens))
                },
                "load": {"type": "constant", "interval": 0}
                | {"stages": [{"rate": rate, "duration": int(seconds)}]},
                "server": {"type": "vllm", "model_name": "m", "base_url": URL, "ignore_eos": True},
                "tokenizer": {"pretrained_model_name_or_path": words},
                "report": {"request_lifecycle": {"summary": True, "per_request": True}},
                "storage": {"local_storage": {"path": str(folder / "out")}},
            }
            (folder / "config.yml").write_text(json.dumps(config))  # JSON is YAML
            return [own, "-c", str(folder / "config.yml")]
        case "guidellm":
            argv = f"""run --disable-progress --profile kind=constant,rate={rate}
                --backend kind=openai_http,target={URL},model=m,request_format=/v1/chat/completions
                --constraint kind=max_requests,count={count}
                --data kind=synthetic_text,prompt_tokens={prompt},output_tokens={tokens}
                --tokenizer kind=hf_auto,model={peers / "bytes"}
                --output kind=json,path={folder / "guide.json"}"""
            return [own, *argv.split()]
    raise SystemExit(f"no tool {tool}")


def number(text: str) -> int:
    found = re.search(r"r(\d{7})", text)
    return int(found[1]) if found else -1


def of_tokentape(folder: Path, _: int) -> Iterator[Kept]:
    tape = open_tape(folder / "run")
    anchor = tape.segments[0].anchors[0]
    to_monotonic = int(tape.facts["wall_epoch_unix_ns"])
    to_monotonic += anchor["monotonic_ns"] - anchor["wall_unix_ns"]
    for row in tape.read(["response_id", "send_ns", "off_us"]).to_pylist():
        if row["response_id"] and row["off_us"]:
            off_ms = np.array(row["off_us"], np.float64) / 1e3
            first_ns = row["send_ns"] + row["off_us"][0] * 1000 + to_monotonic
            yield Kept(number(row["response_id"]), off_ms[0], np.diff(off_ms), first_ns)


def of_vllm(folder: Path, _: int) -> Iterator[Kept]:
    found = json.loads((folder / "vllm.json").read_text())
    columns = (found[name] for name in ("generated_texts", "start_times", "ttfts", "itls"))
    for text, start_s, ttft_s, gaps_s in zip(*columns, strict=True):
        if text:
            first_ns = int((start_s + ttft_s) * 1e9)
            yield Kept(number(text), ttft_s * 1e3, np.array(gaps_s) * 1e3, first_ns)


def of_aiperf(folder: Path, _: int) -> Iterator[Kept]:
    with (folder / "profile_export_raw.jsonl").open() as lines:
        for found in map(json.loads, lines):
            packets = [(r["perf_ns"], p["value"]) for r in found["responses"] for p in r["packets"]]
            events = [(at_ns, text) for at_ns, text in packets if "srv_ns" in text]
            if events:
                at_ms = np.array([at_ns - found["start_perf_ns"] for at_ns, _ in events]) / 1e6
                yield Kept(number(events[0][1]), at_ms[0], np.diff(at_ms), events[0][0])


def of_inference_perf(folder: Path, _: int) -> Iterator[Kept]:
    (path,) = (folder / "out").glob("per_request*.json")
    for found in json.loads(path.read_text()):
        if not found["error"]:
            response = found["info"]["response_metrics"]
            at_s = np.array(response["chunk_times"])
            ttft_ms = (at_s[0] - found["start_time"]) * 1e3
            name = number(response["response_chunks"][0])
            yield Kept(name, ttft_ms, np.diff(at_s) * 1e3, int(at_s[0] * 1e9))


def of_guidellm(folder: Path, wall_less_monotonic_ns: int) -> Iterator[Kept]:
    (benchmark,) = json.loads((folder / "guide.json").read_text())["benchmarks"]
    for found in benchmark["requests"]["successful"]:
        times = found["info"]["timings"]
        first_s, last_s = times["first_token_iteration"], times["last_token_iteration"]
        mean_ms = (last_s - first_s) * 1e3 / (times["token_iterations"] - 1)
        first_ns = int(first_s * 1e9) - wall_less_monotonic_ns
        ttft_ms = (first_s - times["request_start"]) * 1e3
        yield Kept(number(found["response_id"]), ttft_ms, np.array([mean_ms]), first_ns)


KEPT: dict[str, Callable[[Path, int], Iterator[Kept]]] = {
    "tokentape": of_tokentape,
    "vllm": of_vllm,
    "aiperf": of_aiperf,
    "inference-perf": of_inference_perf,
    "guidellm": of_guidellm,
}
