-- module: latency.ttft
-- requires: prelude.schema
--
-- Time to the first token. From send is what the server did; from arrival is what the user felt,
-- with everything that happened before the request left (a proxy, a late sender, a new connection).

-- metric: ttft
-- Title: TTFT from send
-- Formula: first_content_ns - sent_ns, which is send_end_ns, or send_ns where early_reply is set
-- Unit: ns
-- Weight: request
-- View: ttft.ttft_ns
-- Undefined when: the reply was not streamed, or no event came
-- Differs from: vLLM bench (completions: an event with empty text counts; the first use includes
--   connecting); SGLang and genai-bench (include connecting); inference-perf (answer text only, waits
--   of retries included, None when there is one event); GuideLLM (starts when the head is written);
--   vLLM Prometheus (from its own arrival_time, so no network); OTel client (to the first chunk, also
--   one without content); AIPerf and abench agree, but start before the request is written

-- metric: ttft_arrival
-- Title: TTFT from arrival
-- Formula: first_content_ns - arrival_ns
-- Unit: ns
-- Weight: request
-- View: ttft.ttft_arrival_ns
-- Undefined when: the reply was not streamed, or no event came
-- Differs from: peers, which have no such number: a sender that is late hides its lateness

-- metric: ttfa
-- Title: TTFA from send
-- Formula: first_answer_ns - sent_ns, which is send_end_ns, or send_ns where early_reply is set
-- Unit: ns
-- Weight: request
-- View: ttft.ttfa_ns
-- Undefined when: the reply was not streamed, or held reasoning only
-- Differs from: AIPerf calls it time to first output token; others have one number for both, or
--   (inference-perf) count answer text only and call that TTFT

-- metric: ttfa_arrival
-- Title: TTFA from arrival
-- Formula: first_answer_ns - arrival_ns
-- Unit: ns
-- Weight: request
-- View: ttft.ttfa_arrival_ns
-- Undefined when: the reply was not streamed, or held reasoning only
-- Differs from: peers, which have no such number

-- Time to the first token (any class) and to the first answer token (text or tool arguments) of
-- each request, whatever its outcome.
-- col run VARCHAR: label of the tape
-- col request_id UUID: the request
-- col arrival_ns BIGINT (ns): when it was offered
-- col outcome VARCHAR: how it ended
-- col ttft_ns BIGINT (ns): first event after the last request byte was sent
-- col ttft_arrival_ns BIGINT (ns): first event after the request was offered
-- col ttfa_ns BIGINT (ns): first answer event after the last request byte was sent
-- col ttfa_arrival_ns BIGINT (ns): first answer event after the request was offered
-- col weight DOUBLE: requests that the row stands for
CREATE VIEW ttft AS
SELECT
  run,
  request_id,
  arrival_ns,
  outcome,
  first_content_ns - sent_ns AS ttft_ns,
  first_content_ns - arrival_ns AS ttft_arrival_ns,
  first_answer_ns - sent_ns AS ttfa_ns,
  first_answer_ns - arrival_ns AS ttfa_arrival_ns,
  weight
FROM requests;

-- Samples of the metrics above: requests that ended well.
CREATE VIEW _ttft_samples AS
SELECT
  run,
  arrival_ns,
  unnest(['ttft', 'ttft_arrival', 'ttfa', 'ttfa_arrival']) AS metric,
  unnest([ttft_ns, ttft_arrival_ns, ttfa_ns, ttfa_arrival_ns])::DOUBLE AS value,
  weight
FROM ttft
WHERE outcome = 'ok';
