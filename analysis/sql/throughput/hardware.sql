-- module: throughput.hardware
-- requires: prelude.schema, latency.tpot, throughput.rates
--
-- Throughput as the buyer of hardware sees it: for each user and for each GPU. How many GPUs there
-- were is a fact of the tape (`--fact gpus=8`), or is given when a command reads it.

-- metric: tokens_per_s_user
-- Title: tokens/s/user
-- Formula: 1 / tpot of each reply
-- Unit: tokens/s
-- Weight: request
-- View: tpot.tpot_ns
-- Undefined when: tpot is, or it is 0
-- Differs from: InferenceX (1000 / a statistic of TPOT in ms: its median agrees with ours, its p99 is
--   our p1 to within one rank); a mean of these is not 1 / mean TPOT

-- metric: output_tokens_per_s_gpu
-- Title: output tokens/s/GPU
-- Formula: output_tokens_per_s / GPUs
-- Unit: tokens/s
-- Weight: none
-- View: hardware_rates.output_tokens_per_s_gpu
-- Undefined when: no request has a known output_tokens, or the number of GPUs is not known
-- Differs from: InferenceX calls this output_tput_per_gpu; its tput_per_gpu adds input tokens

-- metric: total_tokens_per_s_gpu
-- Title: input and output tokens/s/GPU
-- Formula: (input_tokens_per_s + output_tokens_per_s) / GPUs
-- Unit: tokens/s
-- Weight: none
-- View: hardware_rates.total_tokens_per_s_gpu
-- Undefined when: a token count is not known for any request, or the number of GPUs is not
-- Differs from: InferenceX's tput_per_gpu agrees, cached input tokens included

-- What each run ran on: facts of the tape, or what the reader was told.
-- col run VARCHAR: label of the tape
-- col gpu VARCHAR: name of the GPU
-- col gpus DOUBLE: how many
-- col usd_per_gpu_hour DOUBLE (USD): price of one for an hour
-- col source VARCHAR: tape, or told
CREATE VIEW hardware AS
SELECT * FROM _hardware;

-- Rates of each run for one GPU, over the whole run.
-- col run VARCHAR: label of the tape
-- col gpus DOUBLE: how many
-- col output_tokens_per_s_gpu DOUBLE (tokens/s): tokens generated
-- col uncached_tokens_per_s_gpu DOUBLE (tokens/s): prompt tokens that were computed
-- col total_tokens_per_s_gpu DOUBLE (tokens/s): prompt tokens, cached ones included, and output
CREATE VIEW hardware_rates AS
SELECT
  run,
  gpus,
  output_tokens_per_s / gpus AS output_tokens_per_s_gpu,
  uncached_tokens_per_s / gpus AS uncached_tokens_per_s_gpu,
  (input_tokens_per_s + output_tokens_per_s) / gpus AS total_tokens_per_s_gpu
FROM rates
JOIN hardware USING (run);
