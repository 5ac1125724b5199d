"""ServeGen data: a seed draws the same requests, with the rates and lengths that it states."""

import json
from math import gamma
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokentape.traces.errors import TapeError, UsageError
from tokentape.traces.importers import ImportSummary, import_trace
from tokentape.traces.reader import open_tape

REAL = Path(__file__).parents[2] / "shared/data/servegen/m-small"
LENGTHS = {"input_tokens": "{100: 0.25, 200: 0.75}", "output_tokens": "{7: 1.0}"}


def client(folder: Path, *windows: str, dataset: Any = None, name: str = "chunk-0") -> Path:
    path = folder / f"{name}-trace.csv"
    path.write_text("\n".join(windows) + "\n")
    if dataset is not None:
        (folder / f"{name}-dataset.json").write_text(json.dumps(dataset))
    return path


def imported(
    folder: Path, *files: Path, seed: int = 0
) -> tuple[ImportSummary, list[dict[str, Any]]]:
    summary = import_trace("servegen", files, folder / "s.tape", seed=seed, force=True)
    columns = ["arrival_ns", "input_tokens", "output_tokens", "request_id", "extra"]
    return summary, open_tape(summary.tape).read(columns).to_pylist()


def test_a_seed_means_the_same_requests_and_another_means_others(tmp_path: Path) -> None:
    path = client(tmp_path, "0,1.0,1.0,Gamma,1.0,1.0", dataset={"0": LENGTHS})
    _, first = imported(tmp_path, path, seed=7)
    _, again = imported(tmp_path, path, seed=7)
    _, other = imported(tmp_path, path, seed=8)
    assert first == again
    assert [r["arrival_ns"] for r in first] != [r["arrival_ns"] for r in other]
    assert open_tape(tmp_path / "s.tape").facts["seed"] == 8
    assert "drawn" in open_tape(tmp_path / "s.tape").facts["source"]


def test_the_draw_of_a_seed_never_changes(tmp_path: Path) -> None:
    windows = ["0,0.005,1.0,Weibull,0.5,1.0", "600,0.005,1.0,Gamma,0.5,1.0"]
    imported(tmp_path, client(tmp_path, *windows, dataset={"0": LENGTHS}))
    tape = open_tape(tmp_path / "s.tape")
    epoch_ns = tape.facts["wall_epoch_unix_ns"]
    rows = tape.read(["arrival_ns", "input_tokens"]).to_pylist()
    # Written down once; a C library may round the last of a time's 53 bits in another way.
    assert [round((r["arrival_ns"] + epoch_ns) / 1e6) for r in rows] == (
        [233, 113_779, 556_848, 566_637, 600_070, 626_137, 942_365, 972_235, 1_078_549]
    )
    assert [r["input_tokens"] for r in rows] == [200] * 5 + [100] * 4


@pytest.mark.parametrize(("pattern", "shape"), [("Gamma", 0.5), ("Gamma", 4.0), ("Weibull", 0.7)])
def test_gaps_have_the_window_s_rate_and_the_pattern_s_variation(
    tmp_path: Path, pattern: str, shape: float
) -> None:
    windows = [f"{start},20.0,1.0,{pattern},{shape},1.0" for start in range(0, 6_000, 600)]
    path = client(tmp_path, *windows, dataset={"0": LENGTHS})
    _, rows = imported(tmp_path, path)
    gaps_s = np.diff([r["arrival_ns"] for r in rows]) / 1e9
    variance = (
        1 / shape if pattern == "Gamma" else gamma(1 + 2 / shape) / gamma(1 + 1 / shape) ** 2 - 1
    )
    # 120,000 gaps from one seed: the mean is within 5 of its standard errors, the CV within 5 %.
    error_s = 0.05 * (variance / len(gaps_s)) ** 0.5
    assert abs(gaps_s.mean() - 0.05) < 5 * error_s
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(variance**0.5, rel=0.05)


def test_lengths_are_drawn_with_their_probabilities(tmp_path: Path) -> None:
    path = client(tmp_path, "0,50.0,1.0,Gamma,1.0,1.0", dataset={"0": LENGTHS})
    _, rows = imported(tmp_path, path)
    share = np.mean([r["input_tokens"] == 200 for r in rows])
    assert {r["output_tokens"] for r in rows} == {7}
    assert abs(share - 0.75) < 5 * (0.75 * 0.25 / len(rows)) ** 0.5
    assert json.loads(rows[0]["extra"]) == {"client": "chunk-0"}


def test_windows_take_the_lengths_of_the_time_that_they_lie_in(tmp_path: Path) -> None:
    later = {"input_tokens": "{5: 1.0}", "output_tokens": "{6: 1.0}"}
    path = client(
        tmp_path,
        "21000,0.5,1.0,Gamma,1.0,1.0",
        "21600,0.5,1.0,Gamma,1.0,1.0",
        dataset={"0": LENGTHS, "21600": later},
    )
    _, rows = imported(tmp_path, path)
    epoch_ns = open_tape(tmp_path / "s.tape").facts["wall_epoch_unix_ns"]
    for row in rows:
        late = row["arrival_ns"] + epoch_ns >= 21_600 * 10**9
        assert (row["output_tokens"] == 6) == late


def test_idle_windows_are_silent_and_rows_without_lengths_are_counted(tmp_path: Path) -> None:
    empty = {"input_tokens": "{}", "output_tokens": "{}"}
    good = client(
        tmp_path,
        "0,0,0,,0,0",
        "600,0.1,1.0,Gamma,1.0,1.0",
        "21600,0.1,1.0,Gamma,1.0,1.0",
        dataset={"0": LENGTHS, "21600": empty},
    )
    bare = client(tmp_path, "0,0.1,1.0,Gamma,1.0,1.0", name="chunk-1")
    summary, rows = imported(tmp_path, good, bare)
    assert summary.read == summary.written + summary.dropped["no_lengths"]
    assert summary.written == len(rows) > 0
    first, second = open_tape(summary.tape).facts["source"]["files"]
    assert first["dropped"]["no_lengths"] > 0
    assert (second["written"], second["read"]) == (0, second["dropped"]["no_lengths"])


def test_a_seed_where_nothing_is_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--seed 3: azure is a record"):
        import_trace("azure", [tmp_path / "x.csv"], tmp_path / "t.tape", seed=3)


@pytest.mark.parametrize(
    ("window", "says"),
    [
        ("600,0.1,1.0,Gamma,1.0", "line 2: not six fields"),
        ("600,nan,1.0,Gamma,1.0,1.0", "line 2: rate nan"),
        ("600,1e9,1.0,Gamma,1.0,1.0", "line 2: rate 1e9"),
        ("600,0.1,1.0,Pareto,1.0,1.0", "line 2: rate 0.1, pattern 'Pareto' cannot"),
        ("600,0.1,1.0,,0,0", "line 2: rate 0.1, pattern '' cannot"),
        ("600,0.1,1.0,Gamma,-1.0,1.0", "line 2: rate 0.1"),
    ],
)
def test_a_window_that_cannot_be_drawn_from_is_named(
    tmp_path: Path, window: str, says: str
) -> None:
    path = client(tmp_path, "0,0,0,,0,0", window, dataset={"0": LENGTHS})
    with pytest.raises(TapeError) as raised:
        imported(tmp_path, path)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    "text",
    ["{1: 0.5", "__import__('os')", "{-1: 1.0}", "{1: -1.0}", "{1: 0.0}", "[1]", "{'a': 1.0}"],
)
def test_a_text_that_is_no_distribution_is_refused(tmp_path: Path, text: str) -> None:
    path = client(
        tmp_path, "0,0.1,1.0,Gamma,1.0,1.0", dataset={"0": LENGTHS | {"input_tokens": text}}
    )
    with pytest.raises(TapeError, match=r"input_tokens is .*, not a distribution"):
        imported(tmp_path, path)


def test_the_real_clients_give_their_counts(tmp_path: Path) -> None:
    if not REAL.exists():
        pytest.skip("the ServeGen data is not beside this checkout")
    few = [REAL / f"chunk-{n}-trace.csv" for n in (0, 3)]
    summary, rows = imported(tmp_path, *few)
    # 98,147 and 55,989 requests are what the rates say; bursts make a draw differ.
    assert summary.dropped == {}
    assert 0.9 < summary.written / (98_147 + 55_989) < 1.1
    assert {json.loads(r["extra"])["client"] for r in rows[::1000]} == {"chunk-0", "chunk-3"}
