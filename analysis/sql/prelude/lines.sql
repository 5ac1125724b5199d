-- module: prelude.lines
-- requires: prelude.quantiles
--
-- Straight lines through points, for models that are fitted to a tape. A fit is trimmed: least squares,
-- then without the points that lie beyond 2.5 standard deviations (by the median deviation), thrice,
-- so that a few requests that met something else do not bend it.

-- Least squares of y on x by key.
CREATE MACRO _line(tbl) AS TABLE
SELECT key, regr_slope(y, x) AS slope, regr_intercept(y, x) AS intercept, count(*) AS n
FROM query_table(tbl)
GROUP BY key;

-- The points that lie near the line of their key.
CREATE MACRO _near_line(tbl) AS TABLE
WITH
  _misses AS (
    SELECT points.key, x, y, abs(y - intercept - slope * x) AS value
    FROM query_table(tbl) AS points
    JOIN _line(tbl) AS fit ON fit.key = points.key
  ),
  _spread AS (SELECT key, p50 FROM _quantiles_of_equals('_misses'))
SELECT _misses.key, x, y
FROM _misses
JOIN _spread ON _spread.key = _misses.key
WHERE value <= 2.5 * 1.4826 * p50 + 1000;

-- Trimmed least squares of y on x; a key with fewer than 8 points has no row.
CREATE MACRO _trimmed_line(tbl) AS TABLE
WITH
  _first AS MATERIALIZED (
    SELECT key, x, y FROM query_table(tbl) QUALIFY count(*) OVER (PARTITION BY key) >= 8
  ),
  _second AS MATERIALIZED (SELECT * FROM _near_line('_first')),
  _third AS MATERIALIZED (SELECT * FROM _near_line('_second')),
  _fourth AS MATERIALIZED (SELECT * FROM _near_line('_third'))
SELECT * FROM _line('_fourth');
