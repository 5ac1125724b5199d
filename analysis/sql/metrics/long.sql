-- module: metrics.long
-- requires: prelude.quantiles, prelude.schema, latency.ttft, latency.tpot, latency.itl, latency.e2e,
--   latency.normalized, latency.stall, throughput.in_flight, throughput.rates, throughput.hardware,
--   cost.price, cost.energy, quality.outcomes, quality.schedule, slo.goodput, phase.server, metrics.definitions
--
-- Every metric of every run in one tidy table, the only machine output. The same rows for every
-- run, also where there is no value. A value that is NULL is not known, does not apply, or stands
-- on too few samples (enough_samples).

-- Samples with one row per request, run and metric as one key. Private parts of this module are
-- macros without arguments: DuckDB does not bind them when they are made.
CREATE MACRO _samples_by_key() AS TABLE
SELECT {'run': run, 'metric': metric} AS key, value, weight, sampled
FROM (
  SELECT * FROM _ttft_samples
  UNION ALL BY NAME SELECT * FROM _tpot_samples
  UNION ALL BY NAME SELECT * FROM _e2e_samples
  UNION ALL BY NAME SELECT * FROM _normalized_samples
  UNION ALL BY NAME SELECT * FROM _schedule_samples
  UNION ALL BY NAME SELECT * FROM _server_samples
)
JOIN tapes USING (run)
WHERE value IS NOT NULL;

-- Samples with one row per distinct value: events and tokens.
CREATE MACRO _counts_by_key() AS TABLE
SELECT {'run': run, 'metric': metric} AS key, value, weight, n
FROM _gap_counts;

-- One row per run and metric that has samples. Runs that kept every request take the fast way: all
-- weights are 1.
CREATE MACRO _distributions() AS TABLE
WITH
  _whole AS (SELECT key, value FROM _samples_by_key() WHERE NOT sampled),
  _counts AS (
    SELECT key, value, weight, 1 AS n FROM _samples_by_key() WHERE sampled
    UNION ALL BY NAME
    SELECT * FROM _counts_by_key()
  )
SELECT key.run AS run, key.metric AS metric, * EXCLUDE (key, weight)
FROM (
  SELECT * FROM _quantiles_of_equals('_whole')
  UNION ALL BY NAME
  SELECT * FROM _quantiles_of_counts('_counts')
)
UNION ALL BY NAME
SELECT 'in_flight' AS metric, * EXCLUDE (duration_ns) FROM in_flight_quantiles;

-- Statistics of the distributions, long; NULL where there are too few samples. Levels over time are
-- no samples, so the rule does not hold for them.
CREATE MACRO _distribution_stats() AS TABLE
SELECT
  run,
  metric,
  n,
  unnest(['p50', 'p90', 'p99', 'p99.9', 'mean', 'min', 'max']) AS stat,
  unnest([
    CASE WHEN weight = 'time' OR enough_samples(n, 0.5) THEN p50 END,
    CASE WHEN weight = 'time' OR enough_samples(n, 0.9) THEN p90 END,
    CASE WHEN weight = 'time' OR enough_samples(n, 0.99) THEN p99 END,
    CASE WHEN weight = 'time' OR enough_samples(n, 0.999) THEN p999 END,
    mean,
    minimum,
    maximum
  ]) AS value
FROM (SELECT run FROM tapes)
CROSS JOIN (
  SELECT metric, weight FROM metrics WHERE weight <> 'none' AND module <> 'phase.phases_long'
)
LEFT JOIN _distributions() USING (run, metric);

-- Rates and counts, long: metrics that are single numbers.
CREATE MACRO _single_stats() AS TABLE
SELECT
  run,
  'value' AS stat,
  unnest([
    'offered_per_s', 'completed_per_s',
    'input_tokens_per_s', 'uncached_tokens_per_s', 'output_tokens_per_s'
  ]) AS metric,
  unnest([
    offered_per_s, completed_per_s,
    input_tokens_per_s, uncached_tokens_per_s, output_tokens_per_s
  ]) AS value,
  unnest([offered, ended, input_known, uncached_known, output_known]) AS n
FROM (SELECT run FROM tapes)
LEFT JOIN rates USING (run)
UNION ALL BY NAME
SELECT
  run,
  'value' AS stat,
  unnest([
    'output_tokens_per_s_gpu', 'total_tokens_per_s_gpu',
    'usd_per_m_output', 'usd_per_m_total', 'joules_per_output_token'
  ]) AS metric,
  unnest([
    output_tokens_per_s_gpu, total_tokens_per_s_gpu,
    usd_per_m_output, usd_per_m_total, joules_per_output_token
  ]) AS value,
  unnest([output_known, output_known, output_known, output_known, output_tokens::BIGINT]) AS n
FROM (SELECT run FROM tapes)
LEFT JOIN rates USING (run)
LEFT JOIN hardware_rates USING (run)
LEFT JOIN price USING (run)
LEFT JOIN energy USING (run)
UNION ALL BY NAME
SELECT
  run,
  'prefix_got' AS metric,
  'value' AS stat,
  sum(weight * cached_tokens) FILTER (input_tokens IS NOT NULL)
    / nullif(sum(weight * input_tokens) FILTER (cached_tokens IS NOT NULL), 0) AS value,
  count(cached_tokens + input_tokens) AS n
FROM (SELECT run FROM tapes)
LEFT JOIN requests USING (run)
GROUP BY run
UNION ALL BY NAME
SELECT run, 'stalled_share' AS metric, 'value' AS stat, stalled_share AS value, replies AS n
FROM (SELECT run FROM tapes)
LEFT JOIN stall_rates USING (run)
UNION ALL BY NAME
SELECT
  run,
  unnest(['goodput', 'slo_attainment']) AS metric,
  slo AS stat,
  unnest([goodput_per_s, attainment]) AS value,
  (requests - unjudged)::BIGINT AS n
FROM (SELECT run FROM tapes)
CROSS JOIN (
  SELECT slo FROM slos
  UNION ALL
  SELECT 'value' AS slo WHERE NOT EXISTS (FROM slos)
)
LEFT JOIN goodput USING (run, slo)
UNION ALL BY NAME
SELECT run, 'outcomes' AS metric, outcome AS stat, requests AS value, requests AS n
FROM outcomes
UNION ALL BY NAME
SELECT
  run,
  'outcomes' AS metric,
  unnest(['lost', 'unsealed']) AS stat,
  unnest([lost_requests, unsealed_requests]) AS value,
  value AS n
FROM tapes;

-- Part of what was seen that the tape holds.
CREATE MACRO _coverage() AS TABLE
SELECT
  run,
  sealed_requests AS attempted,
  (sealed_requests + sampled_out_requests) / nullif(
    sealed_requests + sampled_out_requests + lost_requests + unsealed_requests, 0
  ) AS of_requests,
  coalesce(sealed_events / nullif(sealed_events + coalesce(events_dropped, 0), 0), 1) AS of_events
FROM tapes
LEFT JOIN (
  SELECT run, sum(events_dropped)::BIGINT AS events_dropped
  FROM requests
  GROUP BY run
) USING (run);

-- Every metric of every run.
-- col run VARCHAR: label of the tape
-- col metric VARCHAR: name, as in `metrics`
-- col stat VARCHAR: p50, p90, p99, p99.9, mean, min, max; value for a rate; the outcome for outcomes;
--   the name of the SLO for goodput and slo_attainment
-- col weight VARCHAR: what each sample counts for: request, event, token, time, none
-- col value DOUBLE: the number, in `unit`; NULL when unknown, not applicable or too few samples
-- col unit VARCHAR: ns, requests, requests/s, tokens/s, USD, J, 1 (a share)
-- col n BIGINT: samples that it stands on: requests, choices, events, tokens or steps of a level
-- col attempted BIGINT: requests on the tape, whatever their outcome
-- col coverage DOUBLE: part of what was seen that the tape holds: requests, and for events and
--   tokens also the events kept
CREATE VIEW metrics_long AS
SELECT
  run,
  metric,
  stat,
  metrics.weight,
  value::DOUBLE AS value,
  unit,
  coalesce(n, 0)::BIGINT AS n,
  attempted,
  CASE
    WHEN metrics.weight IN ('event', 'token') THEN of_requests * of_events
    ELSE of_requests
  END AS coverage
FROM (
  SELECT * FROM _distribution_stats()
  UNION ALL BY NAME SELECT * FROM _single_stats()
)
JOIN metrics USING (metric)
JOIN _coverage() USING (run);
