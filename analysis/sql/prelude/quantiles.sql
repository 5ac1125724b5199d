-- module: prelude.quantiles
-- requires:
--
-- Exact quantiles, of raw values or of counts. The p-quantile is the smallest value that at least
-- p of the weight does not exceed: always a value that was seen, never interpolated.
-- Nothing here estimates: quantiles of events come from counts by value, which spill and add up.

-- Whether a percentile may be shown: at least one sample must lie beyond its rank, or it is only
-- the maximum under another name. p90 needs 10 samples, p99 100, p99.9 1,000.
-- arg n BIGINT: samples
-- arg p DOUBLE: the percentile, 0 to 1
CREATE MACRO enough_samples(n, p) AS n > ceil(p * n);

-- Quantiles of counts: columns key, value, weight (the total weight at this value) and n (samples
-- there); a value may occur more than once.
CREATE MACRO _quantiles_of_counts(tbl) AS TABLE
WITH
  _by_value AS (
    SELECT key, value, sum(weight)::DOUBLE AS weight, sum(n)::BIGINT AS n
    FROM query_table(tbl)
    WHERE value IS NOT NULL AND weight > 0
    GROUP BY ALL
  ),
  _totals AS (
    SELECT
      key,
      sum(n)::BIGINT AS n,
      sum(weight) AS weight,
      sum(value * weight) / sum(weight) AS mean,
      min(value)::DOUBLE AS minimum,
      max(value)::DOUBLE AS maximum
    FROM _by_value
    GROUP BY ALL
  ),
  _cumulative AS (
    SELECT key, value, sum(weight) OVER (PARTITION BY key ORDER BY value) AS below
    FROM _by_value
  )
SELECT
  _totals.key,
  any_value(_totals.n) AS n,
  any_value(_totals.weight) AS weight,
  any_value(_totals.mean) AS mean,
  any_value(_totals.minimum) AS minimum,
  min(value) FILTER (below >= 0.5 * _totals.weight)::DOUBLE AS p50,
  min(value) FILTER (below >= 0.9 * _totals.weight)::DOUBLE AS p90,
  min(value) FILTER (below >= 0.99 * _totals.weight)::DOUBLE AS p99,
  min(value) FILTER (below >= 0.999 * _totals.weight)::DOUBLE AS p999,
  any_value(_totals.maximum) AS maximum
FROM _totals
JOIN _cumulative ON _cumulative.key IS NOT DISTINCT FROM _totals.key
GROUP BY ALL;

-- Quantiles of equally weighted rows, columns key and value: one sort in memory, so for requests,
-- never for events.
CREATE MACRO _quantiles_of_equals(tbl) AS TABLE
SELECT
  key,
  n,
  n::DOUBLE AS weight,
  mean,
  minimum,
  ranked[1]::DOUBLE AS p50,
  ranked[2]::DOUBLE AS p90,
  ranked[3]::DOUBLE AS p99,
  ranked[4]::DOUBLE AS p999,
  maximum
FROM (
  SELECT
    key,
    count(value) AS n,
    avg(value)::DOUBLE AS mean,
    min(value)::DOUBLE AS minimum,
    quantile_disc(value, [0.5, 0.9, 0.99, 0.999]) AS ranked,
    max(value)::DOUBLE AS maximum
  FROM query_table(tbl)
  WHERE value IS NOT NULL
  GROUP BY ALL
);

-- Exact weighted quantiles of any view, table or CTE, by key. Percentiles are given whatever n is:
-- ask enough_samples before you show one.
-- Example: WITH s AS (SELECT model AS key, gap_us AS value, weight FROM gaps) FROM quantiles('s')
-- arg tbl TABLE: name of what has the columns key, value and weight, one row per sample
-- col key ANY: as it went in
-- col n BIGINT: samples
-- col weight DOUBLE: total weight
-- col mean DOUBLE: weighted mean
-- col minimum DOUBLE: smallest value
-- col p50 DOUBLE: median
-- col p90 DOUBLE: 0.9 quantile
-- col p99 DOUBLE: 0.99 quantile
-- col p999 DOUBLE: 0.999 quantile
-- col maximum DOUBLE: largest value
CREATE MACRO quantiles(tbl) AS TABLE
WITH _counts AS (
  SELECT key, value, sum(weight) AS weight, count(*) AS n
  FROM query_table(tbl)
  GROUP BY ALL
)
SELECT * FROM _quantiles_of_counts('_counts');

-- Median gap of a list of offsets, a value that was seen; within its row, so no state grows.
CREATE MACRO _median_gap_us(off_us) AS
list_aggregate(
  list_transform(off_us[2:], lambda after_us, i: after_us::BIGINT - off_us[i]::BIGINT),
  'quantile_disc',
  0.5
);
