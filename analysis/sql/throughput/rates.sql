-- module: throughput.rates
-- requires: prelude.schema, prelude.units
--
-- Requests and tokens per second of wall time over a stated window. The default window is the whole
-- run: first arrival to last end. Nothing is trimmed: ramp and drain are inside.
-- A request counts, with all its tokens, in the window that holds its end; one without an end (an
-- import) in the window that holds its arrival. Tokens count whatever the outcome: the server
-- worked for them.

-- metric: offered_per_s
-- Title: requests offered
-- Formula: requests with arrival_ns in the window / length of the window
-- Unit: requests/s
-- Weight: none
-- View: rates.offered_per_s
-- Undefined when: the window has no length
-- Differs from: the rate that a load generator was asked for; this one is counted

-- metric: completed_per_s
-- Title: requests completed
-- Formula: requests with outcome ok and end_ns in the window / length of the window
-- Unit: requests/s
-- Weight: none
-- View: rates.completed_per_s
-- Undefined when: no request has an end (an import), or the window has no length
-- Differs from: vLLM bench and AIPerf (first send to last end instead of first arrival)

-- metric: input_tokens_per_s
-- Title: input tokens
-- Formula: sum of input_tokens / length of the window; cached tokens included
-- Unit: tokens/s
-- Weight: none
-- View: rates.input_tokens_per_s
-- Undefined when: no request has a known input_tokens
-- Differs from: vLLM bench (successful requests only, tokens as sent); Anthropic's input_tokens
--   leaves out cached tokens, ours never does

-- metric: uncached_tokens_per_s
-- Title: uncached input tokens
-- Formula: sum of (input_tokens - cached_tokens) / length of the window
-- Unit: tokens/s
-- Weight: none
-- View: rates.uncached_tokens_per_s
-- Undefined when: no request has both counts; a server that does not report cached tokens is unknown
-- Differs from: peers, which count cached tokens as work

-- metric: output_tokens_per_s
-- Title: output tokens
-- Formula: sum of output_tokens / length of the window
-- Unit: tokens/s
-- Weight: none
-- View: rates.output_tokens_per_s
-- Undefined when: no request has a known output_tokens
-- Differs from: vLLM bench (successful requests only; its peak counts events, not tokens)

-- First arrival and last end of each run.
CREATE VIEW _run_spans AS
SELECT
  run,
  min(arrival_ns) AS first_ns,
  max(coalesce(end_ns, last_content_ns, send_end_ns, send_ns, arrival_ns)) AS last_ns
FROM requests
GROUP BY run;

-- Rates of each run over a window; its end belongs to it, so that the whole run counts whole.
-- arg window_from_ns BIGINT (ns): start, since the tape's epoch; NULL: the run's first arrival
-- arg window_until_ns BIGINT (ns): end, since the tape's epoch; NULL: the run's last end
-- col run VARCHAR: label of the tape
-- col from_ns BIGINT (ns): start of the window
-- col until_ns BIGINT (ns): end of the window
-- col offered BIGINT: requests that arrived in the window
-- col ended BIGINT: requests that count in the window, whatever their outcome
-- col offered_per_s DOUBLE (requests/s): requests offered
-- col completed_per_s DOUBLE (requests/s): requests that ended well
-- col input_tokens_per_s DOUBLE (tokens/s): prompt tokens, cached ones included
-- col uncached_tokens_per_s DOUBLE (tokens/s): prompt tokens that were computed
-- col output_tokens_per_s DOUBLE (tokens/s): tokens generated
-- col input_known BIGINT: requests with a known input_tokens
-- col uncached_known BIGINT: requests with a known number of uncached tokens
-- col output_known BIGINT: requests with a known output_tokens
CREATE MACRO rates_in(window_from_ns, window_until_ns) AS TABLE
WITH
  _windows AS (
    SELECT
      run,
      coalesce(window_from_ns, first_ns)::BIGINT AS from_ns,
      coalesce(window_until_ns, last_ns)::BIGINT AS until_ns,
      nullif(greatest(until_ns - from_ns, 0), 0) / 1e9 AS length_s
    FROM _run_spans
  ),
  _marked AS (
    SELECT
      run,
      end_ns,
      outcome,
      input_tokens,
      cached_tokens,
      output_tokens,
      weight,
      arrival_ns BETWEEN from_ns AND until_ns AS arrived,
      coalesce(end_ns, arrival_ns) BETWEEN from_ns AND until_ns AS counts
    FROM requests
    JOIN _windows USING (run)
  ),
  _sums AS (
    SELECT
      run,
      count(*) FILTER (arrived) AS offered,
      count(*) FILTER (counts) AS ended,
      sum(weight) FILTER (arrived) AS offered_weight,
      CASE
        WHEN count(end_ns) > 0
        THEN coalesce(sum(weight) FILTER (counts AND outcome = 'ok' AND end_ns IS NOT NULL), 0)
      END AS completed,
      sum(weight * input_tokens) FILTER (counts) AS input_tokens,
      sum(weight * (input_tokens - cached_tokens)) FILTER (counts) AS uncached_tokens,
      sum(weight * output_tokens) FILTER (counts) AS output_tokens,
      count(input_tokens) FILTER (counts) AS input_known,
      count(input_tokens - cached_tokens) FILTER (counts) AS uncached_known,
      count(output_tokens) FILTER (counts) AS output_known
    FROM _marked
    GROUP BY run
  )
SELECT
  run,
  from_ns,
  until_ns,
  offered,
  ended,
  coalesce(offered_weight, 0) / length_s AS offered_per_s,
  completed / length_s AS completed_per_s,
  input_tokens / length_s AS input_tokens_per_s,
  uncached_tokens / length_s AS uncached_tokens_per_s,
  output_tokens / length_s AS output_tokens_per_s,
  input_known,
  uncached_known,
  output_known
FROM _windows
JOIN _sums USING (run);

-- Rates of each run over its whole length.
-- cols rates_in: the same columns
CREATE VIEW rates AS
SELECT * FROM rates_in(NULL, NULL);

-- Starts of the slices of each run. A slice without anything has zeros in what stands on it, so that a
-- mean over slices is a mean over time; the first and last slice of a run are partly outside it.
CREATE MACRO _slices(slice_ns) AS TABLE
SELECT
  run,
  unnest(range(
    time_bucket_ns(first_ns, slice_ns),
    time_bucket_ns(last_ns, slice_ns) + slice_ns,
    slice_ns
  )) AS from_ns
FROM _run_spans;

-- Requests and tokens of each slice, zeros included, each token in the slice in which its event arrived. Replies that
-- were not streamed, or whose events have no token count, are not in `output_tokens`.
-- Example: SELECT run, max(output_tokens) AS peak FROM rates_over_time(1000000000) GROUP BY run
-- arg slice_ns BIGINT (ns): length of a slice
-- col run VARCHAR: label of the tape
-- col from_ns BIGINT (ns): start of the slice, since the tape's epoch
-- col offered DOUBLE (requests): requests that arrived
-- col ended DOUBLE (requests): requests that ended, whatever their outcome
-- col failed DOUBLE (requests): of these, without outcome ok
-- col events DOUBLE (events): events that arrived
-- col output_tokens DOUBLE (tokens): tokens that arrived
CREATE MACRO rates_over_time(slice_ns) AS TABLE
WITH
  _starts AS (
    SELECT run, time_bucket_ns(arrival_ns, slice_ns) AS from_ns, sum(weight) AS offered
    FROM requests
    GROUP BY ALL
  ),
  _ends AS (
    SELECT
      run,
      time_bucket_ns(end_ns, slice_ns) AS from_ns,
      sum(weight) AS ended,
      coalesce(sum(weight) FILTER (outcome IS DISTINCT FROM 'ok'), 0) AS failed
    FROM requests
    WHERE end_ns IS NOT NULL
    GROUP BY ALL
  ),
  _tokens AS (
    SELECT
      run,
      time_bucket_ns(t_ns, slice_ns) AS from_ns,
      sum(weight) AS events,
      sum(weight * ntok) AS output_tokens
    FROM events
    GROUP BY ALL
  )
SELECT
  run,
  from_ns,
  coalesce(offered, 0)::DOUBLE AS offered,
  coalesce(ended, 0)::DOUBLE AS ended,
  coalesce(failed, 0)::DOUBLE AS failed,
  coalesce(events, 0)::DOUBLE AS events,
  coalesce(output_tokens, 0)::DOUBLE AS output_tokens
FROM _slices(slice_ns)
LEFT JOIN _starts USING (run, from_ns)
LEFT JOIN _ends USING (run, from_ns)
LEFT JOIN _tokens USING (run, from_ns);
