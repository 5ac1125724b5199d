-- module: telemetry.servers
-- requires: prelude.schema
--
-- How busy servers said they were, over time: vLLM, SGLang and TGI by the names that they use. Engines
-- behind one page are added up.

-- Requests in the batch, requests that wait, and use of the KV cache, at each sample of each page.
-- col run VARCHAR: label of the tape
-- col source VARCHAR: URL that was sampled
-- col ts_ns BIGINT (ns): when the sample began, since the tape's epoch
-- col running DOUBLE: requests in the batch
-- col waiting DOUBLE: requests that wait for a place in it: the queue's depth
-- col kv_used DOUBLE: share of the KV cache in use, 0 to 1, mean of the engines
CREATE VIEW servers_load AS
SELECT
  run,
  source,
  ts_ns,
  sum(value) FILTER (
    WHERE name IN ('vllm:num_requests_running', 'sglang:num_running_reqs', 'tgi_batch_current_size')
  ) AS running,
  sum(value) FILTER (
    WHERE name IN ('vllm:num_requests_waiting', 'sglang:num_queue_reqs', 'tgi_queue_size')
  ) AS waiting,
  avg(value) FILTER (
    WHERE name IN ('vllm:kv_cache_usage_perc', 'vllm:gpu_cache_usage_perc', 'sglang:token_usage')
  ) AS kv_used
FROM telemetry
WHERE
  name IN (
    'vllm:num_requests_running',
    'vllm:num_requests_waiting',
    'vllm:kv_cache_usage_perc',
    'vllm:gpu_cache_usage_perc',
    'sglang:num_running_reqs',
    'sglang:num_queue_reqs',
    'sglang:token_usage',
    'tgi_batch_current_size',
    'tgi_queue_size'
  )
GROUP BY run, source, ts_ns;
