"""What changed in the gaps between events, and in the time per token, over paired requests.

Gaps are too many to hold: SQL counts them by run, group, block of time and logarithmic bucket, so
that a quantile here is within 0.27 % of the exact one that `metrics_long` has.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from tokentape.analysis.effects import SIDES, Effect, Mask, Pairs, Samples, effects
from tokentape.analysis.session import Session
from tokentape.analysis.statistics import Ints

METRICS = ("icl", "itl_user", "itl_spread")  # numbered so in _COUNTS
# Requests are joined before their lists are unrolled: joined after, the events would be held. Plain
# replies, with one choice and no event without tokens, are unrolled once, as in latency.itl.
_COUNTS = """
WITH
  _cells AS MATERIALIZED (SELECT run, request_id::UUID AS request_id, cell FROM _compared_requests),
  _plain AS (
    SELECT
      cell,
      unnest(off_us[2:])::BIGINT - unnest(off_us[:-2])::BIGINT AS gap_us,
      unnest(ntok[2:] || ntok[:1])::INTEGER AS ntok,
      weight
    FROM _streams
    JOIN _cells USING (run, request_id)
    WHERE choice IS NULL AND NOT list_contains(ntok, 0)
  ),
  _others AS (
    SELECT cell, unnest(off_us[2:])::BIGINT - unnest(off_us[:-2])::BIGINT AS gap_us, weight
    FROM _streams
    JOIN _cells USING (run, request_id)
    WHERE choice IS NULL AND (ntok IS NULL OR list_contains(ntok, 0))
    UNION ALL
    SELECT cell, gap_us, weight
    FROM _events_of_many_choices
    JOIN _cells USING (run, request_id)
    WHERE gap_us IS NOT NULL
  ),
  _tokens AS MATERIALIZED (
    SELECT
      plain,
      cell,
      coalesce(log2_bucket(gap_us), -1) AS bucket,
      coalesce(log2_bucket(gap_us / ntok), -1) AS bucket_of_each,
      gap_us IS NULL AS first,
      ntok,
      sum(weight) AS weight,
      count(*) AS n
    FROM (
      SELECT true AS plain, cell, gap_us, ntok, weight FROM _plain
      UNION ALL
      SELECT false, cell, gap_us, ntok, weight
      FROM _itl_searched
      JOIN _cells USING (run, request_id)
    )
    GROUP BY ALL
  ),
  _found AS (
    SELECT 0 AS metric, cell, bucket, weight, n FROM _tokens WHERE plain AND NOT first
    UNION ALL
    SELECT 0, cell, coalesce(log2_bucket(gap_us), -1), weight, 1 FROM _others
    UNION ALL
    SELECT 1, cell, bucket, weight, n FROM _tokens WHERE NOT first
    UNION ALL  -- what comes with the first token of an event waits for nothing
    SELECT 1, cell, -1, weight * (ntok - 1), n * (ntok - 1) FROM _tokens WHERE ntok > 1
    UNION ALL
    SELECT 2, cell, bucket_of_each, weight * ntok, n * ntok FROM _tokens WHERE NOT first
  )
SELECT metric, cell, bucket, sum(weight)::DOUBLE AS weight, sum(n)::BIGINT AS n
FROM _found
GROUP BY ALL
"""


def of_gaps(
    session: Session,
    rows: pa.Table,
    pairs: Pairs,
    streamed: Mask,
    groups: Sequence[tuple[str, Mask]],
) -> Iterator[Effect]:
    """The effect on METRICS in every group, over requests that `streamed` holds on both sides.

    rows: with `run` and `request_id`, in the order of the masks and of `pairs`.
    """
    keys = pairs.both(streamed)
    block, n_blocks = pairs.blocks(keys)
    used = streamed & keys[pairs.key] & (pairs.sides["A"] | pairs.sides["B"])
    if not used.any():
        return
    cell, run_of, block_of, where = _cells(pairs, block, used, groups)
    chosen = rows.select(["run", "request_id"]).filter(pa.array(used))
    session.give("_compared_requests", chosen.append_column("cell", pa.array(cell)))
    counts = session.table(_COUNTS)
    metric, at = counts["metric"].to_numpy(), counts["cell"].to_numpy()
    runs = {side: np.unique(pairs.run[mask]) for side, mask in pairs.sides.items()}
    for (group, _), inside in zip(groups, where, strict=True):
        for number, name in enumerate(METRICS):
            mine = (metric == number) & inside[at]
            found = [
                _summed(counts, mine & np.isin(run_of[at], runs[side]), block_of[at], run_of[at])
                for side in SIDES
            ]
            (a, n_a), (b, n_b) = found
            yield from effects(a, b, n_blocks, min(n_a, n_b), group, name)


def _summed(counts: pa.Table, mine: Mask, block: Ints, run: Ints) -> tuple[Samples, int]:
    """Counts of several cells of one run and block put together, and how many gaps they are."""
    bucket, block, run = counts["bucket"].to_numpy()[mine] + 1, block[mine], run[mine]
    if not len(bucket):
        return Samples(np.zeros(0), np.zeros(0), block, run), 0
    sizes = (int(run.max()) + 1, int(block.max()) + 1, int(bucket.max()) + 1)
    place = np.ravel_multi_index((run, block, bucket), sizes)
    weights = np.bincount(place, counts["weight"].to_numpy()[mine])
    known = np.flatnonzero(weights)
    run, block, bucket = np.unravel_index(known, sizes)
    values = np.where(bucket > 0, 1000 * np.exp2((bucket - 0.5) / 128), 0.0)  # bucket is 1 higher
    return Samples(values, weights[known], block, run), int(counts["n"].to_numpy()[mine].sum())


def _cells(
    pairs: Pairs, block: Ints, used: Mask, groups: Sequence[tuple[str, Mask]]
) -> tuple[Ints, Ints, Ints, list[Mask]]:
    """Rows of one run, block and set of groups share a cell.

    Returns the cell of each row that is used, run and block of each cell, and for each group which
    cells are in it.
    """
    run, of_block = pairs.run[used], block[pairs.key[used]]
    cell = np.unique(run * (of_block.max() + 1) + of_block, return_inverse=True)[1]
    for _, mask in groups:  # rows that are in the same groups keep the same number
        cell = np.unique(2 * cell + mask[used], return_inverse=True)[1]
    first = np.unique(cell, return_index=True)[1]
    return cell, run[first], of_block[first], [mask[used][first] for _, mask in groups]
