-- module: telemetry.speculation
-- requires: telemetry.counters
--
-- How well an engine guessed ahead, by its own counters: vLLM's spec_decode. Guesses depend on the text:
-- random tokens are guessed worse than users' text, so acceptance under a replay is that of its prompts.

-- Drafts and accepted tokens of each page between its first and its last sample, engines added up.
-- col run VARCHAR: label of the tape
-- col source VARCHAR: URL that was sampled
-- col drafts DOUBLE: times that a draft was made
-- col draft_tokens DOUBLE (tokens): tokens in them
-- col accepted_tokens DOUBLE (tokens): of these, tokens that the model kept
-- col acceptance DOUBLE: accepted_tokens / draft_tokens; NULL where nothing was drafted
-- col tokens_per_draft DOUBLE (tokens): 1 + accepted_tokens / drafts: what a step of the model gave
CREATE VIEW speculation AS
SELECT
  run,
  source,
  drafts,
  draft_tokens,
  accepted_tokens,
  accepted_tokens / nullif(draft_tokens, 0) AS acceptance,
  1 + accepted_tokens / nullif(drafts, 0) AS tokens_per_draft
FROM (
  SELECT
    run,
    source,
    sum(increase) FILTER (WHERE name = 'vllm:spec_decode_num_drafts_total') AS drafts,
    sum(increase) FILTER (WHERE name = 'vllm:spec_decode_num_draft_tokens_total') AS draft_tokens,
    sum(increase) FILTER (
      WHERE name = 'vllm:spec_decode_num_accepted_tokens_total'
    ) AS accepted_tokens
  FROM counters
  WHERE
    name IN (
      'vllm:spec_decode_num_drafts_total',
      'vllm:spec_decode_num_draft_tokens_total',
      'vllm:spec_decode_num_accepted_tokens_total'
    )
  GROUP BY run, source
);
