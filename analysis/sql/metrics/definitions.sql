-- module: metrics.definitions
-- requires: prelude.schema, prelude.quantiles, latency.ttft, latency.tpot, latency.icl, latency.itl,
--   latency.e2e, latency.normalized, latency.stall, throughput.in_flight, throughput.rates, throughput.hardware,
--   cost.price, cost.energy, quality.outcomes, quality.schedule, slo.goodput, throughput.steady, throughput.prefix,
--   phase.server, phase.phases, phase.interference, tails.tails, frontier.frontier
--
-- What is measured, as a table: the definitions from the heads of all modules.

-- Every metric with its definition.
-- col metric VARCHAR: name
-- col title VARCHAR: name for people
-- col unit VARCHAR: unit of its values
-- col weight VARCHAR: what each sample counts for: request, event, token, time; none for a single number
-- col formula VARCHAR: definition
-- col undefined_when VARCHAR: when it is NULL
-- col differs_from VARCHAR: how other tools differ
-- col source VARCHAR: view and column of the raw values
-- col module VARCHAR: module that defines it
CREATE VIEW metrics AS
SELECT * FROM _metrics;
