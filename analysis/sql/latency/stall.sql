-- module: latency.stall
-- requires: prelude.schema, prelude.quantiles
--
-- Pauses inside a reply. A gap is a stall when it is longer than a stated time and than a stated
-- multiple of the reply's own median gap. There is no agreed constant, so both are arguments; the
-- views use 200 ms and 2.

-- metric: stalled_share
-- Title: part of decode time lost in stalls
-- Formula: sum of the gaps over 200 ms and over 2 median gaps of their reply / sum of
--   (last_content_ns - first_content_ns); requests that ended well
-- Unit: 1
-- Weight: none
-- View: stall_rates.stalled_share
-- Undefined when: no streamed reply with two events ended well
-- Differs from: peers have no such number; Etalon counts missed deadlines, see `fluidity_at`

-- Stalls of every reply, whatever its outcome.
-- Example: SELECT count(*) FROM stalls_over(100000, 5)
-- arg least_us BIGINT (us): a stall is longer than this
-- arg medians DOUBLE: and longer than so many median gaps of its reply and choice
-- col run VARCHAR: label of the tape
-- col request_id UUID: the request
-- col i BIGINT: position in the stream of the event that ended the stall
-- col choice TINYINT: choice; NULL when there is one
-- col from_ns BIGINT (ns): when the stall began: the event before, since the tape's epoch
-- col until_ns BIGINT (ns): when it ended
-- col gap_us BIGINT (us): how long it was
-- col median_us BIGINT (us): median gap of the reply
-- col outcome VARCHAR: how the request ended
-- col model VARCHAR: model of the request
-- col server_id VARCHAR: replica that served it, where known
-- col weight DOUBLE: requests that the row stands for
CREATE MACRO stalls_over(least_us, medians) AS TABLE
WITH
  _hit AS MATERIALIZED (  -- few as a rule: all else is asked of these replies alone
    SELECT DISTINCT run, request_id
    FROM (
      SELECT
        run,
        request_id,
        unnest(off_us[2:])::BIGINT - unnest(off_us[:-2])::BIGINT AS gap_us
      FROM _streams
      WHERE choice IS NULL
    )
    WHERE gap_us > least_us
  ),
  _replies AS (
    SELECT _streams.*, _median_gap_us(off_us) AS median_us
    FROM _streams
    SEMI JOIN _hit USING (run, request_id)
    WHERE choice IS NULL
  ),
  _of_one_choice AS (
    SELECT *, after_us::BIGINT - before_us::BIGINT AS gap_us
    FROM (
      SELECT
        run,
        request_id,
        send_ns,
        median_us,
        outcome,
        model,
        server_id,
        weight,
        unnest(range(2, len(off_us) + 1)) AS i,
        unnest(off_us[2:]) AS after_us,
        unnest(off_us[:-2]) AS before_us
      FROM _replies
    )
    WHERE gap_us > least_us AND gap_us > medians * median_us
  ),
  _many AS (
    SELECT {'run': run, 'request_id': request_id, 'choice': choice} AS key, gap_us AS value, 1 AS weight
    FROM _events_of_many_choices
    WHERE gap_us IS NOT NULL
  ),
  _medians AS (SELECT key, p50::BIGINT AS median_us FROM quantiles('_many'))
SELECT
  run,
  request_id,
  i,
  NULL::TINYINT AS choice,
  send_ns + before_us::BIGINT * 1000 AS from_ns,
  send_ns + after_us::BIGINT * 1000 AS until_ns,
  gap_us,
  median_us,
  outcome,
  model,
  server_id,
  weight
FROM _of_one_choice
UNION ALL BY NAME
SELECT
  events.run,
  events.request_id,
  i,
  events.choice,
  t_ns - gap_us * 1000 AS from_ns,
  t_ns AS until_ns,
  gap_us,
  median_us,
  outcome,
  model,
  server_id,
  weight
FROM _events_of_many_choices AS events
JOIN _medians
  ON key.run = events.run
  AND key.request_id = events.request_id
  AND key.choice = events.choice
WHERE gap_us > least_us AND gap_us > medians * median_us;

-- Stalls over 200 ms and over 2 median gaps.
-- cols stalls_over: the same columns
CREATE VIEW stalls AS
SELECT * FROM stalls_over(200000, 2);

-- Stalls of each run, over requests that ended well.
-- col run VARCHAR: label of the tape
-- col stalls BIGINT: how many
-- col requests BIGINT: requests that had one
-- col longest_us BIGINT (us): longest
-- col stalled_ns DOUBLE (ns): time in stalls, all requests together
-- col decode_ns DOUBLE (ns): time from first to last event, all requests together
-- col stalled_share DOUBLE: part of that time
-- col replies BIGINT: streamed replies that ended well and have two events
CREATE VIEW stall_rates AS
WITH
  _stalled AS (
    SELECT
      run,
      count(*) AS stalls,
      count(DISTINCT request_id) AS requests,
      max(gap_us) AS longest_us,
      sum(weight * gap_us) * 1000 AS stalled_ns
    FROM stalls
    WHERE outcome = 'ok'
    GROUP BY run
  ),
  _decoded AS (
    SELECT
      run,
      sum(weight * (last_content_ns - first_content_ns))::DOUBLE AS decode_ns,
      count(*) AS replies
    FROM requests
    WHERE outcome = 'ok' AND last_content_ns > first_content_ns
    GROUP BY run
  )
SELECT
  run,
  coalesce(stalls, 0) AS stalls,
  coalesce(requests, 0) AS requests,
  longest_us,
  coalesce(stalled_ns, 0)::DOUBLE AS stalled_ns,
  decode_ns,
  coalesce(stalled_ns, 0)::DOUBLE / decode_ns AS stalled_share,
  replies
FROM _decoded
LEFT JOIN _stalled USING (run);
