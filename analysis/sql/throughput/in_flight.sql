-- module: throughput.in_flight
-- requires: prelude.schema, intervals.overlap, throughput.rates
--
-- Concurrency over time: requests that were sent and have not ended, whatever their outcome.
-- One without an end (the capture ended first) stays in flight until the run's last instant.

-- metric: in_flight
-- Title: requests in flight
-- Formula: requests with send_ns <= t < end_ns, over the time from the first send to the last end
-- Unit: requests
-- Weight: time
-- View: in_flight.level
-- Undefined when: nothing was sent (an import)
-- Differs from: peers print the concurrency that they were asked for; AIPerf's effective
--   concurrency is the same curve over successful requests

-- Time in flight of each request.
CREATE VIEW _in_flight_spans AS
SELECT
  run,
  send_ns AS from_ns,
  coalesce(end_ns, max(coalesce(end_ns, last_content_ns, send_ns)) OVER (PARTITION BY run)) AS until_ns,
  weight
FROM requests
WHERE send_ns IS NOT NULL;

-- Steps of the number of requests in flight.
-- col run VARCHAR: label of the tape
-- col from_ns BIGINT (ns): when the level began, since the tape's epoch
-- col until_ns BIGINT (ns): when it ended
-- col level DOUBLE: requests in flight
CREATE VIEW in_flight AS
SELECT * FROM overlap('_in_flight_spans');

-- Quantiles over time of the number of requests in flight.
-- col run VARCHAR: label of the tape
-- col n BIGINT: steps of the level
-- col duration_ns DOUBLE (ns): from the first send to the last end
-- col mean DOUBLE: mean over time
-- col minimum DOUBLE: fewest
-- col p50 DOUBLE: not exceeded half of the time
-- col p90 DOUBLE: not exceeded 90 % of the time
-- col p99 DOUBLE: not exceeded 99 % of the time
-- col p999 DOUBLE: not exceeded 99.9 % of the time
-- col maximum DOUBLE: most
CREATE VIEW in_flight_quantiles AS
SELECT * FROM overlap_quantiles('_in_flight_spans');

-- Mean number of requests in flight in each slice, exact: the time that each was in flight inside
-- the slice / length of the slice.
-- arg slice_ns BIGINT (ns): length of a slice
-- col run VARCHAR: label of the tape
-- col from_ns BIGINT (ns): start of the slice, since the tape's epoch
-- col mean DOUBLE (requests): mean over the slice
CREATE MACRO in_flight_over_time(slice_ns) AS TABLE
WITH
  _edges AS (
    SELECT run, from_ns AS t_ns FROM _slices(slice_ns)
    UNION
    SELECT run, from_ns + slice_ns FROM _slices(slice_ns)
  ),
  _areas AS (SELECT * FROM _area_until('_in_flight_spans', '_edges'))
SELECT
  _slices.run,
  from_ns,
  (later.area - earlier.area) / slice_ns AS mean
FROM _slices(slice_ns) AS _slices
JOIN _areas AS earlier ON earlier.run = _slices.run AND earlier.t_ns = from_ns
JOIN _areas AS later ON later.run = _slices.run AND later.t_ns = from_ns + slice_ns;
