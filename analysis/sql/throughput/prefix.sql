-- module: throughput.prefix
-- requires: prelude.schema
--
-- Prefix reuse that the traffic asked for, against what the server gave. Asked: prompt tokens in blocks
-- whose whole prefix an earlier request of the run had; a cache that forgets nothing and is filled at once
-- would have them all. Got: cached tokens, as the server reported.

-- metric: prefix_got
-- Title: part of input tokens from the cache
-- Formula: sum of cached_tokens / sum of input_tokens, over requests with both
-- Unit: 1
-- Weight: none
-- View: prefix_reuse.got_share
-- Undefined when: the server does not report cached tokens
-- Differs from: vLLM's prefix_cache_hits / queries (agrees, without preempted prefills that hit again)

-- Every block of requests that reached an engine. Equal hashes mean equal prefixes within a scope only.
CREATE VIEW _prefix_blocks AS
SELECT
  {
    'run': run,
    'scope': CASE WHEN block_scope = 'session' THEN session_id END,
    'size': block_tokens,
    'unit': block_unit
  } AS key,
  run,
  request_id,
  arrival_ns,
  unnest(block_hashes) AS hash
FROM _rows_of_tapes
WHERE len(block_hashes) > 0 AND outcome NOT IN ('http_error', 'connect_error');

-- Prefix reuse of each request that has prefix hashes and reached an engine.
-- col run VARCHAR: label of the tape
-- col request_id UUID: the request
-- col arrival_ns BIGINT (ns): when it was offered
-- col blocks BIGINT: full blocks of its prompt
-- col asked_blocks BIGINT: of these, leading ones that an earlier request had
-- col asked_tokens DOUBLE (tokens): tokens in them; with blocks of bytes in proportion, so approximate
-- col got_tokens INTEGER (tokens): cached tokens that the server reported
-- col input_tokens INTEGER (tokens): prompt tokens
-- col exact BOOLEAN: blocks are tokens
-- col weight DOUBLE: requests that the row stands for
CREATE VIEW prefix_requests AS
WITH
  _first AS (SELECT key, hash, min(arrival_ns) AS first_ns FROM _prefix_blocks GROUP BY key, hash),
  _asked AS (
    SELECT run, request_id, count(*) FILTER (first_ns < arrival_ns) AS asked_blocks, count(*) AS blocks
    FROM _prefix_blocks
    JOIN _first ON _first.hash = _prefix_blocks.hash AND _first.key = _prefix_blocks.key
    GROUP BY run, request_id
  )
SELECT
  run,
  request_id,
  arrival_ns,
  blocks,
  asked_blocks,
  CASE
    WHEN input_tokens IS NULL THEN NULL
    WHEN block_unit = 'token' THEN least(asked_blocks * block_tokens, input_tokens)
    ELSE input_tokens * asked_blocks * block_tokens
      / nullif(blocks * block_tokens + coalesce(prefix_partial, 0), 0)
  END::DOUBLE AS asked_tokens,
  cached_tokens AS got_tokens,
  input_tokens,
  block_unit = 'token' AS exact,
  weight
FROM _asked
JOIN requests USING (run, request_id);

-- Prefix reuse of each run.
-- col run VARCHAR: label of the tape
-- col requests BIGINT: requests with prefix hashes
-- col exact BOOLEAN: all of their blocks are tokens
-- col asked_tokens DOUBLE (tokens): prompt tokens that earlier requests had
-- col asked_share DOUBLE: part of the prompt tokens of these requests
-- col got_known BIGINT: requests, with hashes or not, whose cached tokens are known
-- col got_tokens DOUBLE (tokens): cached tokens of these
-- col got_share DOUBLE: part of their prompt tokens
-- col got_of_asked DOUBLE: got over asked, where a request has both
CREATE VIEW prefix_reuse AS
WITH
  _asked AS (
    SELECT
      run,
      count(*) AS requests,
      bool_and(exact) AS exact,
      sum(weight * asked_tokens) AS asked_tokens,
      sum(weight * asked_tokens) / nullif(sum(weight * input_tokens), 0) AS asked_share,
      sum(weight * got_tokens) FILTER (asked_tokens IS NOT NULL)
        / nullif(sum(weight * asked_tokens) FILTER (got_tokens IS NOT NULL), 0) AS got_of_asked
    FROM prefix_requests
    GROUP BY run
  ),
  _got AS (
    SELECT
      run,
      count(*) AS got_known,
      sum(weight * cached_tokens)::DOUBLE AS got_tokens,
      sum(weight * cached_tokens)::DOUBLE / nullif(sum(weight * input_tokens), 0) AS got_share
    FROM requests
    WHERE cached_tokens IS NOT NULL AND input_tokens IS NOT NULL
    GROUP BY run
  )
SELECT
  run,
  coalesce(requests, 0) AS requests,
  exact,
  asked_tokens,
  asked_share,
  coalesce(got_known, 0) AS got_known,
  got_tokens,
  got_share,
  got_of_asked
FROM (SELECT run FROM tapes)
LEFT JOIN _asked USING (run)
LEFT JOIN _got USING (run);
