-- module: quality.coverage
-- requires: prelude.schema
--
-- When a capture recorded and when it did not: the workers' own samples, one a second. A worker that
-- runs late pauses recording and nothing else, so what passed meanwhile is missing from every number.

-- One line for each sample of each worker.
CREATE VIEW _coverage_samples AS
SELECT
  run,
  source,
  ts_ns,
  max(end_ns) AS end_ns,
  max(value) FILTER (WHERE name = 'tokentape_recording') AS recording,
  max(value) FILTER (WHERE name = 'tokentape_loop_lag_max_seconds') AS lag_s,
  coalesce(sum(value) FILTER (WHERE name = 'tokentape_requests_lost_total'), 0) AS lost
FROM telemetry
WHERE source LIKE 'tokentape/%'
GROUP BY ALL;

-- What each worker recorded over time.
-- col run VARCHAR: label of the tape
-- col source VARCHAR: tokentape/WORKER
-- col ts_ns BIGINT (ns): when the sample began, since the tape's epoch
-- col end_ns BIGINT (ns): when it was complete
-- col recording BOOLEAN: whether the worker recorded at its end
-- col requests_lost BIGINT: requests that got no row meanwhile
-- col lag_max_ns BIGINT (ns): how late the worker's event loop was at most
CREATE VIEW coverage AS
SELECT
  run,
  source,
  ts_ns,
  end_ns,
  recording > 0 AS recording,
  -- the worker's total; it begins anew with its replacement
  CASE WHEN lost >= coalesce(before, 0) THEN lost - coalesce(before, 0) ELSE lost END::BIGINT
    AS requests_lost,
  (lag_s * 1e9)::BIGINT AS lag_max_ns
FROM (
  SELECT *, lag(lost) OVER (PARTITION BY run, source ORDER BY ts_ns) AS before
  FROM _coverage_samples
  WHERE recording IS NOT NULL
);
