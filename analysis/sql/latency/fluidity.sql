-- module: latency.fluidity
-- requires: prelude.schema
--
-- Fluidity index (Etalon, arXiv 2407.07000, its algorithm and not the token count of its pages):
-- every token has a deadline, what arrives early banks slack for later ones, and a long stall
-- misses as many deadlines as fit into it.

-- One step of the algorithm: slack, deadlines met and missed after an event of k tokens and a gap,
-- of which the first has the given deadline. The others come with it: each banks a whole pace.
CREATE MACRO _fluidity_step(s, gap_us, k, deadline_us, pace_us) AS
CASE
  WHEN gap_us <= deadline_us + s.slack THEN {
    'slack': s.slack + deadline_us - gap_us + pace_us * (k - 1),
    'met': s.met + k,
    'missed': s.missed
  }
  ELSE {
    'slack': pace_us * (k - 1),
    'met': s.met + k - 1,
    'missed': s.missed + floor((gap_us - s.slack - deadline_us) / deadline_us) + 1
  }
END;

-- Fluidity of each reply with one choice and known tokens, whatever its outcome.
-- Example: SELECT avg(fluidity) FROM fluidity_at(500000, 50000) WHERE outcome = 'ok'
-- arg first_us DOUBLE (us): deadline of the first token, after the request was offered
-- arg pace_us DOUBLE (us): deadline of each further token, after the one before
-- col run VARCHAR: label of the tape
-- col request_id UUID: the request
-- col arrival_ns BIGINT (ns): when it was offered
-- col outcome VARCHAR: how it ended
-- col deadlines BIGINT: deadlines, met and missed
-- col missed BIGINT: deadlines missed
-- col fluidity DOUBLE: part of the deadlines that was met
-- col weight DOUBLE: requests that the row stands for
CREATE MACRO fluidity_at(first_us, pace_us) AS TABLE
WITH _ends AS (
  SELECT
    run,
    request_id,
    arrival_ns,
    outcome,
    weight,
    -- list_reduce knows one type: an event goes in as a state that holds gap, tokens and deadline
    list_reduce(
      list_transform(
        range(1, len(off_us) + 1),
        lambda j: {
          'slack': CASE
            WHEN j = 1 THEN (send_ns - arrival_ns) / 1e3 + off_us[1]
            ELSE off_us[j]::DOUBLE - off_us[j - 1]
          END,
          'met': ntok[j]::DOUBLE,
          'missed': CASE WHEN j = 1 THEN first_us ELSE pace_us END::DOUBLE
        }
      ),
      lambda s, x: _fluidity_step(s, x.slack, x.met, x.missed, pace_us),
      {'slack': 0.0::DOUBLE, 'met': 0.0::DOUBLE, 'missed': 0.0::DOUBLE}
    ) AS s
  FROM _streams
  WHERE choice IS NULL AND len(off_us) >= 1 AND NOT list_contains(ntok, 0)
)
SELECT
  run,
  request_id,
  arrival_ns,
  outcome,
  (s.met + s.missed)::BIGINT AS deadlines,
  s.missed::BIGINT AS missed,
  s.met / (s.met + s.missed) AS fluidity,
  weight
FROM _ends;
