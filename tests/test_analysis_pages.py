"""HTML pages in a real browser: what they show, what they refuse, who can read them."""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

import tokentape
from rows import MS, make_tape, streamed_row
from tokentape.__main__ import main
from tokentape.analysis import chart_rows, charts, frontier_page
from tokentape.analysis.frontier import Frontier

HOSTILE = "<img src=x onerror=document.title='owned'>"
LONG = "m" * 10_000
RTL = "\u202eمودل</script><script>document.title='owned'</script>"
LIMIT_BYTES = 2_000_000

Opened = tuple[Page, list[str]]


def varied_rows(n: int) -> list[dict[str, Any]]:
    """Requests over some seconds with a log-normal TTFT, some failed, some partly cached."""
    draw = random.Random(7)
    made = []
    for i in range(n):
        row = streamed_row(i * 20, 4, model=("m", HOSTILE, LONG, RTL)[i % 4])
        ttft_ns = int(draw.lognormvariate(3, 1) * MS)
        row["input_tokens"], row["cached_tokens"] = draw.randrange(1, 9000), 0
        row["first_content_ns"] = row["first_byte_ns"] = row["send_ns"] + ttft_ns
        row["last_content_ns"] = row["first_content_ns"] + 3 * MS
        row["end_ns"] = row["last_content_ns"] + MS
        row["off_us"] = type(row["off_us"])("I", [ttft_ns // 1000 + 1000 * k for k in range(4)])
        made.append(row | ({"outcome": "http_error", "http_status": 503} if i % 50 == 3 else {}))
    return made


@pytest.fixture(scope="module")
def tape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    verdict = {"level": "suspect", "reasons": [f"suspect: {HOSTILE}"]}
    folder = tmp_path_factory.mktemp("pages")
    return make_tape(folder / "<b>run & co.tape", varied_rows(800), role="replay", verdict=verdict)


@pytest.fixture(scope="module")
def html(tape: Path) -> Path:
    file = tape.parent / "report.html"
    file.write_text("older", encoding="utf-8")
    assert run_cli("report", str(tape), "--html", str(file), "--force") == 0
    return file


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's chromium; playwright's own browsers are never downloaded."""
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def load(browser: Browser) -> Iterator[Callable[..., Opened]]:
    """Opens a page with all charts drawn; beside it whatever it asked for or complained of."""
    contexts = []

    def opened(file: Path, width: int = 1280, scheme: Any = "light") -> Opened:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        troubles: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_function("document.documentElement.dataset.charts")
        return page, troubles + asked[1:]  # the first one is the page itself

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def wide(load: Callable[..., Opened], html: Path) -> Opened:
    return load(html)


def charts_of(file: Path) -> dict[str, Any]:
    return charts_in(file.read_text(encoding="utf-8"))


def charts_in(text: str) -> dict[str, Any]:
    """The data that a page draws, by chart."""
    [found] = re.findall(r'id="charts">(.*?)</script>', text, re.DOTALL)
    return {chart["name"]: chart for chart in json.loads(found)}


def test_a_page_opens_offline_and_asks_for_nothing(wide: Opened, html: Path) -> None:
    page, troubles = wide
    assert troubles == []
    assert page.evaluate("document.documentElement.dataset.charts") == str(len(charts_of(html)))
    assert html.stat().st_size < LIMIT_BYTES


@pytest.mark.parametrize("name", ["ttft-map-0", "e2e-map-0", "icl-map-0", "prompts-0"])
def test_a_map_has_a_mark_for_each_cell_that_sql_counted(
    wide: Opened, html: Path, name: str
) -> None:
    cells = charts_of(html)[name]["rows"]
    marks = wide[0].locator(f"#chart-{name} .mark-rect.role-mark path")
    assert marks.count() == len(cells) > 1


def test_a_map_counts_every_request_once(html: Path) -> None:
    found = charts_of(html)["ttft-map-0"]
    assert sum(row[found["names"].index("n")] for row in found["rows"]) == 800 - 16


def test_each_point_of_a_distribution_is_a_value_that_was_seen_with_its_exact_share(
    html: Path,
) -> None:
    ok = [r for r in varied_rows(800) if r["outcome"] == "ok"]
    ttft_ms = sorted((r["first_content_ns"] - r["send_end_ns"]) / 1e6 for r in ok)
    points = [row for row in charts_of(html)["ttft"]["rows"] if row[3] == ""]
    assert len(points) > 100
    for _, value_ms, below, _ in points:
        at_most = sum(value <= value_ms * (1 + 1e-4) for value in ttft_ms) / len(ttft_ms)
        less = sum(value < value_ms * (1 - 1e-4) for value in ttft_ms) / len(ttft_ms)
        assert less - 1e-4 <= below <= at_most + 1e-4
        assert min(abs(value / value_ms - 1) for value in ttft_ms) < 1e-4


def test_percentiles_are_marked_where_the_report_has_them(wide: Opened, tape: Path) -> None:
    words = wide[0].locator("#chart-ttft .mark-text.role-mark text").all_text_contents()
    assert words == ["p50", "p90", "p99"]  # 784 requests are too few for a p99.9


def test_phases_of_a_slice_are_stacked_without_a_gap() -> None:
    means = {"queue_ms": 1.0, "prefill_ms": 2.5, "decode_ms": 40.0, "outside_ms": None}
    slices = [{"from_s": 0.0, "n": 3, **means}, {"from_s": 2.0, "n": 1, **means}]
    drawn = charts.phases("p", "Phases", slices, 2.0, "words")
    low, high, start = (drawn.names.index(n) for n in ("low_ms", "high_ms", "from_s"))
    spans = [(row[low], row[high]) for row in drawn.rows if row[start] == 2.0]
    assert spans == [(0.0, 1.0), (1.0, 3.5), (3.5, 43.5), (43.5, 43.5)]


def test_hostile_names_are_text(wide: Opened) -> None:
    page, _ = wide
    assert page.title() == "Report: <b>run & co.tape"
    assert page.locator("img, header b").count() == 0
    told = page.locator("#headline p").first.inner_text()
    assert told.endswith(f"suspect: {HOSTILE}")
    assert LONG not in page.content()


@pytest.mark.parametrize(
    ("width", "scheme"), [(390, "dark"), pytest.param(1280, "light", marks=pytest.mark.slow)]
)
def test_a_page_fits_its_screen_and_has_no_serious_fault_of_access(
    load: Callable[..., Opened], html: Path, width: int, scheme: str
) -> None:
    page, _ = load(html, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = Axe().run(page).response["violations"]
    serious = {v["id"]: v["nodes"][0]["html"] for v in found if v["impact"] != "minor"}
    assert serious == {}


def test_a_definition_is_one_key_away(wide: Opened) -> None:
    page, _ = wide
    page.locator('a[href="#def-ttft"]').first.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#def-ttft"
    assert "first_content_ns" in page.locator("#def-ttft + dd").inner_text()
    page.evaluate("window.scrollTo(0, 0); document.activeElement.blur()")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") != ""


def test_the_data_of_charts_have_a_bound_that_no_tape_can_pass(html: Path) -> None:
    slices, buckets = chart_rows.SLICES + 1, 31
    sizes = {name: len(chart["rows"]) for name, chart in charts_of(html).items()}
    assert sizes["ttft"] <= 151 + 4  # of 784 values
    assert sizes["prompts-0"] <= buckets**2
    assert max(sizes[f"{metric}-map-0"] for metric in ("ttft", "e2e", "icl")) <= slices * buckets
    assert sizes["offered_per_s"] <= slices + 1


def test_a_page_that_exists_is_replaced_only_by_force(
    tape: Path, html: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = html.read_bytes()
    assert run_cli("report", str(tape), "--html", str(html)) == 1
    assert "--force" in capsys.readouterr().err
    assert html.read_bytes() == before


@pytest.mark.slow
def test_a_notebook_shows_the_page_in_a_frame_that_cannot_reach_it(
    browser: Browser, tape: Path
) -> None:
    found = tokentape.open(tape).report()
    assert str(found).startswith("tape ")
    page = browser.new_page()
    page.set_content(f"<title>mine</title>{found._repr_html_()}")
    drawn = page.frames[1].wait_for_selector("#chart-ttft svg")
    assert drawn is not None and page.title() == "mine"
    assert page.frames[1].evaluate("window.origin") == "null"
    page.close()


@pytest.fixture(scope="module")
def pareto() -> Frontier:
    """Four runs of hostile names, one of them dominated, one without a number of GPUs."""
    numbers = dict.fromkeys(
        [f"tokens_per_s_{axis}_{end}" for axis in ("user", "gpu") for end in ("lo", "hi")]
        + ["usd_per_m_output", "joules_per_output_token", "attainment", "of_light_speed"]
    )
    made = [
        (HOSTILE, 90.0, 200.0, False, "frontier"),
        ("b", 50.0, 900.0, False, "operating point"),
        ("c", 40.0, 300.0, True, "dominated"),
        ("d", 45.0, None, None, "not placed"),
    ]
    names = ("run", "tokens_per_s_user", "tokens_per_s_gpu", "dominated", "part")
    points = [numbers | {"configuration": RTL} | dict(zip(names, one, strict=True)) for one in made]
    points[0]["usd_per_m_output"] = 1.5
    return Frontier(points, [], 0.99, "b", None, ["the run c is suspect; see report c"])


def test_a_frontier_has_a_mark_for_each_run_and_dims_those_that_are_dominated(
    load: Callable[..., Opened], pareto: Frontier, tmp_path: Path
) -> None:
    file = tmp_path / "frontier.html"
    file.write_text(frontier_page.page_of(pareto), encoding="utf-8")
    page, troubles = load(file, 390, "dark")
    assert troubles == []
    marks = page.locator("#chart-tokens_per_s_gpu .mark-symbol.role-mark path")
    assert sorted(float(m.get_attribute("opacity") or 1) for m in marks.all()) == [0.35, 1, 1]
    assert page.locator("#chart-usd_per_m_output .mark-symbol.role-mark path").count() == 1
    assert page.locator("#chart-joules_per_output_token").count() == 0
    copied = (page.locator("#points pre").text_content() or "").splitlines()
    assert [line.split("\t")[0] for line in copied] == ["run", HOSTILE, "b", "c", "d"]
    assert page.locator("img").count() == 0


def run_cli(*words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["tokentape", *words])
        with pytest.raises(SystemExit) as left:
            main()
    return int(left.value.code or 0)
