"""Continuous batching: told of arrivals and aborts, asked for the next step. Pure.

The order of things is vLLM's: running sequences first, each with the tokens that are known but not
computed, then waiting ones in order of arrival, all under one token budget; a long prompt is
prefilled in chunks. When KV blocks run out, the sequence that came last is preempted and computed
anew later. It must never read a clock: the caller brings the times, and a step says when it ends.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from random import Random

from tokentape.replay.engine.kv import KvBlocks
from tokentape.replay.engine.profile import Profile


@dataclass(eq=False, slots=True)
class Sequence:
    """One request in the batch: its prompt and, known beforehand, its output.

    `cached_tokens` are prompt tokens found in the prefix cache when it was first admitted. Times
    are ns on the caller's clock; None means not yet.
    """

    tokens: list[int]
    prompt_tokens: int
    arrived_ns: int
    queued_ns: int = 0
    admitted_ns: int | None = None
    first_token_ns: int | None = None
    last_token_ns: int | None = None
    gap_ns: int = 0  # between its last two tokens
    made: int = 0
    computed: int = 0  # tokens whose KV is in blocks
    cached_tokens: int = 0
    preemptions: int = 0
    running: bool = False
    aborted: bool = False
    blocks: list[int] = field(default_factory=list)
    names: list[int] = field(default_factory=list)

    @property
    def output_tokens(self) -> int:
        """Tokens that it makes in all."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def known(self) -> int:
        """Prompt and the tokens made so far."""
        return self.prompt_tokens + self.made

    @property
    def finished(self) -> bool:
        """True when its last token has been made."""
        return self.known == len(self.tokens)

    @property
    def newest_token(self) -> int:
        """The token made last."""
        return self.tokens[self.known - 1]


@dataclass(slots=True)
class Step:
    """One forward pass: who prefills how many tokens, who decodes one, and until when."""

    begin_ns: int
    end_ns: int = 0
    prefill: list[tuple[Sequence, int]] = field(default_factory=list)
    decode: list[Sequence] = field(default_factory=list)
    prefill_tokens: int = 0
    kv_tokens: int = 0  # context that it reads

    @property
    def tokens(self) -> int:
        """Tokens computed."""
        return self.prefill_tokens + len(self.decode)

    def add(self, sequence: Sequence, tokens: int) -> None:
        """Put a sequence in, with the tokens that it computes."""
        if sequence.made and tokens == 1:
            self.decode.append(sequence)
        else:
            self.prefill.append((sequence, tokens))
            self.prefill_tokens += tokens
        self.kv_tokens += sequence.computed + tokens


class Batch:
    """The engine's scheduler. One step is under way at most: `begin`, then `end`."""

    def __init__(self, profile: Profile) -> None:
        self.kv = KvBlocks(profile.kv_blocks)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.step: Step | None = None
        self.preemptions = 0
        self.prefix_queries = 0  # prompt tokens looked up
        self.prefix_hits = 0  # of these, found
        self._profile = profile
        self._random = Random(profile.seed)
        self._now_ns = 0

    def arrive(self, sequence: Sequence, queued_ns: int) -> None:
        """Queue a sequence; no step that begins before `queued_ns` holds it.

        Raises ValueError where it could never be served: too long, nothing to compute or to make.
        """
        longest = min(self._profile.max_model_tokens, self.kv.total * self._profile.block_tokens)
        if not 0 < sequence.prompt_tokens < len(sequence.tokens) <= longest:
            raise ValueError(f"{sequence.prompt_tokens} + {sequence.output_tokens} tokens")
        if self.waiting and queued_ns < self.waiting[-1].queued_ns:
            raise ValueError("arrivals must come in order of time")
        sequence.queued_ns = queued_ns
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Drop a sequence at once, from the queue or the batch, even while a step computes it."""
        if sequence.aborted or sequence.finished:
            return
        if sequence.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.aborted = True
        self._let_go(sequence)

    def begin(self, now_ns: int) -> Step | None:
        """Begin the next step, or None when nobody is there to compute at `now_ns`."""
        if self.step is not None or now_ns < self._now_ns:
            raise ValueError("a step begins after the step before it, and time never goes back")
        self._now_ns = now_ns
        step = Step(now_ns)
        if not self._continue_running(step):
            self._admit_waiting(step)
        if not step.tokens:
            return None
        step.end_ns = now_ns + self._duration_ns(step)
        self.step = step
        return step

    def end(self) -> list[Sequence]:
        """End the step under way: the sequences that made a token, in the order of the batch."""
        step = self.step
        if step is None:
            raise ValueError("no step is under way")
        self.step = None
        self._now_ns = step.end_ns
        made = [s for s in step.decode if not s.aborted and self._advance(s, 1, step.end_ns)]
        made += [s for s, n in step.prefill if not s.aborted and self._advance(s, n, step.end_ns)]
        if any(sequence.finished for sequence in made):
            self.running = [s for s in self.running if not s.finished]
            for sequence in made:
                if sequence.finished:
                    self._let_go(sequence)
        return made

    def _continue_running(self, step: Step) -> bool:
        """Give every running sequence its tokens; True when someone had to be preempted for it."""
        preempted, index = False, 0
        while index < len(self.running):
            budget = self._profile.max_batched_tokens - step.tokens
            if not budget:
                break
            sequence = self.running[index]
            tokens = min(sequence.known - sequence.computed, budget)
            while not self._reserve(sequence, tokens):
                preempted = True
                self._preempt(self.running.pop())
                if not sequence.running:
                    return True
            step.add(sequence, tokens)
            index += 1
        return preempted

    def _admit_waiting(self, step: Step) -> None:
        while self.waiting and self.waiting[0].queued_ns <= step.begin_ns:
            budget = self._profile.max_batched_tokens - step.tokens
            if not budget or len(self.running) == self._profile.max_sequences:
                break
            sequence = self.waiting[0]
            self._share_prefix(sequence)
            tokens = min(sequence.known - sequence.computed, budget)
            if not self._reserve(sequence, tokens):
                self._let_go(sequence)
                break
            self.running.append(self.waiting.popleft())
            sequence.running = True
            if sequence.admitted_ns is None:
                sequence.admitted_ns = step.begin_ns
                sequence.cached_tokens = sequence.computed
                self.prefix_queries += sequence.prompt_tokens if self._profile.prefix_cache else 0
                self.prefix_hits += sequence.computed
            step.add(sequence, tokens)

    def _share_prefix(self, sequence: Sequence) -> None:
        """Hold the blocks of its prefix that are known; at least one token is left to compute."""
        if not self._profile.prefix_cache:
            return
        size = self._profile.block_tokens
        self._extend_names(sequence, (sequence.known - 1) // size)
        sequence.blocks = self.kv.find(sequence.names[: (sequence.known - 1) // size])
        self.kv.share(sequence.blocks)
        sequence.computed = len(sequence.blocks) * size

    def _extend_names(self, sequence: Sequence, count: int) -> None:
        """Chain the hashes of whole blocks of tokens until there are `count` names."""
        names, size = sequence.names, self._profile.block_tokens
        for start in range(len(names) * size, count * size, size):
            before = names[-1] if names else 0
            names.append(hash((before, *sequence.tokens[start : start + size])))

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Hold blocks enough for `tokens` more; False when too few are free."""
        size = self._profile.block_tokens
        missing = -(-(sequence.computed + tokens) // size) - len(sequence.blocks)
        if missing <= 0:
            return True
        taken = self.kv.take(missing)
        if taken is None:
            return False
        sequence.blocks += taken
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue, with nothing computed."""
        self._let_go(sequence)
        sequence.running = False
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        self.kv.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0

    def _advance(self, sequence: Sequence, tokens: int, end_ns: int) -> bool:
        """Count tokens as computed; True when that made the next token."""
        size = self._profile.block_tokens
        full_before = sequence.computed // size
        sequence.computed += tokens
        full = sequence.computed // size
        if full > full_before and self._profile.prefix_cache:
            self._extend_names(sequence, full)
            for index in range(full_before, full):
                self.kv.name(sequence.blocks[index], sequence.names[index])
        if sequence.computed < sequence.known:
            return False
        sequence.made += 1
        if sequence.first_token_ns is None:
            sequence.first_token_ns = end_ns
        else:
            sequence.gap_ns = end_ns - (sequence.last_token_ns or 0)
        sequence.last_token_ns = end_ns
        return True

    def _duration_ns(self, step: Step) -> int:
        profile, sigma = self._profile, self._profile.step_jitter
        sequences = len(step.decode) + len(step.prefill)
        step_ms = profile.step_ms + profile.step_ms_per_sequence * sequences
        prefill_s = step.prefill_tokens / profile.prefill_tokens_per_s
        ns = step_ms * 1e6 + prefill_s * 1e9 + profile.step_ns_per_kv_token * step.kv_tokens
        jitter = math.exp(self._random.gauss(0.0, sigma) - sigma * sigma / 2) if sigma else 1.0
        return max(1, round(ns * jitter))
