"""Record LLM traffic once, replay it on any hardware, find the latency tails in SQL."""

__version__ = "0.1.0"
