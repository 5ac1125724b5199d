"""The engine: a simulated LLM server, so that capture, replay and analysis run with no GPU.

It batches as vLLM does (token budget, chunked prefill, KV blocks, prefix cache, preemption) and
speaks vLLM's HTTP, but no model runs: a step takes the time that the profile's numbers give it.
It must never be taken for a measurement of an engine, and it holds no state on disk.
Start reading at server.py (HTTP), then steps.py (real time), then batching.py (pure).
"""
