"""Golden answers of every SQL module on rows small enough to check by hand; rules of the SQL."""

import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rows import MS, make_tape, streamed_row
from tokentape.analysis.catalogue import metrics
from tokentape.analysis.modules import SQL_FOLDER, SqlObject, load_order
from tokentape.analysis.report import ESTIMATES
from tokentape.analysis.session import Session, connect
from tokentape.traces.words import OUTCOMES

Row = dict[str, Any]


def stream(events_us: list[int], tokens: list[int], arrival_ms: int = 0, **columns: Any) -> Row:
    """A streamed reply that was offered, sent 1 ms later, and written to the socket 2 ms later."""
    send_ns = arrival_ms * MS + 1 * MS
    first_ns, last_ns = send_ns + events_us[0] * 1000, send_ns + events_us[-1] * 1000
    times: Row = {
        "send_ns": send_ns,
        "send_end_ns": send_ns + 1 * MS,
        "first_content_ns": first_ns,
        "first_answer_ns": first_ns,
        "last_content_ns": last_ns,
        "end_ns": last_ns + 1 * MS,
        "off_us": array("I", events_us),
        "ntok": array("H", tokens),
        "cls": bytes(len(tokens)),
        "output_tokens": sum(tokens),
    }
    return streamed_row(arrival_ms, len(tokens), **(times | columns))


def whole(arrival_ms: int, **columns: Any) -> Row:
    """A reply that was not streamed."""
    nothing = dict.fromkeys(
        ("off_us", "ntok", "cls", "first_content_ns", "first_answer_ns", "last_content_ns")
    )
    return stream([5000], [7], arrival_ms, **(nothing | {"stream": False} | columns))


def unsent(arrival_ms: int, **columns: Any) -> Row:
    """A row that has an arrival and nothing else, as an import or a refused connection has."""
    row = {"request_id": None, "arrival_ns": None, "input_tokens": None, "output_tokens": None}
    row |= {k: v for k, v in streamed_row(arrival_ms).items() if k in row}
    return row | columns


TAPES: dict[str, list[Row]] = {
    "empty": [],
    "one_token": [stream([9000], [1])],
    "one_event": [stream([9000], [4])],
    "multi": [stream([10_000, 14_000, 20_000], [3, 1, 2])],
    "zero_token_events": [stream([10_000, 12_000, 15_000, 21_000], [1, 0, 2, 1])],
    "two_choices": [
        stream(
            [10_000, 11_000, 14_000, 19_000], [1, 1, 1, 2], choice=bytes([0, 1, 0, 1]), n_choices=2
        )
    ],
    "unknown_tokens": [stream([10_000, 14_000], [1, 1], ntok=None, output_tokens=None)],
    "early": [stream([500, 900], [1, 1], early_reply=True)],
    "reasoning": [stream([10_000, 14_000], [1, 1], cls=bytes([1, 0]), first_answer_ns=15 * MS)],
    "failures": [
        stream([10_000, 12_000], [1, 1], 0),
        stream([40_000, 42_000], [1, 1], 10, outcome="client_abort"),
        whole(20),
        unsent(30, outcome="connect_error", end_ns=31 * MS, error_type="refused"),
        unsent(40, outcome="http_error", http_status=429, send_ns=41 * MS, end_ns=43 * MS),
        stream([10_000], [1], 50, outcome="cut", end_ns=None),
    ],
    "sampled": [
        stream([10_000], [1], 0, sample_prob=0.1),
        stream([20_000], [1], 1, sample_prob=1.0),
        stream([30_000], [1], 2),
    ],
    "imported": [
        unsent(0, outcome="ok", output_tokens=4),
        unsent(500, outcome="ok", output_tokens=6),
    ],
    "late": [
        stream([10_000], [1], 10, scheduled_ns=6 * MS, late_cause="predecessor"),
        stream([10_000], [1], 20, scheduled_ns=20 * MS),
    ],
}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    folder = tmp_path_factory.mktemp("tapes")
    with connect([make_tape(folder / name, rows) for name, rows in TAPES.items()]) as opened:
        yield opened


def ask(session: Session, query: str) -> list[tuple[Any, ...]]:
    return session.sql(query).fetchall()


@pytest.fixture(scope="module")
def long(session: Session) -> list[Row]:
    """All rows of metrics_long of all tapes."""
    rows: list[Row] = session.table("FROM metrics_long").to_pylist()
    return rows


def stats(long: list[Row], run: str, metric: str) -> dict[str, Any]:
    """All statistics of a metric in ms, with its n."""
    found = [r for r in long if (r["run"], r["metric"]) == (run, metric)]
    values = {r["stat"]: None if r["value"] is None else r["value"] / 1e6 for r in found}
    return values | {"n": found[0]["n"]}


# Prelude


def test_requests_have_every_column_but_the_lists_and_a_row_each(session: Session) -> None:
    assert ask(session, "SELECT count(*), count(DISTINCT request_id) FROM requests") == [
        (sum(map(len, TAPES.values())),) * 2
    ]
    names = {row[0] for row in ask(session, "DESCRIBE requests")}
    assert {"run", "weight", "sent_ns", "parents"} <= names and "off_us" not in names


def test_events_and_gaps_unroll_the_lists(session: Session) -> None:
    assert ask(session, "SELECT i, t_ns, off_us, ntok, cls FROM events WHERE run = 'multi'") == [
        (1, 11 * MS, 10_000, 3, 0),
        (2, 15 * MS, 14_000, 1, 0),
        (3, 21 * MS, 20_000, 2, 0),
    ]
    assert ask(session, "SELECT i, t_ns, gap_us, ntok FROM gaps WHERE run = 'multi'") == [
        (2, 15 * MS, 4000, 1),
        (3, 21 * MS, 6000, 2),
    ]


def test_gaps_are_taken_within_a_choice(session: Session) -> None:
    query = "SELECT choice, i, gap_us FROM gaps WHERE run = 'two_choices' ORDER BY i"
    assert ask(session, query) == [(0, 3, 4000), (1, 4, 8000)]


def test_the_weight_is_the_inverse_of_the_probability(session: Session) -> None:
    query = "SELECT weight FROM requests WHERE run = 'sampled' ORDER BY arrival_ns"
    assert ask(session, query) == [(10.0,), (1.0,), (1.0,)]
    assert ask(session, "SELECT run FROM tapes WHERE sampled") == [("sampled",)]


def test_quantiles_are_values_that_were_seen_and_weighted(session: Session) -> None:
    query = "WITH s AS (SELECT 1 AS key, * FROM (VALUES {}) t(value, weight)) FROM quantiles('s')"
    assert ask(session, query.format("(1, 1), (2, 1), (3, 1), (4, 1)"))[0][1:6] == (4, 4, 2.5, 1, 2)
    assert ask(session, query.format("(1, 10), (9, 1), (NULL, 5)"))[0][1:] == (
        2, 11, 19 / 11, 1, 1, 1, 9, 9, 9,
    )  # fmt: skip


def test_a_rank_that_falls_on_a_sample_gives_that_sample_on_both_ways(session: Session) -> None:
    values = "SELECT 1 AS key, i AS value, 1 AS weight FROM range(1, 1001) t(i)"
    for macro in ("quantiles", "_quantiles_of_equals"):
        columns = "n, mean, p50, p90, p99, p999, maximum"
        query = f"WITH s AS ({values}) SELECT {columns} FROM {macro}('s')"
        assert ask(session, query) == [(1000, 500.5, 500, 900, 990, 999, 1000)], macro


def test_a_percentile_needs_a_sample_beyond_its_rank(session: Session) -> None:
    for p, least in ((0.5, 2), (0.9, 10), (0.99, 100), (0.999, 1000)):
        query = f"SELECT enough_samples({least - 1}, {p}), enough_samples({least}, {p})"
        assert ask(session, query) == [(False, True)], p


def test_buckets_hold_their_values(session: Session) -> None:
    query = """
        SELECT max(abs(log2_bucket_middle(log2_bucket(v)) / v - 1)), count(DISTINCT log2_bucket(v))
        FROM (SELECT unnest(range(1, 100000, 7)) AS v)"""
    [(error, buckets)] = ask(session, query)
    assert error < 0.00275 and buckets > 900
    query = "SELECT token_bucket(0), token_bucket(1), token_bucket(5), token_bucket(8)"
    assert ask(session, query) == [(0, 1, 8, 8)]
    assert ask(session, "SELECT time_bucket_ns(-1, 10), time_bucket_ns(19, 10)") == [(-10, 10)]
    assert ask(session, "SELECT event_class(0), event_class(3)") == [("text", "empty")]


# Latency


def test_ttft_from_send_begins_at_the_last_request_byte(session: Session) -> None:
    columns = "ttft_ns / 1e6, ttft_arrival_ns / 1e6, ttfa_ns / 1e6, ttfa_arrival_ns / 1e6"
    query = f"SELECT {columns} FROM ttft WHERE run = '{{}}'"
    assert ask(session, query.format("one_token")) == [(8, 10, 8, 10)]
    assert ask(session, query.format("reasoning")) == [(9, 11, 13, 15)]


def test_an_early_reply_counts_from_the_first_request_byte(session: Session) -> None:
    assert ask(session, "SELECT ttft_ns FROM ttft WHERE run = 'early'") == [(500_000,)]
    assert ask(session, "SELECT e2e_content_ns FROM e2e WHERE run = 'early'") == [(900_000,)]


def test_whole_replies_have_no_first_token_but_an_end(session: Session, long: list[Row]) -> None:
    query = "SELECT count(ttft_ns), count(*) FROM ttft SEMI JOIN requests r USING (request_id) "
    query += "WHERE run = 'failures' AND arrival_ns = 20000000"
    assert ask(session, query) == [(0, 1)]
    assert stats(long, "failures", "ttft")["n"] == 1
    assert stats(long, "failures", "e2e")["n"] == 2


def test_tpot_divides_by_the_tokens_after_the_first(session: Session) -> None:
    assert ask(session, "SELECT tpot_ns FROM tpot WHERE run = 'multi'") == [(2 * MS,)]


def test_tpot_of_tokens_that_came_in_one_event_is_null(session: Session) -> None:
    assert ask(session, "SELECT tpot_ns FROM tpot WHERE run = 'one_event'") == [(None,)]


def test_tpot_of_one_token_and_of_unknown_tokens_is_null_not_zero(
    session: Session, long: list[Row]
) -> None:
    query = "SELECT tpot_ns FROM tpot WHERE run IN ('one_token', 'unknown_tokens')"
    assert ask(session, query) == [(None,), (None,)]
    assert stats(long, "one_token", "tpot")["n"] == 0


def test_tpot_of_several_choices_is_one_row_per_choice(session: Session) -> None:
    query = "SELECT choice, output_tokens, tpot_ns FROM tpot WHERE run = 'two_choices' ORDER BY 1"
    assert ask(session, query) == [(0, 2, 4 * MS), (1, 3, 4 * MS)]


def test_icl_counts_gaps_and_knows_no_tokens(long: list[Row]) -> None:
    found = stats(long, "multi", "icl")
    assert (found["n"], found["p50"], found["max"], found["mean"]) == (2, 4, 6, 5)
    assert stats(long, "unknown_tokens", "icl")["max"] == 4


def test_itl_user_waits_once_for_each_event(long: list[Row]) -> None:
    found = stats(long, "multi", "itl_user")  # 2 zeros, then 4; then 6 and a zero
    assert (found["n"], found["min"], found["p50"], found["max"]) == (5, 0, 0, 6)
    assert found["mean"] == 2  # that is (last - first) / (tokens - 1), as TPOT


def test_itl_spread_shares_the_gap_among_the_tokens(long: list[Row]) -> None:
    found = stats(long, "multi", "itl_spread")  # 4 once, 3 twice
    assert (found["n"], found["p50"], found["max"]) == (3, 3, 4)
    assert found["mean"] == pytest.approx(10 / 3, rel=1e-12)


def test_the_wait_of_an_event_without_tokens_belongs_to_the_next_token(
    session: Session, long: list[Row]
) -> None:
    query = "SELECT i, gap_us, ntok FROM itl WHERE run = 'zero_token_events' ORDER BY i"
    assert ask(session, query) == [(1, None, 1), (3, 5000, 2), (4, 6000, 1)]
    found = stats(long, "zero_token_events", "itl_user")
    assert (found["n"], found["mean"], found["max"]) == (3, pytest.approx(11 / 3), 6)
    assert stats(long, "zero_token_events", "icl")["n"] == 3


def test_itl_is_taken_within_a_choice(session: Session) -> None:
    query = "SELECT choice, i, gap_us FROM itl WHERE run = 'two_choices' ORDER BY i"
    assert ask(session, query) == [(0, 1, None), (1, 2, None), (0, 3, 4000), (1, 4, 8000)]


def test_unknown_token_counts_leave_itl_without_samples(long: list[Row]) -> None:
    assert stats(long, "unknown_tokens", "itl_user")["n"] == 0
    assert stats(long, "unknown_tokens", "itl_spread")["max"] is None


def test_e2e_ends_with_the_reply_or_with_its_last_event(session: Session) -> None:
    columns = "e2e_ns / 1e6, e2e_content_ns / 1e6, e2e_arrival_ns / 1e6"
    assert ask(session, f"SELECT {columns} FROM e2e WHERE run = 'multi'") == [(20, 19, 22)]


# Failures and sampling


def test_latency_stands_on_ok_requests_with_n_and_attempted_beside_it(long: list[Row]) -> None:
    key = ("failures", "ttft", "max")
    [row] = [r for r in long if (r["run"], r["metric"], r["stat"]) == key]
    assert (row["value"], row["n"], row["attempted"]) == (9 * MS, 1, 6)


def test_every_outcome_has_a_row_also_with_no_request(session: Session) -> None:
    query = "SELECT outcome, requests FROM outcomes WHERE run = '{}' ORDER BY ALL"
    expected = dict.fromkeys(OUTCOMES, 0)
    assert dict(ask(session, query.format("empty"))) == expected
    expected |= {"ok": 2, "client_abort": 1, "connect_error": 1, "http_error": 1, "cut": 1}
    assert dict(ask(session, query.format("failures"))) == expected


def test_errors_are_listed_by_who_answered_and_how(session: Session) -> None:
    query = """
        SELECT outcome, http_status, error_type, requests FROM outcomes_errors
        WHERE run = 'failures' ORDER BY outcome"""
    assert ask(session, query) == [
        ("client_abort", None, None, 1),
        ("connect_error", None, "refused", 1),
        ("cut", None, None, 1),
        ("http_error", 429, None, 1),
    ]


def test_sampled_requests_count_by_their_weight(session: Session, long: list[Row]) -> None:
    found = stats(long, "sampled", "ttft")
    assert (found["n"], found["p50"], found["max"]) == (3, 9, 29)
    assert found["mean"] == pytest.approx((10 * 9 + 19 + 29) / 12, rel=1e-12)
    query = "SELECT requests, estimated_requests, share FROM outcomes WHERE run = 'sampled'"
    assert ask(session, query + " AND outcome = 'ok'") == [(3, 12, 1)]


# Throughput


def test_requests_in_flight_rise_and_fall(session: Session) -> None:
    query = "SELECT from_ns / 1e6, until_ns / 1e6, level FROM in_flight WHERE run = '{}' ORDER BY 1"
    assert ask(session, query.format("multi")) == [(1, 22, 1)]
    assert ask(session, query.format("failures")) == [
        (1, 11, 1),
        (11, 14, 2),
        (14, 21, 1),
        (21, 27, 2),
        (27, 41, 1),
        (41, 43, 2),
        (43, 51, 1),
        (51, 54, 2),
        (54, 61, 1),  # the cut one has no end: in flight until the last instant of the run
    ]


def test_intervals_that_touch_do_not_overlap_and_empty_ones_do_not_count(session: Session) -> None:
    query = """
        WITH s AS (FROM (VALUES ('r', 0, 10, 1), ('r', 10, 20, 1), ('r', 5, 5, 1))
        t(run, from_ns, until_ns, weight)) FROM overlap('s') ORDER BY from_ns"""
    assert ask(session, query) == [("r", 0, 10, 1), ("r", 10, 20, 1)]


def test_concurrency_is_weighted_by_time(session: Session) -> None:
    query = """
        WITH s AS (
          FROM (VALUES ('r', 0, 100, 1), ('r', 90, 95, 1)) t(run, from_ns, until_ns, weight)
        )
        SELECT duration_ns, mean, p50, p90, p99, maximum FROM overlap_quantiles('s')"""
    assert ask(session, query) == [(100, 1.05, 1, 1, 2, 2)]


def test_rates_are_over_the_whole_run(session: Session) -> None:
    query = """
        SELECT from_ns, until_ns, offered_per_s, completed_per_s, input_tokens_per_s,
          uncached_tokens_per_s, output_tokens_per_s
        FROM rates WHERE run = 'failures'"""
    [(start, end, offered, completed, into, uncached, out)] = ask(session, query)
    seconds = (end - start) / 1e9
    assert (start, end) == (0, 61 * MS)
    assert offered == pytest.approx(6 / seconds) and completed == pytest.approx(2 / seconds)
    assert into == pytest.approx(60 / seconds) and uncached is None
    assert out == pytest.approx((2 + 2 + 7 + 3 + 3 + 1) / seconds)


def test_rates_of_a_window_count_what_ended_in_it(session: Session) -> None:
    query = (
        "SELECT offered, ended, completed_per_s FROM rates_in(0, 20000000) WHERE run = 'failures'"
    )
    assert ask(session, query) == [(3, 1, 50)]


def test_an_import_offers_load_but_completes_nothing(session: Session, long: list[Row]) -> None:
    query = """
        SELECT offered_per_s, completed_per_s, output_tokens_per_s
        FROM rates WHERE run = 'imported'"""
    assert ask(session, query) == [(4, None, 20)]
    assert stats(long, "imported", "in_flight")["max"] is None


# Quality


def test_lateness_is_told_against_arrival_and_against_the_plan(
    session: Session, long: list[Row]
) -> None:
    query = "SELECT send_lag_ns, schedule_lag_ns, late_cause FROM schedule WHERE run = 'late'"
    assert ask(session, query) == [(1 * MS, 5 * MS, "predecessor"), (1 * MS, 1 * MS, None)]
    query = (
        "SELECT late_cause, requests, max_schedule_lag_ns FROM schedule_causes WHERE run = 'late'"
    )
    assert set(ask(session, query)) == {("predecessor", 1, 5 * MS), (None, 1, 1 * MS)}
    assert stats(long, "late", "schedule_lag")["max"] == 5
    assert stats(long, "multi", "schedule_lag")["n"] == 0


def test_clocks_are_counted_per_stamp(session: Session) -> None:
    query = "SELECT stamp, clock, requests FROM clocks WHERE run = 'failures' ORDER BY stamp"
    assert ask(session, query) == [("arrival", "callback", 4), ("event", "callback", 4)]


# The long table and the catalogue


def test_every_metric_has_the_same_rows_for_every_run(long: list[Row]) -> None:
    found: dict[str, list[tuple[str, str]]] = {run: [] for run in TAPES}
    for row in sorted(long, key=lambda r: (r["metric"], r["stat"])):
        found[row["run"]].append((row["metric"], row["stat"]))
    assert all(rows == found["empty"] for rows in found.values())
    apart = set(ESTIMATES)  # these are in phases_long
    assert {metric for metric, _ in found["empty"]} == {m.name for m in metrics()} - apart
    assert len(set(found["empty"])) == len(found["empty"])


def test_one_view_has_every_metric_estimates_included(session: Session) -> None:
    found = session.sql("SELECT DISTINCT run, metric FROM metrics_all").fetchall()
    assert set(found) == {(run, m.name) for run in TAPES for m in metrics()}


def test_an_empty_tape_measures_nothing_and_counts_zero(long: list[Row]) -> None:
    for row in long:
        if row["run"] == "empty":
            assert row["value"] == (0 if row["metric"] == "outcomes" else None), row
            assert (row["n"], row["attempted"]) == (0, 0)


def test_too_few_samples_give_no_percentile(long: list[Row]) -> None:
    found = stats(long, "one_token", "ttft")
    assert found["p50"] is None and found["p99"] is None
    assert (found["n"], found["mean"], found["min"], found["max"]) == (1, 8, 8, 8)


def test_losses_and_unsealed_rows_lower_the_coverage(tmp_path: Path) -> None:
    rows = [streamed_row(i, 3, events_dropped=1) for i in range(6)]
    tape = make_tape(tmp_path / "t", rows, losses={"w0": {"disk full": 2}})
    with connect([tape]) as session:
        query = "SELECT DISTINCT weight, coverage FROM metrics_long ORDER BY 1"
        assert dict(ask(session, query)) == {
            "request": 6 / 8,
            "time": 6 / 8,
            "none": 6 / 8,
            "event": 6 / 8 * 18 / 24,
            "token": 6 / 8 * 18 / 24,
        }
        assert ask(session, "FROM losses") == [("t", "disk full", 2)]


# House rules


def public_objects() -> list[SqlObject]:
    return [made for module in load_order() for made in module.objects if made.public]


def test_every_column_of_every_public_view_is_documented_with_its_type(session: Session) -> None:
    for made in public_objects():
        if made.kind == "VIEW":
            actual = {row[0]: row[1] for row in ask(session, f"DESCRIBE {made.name}")}
            told = {c.name: c.type for c in made.columns}
            assert set(told) == set(actual), made.name
            wrong = {n: actual[n] for n, t in told.items() if t and t != actual[n]}
            assert not wrong, made.name


def test_every_column_that_a_table_macro_returns_is_documented(session: Session) -> None:
    calls = {
        "quantiles": "WITH s AS (SELECT 1 AS key, 2 AS value, 3.0::DOUBLE AS weight) FROM {}('s')",
        "overlap": "FROM {}('_in_flight_spans')",
        "overlap_quantiles": "FROM {}('_in_flight_spans')",
        "rates_in": "FROM {}(NULL, NULL)",
        "fluidity_at": "FROM {}(500000, 50000)",
        "price_split": "FROM {}(0.0001, 0.1)",
        "stalls_over": "FROM {}(100000, 5)",
        "rates_over_time": "FROM {}(1000000000)",
        "in_flight_over_time": "FROM {}(1000000000)",
        "goodput_judged": "FROM {}('slos')",
        "goodput_under": "FROM {}('slos')",
        "tails_of": "FROM {}('ttft', 0.99)",
        "tails_groups": "FROM {}('ttft', 0.99)",
    }
    macros = {made.name: made for made in public_objects() if made.kind == "MACRO TABLE"}
    assert set(macros) == set(calls)
    for name, call in calls.items():
        relation = session.sql(call.format(name))
        actual = dict(zip(relation.columns, map(str, relation.types), strict=True))
        told = {c.name: c.type for c in macros[name].columns}
        assert set(told) == set(actual), name
        assert not {n for n, t in told.items() if t not in ("ANY", actual[n])}, name


def test_the_catalogue_of_duckdb_has_a_comment_for_every_object_and_column(
    session: Session,
) -> None:
    views = ask(
        session,
        """SELECT table_name, column_name FROM duckdb_columns()
        WHERE NOT internal AND table_name[1] <> '_' AND comment IS NULL""",
    )
    assert views == []
    macros = ask(
        session,
        "SELECT function_name FROM duckdb_functions() WHERE NOT internal AND comment IS NULL",
    )
    assert macros == []
    [(comment,)] = ask(
        session, "SELECT comment FROM duckdb_functions() WHERE function_name = 'overlap'"
    )
    assert "tbl TABLE" in comment and "until_ns BIGINT" in comment


def test_the_source_of_every_metric_exists(session: Session) -> None:
    for metric in metrics():
        view, column = metric.view.split(".")
        assert column in session.sql(f"FROM {view}").columns, metric.name


def test_explain_of_every_view_works_on_a_tape_without_segments(tmp_path: Path) -> None:
    with connect([make_tape(tmp_path / "empty", [])]) as session:
        for made in public_objects():
            if made.kind == "VIEW":
                assert session.sql(f"EXPLAIN FROM {made.name}").fetchall()


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("approx_quantile|reservoir_quantile", "tails wrong by up to 30 %"),
        ("approx_count_distinct", "not exact"),
        ("quantile_cont|median\\(", "interpolates, and its state does not spill"),
        ("->", "arrow lambdas are an error in DuckDB 2.0"),
        (
            "CREATE (OR REPLACE|TABLE|TEMP)|DROP |INSERT |COPY ",
            "a module only creates views and macros",
        ),
    ],
)
def test_banned_sql_is_nowhere(pattern: str, why: str) -> None:
    for path in SQL_FOLDER.glob("**/*.sql"):
        code = "\n".join(line.split("--")[0] for line in path.read_text().splitlines())
        assert not re.search(pattern, code), f"{path}: {why}"


def test_quantiles_of_events_never_sort_the_events(session: Session) -> None:
    """quantile_disc keeps every value in memory: for requests, or within one reply, only."""
    for metric in ("icl", "itl_user", "itl_spread"):
        assert next(m.weight for m in metrics() if m.name == metric) in ("event", "token")
    users = {(m.name, o.name) for m in load_order() for o in m.objects if "quantile_disc" in o.sql}
    assert users == {
        ("prelude.quantiles", "_quantiles_of_equals"),
        ("prelude.quantiles", "_median_gap_us"),
    }
    plan = str(ask(session, "EXPLAIN FROM _gap_counts"))
    assert "quantile" not in plan
