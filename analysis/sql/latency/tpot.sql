-- module: latency.tpot
-- requires: prelude.schema
--
-- Time per output token after the first: one number per reply, so a long reply counts as a short one.

-- metric: tpot
-- Title: TPOT
-- Formula: (last_content_ns - first_content_ns) / (output_tokens - 1); with several choices the
--   same of each choice, its tokens being the sum of its ntok
-- Unit: ns
-- Weight: request
-- View: tpot.tpot_ns
-- Undefined when: fewer than two tokens or two events, unknown token count, or not streamed: all
--   tokens in one event have no time between them (never 0)
-- Differs from: vLLM bench and SGLang ((latency - ttft) / (n - 1), where one token counts as 0 and
--   meets every SLO; SGLang's latency runs to [DONE]); AIPerf (calls it inter-token latency, tokens
--   by its own tokenizer); GuideLLM (this is its ITL; its TPOT is (last - start) / n, so TTFT is
--   inside); inference-perf agrees, with its own count of tokens; genai-bench (to the end of its
--   loop, without replies that took under 1 ms); abench (the mean of the gaps between events)

-- Time per output token of each reply, whatever its outcome; one row per choice.
-- col run VARCHAR: label of the tape
-- col request_id UUID: the request
-- col choice TINYINT: choice; NULL when there is one
-- col arrival_ns BIGINT (ns): when the request was offered
-- col outcome VARCHAR: how the request ended
-- col output_tokens INTEGER (tokens): tokens of the reply, or of the choice
-- col tpot_ns DOUBLE (ns): time per token after the first
-- col weight DOUBLE: requests that the row stands for
CREATE VIEW tpot AS
SELECT
  run,
  request_id,
  NULL::TINYINT AS choice,
  arrival_ns,
  outcome,
  output_tokens,
  CASE
    WHEN output_tokens >= 2 AND coalesce(n_choices, 1) = 1 AND len(cls) >= 2  -- as off_us, cheaper to read
    THEN (last_content_ns - first_content_ns) / (output_tokens - 1)
  END::DOUBLE AS tpot_ns,
  _weight(sample_prob) AS weight
FROM _rows_of_tapes
WHERE choice IS NULL
UNION ALL
SELECT
  run,
  request_id,
  choice,
  any_value(arrival_ns),
  any_value(outcome),
  sum(ntok)::INTEGER,
  CASE
    WHEN sum(ntok) >= 2 AND count(*) >= 2 THEN (max(off_us) - min(off_us)) * 1000 / (sum(ntok) - 1)
  END::DOUBLE,
  any_value(weight)
FROM _events_of_many_choices
GROUP BY run, request_id, choice;

-- Samples of the metric above and of its inverse, tokens_per_s_user: replies that ended well.
CREATE VIEW _tpot_samples AS
SELECT
  run,
  arrival_ns,
  unnest(['tpot', 'tokens_per_s_user']) AS metric,
  unnest([tpot_ns, 1e9 / nullif(tpot_ns, 0)]) AS value,
  weight
FROM tpot
WHERE outcome = 'ok' AND tpot_ns IS NOT NULL;
