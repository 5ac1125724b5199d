-- module: cost.energy
-- requires: prelude.schema
--
-- Energy from counters, never from samples of power: a GPU samples its power a quarter of the time
-- (arXiv 2312.02741), its counter misses nothing. The counter moves each 20 to 100 ms, so a window
-- under a second gives nothing.

-- metric: joules_per_output_token
-- Title: energy per output token
-- Formula: energy between the first and the last reading of the counters of all GPUs, each in its own
--   window / output tokens that arrived in that window
-- Unit: J
-- Weight: none
-- View: energy.joules_per_output_token
-- Undefined when: no energy counter on the tape, less than 1 s between readings, or no tokens
-- Differs from: InferenceX (integrates polled power); AIPerf (agrees); MLPerf (at the wall)

-- Readings of energy counters, in joules.
CREATE VIEW _energy_readings AS
SELECT
  run,
  source,
  labels,
  ts_ns,
  CASE
    WHEN name = 'DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION' OR name LIKE '%_mj' THEN value / 1000
    ELSE value
  END AS joules
FROM telemetry
WHERE
  name = 'DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION'
  OR name LIKE '%energy%_joules%'
  OR name LIKE '%energy%_mj';

-- Energy of each run. A counter that runs backwards (a driver was loaded) begins anew.
-- col run VARCHAR: label of the tape
-- col counters BIGINT: GPUs, or whatever had a counter
-- col from_ns BIGINT (ns): first reading, since the tape's epoch
-- col until_ns BIGINT (ns): last reading
-- col joules DOUBLE (J): energy between them
-- col watts DOUBLE (W): mean power between them
-- col output_tokens DOUBLE (tokens): tokens that arrived between them
-- col joules_per_output_token DOUBLE (J): energy for each of these
CREATE VIEW energy AS
WITH
  _steps AS (
    SELECT
      *,
      joules - lag(joules) OVER (PARTITION BY run, source, labels ORDER BY ts_ns) AS step
    FROM _energy_readings
  ),
  _sums AS (
    SELECT
      run,
      count(DISTINCT (source, labels)) AS counters,
      min(ts_ns) AS from_ns,
      max(ts_ns) AS until_ns,
      sum(greatest(step, 0)) AS joules
    FROM _steps
    GROUP BY run
    HAVING max(ts_ns) - min(ts_ns) >= 1000000000
  ),
  _tokens AS (
    SELECT run, sum(weight * ntok)::DOUBLE AS output_tokens
    FROM events
    JOIN _sums USING (run)
    WHERE t_ns BETWEEN from_ns AND until_ns
    GROUP BY run
  )
SELECT
  run,
  counters,
  from_ns,
  until_ns,
  joules,
  joules * 1e9 / (until_ns - from_ns) AS watts,
  output_tokens,
  joules / nullif(output_tokens, 0) AS joules_per_output_token
FROM _sums
LEFT JOIN _tokens USING (run);
