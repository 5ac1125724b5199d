-- module: quality.schedule
-- requires: prelude.schema
--
-- How late requests were sent: against when they were offered (due, in a replay), and against the
-- plan. The difference of the two is the backlog of sessions that waited for slow turns. All
-- requests that were sent count, whatever their outcome.

-- metric: send_lag
-- Title: send after arrival
-- Formula: send_ns - arrival_ns
-- Unit: ns
-- Weight: request
-- View: schedule.send_lag_ns
-- Undefined when: the request was never sent
-- Differs from: AIPerf, whose lag is relative to its least late request, so that a constant delay
--   shows as 0; ours is absolute, on one clock. In a capture it is the time in the proxy, with the
--   rest of the client's upload

-- metric: schedule_lag
-- Title: send after plan
-- Formula: send_ns - scheduled_ns
-- Unit: ns
-- Weight: request
-- View: schedule.schedule_lag_ns
-- Undefined when: there is no plan (a capture), or the request was never sent
-- Differs from: as send_lag; backlog of sessions is inside

-- Lateness of each request that was sent.
-- col run VARCHAR: label of the tape
-- col request_id UUID: the request
-- col arrival_ns BIGINT (ns): when it was offered
-- col outcome VARCHAR: how it ended
-- col send_lag_ns BIGINT (ns): first byte sent after it was offered
-- col schedule_lag_ns BIGINT (ns): first byte sent after the plan wanted it
-- col late_cause VARCHAR: what made it late, as the replay named it
-- col weight DOUBLE: requests that the row stands for
CREATE VIEW schedule AS
SELECT
  run,
  request_id,
  arrival_ns,
  outcome,
  send_ns - arrival_ns AS send_lag_ns,
  send_ns - scheduled_ns AS schedule_lag_ns,
  late_cause,
  weight
FROM requests
WHERE send_ns IS NOT NULL;

-- Requests by the cause of their lateness.
-- col run VARCHAR: label of the tape
-- col late_cause VARCHAR: cause; NULL: none named
-- col requests BIGINT: rows
-- col max_send_lag_ns BIGINT (ns): latest after it was offered
-- col max_schedule_lag_ns BIGINT (ns): latest after the plan
CREATE VIEW schedule_causes AS
SELECT
  run,
  late_cause,
  count(*) AS requests,
  max(send_lag_ns) AS max_send_lag_ns,
  max(schedule_lag_ns) AS max_schedule_lag_ns
FROM schedule
GROUP BY ALL;

-- Samples of the metrics above.
CREATE VIEW _schedule_samples AS
SELECT
  run,
  arrival_ns,
  unnest(['send_lag', 'schedule_lag']) AS metric,
  unnest([send_lag_ns, schedule_lag_ns])::DOUBLE AS value,
  weight
FROM schedule;
