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

-- Ends of the steps of each server, as its streams show them: an instant with events after none for an
-- eighth of a step or more; with the three ends before it.
CREATE VIEW _step_ends AS
WITH
  _slots AS (
    SELECT {'run': run, 'server_id': server_id} AS key, t_ns, slot
    FROM (
      SELECT run, server_id, min(t_ns) AS t_ns, (t_ns // slot_ns) AS slot
      FROM events
      JOIN (
        SELECT key.run AS run, key.server_id AS server, greatest(step_ns / 8, 1000)::BIGINT AS slot_ns
        FROM _phase_steps
      ) USING (run)
      WHERE server IS NOT DISTINCT FROM server_id
      GROUP BY run, server_id, (t_ns // slot_ns)
    )
  ),
  _ends AS (
    SELECT key, t_ns
    FROM _slots
    QUALIFY lag(slot) OVER (PARTITION BY key ORDER BY slot) IS DISTINCT FROM slot - 1
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

-- When the scheduler saw and scheduled each request, if it takes them in order of their first token. The
-- one before it in this order gave its last step's leftover to it, so it was scheduled with that step:
-- two ends of steps before that first token. A wait that no prefill explains, twice as long as all the
-- work meanwhile (prompts that were done by then, and the next one) and ten steps or more, is one for a
-- seat or for memory, and is queue as well.
CREATE VIEW _phase_estimates AS
WITH
  _ready AS (
    SELECT
      _phase_streams.*,
      fit.step_ns,
      fit.longest_ns,
      fit.prefill_ns_per_token,
      least(anchor_ns + fit.outside_ns::BIGINT, first_ns) AS ready_ns,
      lag(first_ns) OVER (
        PARTITION BY _phase_streams.key
        ORDER BY first_ns, anchor_ns, request_id
      ) AS before_ns
    FROM _phase_streams
    JOIN prefill_fit AS fit
      ON fit.run = key.run AND fit.server_id IS NOT DISTINCT FROM key.server_id
  ),
  _seen AS (
    SELECT
      _ready.*,
      CASE WHEN after.t_ns < first_ns - 1000 THEN after.t_ns ELSE ready_ns END AS seen_ns
    FROM _ready
    ASOF LEFT JOIN _step_ends AS after ON _ready.key = after.key AND _ready.ready_ns <= after.t_ns
  ),
  _turn AS (
    SELECT
      _seen.*,
      greatest(one_before_ns, before_ns - longest_ns)::BIGINT AS late_turn_ns,
      greatest(two_before_ns, before_ns - 2 * longest_ns)::BIGINT AS turn_ns,
      greatest(three_before_ns, before_ns - 3 * longest_ns)::BIGINT AS early_turn_ns
    FROM _seen
    ASOF LEFT JOIN _step_ends AS before
      ON _seen.key = before.key AND coalesce(_seen.before_ns, 0) + 1000 >= before.t_ns
  ),
  _taken AS (
    SELECT
      *,
      CASE WHEN before_ns > seen_ns THEN greatest(seen_ns, turn_ns) ELSE seen_ns END AS turn_or_seen_ns
    FROM _turn
  ),
  _worked AS (
    SELECT
      _taken.*,
      2 * step_ns
        + prefill_ns_per_token * greatest(at_first.done - coalesce(at_turn.done, 0), coalesce(uncached, 0))
        + least(prefill_ns_per_token * at_first.next_tokens, longest_ns) AS work_ns
    FROM _taken
    ASOF JOIN _prefilled AS at_first
      ON _taken.key = at_first.key AND _taken.first_ns + _taken.step_ns / 2 >= at_first.first_ns
    ASOF LEFT JOIN _prefilled AS at_turn
      ON _taken.key = at_turn.key AND _taken.turn_or_seen_ns >= at_turn.first_ns
  )
SELECT
  *,
  CASE WHEN seated THEN greatest(seen_ns, (first_ns - shortest_ns - step_ns)::BIGINT) ELSE turn_or_seen_ns END
    AS scheduled_ns,
  greatest(CASE WHEN before_ns > seen_ns THEN early_turn_ns - seen_ns END, 0) AS queue_lo_ns,
  CASE
    WHEN seated THEN (first_ns - shortest_ns)::BIGINT
    ELSE least(greatest(CASE WHEN before_ns > seen_ns THEN late_turn_ns END, turn_or_seen_ns), first_ns)
  END - ready_ns AS queue_hi_ns
FROM (
  SELECT
    *,
    step_ns + prefill_ns_per_token * coalesce(uncached, 0) AS shortest_ns,
    first_ns - turn_or_seen_ns > work_ns + greatest(work_ns, 10 * step_ns) AS seated
  FROM _worked
);

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
