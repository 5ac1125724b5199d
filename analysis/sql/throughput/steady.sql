-- module: throughput.steady
-- requires: prelude.schema, prelude.quantiles, throughput.rates, throughput.in_flight, latency.e2e
--
-- The part of a replay in which ramp and drain are over, if there is one. Requests that arrive in it
-- are what to look at, not those that end in it: that would prefer short ones. A capture of
-- production is not trimmed; look at it slice by slice.

-- Steady window of each run: from the first moment at 90 % of the median number in flight, and one
-- median E2E more, to the last arrival. The window is cut into 20 equal slices.
-- col run VARCHAR: label of the tape
-- col from_ns BIGINT (ns): start of the window, since the tape's epoch
-- col until_ns BIGINT (ns): end of the window: the last arrival
-- col arrivals BIGINT: requests that arrived in it
-- col in_flight DOUBLE (requests): mean number in flight in it
-- col drift DOUBLE: linear trend of the number in flight over the window / in_flight
-- col halves DOUBLE: difference of the means of the two halves, in its own standard errors
-- col steady BOOLEAN: the trend is at most 10 %, and the halves differ by less than 2.1 standard
--   errors (95 %, Student, 18 degrees of freedom)
-- col why VARCHAR: what is against it; NULL when steady
CREATE VIEW steady AS
WITH
  _levels AS (SELECT run, p50 FROM in_flight_quantiles),
  _ended AS (SELECT run AS key, e2e_ns AS value FROM e2e WHERE outcome = 'ok'),
  _durations AS (
    SELECT key AS run, p50::BIGINT AS e2e_ns FROM _quantiles_of_equals('_ended')
  ),
  _starts AS (
    SELECT in_flight.run, min(from_ns) + any_value(e2e_ns) AS from_ns
    FROM in_flight
    JOIN _levels USING (run)
    JOIN _durations USING (run)
    WHERE level >= 0.9 * p50
    GROUP BY in_flight.run
  ),
  _arrivals AS (
    SELECT
      run,
      any_value(from_ns) AS from_ns,
      max(arrival_ns) AS until_ns,
      count(*) FILTER (arrival_ns >= from_ns) AS arrivals
    FROM requests
    JOIN _starts USING (run)
    GROUP BY run
  ),
  _edges AS (
    SELECT run, slice, from_ns + ((until_ns - from_ns) * slice // 20) AS t_ns
    FROM _arrivals
    CROSS JOIN range(0, 21) AS s (slice)
    WHERE until_ns > from_ns
  ),
  _areas AS (SELECT run, t_ns, area FROM _area_until('_in_flight_spans', '_edges')),
  _means AS (
    SELECT
      run,
      slice,
      (area - lag(area) OVER w) / nullif(t_ns - lag(t_ns) OVER w, 0) AS mean
    FROM _edges
    JOIN _areas USING (run, t_ns)
    WINDOW w AS (PARTITION BY run ORDER BY slice)
  ),
  _trends AS (
    SELECT
      run,
      avg(mean) AS in_flight,
      20 * regr_slope(mean, slice) / nullif(avg(mean), 0) AS drift,
      (avg(mean) FILTER (slice > 10) - avg(mean) FILTER (slice <= 10))
        / nullif(
          sqrt((var_samp(mean) FILTER (slice > 10) + var_samp(mean) FILTER (slice <= 10)) / 10), 0
        ) AS halves
    FROM _means
    WHERE mean IS NOT NULL
    GROUP BY run
  ),
  _judged AS (
    SELECT
      *,
      CASE
        WHEN drift IS NULL THEN 'the run ends before its ramp does'
        WHEN arrivals < 20 THEN 'too few arrivals (n=' || arrivals || ')'
        WHEN abs(drift) > 0.1 THEN 'the number in flight has a trend'
        WHEN abs(halves) > 2.1 THEN 'the halves of the window differ'
      END AS why
    FROM _arrivals
    LEFT JOIN _trends USING (run)
  )
SELECT
  run,
  from_ns,
  until_ns,
  arrivals,
  in_flight,
  drift,
  halves,
  why IS NULL AS steady,
  why
FROM _judged;
