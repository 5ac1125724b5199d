"""What the engine did, as the Prometheus page that vLLM serves: same names, labels and buckets.

Server truth of the simulation: times are those of the steps, not of the sockets. How late this
process was is told beside it under tokentape_ names, so that a run can be judged. Counting must
stay cheap: it is called for every step and every request, and only a scrape formats text.
"""

from bisect import bisect_left
from dataclasses import dataclass, field

from tokentape.replay.engine.batching import Batch, Sequence, Step
from tokentape.replay.engine.profile import Profile

# Buckets as recorded from vLLM 0.22.1.
LONG_S = (
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    120,
    240,
    480,
    960,
    1920,
    7680,
)
FIRST_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20,
           40, 80, 160, 640, 2560)  # fmt: skip
TOKEN_S = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LATE_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Histogram:
    """Cumulative histogram with Prometheus' upper bounds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def lines(self, name: str, labels: str) -> list[str]:
        """Sample lines of the page."""
        total, lines, comma = 0, [], "," if labels else ""
        for bound, count in zip((*map(float, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{{labels}{comma}le="{bound}"}} {float(total)}')
        tag = f"{{{labels}}}" if labels else ""
        return [*lines, f"{name}_count{tag} {float(total)}", f"{name}_sum{tag} {self.sum}"]


def _long() -> Histogram:
    return Histogram(LONG_S)


@dataclass
class Counters:
    """Totals since the engine started."""

    prompt_tokens: int = 0
    prompt_tokens_cached: int = 0
    generation_tokens: int = 0
    finished: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "abort": 0})
    steps: int = 0
    steps_slipped: int = 0
    slow_readers: int = 0
    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_S))
    inter_token: Histogram = field(default_factory=lambda: Histogram(TOKEN_S))
    per_output_token: Histogram = field(default_factory=lambda: Histogram(TOKEN_S))
    e2e: Histogram = field(default_factory=_long)
    queue: Histogram = field(default_factory=_long)
    inference: Histogram = field(default_factory=_long)
    prefill: Histogram = field(default_factory=_long)
    decode: Histogram = field(default_factory=_long)
    request_prompt: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    request_output: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    step_tokens: Histogram = field(default_factory=lambda: Histogram(STEP_TOKENS))
    step_late: Histogram = field(default_factory=lambda: Histogram(LATE_S))
    step_written: Histogram = field(default_factory=lambda: Histogram(LATE_S))

    def count_step(self, step: Step, made: list[Sequence], late_ns: int) -> None:
        """Count a step that ended `late_ns` after its time, and the tokens it made."""
        self.steps += 1
        self.step_late.add(late_ns / 1e9)
        self.step_tokens.add(step.tokens)
        self.generation_tokens += len(made)
        gaps: dict[int, int] = {}
        for sequence in made:
            if sequence.made == 1:
                self.prompt_tokens += sequence.prompt_tokens
                self.prompt_tokens_cached += sequence.cached_tokens
                self.first_token.add((step.end_ns - sequence.arrived_ns) / 1e9)
            else:
                gaps[sequence.gap_ns] = gaps.get(sequence.gap_ns, 0) + 1
        for gap_ns, times in gaps.items():
            self.inter_token.add(gap_ns / 1e9, times)

    def count_finished(self, sequence: Sequence, reason: str) -> None:
        """Count a request that made all its tokens."""
        self.finished[reason] += 1
        admitted_ns = sequence.admitted_ns or 0
        first_ns, last_ns = sequence.first_token_ns or 0, sequence.last_token_ns or 0
        self.e2e.add((last_ns - sequence.arrived_ns) / 1e9)
        self.queue.add((admitted_ns - sequence.queued_ns) / 1e9)
        self.inference.add((last_ns - admitted_ns) / 1e9)
        self.prefill.add((first_ns - admitted_ns) / 1e9)
        self.decode.add((last_ns - first_ns) / 1e9)
        self.request_prompt.add(sequence.prompt_tokens)
        self.request_output.add(sequence.made)
        if sequence.made > 1:
            self.per_output_token.add((last_ns - first_ns) / 1e9 / (sequence.made - 1))

    def page(self, batch: Batch, profile: Profile) -> str:
        """The text of /metrics."""
        model = profile.model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        labels = f'engine="0",model_name="{model}"'
        lines: list[str] = []
        for name, value, meaning in self._gauges(batch):
            lines += [*_head(name, "gauge", meaning), f"{name}{{{labels}}} {float(value)}"]
        for name, value, meaning in self._totals(batch):
            lines += [*_head(name, "counter", meaning), f"{name}{{{labels}}} {float(value)}"]
        name = "vllm:request_success_total"
        lines += _head(name, "counter", "Requests by how they ended.")
        for reason, count in self.finished.items():
            tags = f'engine="0",finished_reason="{reason}",model_name="{model}"'
            lines.append(f"{name}{{{tags}}} {float(count)}")
        for name, histogram, meaning in self._histograms():
            tags = labels if name.startswith("vllm:") else ""
            lines += _head(name, "histogram", meaning) + histogram.lines(name, tags)
        config = (
            f'block_size="{profile.block_tokens}",enable_prefix_caching="{profile.prefix_cache}"'
        )
        config += f',engine="0",num_gpu_blocks="{profile.kv_blocks}"'
        lines += _head("vllm:cache_config_info", "gauge", "Settings of the KV cache.")
        lines += [f"vllm:cache_config_info{{{config}}} 1.0", *self._own_lines()]
        return "\n".join(lines) + "\n"

    def _gauges(self, batch: Batch) -> list[tuple[str, float, str]]:
        used = 1 - batch.kv.free / batch.kv.total
        return [
            ("vllm:num_requests_running", len(batch.running), "Requests in execution batches."),
            ("vllm:num_requests_waiting", len(batch.waiting), "Requests waiting to be processed."),
            ("vllm:kv_cache_usage_perc", used, "KV-cache usage. 1 means 100 percent usage."),
        ]

    def _totals(self, batch: Batch) -> list[tuple[str, float, str]]:
        return [
            (
                "vllm:prompt_tokens_total",
                self.prompt_tokens,
                "Prefill tokens, cached ones included.",
            ),
            ("vllm:prompt_tokens_cached_total", self.prompt_tokens_cached, "Cached prompt tokens."),
            ("vllm:generation_tokens_total", self.generation_tokens, "Tokens generated."),
            ("vllm:prefix_cache_queries_total", batch.prefix_queries, "Prompt tokens looked up."),
            ("vllm:prefix_cache_hits_total", batch.prefix_hits, "Prompt tokens found."),
            ("vllm:num_preemptions_total", batch.preemptions, "Preemptions."),
        ]

    def _histograms(self) -> list[tuple[str, Histogram, str]]:
        return [
            ("vllm:time_to_first_token_seconds", self.first_token, "Arrival to first token."),
            ("vllm:inter_token_latency_seconds", self.inter_token, "Between tokens."),
            (
                "vllm:request_time_per_output_token_seconds",
                self.per_output_token,
                "Mean of a request.",
            ),
            ("vllm:e2e_request_latency_seconds", self.e2e, "Arrival to last token."),
            ("vllm:request_queue_time_seconds", self.queue, "Time in the WAITING phase."),
            ("vllm:request_inference_time_seconds", self.inference, "Time in the RUNNING phase."),
            ("vllm:request_prefill_time_seconds", self.prefill, "Time in the PREFILL phase."),
            ("vllm:request_decode_time_seconds", self.decode, "Time in the DECODE phase."),
            ("vllm:request_prompt_tokens", self.request_prompt, "Prompt tokens of a request."),
            ("vllm:request_generation_tokens", self.request_output, "Tokens that a request made."),
            ("vllm:iteration_tokens_total", self.step_tokens, "Tokens of an engine step."),
            (
                "tokentape_engine_step_lateness_seconds",
                self.step_late,
                "How long after its simulated end a step was ended.",
            ),
            (
                "tokentape_engine_step_written_seconds",
                self.step_written,
                "From a step's simulated end until all its tokens were written.",
            ),
        ]

    def _own_lines(self) -> list[str]:
        lines: list[str] = []
        for name, value, meaning in (
            ("steps", self.steps, "Steps ended."),
            ("steps_slipped", self.steps_slipped, "Steps too late to be caught up: time was lost."),
            ("slow_readers", self.slow_readers, "Streams closed because their reader was slow."),
        ):
            full = f"tokentape_engine_{name}_total"
            lines += [*_head(full, "counter", meaning), f"{full} {float(value)}"]
        return lines


def _head(name: str, kind: str, meaning: str) -> list[str]:
    return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
