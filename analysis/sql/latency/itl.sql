-- module: latency.itl
-- requires: prelude.schema, latency.icl
--
-- Inter-token latency, where an event may carry several tokens (speculative decoding, batching).
-- Two readings of one stream: what the user waited for each token, and the pace of the engine.
-- An event without tokens ends no gap: its wait belongs to the next token.

-- metric: itl_user
-- Title: ITL user
-- Formula: the first token of an event waits for the whole gap, its other tokens wait 0; so do the
--   tokens after the first in the first event. Sum = last - first, weight = tokens - 1
-- Unit: ns
-- Weight: token
-- View: itl.gap_us
-- Undefined when: fewer than two tokens, token counts unknown, or not streamed
-- Differs from: inference-perf has the same zeros; vLLM bench's ITL is our ICL

-- metric: itl_spread
-- Title: ITL spread
-- Formula: each of the k tokens of an event took gap / k; the first event has no gap
-- Unit: ns
-- Weight: token
-- View: itl.gap_us
-- Undefined when: fewer than two events with tokens, token counts unknown, or not streamed
-- Differs from: SGLang divides by the accepted length since PR 12064; vLLM bench does not divide

-- Tokens of replies with one choice and no event without tokens: the fast path.
CREATE VIEW _itl_plain AS
SELECT
  run,
  request_id,
  i,
  NULL::TINYINT AS choice,
  off_us[i]::BIGINT - off_us[i - 1]::BIGINT AS gap_us,  -- off_us[0] is NULL
  ntok[i]::INTEGER AS ntok,
  outcome,
  arrival_ns,
  model,
  server_id,
  weight
FROM (
  SELECT *, unnest(range(1, len(off_us) + 1)) AS i
  FROM _streams
  WHERE choice IS NULL AND NOT list_contains(ntok, 0)
);

-- All other replies with token counts: the event before is looked for.
CREATE VIEW _itl_searched AS
SELECT
  * EXCLUDE (off_us),
  off_us - lag(off_us) OVER (PARTITION BY run, request_id, choice ORDER BY i) AS gap_us
FROM (
  SELECT
    run,
    request_id,
    i,
    choice[i]::TINYINT AS choice,
    off_us[i]::BIGINT AS off_us,
    ntok[i]::INTEGER AS ntok,
    outcome,
    arrival_ns,
    model,
    server_id,
    weight
  FROM (
    SELECT *, unnest(range(1, len(off_us) + 1)) AS i
    FROM (
      SELECT * FROM _streams WHERE choice IS NOT NULL AND ntok IS NOT NULL
      UNION ALL  -- and not OR: each filter alone is pushed into the scan
      SELECT * FROM _streams WHERE choice IS NULL AND list_contains(ntok, 0)
    )
  )
)
WHERE ntok > 0;

-- One row per event that carries tokens, with the gap that they share.
-- col run VARCHAR: label of the tape
-- col request_id UUID: the request
-- col i BIGINT: position in the stream
-- col choice TINYINT: choice; NULL when there is one
-- col gap_us BIGINT (us): time since the event before with tokens, same choice; NULL for the first one
-- col ntok INTEGER (tokens): tokens of the event, at least 1
-- col outcome VARCHAR: outcome of the request
-- col arrival_ns BIGINT (ns): when the request was offered
-- col model VARCHAR: model of the request
-- col server_id VARCHAR: replica that served it, where known
-- col weight DOUBLE: requests that the row stands for
CREATE VIEW itl AS
SELECT * FROM _itl_plain
UNION ALL BY NAME
SELECT * FROM _itl_searched;

-- The same replies, requests that ended well, without what counts by value have no use for: two slices
-- unrolled side by side are a fifth cheaper than one index. Each reply's first event comes last, with
-- no gap: what is unrolled beside a longer list ends in NULL.
CREATE VIEW _plain_gaps AS
SELECT run, after_us::BIGINT - before_us::BIGINT AS gap_us, ntok, weight
FROM (
  SELECT
    run,
    unnest(off_us[2:]) AS after_us,
    unnest(off_us[:-2]) AS before_us,
    unnest(ntok[2:] || ntok[:1])::INTEGER AS ntok,
    weight
  FROM _streams
  WHERE outcome = 'ok' AND choice IS NULL AND NOT list_contains(ntok, 0)
);

-- Counts by value of ICL and of both metrics here, over requests that ended well; one pass over the events
-- of plain replies, whose ICL gap and ITL gap are the same.
CREATE VIEW _gap_counts AS
WITH
  _plain AS MATERIALIZED (
    SELECT run, gap_us, ntok, sum(weight) AS weight, count(*) AS n
    FROM _plain_gaps
    GROUP BY run, gap_us, ntok
  ),
  _searched AS MATERIALIZED (
    SELECT run, gap_us, ntok, sum(weight) AS weight, count(*) AS n
    FROM _itl_searched
    WHERE outcome = 'ok'
    GROUP BY run, gap_us, ntok
  ),
  _gaps AS (
    SELECT * FROM _plain
    UNION ALL
    SELECT * FROM _searched
  )
SELECT run, 'icl' AS metric, gap_us * 1000.0 AS value, weight, n
FROM _plain
WHERE gap_us IS NOT NULL
UNION ALL
SELECT run, 'icl', gap_us * 1000.0, sum(weight), count(*)
FROM _icl_of_others
GROUP BY run, gap_us
UNION ALL
SELECT run, 'itl_user', gap_us * 1000.0, weight, n
FROM _gaps
WHERE gap_us IS NOT NULL
UNION ALL
SELECT run, 'itl_user', 0.0, sum(weight * (ntok - 1)), sum(n * (ntok - 1))::BIGINT
FROM _gaps
WHERE ntok > 1
GROUP BY run
UNION ALL
SELECT run, 'itl_spread', gap_us * 1000.0 / ntok, weight * ntok, n * ntok
FROM _gaps
WHERE gap_us IS NOT NULL;
