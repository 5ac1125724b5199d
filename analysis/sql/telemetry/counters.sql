-- module: telemetry.counters
-- requires: prelude.schema
--
-- What the counters and histograms of servers did between their first and last sample of a run. A
-- replay takes these before it sends and after the last reply, so they bracket the run; whatever else
-- the server did meanwhile is in them as well. A capture has no such edges.

-- Steps of counters from sample to sample. One that runs backwards began anew at 0.
CREATE VIEW _counter_steps AS
SELECT
  run,
  source,
  name,
  labels,
  ts_ns,
  value,
  CASE WHEN value < before THEN value ELSE value - before END AS step
FROM (
  SELECT *, lag(value) OVER (PARTITION BY run, source, name, labels ORDER BY ts_ns) AS before
  FROM telemetry
  WHERE
    regexp_matches(name, '_(total|sum|count|bucket|joules|mj)$')
    OR name = 'DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION'
);

-- Every counter of the tape's telemetry, and each part of a histogram.
-- col run VARCHAR: label of the tape
-- col source VARCHAR: URL, device or process that was sampled
-- col name VARCHAR: name as the source gives it
-- col labels VARCHAR: JSON object of labels
-- col samples BIGINT: how often it was read
-- col from_ns BIGINT (ns): first reading, since the tape's epoch
-- col until_ns BIGINT (ns): last reading
-- col increase DOUBLE: what it grew by between them; NULL for a single reading
-- col increase_per_s DOUBLE (1/s): the same for each second
CREATE VIEW counters AS
SELECT
  run,
  source,
  name,
  labels,
  count(*) AS samples,
  min(ts_ns) AS from_ns,
  max(ts_ns) AS until_ns,
  sum(step) AS increase,
  sum(step) * 1e9 / nullif(max(ts_ns) - min(ts_ns), 0) AS increase_per_s
FROM _counter_steps
GROUP BY run, source, name, labels;

-- Histograms: how many values were observed between the first and the last sample, and their sum.
-- col run VARCHAR: label of the tape
-- col source VARCHAR: URL that was sampled
-- col name VARCHAR: name of the histogram, without _sum and _count
-- col labels VARCHAR: JSON object of labels
-- col observations DOUBLE: values observed
-- col total DOUBLE: their sum, in the unit that the name says
-- col mean DOUBLE: their mean
CREATE VIEW counters_histograms AS
SELECT
  sums.run,
  sums.source,
  regexp_replace(sums.name, '_sum$', '') AS name,
  sums.labels,
  counts.increase AS observations,
  sums.increase AS total,
  sums.increase / nullif(counts.increase, 0) AS mean
FROM counters AS sums
JOIN counters AS counts
  ON
    sums.run = counts.run
    AND sums.source = counts.source
    AND sums.labels = counts.labels
    AND counts.name = regexp_replace(sums.name, '_sum$', '_count')
WHERE sums.name LIKE '%\_sum' ESCAPE '\';
