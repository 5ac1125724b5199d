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

-- Gaps of replies that ended well and are not plain (latency.itl): several choices, an event without
-- tokens, or unknown token counts.
CREATE VIEW _icl_of_others AS
SELECT run, gap_us, weight
FROM _events_of_many_choices
WHERE outcome = 'ok' AND gap_us IS NOT NULL
UNION ALL
SELECT run, off_us[i]::BIGINT - off_us[i - 1]::BIGINT AS gap_us, weight
FROM (
  SELECT run, off_us, weight, unnest(range(2, len(off_us) + 1)) AS i
  FROM _streams
  WHERE choice IS NULL AND outcome = 'ok' AND (ntok IS NULL OR list_contains(ntok, 0))
);
