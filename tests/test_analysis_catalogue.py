"""METRICS.md and the catalogue come from the heads of the SQL modules, whole and up to date."""

import dataclasses
from pathlib import Path

from tokentape.analysis.catalogue import markdown, metrics
from tokentape.analysis.modules import load_order

METRICS_MD = Path(__file__).parents[1] / "METRICS.md"


def test_metrics_md_is_up_to_date() -> None:
    told = (
        "run: python -c 'from tokentape.analysis.catalogue import *; print(markdown(), end=\"\")'"
    )
    assert METRICS_MD.read_text() == markdown(), told


def test_every_metric_says_everything_once() -> None:
    found = metrics()
    assert len({m.name for m in found}) == len({m.title for m in found}) == len(found) > 15
    for metric in found:
        assert all(dataclasses.astuple(metric)), metric.name
        assert metric.weight in {"request", "event", "token", "time", "none"}, metric.name


def test_the_catalogue_begins_with_the_first_token() -> None:
    assert [m.name for m in metrics()][:5] == [
        "ttft",
        "ttft_arrival",
        "ttfa",
        "ttfa_arrival",
        "tpot",
    ]


def test_every_public_object_is_in_metrics_md() -> None:
    text = markdown()
    for module in load_order():
        assert f"### Module `{module.name}`" in text
        for made in module.objects:
            shown = f"#### `{made.name}`" in text or f"#### `{made.name}(" in text
            assert shown == made.public, made.name
