"""Fluidity, hardware, price and energy on rows small enough to check by hand."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rows import MS, make_tape, streamed_row
from tokentape.analysis.hardware import Hardware
from tokentape.analysis.session import connect
from tokentape.traces.errors import UsageError
from tokentape.traces.schema import TELEMETRY

S = 1000 * MS


def priced_tape(path: Path, **given: str) -> Path:
    """Two requests over 10 s: 20 prompt tokens, 8 output tokens."""
    rows = [
        streamed_row(0, 3, end_ns=5 * S),
        streamed_row(1, 5, arrival_ns=S, end_ns=10 * S),
    ]
    return make_tape(path, rows, candidate={"given": given})


def add_energy(tape: Path, readings: list[tuple[int, float]], name: str) -> None:
    rows = [
        {"ts_ns": t, "end_ns": t, "source": "gpu0", "name": name, "labels": "{}", "value": v}
        for t, v in readings
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=TELEMETRY), tape / "telemetry" / "g.parquet")


def singles(tape: Path, **options: object) -> dict[str, float | None]:
    with connect([tape], **options) as session:  # type: ignore[arg-type]
        query = "SELECT metric, value FROM metrics_long WHERE stat = 'value'"
        return dict(session.sql(query).fetchall())


@pytest.mark.parametrize(
    ("gaps_us", "tokens", "met", "missed"),
    [
        ([5000, 2000, 2000], [1, 1, 1], 3, 0),
        ([1000, 6000], [1, 1], 2, 0),  # 4 ms were saved by the first token
        ([1000, 6001], [1, 1], 1, 1),
        ([5000, 9000], [1, 1], 1, 4),  # (9 - 2) / 2 ms, rounded down, and one
        ([5000, 9000, 2000], [1, 3, 1], 4, 4),  # the two that came with it are early
        ([12_000], [1], 0, 2),  # the first deadline has its own length
    ],
)
def test_fluidity_counts_deadlines_and_banks_what_came_early(
    tmp_path: Path, gaps_us: list[int], tokens: list[int], met: int, missed: int
) -> None:
    at = [sum(gaps_us[: i + 1]) for i in range(len(gaps_us))]
    row = streamed_row(0, len(at), off_us=at, ntok=tokens, send_ns=0, send_end_ns=0)
    with connect([make_tape(tmp_path / "t", [row])]) as session:
        found = session.sql("SELECT deadlines, missed FROM fluidity_at(5000, 2000)").fetchall()
    assert found == [(met + missed, missed)]


def test_rates_for_a_gpu_and_costs_come_from_the_facts_of_the_tape(tmp_path: Path) -> None:
    found = singles(priced_tape(tmp_path / "t", gpus="2", usd_per_gpu_hour="3.6"))
    assert found["output_tokens_per_s_gpu"] == pytest.approx(0.4)
    assert found["total_tokens_per_s_gpu"] == pytest.approx(1.4)
    # 10 s of two GPUs at 3.6 USD an hour are 0.02 USD, for 8 output and 28 tokens in all
    assert found["usd_per_m_output"] == pytest.approx(0.02 / 8 * 1e6)
    assert found["usd_per_m_total"] == pytest.approx(0.02 / 28 * 1e6)


def test_what_the_reader_says_replaces_the_fact_and_nothing_is_guessed(tmp_path: Path) -> None:
    tape = priced_tape(tmp_path / "t", gpus="many")
    assert singles(tape)["output_tokens_per_s_gpu"] is None
    told = singles(tape, hardware={"t": Hardware(gpus=4)})
    assert told["output_tokens_per_s_gpu"] == pytest.approx(0.2)
    assert told["usd_per_m_output"] is None
    with pytest.raises(UsageError, match="no run is named x"):
        singles(tape, hardware={"x": Hardware(gpus=4)})


def test_the_split_prices_pay_for_the_whole_run(tmp_path: Path) -> None:
    rows = [streamed_row(0, 8, end_ns=10 * S, input_tokens=100, cached_tokens=40)]
    given = {"gpus": "1", "usd_per_gpu_hour": "3.6"}
    tape = make_tape(tmp_path / "t", rows, candidate={"given": given})
    with connect([tape]) as session:
        columns = "prefill_share, usd_per_m_input, usd_per_m_cached, usd_per_m_output"
        [(share, new, cached, out)] = session.sql(
            f"SELECT {columns} FROM price_split(0.05, 0.1)"
        ).fetchall()
    assert share == pytest.approx(60 * 0.05 / 10)
    assert cached == pytest.approx(new * 0.1)
    assert (60 * new + 40 * cached + 8 * out) / 1e6 == pytest.approx(0.01)


def test_energy_is_the_difference_of_a_counter_over_the_tokens_of_its_window(
    tmp_path: Path,
) -> None:
    tape = priced_tape(tmp_path / "t")
    # millijoules; the driver was loaded anew between the second and the third reading
    readings = [(0, 5000.0), (4 * S, 9000.0), (6 * S, 100.0), (8 * S, 2100.0)]
    add_energy(tape, readings, "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION")
    assert singles(tape)["joules_per_output_token"] == pytest.approx((4 + 2) / 8)


def test_energy_of_less_than_a_second_is_not_known(tmp_path: Path) -> None:
    tape = priced_tape(tmp_path / "t")
    add_energy(tape, [(0, 1.0), (S // 2, 9.0)], "tokentape_gpu_energy_joules_total")
    assert singles(tape)["joules_per_output_token"] is None
