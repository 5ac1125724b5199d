-- module: intervals.overlap
-- requires: prelude.quantiles
--
-- How many intervals are open at each moment, and quantiles of that number weighted by time.
-- Intervals are half open: one that ends where another begins does not overlap it.

-- Steps of the number of open intervals. Instants that coincide are merged first, so a level that
-- lasts no time is not shown. Ends with the last interval; a run without intervals has no rows.
-- arg tbl TABLE: name of what has the columns run, from_ns, until_ns and weight
-- col run VARCHAR: label of the tape
-- col from_ns BIGINT (ns): when the level began
-- col until_ns BIGINT (ns): when it ended
-- col level DOUBLE: open intervals, each by its weight
CREATE MACRO overlap(tbl) AS TABLE
WITH
  _changes AS (
    SELECT run, from_ns AS t_ns, weight AS change
    FROM query_table(tbl)
    WHERE until_ns > from_ns
    UNION ALL
    SELECT run, until_ns, -weight
    FROM query_table(tbl)
    WHERE until_ns > from_ns
  ),
  _instants AS (
    SELECT run, t_ns, sum(change) AS change
    FROM _changes
    GROUP BY run, t_ns
  ),
  _levels AS (
    SELECT
      run,
      t_ns AS from_ns,
      lead(t_ns) OVER (PARTITION BY run ORDER BY t_ns) AS until_ns,
      sum(change) OVER (PARTITION BY run ORDER BY t_ns) AS level
    FROM _instants
  )
SELECT run, from_ns, until_ns, level
FROM _levels
WHERE until_ns IS NOT NULL;

-- Quantiles of the number of open intervals, each level weighted by how long it lasted.
-- arg tbl TABLE: name of what has the columns run, from_ns, until_ns and weight
-- col run VARCHAR: label of the tape
-- col n BIGINT: steps of the level
-- col duration_ns DOUBLE (ns): from the first start to the last end
-- col mean DOUBLE: mean level over time
-- col minimum DOUBLE: lowest level
-- col p50 DOUBLE: level not exceeded half of the time
-- col p90 DOUBLE: level not exceeded 90 % of the time
-- col p99 DOUBLE: level not exceeded 99 % of the time
-- col p999 DOUBLE: level not exceeded 99.9 % of the time
-- col maximum DOUBLE: highest level
CREATE MACRO overlap_quantiles(tbl) AS TABLE
WITH _time_at_level AS (
  SELECT run AS key, level AS value, (until_ns - from_ns)::DOUBLE AS weight, 1 AS n
  FROM overlap(tbl)
)
SELECT key AS run, n, weight AS duration_ns, mean, minimum, p50, p90, p99, p999, maximum
FROM _quantiles_of_counts('_time_at_level');

-- Request-nanoseconds that any of some intervals lasted before an instant: the integral of the level.
CREATE MACRO _area_until(tbl, instants) AS TABLE
WITH
  _steps AS (
    SELECT
      run,
      from_ns,
      until_ns,
      level,
      coalesce(
        sum(level * (until_ns - from_ns)) OVER (
          PARTITION BY run
          ORDER BY from_ns
          ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ),
        0
      ) AS before
    FROM overlap(tbl)
  )
SELECT
  asked.run,
  asked.t_ns,
  coalesce(before + level * (least(asked.t_ns, until_ns) - from_ns), 0)::DOUBLE AS area
FROM query_table(instants) AS asked
ASOF LEFT JOIN _steps ON asked.run = _steps.run AND asked.t_ns >= _steps.from_ns;
