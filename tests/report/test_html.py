"""The report in a real browser: it loads from disk, says what was measured, and its controls work."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dip_megatron.cli import main
from dip_megatron.core.files import write_plans
from dip_megatron.report.observed import observed
from tests.browser import CHROMIUM, MISSING, opened
from tests.report.test_run import delivered, record

needs_browser = pytest.mark.skipif(not CHROMIUM, reason=MISSING)


def report(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["report", *arguments])
    return int(ended.value.code or 0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Traces of eight iterations that took twice as long as planned; a second replica took half as long again."""
    record(tmp_path / "run", 8, 0.125)
    lines = (tmp_path / "run" / "iterations.jsonl").read_text().splitlines()
    other = tmp_path / "run" / "dp1_tp0"
    other.mkdir()
    slower = [json.loads(line) for line in lines]
    for line in slower:
        line["iteration_seconds"] *= 1.5
    (other / "iterations.jsonl").write_text("\n".join(map(json.dumps, slower)))
    (tmp_path / "run" / "run.json").write_text(json.dumps({"versions": {"torch": "2.15.0"}}))
    return tmp_path / "run"


def figure(page: Any, name: str, what: str) -> Any:
    return page.evaluate(
        "([name, what]) => { for (const d of Bokeh.documents) { const m = d.get_model_by_name(name);"
        " if (m) return what.split('.').reduce((o, k) => o[k], m); } }",
        [name, what],
    )


def facts(page: Any) -> dict[str, str]:
    return dict(
        zip(page.locator("#facts dt").all_inner_texts(), page.locator("#facts dd").all_inner_texts(), strict=True)
    )


@needs_browser
def test_a_run_is_shown_and_its_controls_work(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert report(str(run), "--out", str(out)) == 0
    plan = delivered(7).plan
    with opened(out) as (page, complaints):
        told = facts(page)
        assert told["pipeline ranks"] == str(plan.graph.ranks)
        assert told["operations"] == str(sum(len(order) for order in plan.schedule.orders))
        assert told["iterations"] == "8"
        assert told["waited for a plan, median"] == "500.0 ms"
        assert page.locator("h2").all_inner_texts() == [
            "Timeline", "Idle time", "Memory", "Iterations", "Planned against measured", "Replicas", "Versions",
        ]  # fmt: skip
        assert "2.15.0" in page.locator("section[aria-label=versions]").inner_text()
        # Every operation has its bar, as long as it was planned and measured.
        bars = page.evaluate(
            "() => { const m = Bokeh.documents[0].get_model_by_name('timeline').renderers[0].data_source.data;"
            " return {operation: [...m.operation], planned: [...m.planned], measured: [...m.measured]}; }"
        )
        assert sorted(bars["operation"]) == sorted(
            str(o) for rank in range(plan.graph.ranks) for o in plan.schedule.operations(plan.graph, rank)
        )
        for planned, measured in zip(bars["planned"], bars["measured"], strict=True):
            assert measured == pytest.approx(2 * planned, rel=1e-3)
        # Straggling: the other replica took half as long again.
        straggling = page.evaluate(
            "() => { const chart = Bokeh.documents[0].get_model_by_name('causes_measured');"
            " return [...chart.renderers[0].data_source.data.straggling]; }"
        )
        assert straggling == pytest.approx([100 / 3] * plan.graph.ranks, rel=1e-3)
        # A pointer on a bar is told what it is.
        box = page.locator("#figure-timeline").bounding_box()
        for x in (50, 52, 54):
            page.mouse.move(box["x"] + x, box["y"] + 50)
        page.locator("text=/· microbatch 0/").wait_for()
        page.locator("text=/planned [0-9.]+ ms · measured [0-9.]+ ms/").wait_for()
        # Keys zoom, move and reset; both timelines go together.
        whole = figure(page, "timeline", "x_range.end") - figure(page, "timeline", "x_range.start")
        page.locator("#figure-timeline").focus()
        page.keyboard.press("+")
        zoomed = (figure(page, "timeline", "x_range.start"), figure(page, "timeline", "x_range.end"))
        assert zoomed[1] - zoomed[0] == pytest.approx(whole / 2)
        assert figure(page, "timeline_measured", "x_range.start") == zoomed[0]
        page.keyboard.press("ArrowRight")
        assert figure(page, "timeline", "x_range.start") == pytest.approx(zoomed[0] + 0.1 * whole)
        page.keyboard.press("0")
        assert figure(page, "timeline", "x_range.end") == pytest.approx(whole)
        # Light and dark: by the reader's system, and by the button.
        light = figure(page, "timeline", "background_fill_color")
        page.locator("#theme").focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert figure(page, "timeline", "background_fill_color") != light
        page.locator("summary").click()
        assert page.locator("#idle tbody tr").count() == 2 * plan.graph.ranks
        assert complaints == []


@needs_browser
def test_a_plan_file_is_shown_in_the_dark_and_where_there_is_little_room(tmp_path: Path) -> None:
    plans = [delivered(i).plan for i in range(3)]
    write_plans(tmp_path / "plans.jsonl", plans)
    out = tmp_path / "report.html"
    assert report(str(tmp_path / "plans.jsonl"), "--number", "2", "--out", str(out)) == 0
    with opened(out, scheme="dark", width=500) as (page, complaints):
        assert facts(page)["plans"] == "3"
        assert "measured, median" not in facts(page)
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert figure(page, "timeline_measured", "name") is None
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert complaints == []


def test_a_report_asks_nothing_of_a_network(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert report(str(run), "--out", str(out)) == 0
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=", out.read_text())


def test_a_run_that_was_killed_has_its_iterations(run: Path, tmp_path: Path) -> None:
    for name in ("trace.json", "last_plan.jsonl"):
        (run / name).unlink()
    assert report(str(run), "--out", str(tmp_path / "report.html")) == 0
    found = observed(run)
    assert found.plan is None
    assert len(found.lines) == 8


def test_bad_input_is_refused_on_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    write_plans(tmp_path / "plans.jsonl", [delivered(0).plan])
    for arguments, words in (
        ([str(tmp_path / "empty")], "no iterations.jsonl"),
        ([str(tmp_path / "plans.jsonl"), "--number", "2"], "there is no plan 2; the file has 1"),
        ([str(tmp_path / "none")], "does not exist"),
    ):
        assert report(*arguments, "--out", str(tmp_path / "r.html")) == 2
        assert words in capsys.readouterr().err
    (run / "trace.json").write_text("{}")
    assert report(str(run), "--out", str(tmp_path / "r.html")) == 2
    assert "not a trace that this version writes" in capsys.readouterr().err
    (run / "iterations.jsonl").write_text("{]\n")
    (run / "trace.json").unlink()
    assert report(str(run), "--out", str(tmp_path / "r.html")) == 2
    assert "line 1: not JSON" in capsys.readouterr().err
