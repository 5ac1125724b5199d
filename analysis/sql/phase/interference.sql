-- module: phase.interference
-- requires: prelude.schema, prelude.units, prelude.quantiles, phase.phases
--
-- What the prefills of others cost those who decode. Each gap is taken apart: base (what a gap takes
-- with so many streams decoding and nobody prefilling) + a price for each prompt token that can have run
-- in it + unexplained, which is always shown. That a prefill ran is no proof that it was the cause: where
-- nearly every gap holds one, lift is near 1 and says nothing.

-- Changes over time on each server: streams that decode, and the rate of prefill. A prefill is spread evenly
-- over the time from when it can have begun to its first token; `rate` and `offset` give the tokens
-- prefilled by an instant x as rate * x - offset, x in ns since the first stream.
CREATE VIEW _load_steps AS
WITH
  _spans AS (
    SELECT
      key,
      first_ns,
      last_ns,
      greatest(scheduled_ns, (first_ns - shortest_ns)::BIGINT) AS begin_ns,
      coalesce(uncached, 0) / greatest(first_ns - begin_ns, 1) AS per_ns,
      min(first_ns) OVER (PARTITION BY key) AS zero_ns
    FROM _phase_estimates
  ),
  _changes AS (
    SELECT key, zero_ns, first_ns AS t_ns, 1 AS decoding, -per_ns AS rate FROM _spans
    UNION ALL
    SELECT key, zero_ns, last_ns, -1, 0 FROM _spans
    UNION ALL
    SELECT key, zero_ns, begin_ns, 0, per_ns FROM _spans
  ),
  _instants AS (
    SELECT key, t_ns, any_value(zero_ns) AS zero_ns, sum(decoding) AS decoding, sum(rate) AS rate
    FROM _changes
    GROUP BY key, t_ns
  )
SELECT
  key,
  t_ns,
  zero_ns,
  sum(decoding) OVER w AS decoding,
  sum(rate) OVER w AS rate,
  sum(rate * (t_ns - zero_ns)) OVER w AS offset
FROM _instants
WINDOW w AS (PARTITION BY key ORDER BY t_ns);

-- Gaps with the streams that decoded when they began and the prompt tokens that ran in them.
CREATE VIEW _loaded_gaps AS
WITH
  _gaps AS (
    SELECT
      {'run': run, 'server_id': server_id} AS key,
      request_id,
      i,
      gap_us * 1000 AS gap_ns,
      t_ns AS until_ns,
      t_ns - gap_us * 1000 AS from_ns,
      outcome,
      weight
    FROM gaps
  )
SELECT
  _gaps.*,
  earlier.decoding::BIGINT AS decoding,
  greatest(
    later.rate * (until_ns - later.zero_ns) - later.offset
      - (earlier.rate * (from_ns - earlier.zero_ns) - earlier.offset),
    0
  ) AS prefill_tokens
FROM _gaps
ASOF JOIN _load_steps AS earlier ON _gaps.key = earlier.key AND _gaps.from_ns >= earlier.t_ns
ASOF JOIN _load_steps AS later ON _gaps.key = later.key AND _gaps.until_ns >= later.t_ns;

-- Every gap taken apart: gap_ns = base_ns + prefill_ns + unexplained_ns.
-- col run VARCHAR: label of the tape
-- col request_id UUID: the request that waited
-- col i BIGINT: position in its stream of the event that ended the gap
-- col outcome VARCHAR: how it ended
-- col gap_ns BIGINT (ns): the gap
-- col decoding BIGINT: streams on its server that decoded when the gap began, itself included
-- col prefill_tokens DOUBLE (tokens): prompt tokens of others that can have run in the gap
-- col base_ns DOUBLE (ns): median of the gaps with as many streams, to a power of two, and no prefill
-- col prefill_ns DOUBLE (ns): prefill_tokens at the price that least squares of all gaps gives
-- col unexplained_ns DOUBLE (ns): the rest; negative where the gap was shorter
-- col weight DOUBLE: requests that the row stands for
CREATE VIEW interference_gaps AS
WITH
  _loaded AS MATERIALIZED (SELECT *, token_bucket(decoding) AS size FROM _loaded_gaps),
  _quiet AS (
    SELECT {'key': key, 'size': size} AS key, gap_ns AS value, 1 AS weight
    FROM _loaded
    WHERE prefill_tokens < 1
  ),
  _bases AS (SELECT key.key AS key, key.size AS size, p50 AS base_ns FROM quantiles('_quiet')),
  _based AS (
    SELECT _loaded.*, base_ns
    FROM _loaded
    JOIN _bases ON _bases.key = _loaded.key AND _bases.size = _loaded.size
  ),
  _prices AS (
    SELECT
      key,
      greatest(
        sum(prefill_tokens * (gap_ns - base_ns)) / nullif(sum(prefill_tokens * prefill_tokens), 0), 0
      ) AS ns_per_token
    FROM _based
    GROUP BY key
  )
SELECT
  _based.key.run AS run,
  request_id,
  i,
  outcome,
  gap_ns,
  decoding,
  prefill_tokens,
  base_ns,
  prefill_tokens * coalesce(ns_per_token, 0) AS prefill_ns,
  gap_ns - base_ns - prefill_ns AS unexplained_ns,
  weight
FROM _based
JOIN _prices ON _prices.key = _based.key;

-- Decode time of each run taken apart, and how often slow gaps, over 2 bases, held a prefill.
-- col run VARCHAR: label of the tape
-- col gaps BIGINT: gaps that have a base: others decoded with as many streams and no prefill
-- col decode_s DOUBLE (s): time in these gaps
-- col base_s DOUBLE (s): of it the base
-- col prefill_s DOUBLE (s): of it the price of others' prefills
-- col unexplained_s DOUBLE (s): of it the rest, what was faster than expected taken off
-- col over_s DOUBLE (s): of it only what was slower than expected
-- col prefill_ns_per_token DOUBLE (ns): price of a prompt token to each stream that decodes
-- col slow_gaps BIGINT: gaps over 2 bases
-- col slow_with_prefill DOUBLE: part of these with a prefill, at least one token, in them
-- col all_with_prefill DOUBLE: the same of all gaps: what chance alone would give
-- col lift DOUBLE: how many times as often slow gaps held one
CREATE VIEW interference AS
SELECT
  run,
  count(*) AS gaps,
  sum(weight * gap_ns) / 1e9 AS decode_s,
  sum(weight * base_ns) / 1e9 AS base_s,
  sum(weight * prefill_ns) / 1e9 AS prefill_s,
  sum(weight * unexplained_ns) / 1e9 AS unexplained_s,
  sum(weight * greatest(unexplained_ns, 0)) / 1e9 AS over_s,
  sum(prefill_ns) / nullif(sum(prefill_tokens), 0) AS prefill_ns_per_token,
  count(*) FILTER (gap_ns > 2 * base_ns) AS slow_gaps,
  avg((prefill_tokens >= 1)::INTEGER) FILTER (gap_ns > 2 * base_ns) AS slow_with_prefill,
  avg((prefill_tokens >= 1)::INTEGER) AS all_with_prefill,
  slow_with_prefill / nullif(all_with_prefill, 0) AS lift
FROM interference_gaps
GROUP BY run;
