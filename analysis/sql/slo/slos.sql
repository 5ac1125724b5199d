-- module: slo.slos
-- requires:
--
-- Service level objectives: what the reader asks for, and what others published.

-- Latency limits of MLPerf Inference (inference_policies, inference_rules.adoc at ac93e89, July 2026).
-- MLPerf wants them met by the 99th percentile over requests, that is by 99 % of the requests for each
-- limit; its clock starts when a request is due, so TTFT is from arrival.
-- col slo VARCHAR: name of the objective
-- col ttft_arrival_ns BIGINT (ns): limit of TTFT from arrival
-- col tpot_ns BIGINT (ns): limit of TPOT
CREATE VIEW slos_presets AS
SELECT slo, ttft_ms * 1000000 AS ttft_arrival_ns, tpot_ms * 1000000 AS tpot_ns
FROM (
  VALUES
    ('llama2-70b-server', 2000::BIGINT, 200::BIGINT),
    ('llama2-70b-interactive', 450, 40),
    ('llama3.1-8b-server', 2000, 100),
    ('llama3.1-8b-interactive', 500, 30),
    ('llama3.1-405b-server', 6000, 175),
    ('llama3.1-405b-interactive', 4500, 80),
    ('mixtral-8x7b-server', 2000, 200),
    ('deepseek-r1-server', 2000, 80),
    ('deepseek-r1-interactive', 1500, 15),
    ('gpt-oss-120b-server', 3000, 80),
    ('gpt-oss-120b-interactive', 2000, 20)
) AS t (slo, ttft_ms, tpot_ms);

-- The SLOs that the reader was given (`--slo`); none by default. NULL: not limited, not narrowed.
-- col slo VARCHAR: its name
-- col model VARCHAR: class: only this model
-- col tenant VARCHAR: class: only this tenant_digest
-- col prompt_from BIGINT (tokens): class: prompts of at least so many tokens
-- col prompt_until BIGINT (tokens): class: prompts of at most so many tokens
-- col ttft_ns BIGINT (ns): limit of TTFT from send
-- col ttft_arrival_ns BIGINT (ns): limit of TTFT from arrival
-- col ttfa_ns BIGINT (ns): limit of TTFA from send
-- col ttfa_arrival_ns BIGINT (ns): limit of TTFA from arrival
-- col tpot_ns BIGINT (ns): limit of TPOT, of the slowest choice where there are several
-- col e2e_ns BIGINT (ns): limit of E2E from send
-- col e2e_arrival_ns BIGINT (ns): limit of E2E from arrival
CREATE VIEW slos AS
SELECT
  _slos.slo,
  model,
  tenant,
  prompt_from,
  prompt_until,
  ttft_ns,
  coalesce(_slos.ttft_arrival_ns, slos_presets.ttft_arrival_ns) AS ttft_arrival_ns,
  ttfa_ns,
  ttfa_arrival_ns,
  coalesce(_slos.tpot_ns, slos_presets.tpot_ns) AS tpot_ns,
  e2e_ns,
  e2e_arrival_ns
FROM _slos
LEFT JOIN slos_presets ON slos_presets.slo = _slos.preset;
