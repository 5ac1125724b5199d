-- module: latency.e2e
-- requires: prelude.schema
--
-- How long a whole reply took.

-- metric: e2e
-- Title: E2E from send
-- Formula: end_ns - sent_ns, which is send_end_ns, or send_ns where early_reply is set
-- Unit: ns
-- Weight: request
-- View: e2e.e2e_ns
-- Undefined when: the request was never sent, or has no end (an import)
-- Differs from: AIPerf and vLLM bench (to the last event with content: our e2e_content); GuideLLM
--   (agrees on the end, starts at the header); genai-bench (to the end of its loop)

-- metric: e2e_content
-- Title: E2E to last content
-- Formula: last_content_ns - sent_ns, which is send_end_ns, or send_ns where early_reply is set
-- Unit: ns
-- Weight: request
-- View: e2e.e2e_content_ns
-- Undefined when: the reply was not streamed, or no event came
-- Differs from: AIPerf and vLLM bench, which agree on the end and start before the write

-- metric: e2e_arrival
-- Title: E2E from arrival
-- Formula: end_ns - arrival_ns
-- Unit: ns
-- Weight: request
-- View: e2e.e2e_arrival_ns
-- Undefined when: the request has no end (an import)
-- Differs from: peers, which start at the send and so hide a late sender

-- Duration of each request, whatever its outcome.
-- col run VARCHAR: label of the tape
-- col request_id UUID: the request
-- col arrival_ns BIGINT (ns): when it was offered
-- col outcome VARCHAR: how it ended
-- col e2e_ns BIGINT (ns): end of the reply after the last request byte was sent
-- col e2e_content_ns BIGINT (ns): last event after the last request byte was sent
-- col e2e_arrival_ns BIGINT (ns): end of the reply after the request was offered
-- col weight DOUBLE: requests that the row stands for
CREATE VIEW e2e AS
SELECT
  run,
  request_id,
  arrival_ns,
  outcome,
  end_ns - sent_ns AS e2e_ns,
  last_content_ns - sent_ns AS e2e_content_ns,
  end_ns - arrival_ns AS e2e_arrival_ns,
  weight
FROM requests;

-- Samples of the metrics above: requests that ended well.
CREATE VIEW _e2e_samples AS
SELECT
  run,
  arrival_ns,
  unnest(['e2e', 'e2e_content', 'e2e_arrival']) AS metric,
  unnest([e2e_ns, e2e_content_ns, e2e_arrival_ns])::DOUBLE AS value,
  weight
FROM e2e
WHERE outcome = 'ok';
