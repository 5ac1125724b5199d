-- module: slo.goodput
-- requires: prelude.schema, latency.ttft, latency.tpot, latency.e2e, throughput.rates, slo.slos
--
-- Which requests met a service level objective (SLO), and how many a second did. A request meets its
-- SLO when it ended well and kept every limit that applies to it. A request that failed, was aborted
-- or was cut off met nothing and stays in the denominator.
-- SLOs are rows of `slos`, which is what the command was given, or of any CTE with the same columns. A
-- request belongs to every SLO whose class it is in.

-- What each request measured, for the limits: the slowest choice for TPOT.
CREATE VIEW _slo_measures AS
SELECT
  requests.run,
  requests.request_id,
  requests.arrival_ns,
  requests.end_ns,
  requests.outcome,
  requests.model,
  requests.tenant_digest,
  requests.input_tokens,
  requests.output_tokens,
  ttft_ns,
  ttft_arrival_ns,
  ttfa_ns,
  ttfa_arrival_ns,
  tpot_ns,
  e2e_ns,
  e2e_arrival_ns,
  requests.weight
FROM requests
JOIN ttft USING (run, request_id)
JOIN e2e USING (run, request_id)
LEFT JOIN (
  SELECT run, request_id, max(tpot_ns) AS tpot_ns
  FROM tpot
  GROUP BY run, request_id
) USING (run, request_id);

-- Each request judged by each SLO whose class it is in.
-- Example: WITH s AS (SELECT * REPLACE (2e8::BIGINT AS ttft_ns) FROM slos) FROM goodput_judged('s')
-- arg slos TABLE: name of the table of SLOs
-- col run VARCHAR: label of the tape
-- col request_id UUID: the request
-- col slo VARCHAR: name of the SLO
-- col arrival_ns BIGINT (ns): when it was offered
-- col outcome VARCHAR: how it ended
-- col verdict VARCHAR: met; missed (ended well, a limit was broken); failed (any other outcome that the
--   server or the path to it caused); aborted (the client left); cut (the capture ended first); unjudged
--   (ended well, and no limit applies to it: it counts nowhere)
-- col broken VARCHAR[]: limits that it broke, by metric
-- col skipped VARCHAR[]: limits that do not apply to it, such as the TPOT of a reply of one token
-- col output_tokens INTEGER (tokens): tokens generated
-- col weight DOUBLE: requests that the row stands for
CREATE MACRO goodput_judged(slos) AS TABLE
WITH
  _limits AS (
    SELECT
      measured.*,
      slo,
      list_filter(
        [
          {'metric': 'ttft', 'most': limits.ttft_ns, 'took': measured.ttft_ns::DOUBLE},
          {
            'metric': 'ttft_arrival',
            'most': limits.ttft_arrival_ns,
            'took': measured.ttft_arrival_ns::DOUBLE
          },
          {'metric': 'ttfa', 'most': limits.ttfa_ns, 'took': measured.ttfa_ns::DOUBLE},
          {
            'metric': 'ttfa_arrival',
            'most': limits.ttfa_arrival_ns,
            'took': measured.ttfa_arrival_ns::DOUBLE
          },
          {'metric': 'tpot', 'most': limits.tpot_ns, 'took': measured.tpot_ns},
          {'metric': 'e2e', 'most': limits.e2e_ns, 'took': measured.e2e_ns::DOUBLE},
          {
            'metric': 'e2e_arrival',
            'most': limits.e2e_arrival_ns,
            'took': measured.e2e_arrival_ns::DOUBLE
          }
        ],
        lambda x: x.most IS NOT NULL
      ) AS set_limits
    FROM _slo_measures AS measured
    JOIN query_table(slos) AS limits
      ON (limits.model IS NULL OR limits.model = measured.model)
      AND (limits.tenant IS NULL OR limits.tenant = measured.tenant_digest)
      AND (limits.prompt_from IS NULL OR measured.input_tokens >= limits.prompt_from)
      AND (limits.prompt_until IS NULL OR measured.input_tokens <= limits.prompt_until)
  ),
  _held AS (
    SELECT
      *,
      list_transform(list_filter(set_limits, lambda x: x.took > x.most), lambda x: x.metric) AS broken,
      list_transform(list_filter(set_limits, lambda x: x.took IS NULL), lambda x: x.metric) AS skipped
    FROM _limits
  )
SELECT
  run,
  request_id,
  slo,
  arrival_ns,
  outcome,
  CASE
    WHEN outcome = 'client_abort' THEN 'aborted'
    WHEN outcome = 'cut' THEN 'cut'
    WHEN outcome IS DISTINCT FROM 'ok' THEN 'failed'
    WHEN len(broken) > 0 THEN 'missed'
    WHEN len(skipped) = len(set_limits) THEN 'unjudged'
    ELSE 'met'
  END AS verdict,
  broken,
  skipped,
  output_tokens,
  weight
FROM _held;

-- metric: goodput
-- Title: goodput
-- Formula: requests that met the SLO / length of the whole run, first arrival to last end
-- Unit: requests/s
-- Weight: none
-- View: goodput.goodput_per_s
-- Undefined when: no SLO is given, or no request belongs to it
-- Differs from: vLLM bench (a reply of one token has TPOT 0 and meets every limit; failed requests are
--   left out); DistServe names the highest such rate that the system can be offered, see `frontier`

-- metric: slo_attainment
-- Title: part of the requests that met the SLO
-- Formula: met / (met + missed + failed + aborted + cut)
-- Unit: 1
-- Weight: none
-- View: goodput.attainment
-- Undefined when: as goodput
-- Differs from: SGLang and AIPerf (agree: failures are in the denominator); vLLM drops failures

-- Goodput of each run under each SLO, also where no request is in its class.
-- arg slos TABLE: name of the table of SLOs, as goodput_judged takes it
-- col run VARCHAR: label of the tape
-- col slo VARCHAR: name of the SLO
-- col requests BIGINT: requests of its class, unjudged ones included
-- col met DOUBLE (requests): met it, each by its weight
-- col missed DOUBLE (requests): ended well and broke a limit
-- col failed DOUBLE (requests): failed
-- col aborted DOUBLE (requests): were left by their client
-- col cut DOUBLE (requests): were running when the capture ended
-- col unjudged DOUBLE (requests): no limit applies; in no other number here
-- col skipped BIGINT: single limits that did not apply to a request which others judged
-- col attainment DOUBLE: part that met it
-- col goodput_per_s DOUBLE (requests/s): requests that met it, for each second of the run
-- col good_tokens_per_s DOUBLE (tokens/s): output tokens of these requests, for each second of the run
CREATE MACRO goodput_under(slos) AS TABLE
WITH
  _counts AS (
    SELECT
      run,
      slo,
      count(*) AS requests,
      coalesce(sum(weight) FILTER (verdict = 'met'), 0) AS met,
      coalesce(sum(weight) FILTER (verdict = 'missed'), 0) AS missed,
      coalesce(sum(weight) FILTER (verdict = 'failed'), 0) AS failed,
      coalesce(sum(weight) FILTER (verdict = 'aborted'), 0) AS aborted,
      coalesce(sum(weight) FILTER (verdict = 'cut'), 0) AS cut,
      coalesce(sum(weight) FILTER (verdict = 'unjudged'), 0) AS unjudged,
      coalesce(sum(len(skipped)) FILTER (outcome = 'ok' AND verdict <> 'unjudged'), 0)::BIGINT
        AS skipped,
      sum(weight * output_tokens) FILTER (verdict = 'met') AS good_tokens
    FROM goodput_judged(slos)
    GROUP BY run, slo
  )
SELECT
  run,
  slo,
  coalesce(requests, 0) AS requests,
  coalesce(met, 0)::DOUBLE AS met,
  coalesce(missed, 0)::DOUBLE AS missed,
  coalesce(failed, 0)::DOUBLE AS failed,
  coalesce(aborted, 0)::DOUBLE AS aborted,
  coalesce(cut, 0)::DOUBLE AS cut,
  coalesce(unjudged, 0)::DOUBLE AS unjudged,
  coalesce(skipped, 0) AS skipped,
  met / nullif(met + missed + failed + aborted + cut, 0) AS attainment,
  met * 1e9 / nullif(last_ns - first_ns, 0) AS goodput_per_s,
  good_tokens * 1e9 / nullif(last_ns - first_ns, 0) AS good_tokens_per_s
FROM (SELECT run FROM tapes)
CROSS JOIN (SELECT slo FROM query_table(slos))
LEFT JOIN _counts USING (run, slo)
LEFT JOIN _run_spans USING (run);

-- Each request judged by each SLO that the reader was given.
-- cols goodput_judged: the same columns
CREATE VIEW goodput_requests AS
SELECT * FROM goodput_judged('slos');

-- Goodput of each run under each SLO that the reader was given.
-- cols goodput_under: the same columns
CREATE VIEW goodput AS
SELECT * FROM goodput_under('slos');
