-- module: telemetry.calibration
-- requires: phase.phases, telemetry.counters
--
-- The phases of a run beside the sums of the server's own histograms, where its telemetry holds them. Both
-- count what ended between the first and the last sample; other clients' requests are only in the server's.

-- One row for each run, phase and way of telling, where the server has a histogram of that phase.
-- col run VARCHAR: label of the tape
-- col phase VARCHAR: queue, prefill, decode
-- col method VARCHAR: server or stream, as in phases; NULL where the tape has no phases
-- col requests BIGINT: requests of the tape that have phases this way
-- col tape_s DOUBLE (s): sum over them
-- col tape_lo_s DOUBLE (s): the least that the estimate leaves open; only the queue has one
-- col tape_hi_s DOUBLE (s): the most
-- col server_requests DOUBLE: observations of the server's histograms, all pages together
-- col server_s DOUBLE (s): their sum
-- col tape_over_server DOUBLE: tape_s / server_s
CREATE VIEW calibration_phases AS
WITH
  _server AS (
    SELECT
      run,
      CASE
        WHEN contains(name, 'queue') THEN 'queue'
        WHEN contains(name, 'prefill') THEN 'prefill'
        ELSE 'decode'
      END AS phase,
      sum(observations) AS server_requests,
      sum(total) AS server_s
    FROM counters_histograms
    WHERE
      name IN (
        'vllm:request_queue_time_seconds',
        'vllm:request_prefill_time_seconds',
        'vllm:request_decode_time_seconds',
        'sglang:queue_time_seconds',
        'tgi_request_queue_duration'
      )
    GROUP BY ALL
  ),
  _tape AS (
    SELECT
      run,
      method,
      requests,
      unnest(['queue', 'prefill', 'decode']) AS phase,
      unnest([queue_s, prefill_s, decode_s]) AS tape_s,
      unnest([queue_lo_s, NULL, NULL]) AS tape_lo_s,
      unnest([queue_hi_s, NULL, NULL]) AS tape_hi_s
    FROM phases_totals
  )
SELECT
  run,
  phase,
  method,
  requests,
  tape_s,
  tape_lo_s,
  tape_hi_s,
  server_requests,
  server_s,
  tape_s / nullif(server_s, 0) AS tape_over_server
FROM _server
LEFT JOIN _tape USING (run, phase);
