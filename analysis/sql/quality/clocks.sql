-- module: quality.clocks
-- requires: prelude.schema
--
-- How good the stamps are: who took them, how late the process read them, what was put right.

-- Requests by the clock of each stamp, best clock first: kernel, callback, coroutine, wall.
-- col run VARCHAR: label of the tape
-- col stamp VARCHAR: arrival, send or event (the worst of the row)
-- col clock VARCHAR: which clock took it
-- col requests BIGINT: rows
CREATE VIEW clocks AS
SELECT run, stamp, clock, count(*) AS requests
FROM (
  SELECT
    run,
    unnest(['arrival', 'send', 'event']) AS stamp,
    unnest([arrival_clock, send_clock, event_clock]) AS clock
  FROM requests
)
WHERE clock IS NOT NULL
GROUP BY ALL;

-- What makes the stamps of a run worse than its clock.
-- col run VARCHAR: label of the tape
-- col requests BIGINT: rows
-- col lag_max_us INTEGER (us): longest kernel-to-user delay of any read
-- col coalesced_reads BIGINT: reads that held more than one event
-- col clamped_events BIGINT: stamps lowered because they ran backwards
-- col events_dropped BIGINT: events seen but not kept
-- col backpressure_ns BIGINT (ns): time that slow clients stopped upstream reads
CREATE VIEW clocks_quality AS
SELECT
  run,
  count(*) AS requests,
  max(lag_max_us) AS lag_max_us,
  sum(coalesced_reads)::BIGINT AS coalesced_reads,
  sum(clamped_events)::BIGINT AS clamped_events,
  sum(events_dropped)::BIGINT AS events_dropped,
  sum(backpressure_ns)::BIGINT AS backpressure_ns
FROM requests
GROUP BY run;
