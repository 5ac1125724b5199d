-- module: phase.prefill
-- requires: prelude.schema, prelude.quantiles, prelude.lines, throughput.prefix
--
-- What a prefill costs, from the stream alone: a line through the time to the first token of requests
-- that met nobody else's prefill. Engines batch in steps; a step is seen from outside because all
-- streams get their tokens at its end.

-- Streams that had a first token, with what they had to prefill. Where nearly all reply heads came
-- well after the send and before the first token (vLLM sends them when the prompt has been read), the
-- head's time is the anchor: reading and tokenising are over by then. A server is a run and its server_id.
-- Prompt tokens that the server does not call cached, though an earlier request had them, are taken as cached
-- where the time to the first token goes with the rest of the prompt better than with all of it.
CREATE VIEW _phase_streams AS
WITH
  _first AS (
    SELECT
      {'run': run, 'server_id': server_id} AS key,
      run,
      request_id,
      sent_ns,
      response_headers_ns AS head_ns,
      first_content_ns AS first_ns,
      last_content_ns AS last_ns,
      greatest(requests.input_tokens - coalesce(cached_tokens, 0), 0) AS uncached,
      greatest(requests.input_tokens - coalesce(cached_tokens, asked_tokens, 0), 0)::BIGINT AS unseen
    FROM requests
    LEFT JOIN prefix_requests USING (run, request_id)
    WHERE first_content_ns >= sent_ns
  ),
  _servers AS (
    SELECT
      key,
      avg((head_ns BETWEEN sent_ns + 500000 AND first_ns - 5000000)::INTEGER) > 0.9 AS early,
      coalesce(
        corr(first_ns - sent_ns, unseen) > greatest(corr(first_ns - sent_ns, uncached), 0),
        false
      ) AS shared
    FROM _first
    GROUP BY key
  )
SELECT
  _first.* EXCLUDE (uncached, unseen),
  CASE WHEN shared THEN unseen ELSE uncached END AS uncached,
  CASE WHEN early THEN greatest(head_ns, sent_ns) ELSE sent_ns END AS anchor_ns,
  early
FROM _first
JOIN _servers ON _servers.key = _first.key;

-- A step without prefill: the lower quartile of the gaps between events.
CREATE VIEW _phase_steps AS
WITH
  _counts AS (
    SELECT {'run': run, 'server_id': server_id} AS key, gap_us AS value, count(*) AS n
    FROM gaps
    GROUP BY ALL
  ),
  _below AS (
    SELECT
      key,
      value,
      sum(n) OVER (PARTITION BY key ORDER BY value) AS below,
      sum(n) OVER (PARTITION BY key) AS total
    FROM _counts
  )
SELECT
  key,
  1000.0::DOUBLE * min(value) FILTER (4 * below >= total) AS step_ns,
  1000.0::DOUBLE * min(value) FILTER (1000 * below >= 999 * total) AS longest_ns
FROM _below
GROUP BY key;

-- Who waits while others decode. A server that batches by whole replies keeps who comes meanwhile until all
-- of these are done, and then starts several together: queue and prefill cannot be told by steps, so it has no
-- estimate. A serial one serves a single request at a time. Tokens within 5 ms are of one step.
CREATE VIEW _whole_replies AS
WITH
  _order AS (
    SELECT
      key,
      anchor_ns,
      first_ns,
      max(last_ns) FILTER (last_ns > first_ns) OVER (
        PARTITION BY key
        ORDER BY first_ns
        RANGE BETWEEN UNBOUNDED PRECEDING AND 5000000 PRECEDING
      ) AS earlier_until_ns,
      count(*) OVER (
        PARTITION BY key
        ORDER BY first_ns
        RANGE BETWEEN 5000000 PRECEDING AND 5000000 FOLLOWING
      ) AS together
    FROM _phase_streams
  )
SELECT key, count(*) FILTER (together > 1) < 0.1 * count(*) AS serial
FROM _order
GROUP BY key
HAVING
  count(*) FILTER (anchor_ns < earlier_until_ns) >= 10
  AND count(*) FILTER (first_ns + 5000000 < earlier_until_ns)
    <= 0.02 * count(*) FILTER (anchor_ns < earlier_until_ns);

-- Busy periods: requests in order of their first token, cut where everyone who came before has one; on a
-- serial server each request is one, and it begins where the reply before it ended. Points of the line:
-- prompt tokens of a period against its length; periods of one request that met nobody where there are 20,
-- else all.
CREATE VIEW _prefill_points AS
WITH
  _order AS (
    SELECT
      _phase_streams.*,
      coalesce(serial, false) AS serial,
      lag(first_ns) OVER w AS before_ns,
      max(last_ns) OVER (w ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS free_ns,
      min(anchor_ns) OVER (w ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING) AS earliest_ns
    FROM _phase_streams
    LEFT JOIN _whole_replies ON _whole_replies.key = _phase_streams.key
    WHERE uncached IS NOT NULL
    WINDOW w AS (PARTITION BY _phase_streams.key ORDER BY first_ns, anchor_ns, request_id)
  ),
  _numbered AS (
    SELECT
      *,
      CASE WHEN serial AND free_ns > anchor_ns THEN free_ns ELSE anchor_ns END AS begin_ns,
      sum((before_ns IS NULL OR serial OR before_ns <= earliest_ns)::INTEGER) OVER (
        PARTITION BY key
        ORDER BY first_ns, anchor_ns, request_id
      ) AS period
    FROM _order
  ),
  _periods AS (
    SELECT
      key,
      count(*) = 1 AND bool_and(begin_ns = anchor_ns) AS alone,
      sum(uncached)::DOUBLE AS x,
      (max(first_ns) - min(begin_ns))::DOUBLE AS y
    FROM _numbered
    GROUP BY key, period
  )
SELECT key, x, y
FROM _periods
QUALIFY alone OR sum(alone::INTEGER) OVER (PARTITION BY key) < 20;

-- What a prefill costs on each server; none for one that batches by whole replies.
-- col run VARCHAR: label of the tape
-- col server_id VARCHAR: replica, where known
-- col step_ns DOUBLE (ns): a step that prefills nothing
-- col longest_ns DOUBLE (ns): 99.9 % of all gaps are no longer: a full step
-- col prefill_ns_per_token DOUBLE (ns): time that an uncached prompt token takes
-- col outside_ns DOUBLE (ns): network and frontend before the engine, at no tokens: the line's intercept
--   less two steps. Half a step of waiting and the tokens that a step prefills for nothing, because
--   it is bound by memory, cancel to 2 ms on an H100. 0 where the reply's head tells when the engine got it
-- col points BIGINT: busy periods that the line stands on
-- col serial BOOLEAN: it serves one request at a time; one step is taken off then, not two
CREATE VIEW prefill_fit AS
WITH _lines AS (SELECT * FROM _trimmed_line('_prefill_points'))
SELECT
  _lines.key.run AS run,
  _lines.key.server_id AS server_id,
  step_ns,
  longest_ns,
  slope AS prefill_ns_per_token,
  CASE
    WHEN early THEN 0
    ELSE greatest(intercept - CASE WHEN coalesce(serial, false) THEN 1 ELSE 2 END * step_ns, 0)
  END AS outside_ns,
  n AS points,
  coalesce(serial, false) AS serial
FROM _lines
JOIN _phase_steps ON _phase_steps.key = _lines.key
JOIN (SELECT key, bool_and(early) AS early FROM _phase_streams GROUP BY key) AS heads ON heads.key = _lines.key
LEFT JOIN _whole_replies ON _whole_replies.key = _lines.key
WHERE slope > 0 AND coalesce(serial, true);
