-- module: prelude.units
-- requires:
--
-- Units, and buckets for grouping. A logarithmic bucket holds values within 0.27 % of its middle;
-- counts by bucket add up over files, minutes, runs and hosts.

-- Nanoseconds as milliseconds; for display only.
-- arg duration_ns BIGINT (ns): a duration
CREATE MACRO ns_to_ms(duration_ns) AS duration_ns / 1e6;

-- Nanoseconds as seconds; for display only.
-- arg duration_ns BIGINT (ns): a duration
CREATE MACRO ns_to_s(duration_ns) AS duration_ns / 1e9;

-- Unix time of an instant of a tape, for joining with logs.
-- arg instant_ns BIGINT (ns): an instant, since the tape's epoch
-- arg wall_epoch_unix_ns BIGINT (ns): the tape's epoch, from `tapes`
CREATE MACRO to_timestamp_of(instant_ns, wall_epoch_unix_ns) AS
make_timestamp_ns(wall_epoch_unix_ns + instant_ns);

-- Number of the logarithmic bucket of a value, 128 to a factor of two; NULL below 1.
-- arg amount DOUBLE: a duration, a length, a rate
CREATE MACRO log2_bucket(amount) AS
CASE WHEN amount >= 1 THEN floor(log2(amount) * 128)::INTEGER END;

-- Middle of a logarithmic bucket, in the unit that went in.
-- arg bucket INTEGER: a number that log2_bucket gave
CREATE MACRO log2_bucket_middle(bucket) AS pow(2, (bucket + 0.5) / 128);

-- Power of two at or above a token count: 0, 1, 2, 4, 8, ...
-- arg tokens INTEGER (tokens): a token count
CREATE MACRO token_bucket(tokens) AS
CASE WHEN tokens >= 1 THEN pow(2, ceil(log2(tokens)))::BIGINT WHEN tokens = 0 THEN 0 END;

-- Start of the time slice that holds an instant.
-- arg instant_ns BIGINT (ns): an instant, since the tape's epoch
-- arg slice_ns BIGINT (ns): length of a slice
CREATE MACRO time_bucket_ns(instant_ns, slice_ns) AS
(instant_ns - ((instant_ns % slice_ns + slice_ns) % slice_ns))::BIGINT;

-- Name of the class of an event.
-- arg cls TINYINT: class code, from `events` or `gaps`
CREATE MACRO event_class(cls) AS ['text', 'reasoning', 'tool', 'empty'][cls + 1];
