-- module: latency.normalized
-- requires: prelude.schema
--
-- Latency divided by the length of the answer, as papers print it. It hides tails and mixes the
-- phases: only for comparing with published figures.

-- metric: normalized
-- Title: normalized latency
-- Formula: (end_ns - sent_ns) / output_tokens
-- Unit: ns
-- Weight: request
-- View: normalized.normalized_ns
-- Undefined when: no token, unknown token count, never sent, or no end (an import)
-- Differs from: vLLM's paper and Etalon agree; inference-perf calls it NTPOT; GuideLLM prints nearly
--   this as TPOT

-- Duration of each request per token of its answer, whatever its outcome.
-- col run VARCHAR: label of the tape
-- col request_id UUID: the request
-- col arrival_ns BIGINT (ns): when it was offered
-- col outcome VARCHAR: how it ended
-- col normalized_ns DOUBLE (ns): duration per token
-- col weight DOUBLE: requests that the row stands for
CREATE VIEW normalized AS
SELECT
  run,
  request_id,
  arrival_ns,
  outcome,
  (end_ns - sent_ns) / nullif(output_tokens, 0) AS normalized_ns,
  weight
FROM requests;

-- Samples of the metric above: requests that ended well.
CREATE VIEW _normalized_samples AS
SELECT run, 'normalized' AS metric, arrival_ns, normalized_ns AS value, weight
FROM normalized
WHERE outcome = 'ok';
