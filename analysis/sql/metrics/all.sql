-- module: metrics.all
-- requires: metrics.long, phase.phases_long
--
-- Everything that METRICS.md defines, by one query. It costs the passes over all events that the estimates of
-- the phases take; metrics_long leaves these out and is what the commands read.

-- metrics_long and phases_long: measurements, and estimates under names of their own (`..._estimate`).
-- Example: SELECT metric, stat, value FROM metrics_all WHERE metric LIKE '%_estimate'
-- col run VARCHAR: label of the tape
-- col metric VARCHAR: name, as in `metrics`; estimates end in _estimate
-- col stat VARCHAR: p50, p90, p99, p99.9, mean, min, max; value for a rate; the outcome for outcomes;
--   the name of the SLO for goodput and slo_attainment
-- col weight VARCHAR: what each sample counts for: request, event, token, time, none
-- col value DOUBLE: the number, in `unit`; NULL when unknown, not applicable or too few samples
-- col unit VARCHAR: ns, requests, requests/s, tokens/s, USD, J, 1 (a share)
-- col n BIGINT: samples that it stands on: requests, choices, events, tokens or steps of a level
-- col attempted BIGINT: requests on the tape, whatever their outcome
-- col coverage DOUBLE: part of what was seen that the tape holds: requests, and for events and
--   tokens also the events kept
CREATE VIEW metrics_all AS
SELECT * FROM metrics_long
UNION ALL BY NAME
SELECT * FROM phases_long;
