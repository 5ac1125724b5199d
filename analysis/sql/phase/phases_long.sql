-- module: phase.phases_long
-- requires: prelude.quantiles, phase.phases, metrics.definitions, metrics.long
--
-- The estimates of phase.phases as rows like those of metrics_long, under names of their own: an estimate is
-- never shown as a measurement. They take passes over all events, so metrics_long does not hold them.

-- metric: queue_estimate
-- Title: queue, estimated
-- Formula: queue_ns of `phases` where method is stream
-- Unit: ns
-- Weight: request
-- View: phases.queue_ns
-- Undefined when: the server reported its phases, or its streams do not show its steps
-- Differs from: peers, which have no such number; each value has its interval in `phases`

-- metric: prefill_estimate
-- Title: prefill, estimated
-- Formula: prefill_ns of `phases` where method is stream
-- Unit: ns
-- Weight: request
-- View: phases.prefill_ns
-- Undefined when: the server reported its phases, or its streams do not show its steps
-- Differs from: peers, which call TTFT prefill, queue included

-- metric: decode_estimate
-- Title: decode, estimated
-- Formula: decode_ns of `phases` where method is stream
-- Unit: ns
-- Weight: request
-- View: phases.decode_ns
-- Undefined when: the server reported its phases, or its streams do not show its steps
-- Differs from: peers, which have no such number

-- Statistics of the metrics above, over requests that ended well; the same rows for every run.
-- col run VARCHAR: label of the tape
-- col metric VARCHAR: queue_estimate, prefill_estimate or decode_estimate
-- col stat VARCHAR: p50, p90, p99, p99.9, mean, min, max
-- col weight VARCHAR: request
-- col value DOUBLE: the number, in `unit`; NULL when there is no estimate or too few samples
-- col unit VARCHAR: ns
-- col n BIGINT: requests that it stands on
-- col attempted BIGINT: requests on the tape, whatever their outcome
-- col coverage DOUBLE: part of what was seen that the tape holds
CREATE VIEW phases_long AS
WITH
  _samples AS MATERIALIZED (
    SELECT
      {'run': run, 'metric': unnest(['queue_estimate', 'prefill_estimate', 'decode_estimate'])} AS key,
      unnest([queue_ns, prefill_ns, decode_ns])::DOUBLE AS value,
      weight
    FROM phases
    WHERE method = 'stream' AND outcome = 'ok'
  ),
  _found AS (
    SELECT key.run AS run, key.metric AS metric, * EXCLUDE (key, weight)
    FROM quantiles('_samples')
  )
SELECT
  run,
  metric,
  unnest(['p50', 'p90', 'p99', 'p99.9', 'mean', 'min', 'max']) AS stat,
  weight,
  unnest([
    CASE WHEN enough_samples(n, 0.5) THEN p50 END,
    CASE WHEN enough_samples(n, 0.9) THEN p90 END,
    CASE WHEN enough_samples(n, 0.99) THEN p99 END,
    CASE WHEN enough_samples(n, 0.999) THEN p999 END,
    mean,
    minimum,
    maximum
  ]) AS value,
  unit,
  coalesce(n, 0)::BIGINT AS n,
  attempted,
  of_requests AS coverage
FROM (SELECT run FROM tapes)
CROSS JOIN (SELECT metric, weight, unit FROM metrics WHERE module = 'phase.phases_long')
JOIN _coverage() USING (run)
LEFT JOIN _found USING (run, metric);
