-- module: quality.outcomes
-- requires: prelude.schema
--
-- How the requests ended, and what is missing. Every latency stands on outcome ok; this is the rest.

-- metric: outcomes
-- Title: outcomes
-- Formula: rows by outcome, plus `lost` (seen, not on the tape) and `unsealed` (still in the journal)
-- Unit: requests
-- Weight: none
-- View: outcomes.requests
-- Undefined when: never; an outcome that did not occur is 0
-- Differs from: vLLM bench, which drops failed requests from every number

-- Requests by outcome; every outcome of the format has a row for every run.
-- col run VARCHAR: label of the tape
-- col outcome VARCHAR: ok, http_error, stream_error, client_abort, upstream_abort, timeout,
--   connect_error, cut; unknown where the row has none
-- col requests BIGINT: rows
-- col estimated_requests DOUBLE: requests that the rows stand for; differs from rows when sampled
-- col share DOUBLE: part of the run's estimated requests
CREATE VIEW outcomes AS
WITH
  _names AS (
    SELECT run, unnest([
      'ok', 'http_error', 'stream_error', 'client_abort',
      'upstream_abort', 'timeout', 'connect_error', 'cut'
    ]) AS outcome
    FROM tapes
  ),
  _counts AS (
    SELECT
      run,
      coalesce(outcome, 'unknown') AS outcome,
      count(*) AS requests,
      sum(weight) AS estimated_requests
    FROM requests
    GROUP BY ALL
  )
SELECT
  run,
  outcome,
  coalesce(requests, 0) AS requests,
  coalesce(estimated_requests, 0) AS estimated_requests,
  coalesce(estimated_requests, 0) / nullif(sum(estimated_requests) OVER (PARTITION BY run), 0) AS share
FROM _names
FULL JOIN _counts USING (run, outcome);

-- Errors by what answered and by class.
-- col run VARCHAR: label of the tape
-- col outcome VARCHAR: outcome, never ok
-- col origin VARCHAR: who answered: upstream or proxy
-- col http_status SMALLINT: status of the reply
-- col error_type VARCHAR: class of the error
-- col requests BIGINT: rows
-- col retry_after_max_s INTEGER: longest wait that a reply's Retry-After asked for
CREATE VIEW outcomes_errors AS
SELECT
  run,
  outcome,
  origin,
  http_status,
  error_type,
  count(*) AS requests,
  max(retry_after_s) AS retry_after_max_s
FROM requests
WHERE outcome IS DISTINCT FROM 'ok'
GROUP BY ALL;
