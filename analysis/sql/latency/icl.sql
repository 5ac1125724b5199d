-- module: latency.icl
-- requires: prelude.schema
--
-- Inter-chunk latency: the raw gaps between events, as the client saw them. Long replies dominate.
-- An event may carry several tokens: for time per token see latency.itl.

-- metric: icl
-- Title: ICL
-- Formula: gap between an event and the event before of the same choice
-- Unit: ns
-- Weight: event
-- View: gaps.gap_us
-- Undefined when: fewer than two events, or not streamed
-- Differs from: vLLM bench and SGLang call this ITL; AIPerf agrees; inference-perf re-tokenises and
--   gives the tokens of one event the same instant

-- Counts by value of the gaps of requests that ended well.
CREATE VIEW _icl_counts AS
SELECT
  run,
  'icl' AS metric,
  gap_us * 1000.0 AS value,
  sum(weight) AS weight,
  count(*) AS n
FROM gaps
WHERE outcome = 'ok'
GROUP BY run, gap_us;
