-- module: throughput.in_flight
-- requires: prelude.schema, intervals.overlap
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
