-- module: prelude.schema
-- requires:
--
-- The views that every other module stands on: one row per request, one per event, one per gap.
-- The session makes the tables _rows_of_tapes (every sealed row of every tape, lists included, with
-- its `run`), _tapes, _losses and _telemetry before it loads this module.
-- Lists are unrolled by one unnest of the index, so that a column that a query does not name is not
-- read. All lists have the length of off_us.

-- Weight of a row, in whole 1/65536: sums are exact, so they do not depend on the order.
CREATE MACRO _weight(sample_prob) AS coalesce(round(65536 / sample_prob) / 65536, 1.0)::DOUBLE;

-- Streams with their lists, and the few columns that are carried to each event.
CREATE VIEW _streams AS
SELECT
  run,
  request_id,
  send_ns,
  off_us,
  ntok,
  cls,
  choice,
  outcome,
  arrival_ns,
  model,
  server_id,
  _weight(sample_prob) AS weight
FROM _rows_of_tapes;

-- The tapes of the session.
-- col run VARCHAR: label of the tape: its directory name, made unique
-- col path VARCHAR: where the tape lies
-- col tape_id VARCHAR: id that the tape got when it was made
-- col role VARCHAR: capture, replay, simulation or import
-- col created_unix_ns BIGINT (ns): when the tape was made, Unix time
-- col wall_epoch_unix_ns BIGINT (ns): Unix time of the tape's zero
-- col sealed_requests BIGINT: rows that the views show
-- col sealed_events BIGINT: events of these rows
-- col unsealed_requests BIGINT: rows that wait in the journal, open requests included; no view shows them
-- col lost_requests BIGINT: requests that were seen and are not on the tape, for whatever reason
-- col sampled_out_requests BIGINT: requests that got no row because the capture was sampled
-- col damaged_segments BIGINT: files that could not be read and were skipped
-- col sampled BOOLEAN: some rows were kept with a probability below 1
-- col facts JSON: tape.json
CREATE VIEW tapes AS
SELECT * FROM _tapes;

-- What was seen and is not on a tape, by reason.
-- col run VARCHAR: label of the tape
-- col reason VARCHAR: why, as the recorder names it
-- col requests BIGINT: requests lost for this reason
CREATE VIEW losses AS
SELECT * FROM _losses;

-- One row per request, without the lists of events and prefix blocks.
-- cols schema except off_us, ntok, cls, choice, aux_off_us, aux_cls, block_hashes: see FORMAT.md
-- col run VARCHAR: label of the tape
-- col sent_ns BIGINT (ns): where "from send" begins: send_end_ns, or send_ns where early_reply is set
-- col weight DOUBLE: requests that this row stands for: 1 / sample_prob, in whole 1/65536; 1 when
--   not sampled
CREATE VIEW requests AS
SELECT
  * EXCLUDE (off_us, ntok, cls, choice, aux_off_us, aux_cls, block_hashes),
  CASE WHEN early_reply THEN send_ns ELSE send_end_ns END AS sent_ns,
  _weight(sample_prob) AS weight
FROM _rows_of_tapes;

-- One row per event of a streamed reply: a piece of content, or at least one token.
-- col run VARCHAR: label of the tape
-- col request_id UUID: the request
-- col i BIGINT: position in the stream, from 1
-- col t_ns BIGINT (ns): when it arrived, since the tape's epoch
-- col off_us BIGINT (us): when it arrived, after send_ns
-- col ntok INTEGER (tokens): tokens that it carries; NULL when unknown
-- col cls TINYINT: 0 text, 1 reasoning, 2 tool, 3 empty
-- col choice TINYINT: choice that it belongs to; NULL when there is one
-- col outcome VARCHAR: outcome of the request
-- col arrival_ns BIGINT (ns): when the request was offered
-- col model VARCHAR: model of the request
-- col server_id VARCHAR: replica that served it, where known
-- col weight DOUBLE: requests that the row stands for
CREATE VIEW events AS
SELECT
  run,
  request_id,
  i,
  send_ns + off_us[i]::BIGINT * 1000 AS t_ns,
  off_us[i]::BIGINT AS off_us,
  ntok[i]::INTEGER AS ntok,
  cls[i]::TINYINT AS cls,
  choice[i]::TINYINT AS choice,
  outcome,
  arrival_ns,
  model,
  server_id,
  weight
FROM (
  SELECT *, unnest(range(1, len(off_us) + 1)) AS i
  FROM _streams
);

-- One row per message of a stream that is no event: role, usage, finish, done, ping, error.
-- col run VARCHAR: label of the tape
-- col request_id UUID: the request
-- col i BIGINT: position among the messages of this kind, from 1
-- col t_ns BIGINT (ns): when it arrived, since the tape's epoch
-- col off_us BIGINT (us): when it arrived, after send_ns
-- col cls TINYINT: 0 role, 1 usage, 2 finish, 3 done, 4 ping, 5 error, 6 other
-- col outcome VARCHAR: outcome of the request
-- col weight DOUBLE: requests that the row stands for
CREATE VIEW aux_events AS
SELECT
  run,
  request_id,
  i,
  send_ns + aux_off_us[i]::BIGINT * 1000 AS t_ns,
  aux_off_us[i]::BIGINT AS off_us,
  aux_cls[i]::TINYINT AS cls,
  outcome,
  weight
FROM (
  SELECT
    run,
    request_id,
    send_ns,
    aux_off_us,
    aux_cls,
    outcome,
    _weight(sample_prob) AS weight,
    unnest(range(1, len(aux_off_us) + 1)) AS i
  FROM _rows_of_tapes
);

-- Gaps of replies with one choice: the event before is the element before.
CREATE VIEW _gaps_of_one_choice AS
SELECT
  run,
  request_id,
  i,
  send_ns + off_us[i]::BIGINT * 1000 AS t_ns,
  off_us[i]::BIGINT - off_us[i - 1]::BIGINT AS gap_us,
  ntok[i]::INTEGER AS ntok,
  cls[i]::TINYINT AS cls,
  NULL::TINYINT AS choice,
  outcome,
  arrival_ns,
  model,
  server_id,
  weight
FROM (
  SELECT *, unnest(range(2, len(off_us) + 1)) AS i
  FROM _streams
  WHERE choice IS NULL
);

-- Events of replies with several choices, with the event before of the same choice.
CREATE VIEW _events_of_many_choices AS
SELECT
  run,
  request_id,
  i,
  send_ns + off_us[i]::BIGINT * 1000 AS t_ns,
  off_us[i]::BIGINT AS off_us,
  ntok[i]::INTEGER AS ntok,
  cls[i]::TINYINT AS cls,
  choice[i]::TINYINT AS choice,
  outcome,
  arrival_ns,
  model,
  server_id,
  weight,
  off_us[i]::BIGINT - lag(off_us[i]::BIGINT) OVER (
    PARTITION BY run, request_id, choice[i]
    ORDER BY i
  ) AS gap_us
FROM (
  SELECT *, unnest(range(1, len(off_us) + 1)) AS i
  FROM _streams
  WHERE choice IS NOT NULL
);

-- One row per event after the first one of its choice: the time since the event before.
-- col run VARCHAR: label of the tape
-- col request_id UUID: the request
-- col i BIGINT: position in the stream of the event that ends the gap
-- col t_ns BIGINT (ns): when the gap ended, since the tape's epoch
-- col gap_us BIGINT (us): time since the event before of the same choice
-- col ntok INTEGER (tokens): tokens of the event that ends the gap
-- col cls TINYINT: 0 text, 1 reasoning, 2 tool, 3 empty
-- col choice TINYINT: choice; NULL when there is one
-- col outcome VARCHAR: outcome of the request
-- col arrival_ns BIGINT (ns): when the request was offered
-- col model VARCHAR: model of the request
-- col server_id VARCHAR: replica that served it, where known
-- col weight DOUBLE: requests that the row stands for
CREATE VIEW gaps AS
SELECT * FROM _gaps_of_one_choice
UNION ALL BY NAME
SELECT * EXCLUDE (off_us) FROM _events_of_many_choices WHERE gap_us IS NOT NULL;

-- Samples of server metrics, GPU counters and our own health.
-- col run VARCHAR: label of the tape
-- col ts_ns BIGINT (ns): when the sample began, since the tape's epoch
-- col end_ns BIGINT (ns): when the sample was complete
-- col source VARCHAR: URL, device or process that was sampled
-- col name VARCHAR: name as the source gives it
-- col labels VARCHAR: JSON object of labels
-- col value DOUBLE: what was read
CREATE VIEW telemetry AS
SELECT * FROM _telemetry;
