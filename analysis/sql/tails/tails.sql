-- module: tails.tails
-- requires: prelude.schema, prelude.units, prelude.quantiles, intervals.overlap, latency.ttft, latency.tpot,
--   latency.e2e, quality.schedule, throughput.in_flight
--
-- Where the tail of a latency comes from: the slowest requests, grouped by what they share, against how
-- common that is among all requests. A lift is a place to look, not a proof: requests that are near in
-- time share many things.

-- Values of the metrics that have one per request; the slowest choice for TPOT; requests that ended well.
CREATE VIEW _tail_values AS
SELECT
  run,
  request_id,
  unnest([
    'ttft', 'ttft_arrival', 'ttfa', 'ttfa_arrival', 'tpot', 'e2e', 'e2e_content', 'e2e_arrival', 'send_lag'
  ]) AS metric,
  unnest([
    ttft_ns::DOUBLE, ttft_arrival_ns, ttfa_ns, ttfa_arrival_ns, tpot_ns, e2e_ns, e2e_content_ns,
    e2e_arrival_ns, send_lag_ns
  ]) AS value_ns
FROM ttft
JOIN e2e USING (run, request_id)
LEFT JOIN (SELECT run, request_id, send_lag_ns FROM schedule) USING (run, request_id)
LEFT JOIN (
  SELECT run, request_id, max(tpot_ns) AS tpot_ns
  FROM tpot
  GROUP BY run, request_id
) USING (run, request_id)
WHERE ttft.outcome = 'ok';

-- Time of each request between its send and its first token.
CREATE VIEW _first_token_waits AS
SELECT run, send_ns AS from_ns, first_content_ns AS until_ns, weight
FROM requests
WHERE first_content_ns > send_ns;

-- Every request that has a metric, whether it is in the tail, and what it may share with others there.
-- Example: FROM tails_of('ttft', 0.99) WHERE tail ORDER BY value_ns DESC LIMIT 10
-- arg of_metric VARCHAR: ttft, ttft_arrival, ttfa, ttfa_arrival, tpot, e2e, e2e_content, e2e_arrival, send_lag
-- arg level DOUBLE: the tail is what is above this quantile of its run, 0 to 1
-- col run VARCHAR: label of the tape
-- col request_id UUID: the request
-- col trace_id VARCHAR: W3C trace id, for the logs of those who asked
-- col response_id VARCHAR: id that the engine gave, for its log
-- col value_ns DOUBLE (ns): the metric
-- col threshold_ns DOUBLE (ns): the quantile
-- col tail BOOLEAN: above it
-- col weight DOUBLE: requests that the row stands for
-- col prompt VARCHAR: prompt tokens, up to a power of two
-- col output VARCHAR: output tokens, up to a power of two
-- col turn VARCHAR: first or later turn of its session
-- col minute VARCHAR: minute after the run's first arrival
-- col in_flight VARCHAR: requests in flight when it was sent, up to a power of two, itself included
-- col waiting VARCHAR: of these, those without a first token yet: prefills in its way
-- col cache VARCHAR: hit, miss, or unknown where the server does not say
-- col connection VARCHAR: new or reused connection to the server
-- col model VARCHAR: model
-- col server VARCHAR: replica that served it
-- col worker VARCHAR: our own process that carried it
-- col reads VARCHAR: late where our own process read it over a millisecond late, else in time
-- col client VARCHAR: slow where the client held up the stream, else in time
-- col tenant VARCHAR: tenant_digest
CREATE MACRO tails_of(of_metric, level) AS TABLE
WITH
  _values AS (
    SELECT run, request_id, value_ns
    FROM _tail_values
    WHERE metric = of_metric AND value_ns IS NOT NULL
  ),
  _weighed AS (
    SELECT run AS key, value_ns AS value, weight
    FROM _values
    JOIN requests USING (run, request_id)
  ),
  _below AS (
    SELECT
      key,
      value,
      sum(weight) OVER (PARTITION BY key ORDER BY value) AS below,
      sum(weight) OVER (PARTITION BY key) AS total
    FROM _weighed
  ),
  _thresholds AS (
    SELECT key AS run, min(value) FILTER (below >= level * total) AS threshold_ns
    FROM _below
    GROUP BY key
  ),
  _starts AS (SELECT run, min(arrival_ns) AS first_ns FROM requests GROUP BY run),
  _waits AS (SELECT * FROM overlap('_first_token_waits')),
  _rows AS (
    SELECT requests.*, value_ns, threshold_ns, first_ns
    FROM _values
    JOIN requests USING (run, request_id)
    JOIN _thresholds USING (run)
    JOIN _starts USING (run)
  )
SELECT
  _rows.run,
  request_id,
  trace_id,
  response_id,
  value_ns,
  threshold_ns,
  value_ns > threshold_ns AS tail,
  weight,
  coalesce(token_bucket(input_tokens)::VARCHAR, 'unknown') AS prompt,
  coalesce(token_bucket(output_tokens)::VARCHAR, 'unknown') AS output,
  CASE WHEN turn_index > 0 THEN 'later' WHEN turn_index = 0 THEN 'first' ELSE 'none' END AS turn,
  ((arrival_ns - first_ns) // 60000000000)::VARCHAR AS minute,
  coalesce(token_bucket(ceil(in_flight.level)::BIGINT)::VARCHAR, 'unknown') AS in_flight,
  CASE
    WHEN send_ns < _waits.until_ns THEN token_bucket(ceil(_waits.level)::BIGINT)::VARCHAR
    ELSE '0'
  END AS waiting,
  CASE WHEN cached_tokens > 0 THEN 'hit' WHEN cached_tokens = 0 THEN 'miss' ELSE 'unknown' END AS cache,
  CASE WHEN upstream_reused THEN 'reused' WHEN NOT upstream_reused THEN 'new' ELSE 'unknown' END
    AS connection,
  coalesce(model, 'unknown') AS model,
  coalesce(server_id, 'unknown') AS server,
  coalesce(worker, 'unknown') AS worker,
  CASE WHEN lag_max_us > 1000 THEN 'late' ELSE 'in time' END AS reads,
  CASE WHEN backpressure_ns > 1000000 THEN 'slow' ELSE 'in time' END AS client,
  coalesce(tenant_digest, 'unknown') AS tenant
FROM _rows
ASOF LEFT JOIN in_flight ON _rows.run = in_flight.run AND coalesce(send_ns, 0) >= in_flight.from_ns
ASOF LEFT JOIN _waits ON _rows.run = _waits.run AND coalesce(send_ns, 0) >= _waits.from_ns;

-- What the tail shares: each property and value with how often it is in the tail.
-- Example: FROM tails_groups('ttft', 0.99) WHERE evidence > 10.8 ORDER BY evidence DESC
-- arg of_metric VARCHAR: as in tails_of
-- arg level DOUBLE: as in tails_of
-- col run VARCHAR: label of the tape
-- col property VARCHAR: a column of tails_of
-- col value VARCHAR: its value
-- col requests BIGINT: requests that have it
-- col in_tail BIGINT: of these, in the tail
-- col share_of_tail DOUBLE: part of the tail that has it
-- col share_of_all DOUBLE: part of all requests that has it
-- col lift DOUBLE: how many times as common it is in the tail
-- col evidence DOUBLE: likelihood ratio against chance, G of the 2 x 2 table, negative where it is rarer
--   in the tail: over 10.8 is one in 1,000 by chance, if requests were independent
CREATE MACRO tails_groups(of_metric, level) AS TABLE
WITH
  _properties AS (
    SELECT run, tail, property, value
    FROM (
      UNPIVOT (FROM tails_of(of_metric, level))
      ON prompt, output, turn, minute, in_flight, waiting, cache, connection, model, server, worker, reads,
        client, tenant
      INTO NAME property VALUE value
    )
  ),
  _counts AS (
    SELECT
      run,
      property,
      value,
      count(*) AS requests,
      count(*) FILTER (tail) AS in_tail,
      sum(count(*)) OVER (PARTITION BY run, property)::DOUBLE AS n,
      sum(count(*) FILTER (tail)) OVER (PARTITION BY run, property)::DOUBLE AS n_tail
    FROM _properties
    GROUP BY run, property, value
  ),
  _cells AS (
    SELECT
      *,
      [in_tail, requests - in_tail, n_tail - in_tail, n - n_tail - requests + in_tail]::DOUBLE[] AS seen,
      [
        requests * n_tail / n, requests * (n - n_tail) / n,
        (n - requests) * n_tail / n, (n - requests) * (n - n_tail) / n
      ]::DOUBLE[] AS expected
    FROM _counts
  )
SELECT
  run,
  property,
  value,
  requests,
  in_tail,
  in_tail / nullif(n_tail, 0) AS share_of_tail,
  requests / n AS share_of_all,
  share_of_tail / share_of_all AS lift,
  2 * sign(in_tail - expected[1]) * list_sum(
    list_transform(
      [1, 2, 3, 4],
      lambda c: CASE WHEN seen[c] > 0 THEN seen[c] * ln(seen[c] / expected[c]) ELSE 0 END
    )
  ) AS evidence
FROM _cells;
