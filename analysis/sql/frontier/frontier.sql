-- module: frontier.frontier
-- requires: prelude.schema, latency.tpot, throughput.rates, throughput.hardware, throughput.steady,
--   cost.energy, slo.goodput
--
-- What a deployment gives each user against what it gives for each GPU, one point for each run. Measured
-- in the steady window of the run where it has one, else over the whole run, which says so.

-- Where each run is measured.
CREATE VIEW _frontier_windows AS
SELECT
  run,
  CASE WHEN steady THEN 'steady' ELSE 'whole run' END AS measured_in,
  CASE WHEN steady THEN steady.from_ns ELSE first_ns END AS from_ns,
  CASE WHEN steady THEN steady.until_ns ELSE last_ns END AS until_ns
FROM _run_spans
LEFT JOIN steady USING (run);

-- Speed of each reply that began in its window; the axis of the users.
CREATE VIEW _frontier_replies AS
SELECT run, arrival_ns, 1e9 / tpot_ns AS tokens_per_s, weight
FROM tpot
JOIN _frontier_windows USING (run)
WHERE outcome = 'ok' AND tpot_ns > 0 AND arrival_ns BETWEEN from_ns AND until_ns;

-- One point for each run. A run is dominated when another of the same model is at least as good on both
-- axes and better on one.
-- col run VARCHAR: label of the tape
-- col model VARCHAR: model that most requests had
-- col configuration VARCHAR: GPU, how many, engine and version, as the tape's facts say: one series
-- col measured_in VARCHAR: steady, or whole run, ramp and drain included
-- col from_ns BIGINT (ns): start of that window, since the tape's epoch
-- col until_ns BIGINT (ns): end of that window
-- col gpus DOUBLE: GPUs
-- col usd_per_gpu_hour DOUBLE (USD): price of one for an hour
-- col replies BIGINT: replies that the user's axis stands on
-- col tokens_per_s_user DOUBLE (tokens/s): median over replies of 1 / TPOT
-- col tokens_per_s_user_p10 DOUBLE (tokens/s): nine of ten replies are at least as fast
-- col offered_per_s DOUBLE (requests/s): requests that arrived in the window
-- col input_tokens_per_s DOUBLE (tokens/s): prompt tokens of these, cached ones included
-- col output_tokens_per_s DOUBLE (tokens/s): tokens that arrived in the window
-- col tokens_per_s_gpu DOUBLE (tokens/s): output_tokens_per_s / gpus
-- col usd_per_m_output DOUBLE (USD): for a million output tokens at this point
-- col joules_per_output_token DOUBLE (J): energy for each output token, where the tape has counters
-- col attainment DOUBLE: least part of requests that met an SLO, of all that the reader gave
-- col dominated BOOLEAN: another run is better; NULL where an axis is not known
CREATE VIEW frontier AS
WITH
  _windows AS MATERIALIZED (FROM _frontier_windows),  -- long to plan: each named once
  _replies AS MATERIALIZED (FROM _frontier_replies),
  _models AS (
    SELECT run, arg_max(model, (requests, model)) AS model
    FROM (SELECT run, model, count(*) AS requests FROM requests WHERE model IS NOT NULL GROUP BY ALL)
    GROUP BY run
  ),
  _speeds AS (
    SELECT key AS run, n, p50
    FROM (
      WITH _s AS (SELECT run AS key, tokens_per_s AS value, weight FROM _replies)
      FROM quantiles('_s')
    )
  ),
  _slow AS (  -- the p10 of a speed is the p90 of its inverse
    SELECT key AS run, 1 / p90 AS p10
    FROM (
      WITH _s AS (SELECT run AS key, 1 / tokens_per_s AS value, weight FROM _replies)
      FROM quantiles('_s')
    )
  ),
  _offers AS (
    SELECT
      run,
      sum(weight) * 1e9 / nullif(any_value(until_ns - from_ns), 0) AS offered_per_s,
      sum(weight * input_tokens) * 1e9 / nullif(any_value(until_ns - from_ns), 0) AS input_tokens_per_s
    FROM requests
    JOIN _windows USING (run)
    WHERE arrival_ns BETWEEN from_ns AND until_ns
    GROUP BY run
  ),
  _outputs AS (
    SELECT run, sum(weight * ntok) * 1e9 / nullif(any_value(until_ns - from_ns), 0) AS output_tokens_per_s
    FROM events
    JOIN _windows USING (run)
    WHERE t_ns BETWEEN from_ns AND until_ns
    GROUP BY run
  ),
  _attained AS (SELECT run, min(attainment) AS attainment FROM goodput GROUP BY run),
  _points AS (
    SELECT
      run,
      model,
      concat_ws(
        ' ',
        gpus::INTEGER::VARCHAR || ' x ' || coalesce(gpu, 'GPU'),
        json_extract_string(facts, '$.candidate.given.engine'),
        json_extract_string(facts, '$.candidate.given.version'),
        'TP' || json_extract_string(facts, '$.candidate.given.tp')
      ) AS configuration,
      measured_in,
      from_ns,
      until_ns,
      gpus,
      usd_per_gpu_hour,
      coalesce(n, 0) AS replies,
      p50 AS tokens_per_s_user,
      p10 AS tokens_per_s_user_p10,
      offered_per_s,
      input_tokens_per_s,
      output_tokens_per_s,
      output_tokens_per_s / gpus AS tokens_per_s_gpu,
      gpus * usd_per_gpu_hour * 1e6 / (3600 * nullif(output_tokens_per_s, 0)) AS usd_per_m_output,
      joules_per_output_token,
      attainment
    FROM tapes
    LEFT JOIN _models USING (run)
    LEFT JOIN hardware USING (run)
    LEFT JOIN _windows USING (run)
    LEFT JOIN _speeds USING (run)
    LEFT JOIN _slow USING (run)
    LEFT JOIN _offers USING (run)
    LEFT JOIN _outputs USING (run)
    LEFT JOIN (SELECT run, joules_per_output_token FROM energy) USING (run)
    LEFT JOIN _attained USING (run)
  )
SELECT
  *,
  CASE
    WHEN tokens_per_s_user IS NOT NULL AND tokens_per_s_gpu IS NOT NULL
    THEN EXISTS (
      FROM _points AS better
      WHERE better.model IS NOT DISTINCT FROM _points.model
        AND better.tokens_per_s_user >= _points.tokens_per_s_user
        AND better.tokens_per_s_gpu >= _points.tokens_per_s_gpu
        AND (
          better.tokens_per_s_user > _points.tokens_per_s_user
          OR better.tokens_per_s_gpu > _points.tokens_per_s_gpu
        )
    )
  END AS dominated
FROM _points;
