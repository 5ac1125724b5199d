-- module: cost.price
-- requires: prelude.schema, throughput.rates, throughput.hardware
--
-- What tokens cost, over wall time: idle hours are paid too, so nothing assumes full use.

-- metric: usd_per_m_output
-- Title: USD per million output tokens
-- Formula: usd_per_gpu_hour x GPUs x 1e6 / (3600 x output_tokens_per_s), whole run
-- Unit: USD
-- Weight: none
-- View: price.usd_per_m_output
-- Undefined when: GPUs, price or output tokens are not known, or no token was generated
-- Differs from: calculators that assume full use around the clock; peers have no such number

-- metric: usd_per_m_total
-- Title: USD per million tokens
-- Formula: as usd_per_m_output, over input and output tokens
-- Unit: USD
-- Weight: none
-- View: price.usd_per_m_total
-- Undefined when: as usd_per_m_output, or input tokens are not known
-- Differs from: as usd_per_m_output

-- Cost of each run.
-- col run VARCHAR: label of the tape
-- col gpus DOUBLE: GPUs
-- col usd_per_gpu_hour DOUBLE (USD): price of one for an hour
-- col hours DOUBLE (h): first arrival to last end
-- col usd DOUBLE (USD): price of the run
-- col usd_per_m_output DOUBLE (USD): for a million output tokens
-- col usd_per_m_total DOUBLE (USD): for a million tokens, input and output
CREATE VIEW price AS
SELECT
  run,
  gpus,
  usd_per_gpu_hour,
  (until_ns - from_ns) / 3.6e12 AS hours,
  gpus * usd_per_gpu_hour * hours AS usd,
  gpus * usd_per_gpu_hour * 1e6 / (3600 * nullif(output_tokens_per_s, 0)) AS usd_per_m_output,
  gpus * usd_per_gpu_hour * 1e6 / (3600 * nullif(input_tokens_per_s + output_tokens_per_s, 0))
    AS usd_per_m_total
FROM rates
JOIN hardware USING (run);

-- Price of a million tokens of each kind, so that the sums pay for the run: the cost is divided by
-- what the GPU did, prefill of uncached tokens and decoding, and cached tokens at a stated part of
-- the price of uncached ones.
-- Example: FROM price_split(0.0001, 0.1)
-- arg prefill_s_per_token DOUBLE (s): GPU time that an uncached prompt token takes, as phase_prefill fits
-- arg cached_part DOUBLE: price of a cached token as a part of that of an uncached one
-- col run VARCHAR: label of the tape
-- col prefill_share DOUBLE: part of the run's time that prefill took
-- col usd_per_m_input DOUBLE (USD): for a million uncached input tokens
-- col usd_per_m_cached DOUBLE (USD): for a million cached input tokens
-- col usd_per_m_output DOUBLE (USD): for a million output tokens
CREATE MACRO price_split(prefill_s_per_token, cached_part) AS TABLE
WITH
  _sums AS (
    SELECT
      run,
      sum(weight * coalesce(cached_tokens, 0))::DOUBLE AS cached,
      sum(weight * (input_tokens - coalesce(cached_tokens, 0)))::DOUBLE AS uncached,
      sum(weight * output_tokens)::DOUBLE AS output
    FROM requests
    GROUP BY run
  ),
  _shares AS (
    SELECT
      *,
      least(1, uncached * prefill_s_per_token / nullif(hours * 3600, 0)) AS prefill_share,
      uncached + cached * cached_part AS input_units
    FROM _sums
    JOIN price USING (run)
  )
SELECT
  run,
  prefill_share,
  usd * prefill_share * 1e6 / nullif(input_units, 0) AS usd_per_m_input,
  usd * prefill_share * 1e6 / nullif(input_units, 0) * cached_part AS usd_per_m_cached,
  usd * (1 - prefill_share) * 1e6 / nullif(output, 0) AS usd_per_m_output
FROM _shares;
