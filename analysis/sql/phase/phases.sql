-- module: phase.phases
-- requires: prelude.schema, phase.prefill
--
-- Queue, prefill and decode of each request. Where the server reported them, they are the server's. Else
-- they are estimated from the streams of all requests together, as vLLM counts: queue from the moment
-- that the scheduler sees a request until it schedules it, prefill from there to the first token,
-- decode from the first to the last one. The scheduler works one step ahead of the GPU (vLLM's
-- asynchronous scheduling, SGLang's overlap); one that does not counts a step of what is prefill here
-- as queue, so that step lies inside the interval of `queue_ns`. Whatever is in no phase is `outside`:
-- network, frontend, the wait for the running step, the end of the reply.

-- How long steps of each server took, second by second: the lower quartile of the gaps that ended in it.
-- A step of a full engine lasts ten times as long as one of an idle engine, and its tokens are written
-- over ten times as long, so one length for a whole run would cut these in two or join those.
CREATE VIEW _local_steps AS
WITH
  _counts AS (
    SELECT
      {'run': run, 'server_id': server_id} AS key,
      t_ns // 1000000000 AS second,
      (gap_us // 250)::INTEGER AS quarters,
      count(*) AS n
    FROM gaps
    GROUP BY ALL
  ),
  _below AS (
    SELECT
      key,
      second,
      quarters,
      sum(n) OVER (PARTITION BY key, second ORDER BY quarters) AS below,
      sum(n) OVER (PARTITION BY key, second) AS total
    FROM _counts
  )
SELECT key, second, 250000 * (min(quarters) FILTER (4 * below >= total) + 1) AS local_ns
FROM _below
GROUP BY key, second;

-- Ends of the steps of each server, as its streams show them: an instant with events after none for an
-- eighth of a step or more; with the three ends before it.
CREATE VIEW _step_ends AS
WITH
  _cells AS (
    SELECT {'run': run, 'server_id': server_id} AS key, min(t_ns) AS t_ns, max(t_ns) AS until_ns
    FROM events
    GROUP BY run, server_id, (t_ns // 500000)
  ),
  _ends AS (
    SELECT _cells.key, t_ns
    FROM _cells
    JOIN _phase_steps ON _phase_steps.key = _cells.key
    LEFT JOIN _local_steps AS near
      ON near.key = _cells.key AND near.second = t_ns // 1000000000
    QUALIFY t_ns - coalesce(lag(until_ns) OVER (PARTITION BY _cells.key ORDER BY t_ns), 0)
      >= greatest(coalesce(local_ns, step_ns) / 8, 1000)
  )
SELECT
  key,
  t_ns,
  lag(t_ns, 1) OVER w AS one_before_ns,
  lag(t_ns, 2) OVER w AS two_before_ns,
  lag(t_ns, 3) OVER w AS three_before_ns
FROM _ends
WINDOW w AS (PARTITION BY key ORDER BY t_ns);

-- Running sum of the prompt tokens that were prefilled, at each first token, and those of the next one.
CREATE VIEW _prefilled AS
SELECT key, first_ns, sum(tokens) OVER w AS done, coalesce(lead(tokens) OVER w, 0) AS next_tokens
FROM (
  SELECT key, first_ns, sum(coalesce(uncached, 0)) AS tokens
  FROM _phase_streams
  GROUP BY key, first_ns
)
WINDOW w AS (PARTITION BY key ORDER BY first_ns);

-- Each request with the end of the step that gave its first token (end_ns), the requests of a step in order
-- of arrival, and the steps around. seen_ns: the scheduler looks when a step ends. own_ns: the latest
-- step to be scheduled in, if four fifths of the time that its prompt takes must fit between then and the
-- first token. turn_ns: the step in which the request before it was, which is the earliest.
CREATE VIEW _phase_steps_of_requests AS
WITH
  _ready AS (
    SELECT
      _phase_streams.*,
      fit.step_ns,
      fit.longest_ns,
      fit.prefill_ns_per_token,
      least(anchor_ns + fit.outside_ns::BIGINT, first_ns) AS ready_ns,
      fit.serial
    FROM _phase_streams
    JOIN prefill_fit AS fit
      ON fit.run = key.run AND fit.server_id IS NOT DISTINCT FROM key.server_id
  ),
  _seen AS (
    SELECT
      _ready.*,
      CASE WHEN serial OR after.t_ns >= first_ns - 1000 THEN ready_ns ELSE coalesce(after.t_ns, ready_ns) END
        AS seen_ns
    FROM _ready
    ASOF LEFT JOIN _step_ends AS after ON _ready.key = after.key AND _ready.ready_ns <= after.t_ns
  ),
  _given AS (
    SELECT
      _seen.*,
      step.t_ns AS end_ns,
      step.one_before_ns AS given_from_ns,
      step.two_before_ns,
      step.three_before_ns
    FROM _seen
    ASOF LEFT JOIN _step_ends AS step ON _seen.key = step.key AND _seen.first_ns + 1000 >= step.t_ns
  ),
  _order AS (
    SELECT
      *,
      lag(first_ns) OVER w AS before_ns,
      lag(end_ns) OVER w AS before_end_ns,
      lag(given_from_ns) OVER w AS before_from_ns,
      lag(two_before_ns) OVER w AS turn_ns,
      lag(three_before_ns) OVER w AS early_turn_ns,
      max(last_ns) OVER (
        PARTITION BY key
        ORDER BY first_ns
        RANGE BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
      ) AS free_ns
    FROM _given
    WINDOW w AS (PARTITION BY key ORDER BY end_ns, anchor_ns, request_id)
  )
SELECT
  _order.*,
  own.t_ns AS own_begin_ns,
  own.one_before_ns AS own_ns,
  own.two_before_ns AS early_own_ns
FROM _order
ASOF LEFT JOIN _step_ends AS own
  ON
    _order.key = own.key
    AND _order.end_ns - 1000 - (0.8 * prefill_ns_per_token * coalesce(uncached, 0))::BIGINT >= own.t_ns;

-- When the scheduler saw and scheduled each request, if it takes them in order. Who waits and is not the
-- first of those that a step gave their first token was in no step before it: a step has one prompt at
-- most that it cannot finish, the last. The first may have begun in the step before; it has, where that one
-- was full. Otherwise the engine had no seat or no memory for it, and it was scheduled as late
-- as its own prompt allows. A wait that no prefill explains, twice as long as all the work meanwhile (prompts
-- that were done by then, and the next one) and ten steps or more, is such a wait too.
CREATE VIEW _phase_estimates AS
WITH
  _worked AS (
    SELECT
      taken.*,
      2 * step_ns
        + prefill_ns_per_token * greatest(at_first.done - coalesce(at_seen.done, 0), coalesce(uncached, 0))
        + least(prefill_ns_per_token * at_first.next_tokens, longest_ns) AS work_ns
    FROM _phase_steps_of_requests AS taken
    ASOF JOIN _prefilled AS at_first
      ON taken.key = at_first.key AND taken.first_ns + taken.step_ns / 2 >= at_first.first_ns
    ASOF LEFT JOIN _prefilled AS at_seen
      ON taken.key = at_seen.key AND taken.seen_ns >= at_seen.first_ns
  ),
  _told AS (
    SELECT
      *,
      step_ns + prefill_ns_per_token * coalesce(uncached, 0) AS shortest_ns,
      CASE
        WHEN serial THEN 'serial'
        WHEN before_ns > seen_ns AND before_end_ns = end_ns THEN 'together'
        WHEN before_ns > seen_ns AND own_begin_ns - own_ns > 0.75 * longest_ns THEN 'leftover'
        WHEN before_ns > seen_ns THEN 'own'
        WHEN first_ns - seen_ns > work_ns + greatest(work_ns, 10 * step_ns) THEN 'own'
        ELSE 'seen'
      END AS why
    FROM _worked
  )
SELECT
  *,
  least(
    greatest(
      CASE why
        WHEN 'serial' THEN free_ns
        WHEN 'together' THEN two_before_ns
        WHEN 'leftover' THEN turn_ns
        WHEN 'own' THEN own_ns
      END,
      seen_ns
    ),
    first_ns
  ) AS scheduled_ns,
  greatest(
    CASE why
      WHEN 'serial' THEN free_ns - step_ns::BIGINT
      WHEN 'together' THEN three_before_ns
      WHEN 'leftover' THEN early_turn_ns
      WHEN 'own' THEN greatest(least(early_own_ns, early_turn_ns), 0)
    END - seen_ns - step_ns::BIGINT,
    0
  ) AS queue_lo_ns,
  least(
    greatest(
      CASE why
        WHEN 'serial' THEN free_ns + step_ns::BIGINT
        WHEN 'together' THEN given_from_ns
        WHEN 'leftover' THEN greatest(before_from_ns, own_ns)
        WHEN 'own' THEN own_begin_ns
      END,
      scheduled_ns
    ),
    first_ns
  ) - ready_ns AS queue_hi_ns
FROM _told;

-- Phases of each request that has them; whatever its outcome. queue + prefill + decode + outside is E2E
-- from send, exactly.
-- col run VARCHAR: label of the tape
-- col request_id UUID: the request
-- col arrival_ns BIGINT (ns): when it was offered
-- col outcome VARCHAR: how it ended
-- col queue_ns BIGINT (ns): waiting to be scheduled
-- col queue_lo_ns BIGINT (ns): the least that an estimate leaves open: one step earlier, and no wait for a seat
-- col queue_hi_ns BIGINT (ns): the most: one step later, and the wait for the running step too
-- col prefill_ns BIGINT (ns): from there to the first token
-- col decode_ns BIGINT (ns): first to last token
-- col outside_ns BIGINT (ns): all the rest, before and after; NULL when the reply has no end
-- col e2e_ns BIGINT (ns): their sum
-- col method VARCHAR: server: reported, and then queue_lo_ns = queue_hi_ns; stream: an estimate
-- col weight DOUBLE: requests that the row stands for
CREATE VIEW phases AS
SELECT
  requests.run,
  requests.request_id,
  arrival_ns,
  outcome,
  CASE WHEN told THEN server_queue_ns ELSE scheduled_ns_of - seen_ns END AS queue_ns,
  CASE WHEN told THEN server_queue_ns ELSE least(queue_lo_ns, queue_ns) END AS queue_lo_ns,
  CASE WHEN told THEN server_queue_ns ELSE greatest(queue_hi_ns, queue_ns) END AS queue_hi_ns,
  CASE WHEN told THEN server_prefill_ns ELSE first_ns - scheduled_ns_of END AS prefill_ns,
  CASE
    WHEN told THEN coalesce(server_decode_ns, last_content_ns - first_content_ns)
    ELSE last_ns - first_ns
  END AS decode_ns,
  end_ns - requests.sent_ns - queue_ns - prefill_ns - coalesce(decode_ns, 0) AS outside_ns,
  end_ns - requests.sent_ns AS e2e_ns,
  CASE WHEN told THEN 'server' ELSE 'stream' END AS method,
  weight
FROM (
  SELECT *, server_queue_ns IS NOT NULL AND server_prefill_ns IS NOT NULL AS told
  FROM requests
) AS requests
LEFT JOIN (
  SELECT run, request_id, seen_ns, scheduled_ns AS scheduled_ns_of, first_ns, last_ns, queue_lo_ns,
    queue_hi_ns
  FROM _phase_estimates
) AS estimated USING (run, request_id)
WHERE told OR scheduled_ns_of IS NOT NULL;

-- Phases of each run, all requests together.
-- col run VARCHAR: label of the tape
-- col method VARCHAR: server or stream, as in phases
-- col requests BIGINT: requests that have phases this way
-- col queue_s DOUBLE (s): sum of queue_ns
-- col queue_lo_s DOUBLE (s): sum of queue_lo_ns
-- col queue_hi_s DOUBLE (s): sum of queue_hi_ns
-- col prefill_s DOUBLE (s): sum of prefill_ns
-- col decode_s DOUBLE (s): sum of decode_ns
-- col outside_s DOUBLE (s): sum of outside_ns
CREATE VIEW phases_totals AS
SELECT
  run,
  method,
  count(*) AS requests,
  sum(weight * queue_ns) / 1e9 AS queue_s,
  sum(weight * queue_lo_ns) / 1e9 AS queue_lo_s,
  sum(weight * queue_hi_ns) / 1e9 AS queue_hi_s,
  sum(weight * prefill_ns) / 1e9 AS prefill_s,
  sum(weight * decode_ns) / 1e9 AS decode_s,
  sum(weight * outside_ns) / 1e9 AS outside_s
FROM phases
GROUP BY run, method;
