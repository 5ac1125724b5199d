"""Feeds exported files to the loaders of AIPerf, SGLang and GuideLLM, in an environment of theirs.

    python -m venv other && other/bin/pip install aiperf guidellm pybase64
    other/bin/pip download --no-deps sglang   # unpack its wheel somewhere: UNPACKED
    other/bin/python tests/bench/loaders.py aiperf FILE.jsonl
    other/bin/python tests/bench/loaders.py weka FOLDER
    other/bin/python tests/bench/loaders.py sglang FILE.jsonl UNPACKED
    other/bin/python tests/bench/loaders.py guidellm FILE.jsonl BLOCK_TOKENS

What is stubbed is named where it is: tokenizers, which come after loading.
"""

import asyncio
import importlib
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPTS = 20  # made by GuideLLM; each takes a second


class Tokenizer:
    """One token a character, so that a prompt's length can be seen."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "\n".join(message["content"] for message in messages)


def aiperf(file: str) -> None:
    """Its Mooncake loader, with its own default run; tokenizer and hash generator are stubs."""
    loader = importlib.import_module("aiperf.dataset.loader.mooncake_trace")
    base = importlib.import_module("aiperf.dataset.loader.base_loader")
    hashing = types.SimpleNamespace(set_trace_id=lambda _: None)
    names = {"_hash_id_corpus_rng": hashing, "_cache": {}, "_decoded_cache": {}}
    generator = types.SimpleNamespace(
        tokenizer=types.SimpleNamespace(resolved_name="none"), **names
    )
    loaded = loader.MooncakeTraceDatasetLoader(
        filename=file, prompt_generator=generator, run=base._default_test_run()
    ).load_dataset()
    print(f"AIPerf: {len(loaded)} sessions, {sum(map(len, loaded.values()))} rows")


def weka(folder: str) -> None:
    """AIPerf's models of Weka traces, which refuse unknown keys."""
    models = importlib.import_module("aiperf.dataset.loader.weka_trace_models")
    files = sorted(Path(folder).glob("*.json"))
    for file in files:
        models.WekaTrace.model_validate_json(file.read_text())
    print(f"AIPerf: {len(files)} Weka traces valid")


def sglang(file: str, unpacked: str) -> None:
    """Its Mooncake dataset and the generator of requests; the package's __init__ is left out."""
    package = types.ModuleType("sglang")
    package.__path__ = [f"{unpacked}/sglang"]
    sys.modules["sglang"] = package
    mooncake = importlib.import_module("sglang.benchmark.datasets.mooncake")
    rows = mooncake.MooncakeDataset(file, "conversation", 50).load()

    async def planned() -> int:
        requests = mooncake.get_mooncake_request_over_time(rows, Tokenizer(), 0.001, 1)
        return len([request async for request in requests])

    print(f"SGLang: {len(rows)} rows, {asyncio.run(planned())} requests")


def guidellm(file: str, block_tokens: str) -> None:
    """Its Mooncake format: every row checked, some prompts made."""
    trace = importlib.import_module("guidellm.data.deserializers.trace_mooncake")
    schemas = importlib.import_module("guidellm.schemas.data.deserializers")
    datasets, faker = importlib.import_module("datasets"), importlib.import_module("faker").Faker()
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    config = schemas.MooncakeTraceFormatArgs.model_construct(hash_id_block_size=int(block_tokens))
    form = trace.MooncakeTraceFormat(config, datasets.Dataset.from_list(rows))
    for row in rows:
        form.validate_row(row)
    for row in rows[:PROMPTS]:
        prompt = form.create_prompt(row, Tokenizer(), faker)
        assert len(prompt) == row["input_length"]
    print(f"GuideLLM: {len(rows)} rows valid, prompts as long as stated")


CHECKS: dict[str, Callable[..., None]] = {
    "aiperf": aiperf,
    "weka": weka,
    "sglang": sglang,
    "guidellm": guidellm,
}

if __name__ == "__main__":
    CHECKS[sys.argv[1]](*sys.argv[2:])
