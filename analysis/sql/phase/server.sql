-- module: phase.server
-- requires: prelude.schema
--
-- Queue, prefill and decode as servers report them with each reply, where they do. Estimates for the others
-- are in phase.phases.

-- metric: queue
-- Title: queue
-- Formula: as the server reported it; `phases` has an estimate where it did not
-- Unit: ns
-- Weight: request
-- View: requests.server_queue_ns
-- Undefined when: the server did not report it
-- Differs from: vLLM's request_queue_time_seconds, SGLang's queue_time and TGI's x-queue-time are what is
--   reported; peers have no such number

-- metric: prefill
-- Title: prefill
-- Formula: as the server reported it; `phases` has an estimate where it did not
-- Unit: ns
-- Weight: request
-- View: requests.server_prefill_ns
-- Undefined when: the server did not report it
-- Differs from: vLLM's request_prefill_time_seconds agrees; a prefill that others' prefills share steps
--   with takes their time too

-- metric: decode
-- Title: decode
-- Formula: as the server reported it; `phases` has first to last token where it did not
-- Unit: ns
-- Weight: request
-- View: requests.server_decode_ns
-- Undefined when: the server did not report it
-- Differs from: vLLM's request_decode_time_seconds agrees

-- Samples of the metrics above: requests that ended well.
CREATE VIEW _server_samples AS
SELECT
  run,
  arrival_ns,
  unnest(['queue', 'prefill', 'decode']) AS metric,
  unnest([server_queue_ns, server_prefill_ns, server_decode_ns])::DOUBLE AS value,
  weight
FROM requests
WHERE outcome = 'ok';
