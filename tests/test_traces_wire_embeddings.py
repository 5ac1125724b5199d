"""Embeddings and rerank: one body, a prompt's tokens, no output."""

import json
from typing import Any

import openai
import pytest

from tokentape.traces import wire
from wire_streams import JSON, read, served

EMBEDDINGS = {
    "object": "list",
    "model": "e",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -1.0]}],
    "usage": {"prompt_tokens": 8, "total_tokens": 8},
}


def whole(wire_format: str, body: Any, status: int = 200) -> Any:
    data = json.dumps(body).encode()
    return read(wire_format, [data], kind=JSON, stream=False, status=status)


def test_embeddings_have_input_tokens_and_no_output_tokens() -> None:
    reply = whole("openai.embeddings", EMBEDDINGS)
    assert reply.columns["input_tokens"] == 8
    assert reply.columns["model"] == "e"
    assert "output_tokens" not in reply.columns
    assert reply.first_content_ns is None and reply.done
    assert reply.columns["parse_status"] == "ok"


def test_the_official_client_reads_of_the_sample_what_we_read() -> None:
    with (
        served(json.dumps(EMBEDDINGS).encode(), JSON) as url,
        openai.OpenAI(api_key="k", base_url=url, max_retries=0) as client,
    ):
        found = client.embeddings.create(model="e", input="hi", encoding_format="float")
    assert (
        whole("openai.embeddings", EMBEDDINGS).columns["input_tokens"] == found.usage.prompt_tokens
    )


@pytest.mark.parametrize(
    "more",
    [
        {"usage": {"total_tokens": 56}},
        {"usage": {"prompt_tokens": 56, "total_tokens": 60}},
        {"meta": {"tokens": {"input_tokens": 56}, "billed_units": {"search_units": 1}}},
    ],
)
def test_rerank_tells_its_tokens_in_several_ways(more: dict[str, Any]) -> None:
    reply = whole("rerank", {"id": "r", "results": [{"index": 0, "relevance_score": 0.9}], **more})
    assert reply.columns["input_tokens"] == 56
    assert reply.columns["parse_status"] == "ok"


@pytest.mark.parametrize("body", [[], 7, {}, {"data": 1, "usage": "x"}, None, "x"])
def test_odd_bodies_do_not_raise(body: Any) -> None:
    whole("openai.embeddings", body)
    whole("rerank", body, status=500)


def test_an_error_body_tells_its_class() -> None:
    reply = whole("openai.embeddings", {"error": {"type": "bad_input", "message": "x"}}, 400)
    assert reply.stream_error and reply.columns["error_type"] == "bad_input"


def request(path: str, body: dict[str, Any]) -> Any:
    return wire.read_request(path, json.dumps(body).encode())


def test_requests_as_columns_and_prompts() -> None:
    one = request("/v1/embeddings", {"model": "e", "input": "hi", "encoding_format": "base64"})
    assert one.columns["operation"] == "embeddings" and one.prompt.text == b"hi"
    assert one.columns["extra"] == '{"encoding_format":"base64"}'
    assert request("/v1/embeddings", {"input": [1, 2]}).prompt.tokens == [1, 2]
    several = request("/v1/embeddings", {"input": ["a", "b"]})
    assert several.prompt is None and several.columns["extra"] == '{"prompt_count":2}'
    rank = request("/v2/rerank", {"model": "r", "query": "CANARY", "documents": ["CANARY", "b"]})
    assert rank.columns["operation"] == "rerank" and rank.prompt is None
    assert "CANARY" not in repr(rank)
