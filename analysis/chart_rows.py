"""What the charts of a report show: every query of them, binned in SQL, and nothing else.

The number of rows depends on the number of slices and buckets, never on the size of a tape. Every
row has `run`; times are seconds after the run's first arrival, durations are milliseconds.
"""

from dataclasses import dataclass
from typing import Any

from tokentape.analysis.session import Session

Row = dict[str, Any]

SLICES = 72  # of the longest run
_BUCKETS = 30  # of a duration or a length, at most; never finer than a quarter of an octave
_LEAST_SLICE_NS = 1_000_000

# Each point is a value that was seen and the exact share of the weight that it is not below.
_CDF = """
WITH
  _counts AS (
    SELECT run, metric, value, sum(weight) AS weight
    FROM (
      SELECT run, metric, value, weight FROM _ttft_samples WHERE metric = 'ttft'
      UNION ALL
      SELECT run, metric, value, weight FROM _e2e_samples WHERE metric = 'e2e'
      UNION ALL
      SELECT run, metric, value, weight FROM _gap_counts WHERE metric = 'itl_user'
    )
    WHERE value IS NOT NULL
    GROUP BY ALL
  ),
  _below AS (
    SELECT
      run,
      metric,
      value,
      sum(weight) OVER (PARTITION BY run, metric ORDER BY value)
        / sum(weight) OVER (PARTITION BY run, metric) AS below
    FROM _counts
  )
SELECT run, metric, max(value) / 1e6 AS value_ms, max(below) AS below
FROM _below
WHERE value > 0
GROUP BY
  run,
  metric,
  CASE WHEN below <= 0.99 THEN floor(below * 100) ELSE 100 + floor((below - 0.99) * 5000) END
ORDER BY ALL
"""
_STARTS = "_starts AS (SELECT run, min(arrival_ns) AS first_ns FROM requests GROUP BY run)"
_REQUEST_VALUES = """
SELECT run, metric, arrival_ns AS at_ns, value / 1e6 AS value_ms, weight
FROM _ttft_samples
WHERE metric = 'ttft'
UNION ALL
SELECT run, metric, arrival_ns, value / 1e6, weight FROM _e2e_samples WHERE metric = 'e2e'
"""
# Gaps are counted by eighths of a slice first: what is joined and binned is small. An eighth across
# the edge of a slice counts where its middle is.
_GAP_VALUES = """
SELECT run, 'icl' AS metric, at_ns, log2_bucket_middle(bucket) / 1000 AS value_ms, weight
FROM (
  SELECT
    run,
    time_bucket_ns(t_ns, {slice_ns} // 8) + {slice_ns} // 16 AS at_ns,
    log2_bucket(gap_us) AS bucket,
    sum(weight) AS weight
  FROM gaps
  WHERE outcome = 'ok' AND gap_us > 0
  GROUP BY ALL
)
"""
_HEAT = """
WITH
  {starts},
  _values AS MATERIALIZED (FROM ({values}) WHERE value_ms > 0),
  _steps AS (
    SELECT
      run,
      metric,
      log2(min(value_ms)) AS lowest,
      greatest((log2(max(value_ms)) - lowest) / {buckets}, 0.25) AS step
    FROM _values
    GROUP BY run, metric
  )
SELECT
  run,
  metric,
  (at_ns - first_ns) // {slice_ns} * {slice_ns} / 1e9 AS from_s,
  pow(2, lowest + step * floor((log2(value_ms) - lowest) / step)) AS from_ms,
  from_ms * pow(2, any_value(step)) AS until_ms,
  sum(weight) AS n
FROM _values
JOIN _steps USING (run, metric)
JOIN _starts USING (run)
GROUP BY run, metric, from_s, from_ms
ORDER BY ALL
"""
_BY_SLICE = """
WITH {starts}
SELECT
  run,
  metric,
  (at_ns - first_ns) // {slice_ns} * {slice_ns} / 1e9 AS from_s,
  count(*) AS n,
  quantile_disc(value_ms, 0.5) AS p50_ms,
  max(value_ms) AS max_ms
FROM ({values})
JOIN _starts USING (run)
WHERE value_ms IS NOT NULL
GROUP BY run, metric, from_s
ORDER BY ALL
"""
# Where a server never says what its cache held, all prompt tokens stand for the uncached ones.
_PROMPTS = """
WITH
  _told AS (SELECT run, count(cached_tokens) > 0 AS told FROM requests GROUP BY run),
  _points AS (
    SELECT
      run,
      told,
      input_tokens - CASE WHEN told THEN cached_tokens ELSE 0 END AS tokens,
      log2(greatest(tokens, 1)) AS x,
      log2((first_content_ns - sent_ns) / 1e6) AS y,
      weight
    FROM requests
    JOIN _told USING (run)
    WHERE outcome = 'ok' AND first_content_ns > sent_ns
  ),
  _steps AS (
    SELECT
      run,
      min(x) AS x0,
      greatest((max(x) - x0) / {buckets}, 0.25) AS dx,
      min(y) AS y0,
      greatest((max(y) - y0) / {buckets}, 0.25) AS dy
    FROM _points
    WHERE tokens IS NOT NULL
    GROUP BY run
  )
SELECT
  run,
  told,
  pow(2, x0 + dx * floor((x - x0) / dx)) AS from_tokens,
  from_tokens * pow(2, any_value(dx)) AS until_tokens,
  pow(2, y0 + dy * floor((y - y0) / dy)) AS from_ms,
  from_ms * pow(2, any_value(dy)) AS until_ms,
  sum(weight) AS n
FROM _points
JOIN _steps USING (run)
WHERE tokens IS NOT NULL
GROUP BY run, told, from_tokens, from_ms
ORDER BY ALL
"""
_PHASES = """
WITH {starts}
SELECT
  run,
  (arrival_ns - first_ns) // {slice_ns} * {slice_ns} / 1e9 AS from_s,
  count(*) AS n,
  avg(queue_ns) / 1e6 AS queue_ms,
  avg(prefill_ns) / 1e6 AS prefill_ms,
  avg(decode_ns) / 1e6 AS decode_ms,
  avg(outside_ns) / 1e6 AS outside_ms
FROM phases
JOIN _starts USING (run)
GROUP BY run, from_s
ORDER BY ALL
"""
_RATES = """
WITH {starts}
SELECT
  run,
  (from_ns - first_ns) / 1e9 AS from_s,
  mean AS in_flight,
  offered * 1e9 / {slice_ns} AS offered_per_s,
  (ended - failed) * 1e9 / {slice_ns} AS completed_per_s,
  failed * 1e9 / {slice_ns} AS failed_per_s,
  output_tokens * 1e9 / {slice_ns} AS output_tokens_per_s
FROM rates_over_time({slice_ns})
LEFT JOIN in_flight_over_time({slice_ns}) USING (run, from_ns)
JOIN _starts USING (run)
ORDER BY ALL
"""
_SERVERS = """
WITH {starts}
SELECT
  run,
  (ts_ns - first_ns) // {slice_ns} * {slice_ns} / 1e9 AS from_s,
  avg(running) * count(DISTINCT source) AS running,
  avg(waiting) * count(DISTINCT source) AS waiting,
  avg(kv_used) AS kv_used
FROM servers_load
JOIN _starts USING (run)
GROUP BY run, from_s
ORDER BY ALL
"""
_SAMPLES = """
SELECT run, metric, arrival_ns, value, weight FROM _ttft_samples WHERE metric = 'ttft'
UNION ALL
SELECT run, metric, arrival_ns, value, weight FROM _e2e_samples WHERE metric = 'e2e'
UNION ALL
SELECT run, metric, arrival_ns, value, weight FROM _tpot_samples WHERE metric = 'tpot'
"""


@dataclass(frozen=True)
class ChartRows:
    """Rows of each chart, in the order in which they are drawn. `slice_s` is the width of a slice.

    samples: run, metric, arrival_ns, value and weight of requests, for intervals; Arrow, not drawn.
    """

    slice_s: float
    cdf: list[Row]
    heat: list[Row]
    by_slice: list[Row]
    prompts: list[Row]
    phases: list[Row]
    rates: list[Row]
    servers: list[Row]
    samples: Any


def ask(session: Session, span_ns: int, *, phases: bool) -> ChartRows:
    """Ask all that the charts show. `span_ns` is the longest run; phases as in the report."""
    slice_ns = max(-(-span_ns // SLICES), _LEAST_SLICE_NS)
    told = {"starts": _STARTS, "slice_ns": slice_ns, "buckets": _BUCKETS}
    gaps = _GAP_VALUES.format(**told)
    return ChartRows(
        slice_s=slice_ns / 1e9,
        cdf=session.rows(_CDF),
        heat=session.rows(_HEAT.format(**told, values=f"{_REQUEST_VALUES} UNION ALL {gaps}")),
        by_slice=session.rows(_BY_SLICE.format(**told, values=_REQUEST_VALUES)),
        prompts=session.rows(_PROMPTS.format(**told)),
        phases=session.rows(_PHASES.format(**told)) if phases else [],
        rates=session.rows(_RATES.format(**told)),
        servers=session.rows(_SERVERS.format(**told)),
        samples=session.table(_SAMPLES),
    )
