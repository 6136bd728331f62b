"""Where an iteration's time went: the parts add up, and each is what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dip_megatron.cli import main
from dip_megatron.core.simulate import simulate
from dip_megatron.report.breakdown import Breakdown, gaps, measured_breakdown, planned_breakdown
from tests.report.test_run import delivered, record, spans_of_rank

PLAN = delivered(3).plan
RANKS = range(PLAN.graph.ranks)


def sums(parts: list[Breakdown]) -> list[float]:
    return [b.operations + b.cores_lent + b.waiting + b.reading + b.between + b.end for b in parts]


def test_the_parts_of_every_rank_add_up_to_the_iteration() -> None:
    whole = simulate(PLAN.graph, PLAN.schedule).iteration_time
    assert sums(planned_breakdown(PLAN)) == pytest.approx([whole] * len(RANKS))
    spans = [spans_of_rank(PLAN, rank, slower=2.0) for rank in RANKS]
    measured = measured_breakdown(PLAN, spans, [0.25, None])
    assert sums(measured) == pytest.approx([2 * whole] * len(RANKS))
    assert [b.outside for b in measured] == [0.25, None]
    for planned, here in zip(planned_breakdown(PLAN), measured, strict=True):
        assert here.operations == pytest.approx(2 * planned.operations)
        assert here.end == pytest.approx(2 * planned.end)


def test_what_is_planned_between_operations() -> None:
    plain, overhead = planned_breakdown(PLAN), tuple(0.01 * (1 + rank) for rank in RANKS)
    found = planned_breakdown(replace(PLAN, graph=replace(PLAN.graph, overhead=overhead)))
    assert sums(found) == pytest.approx(sums(plain))
    for rank, (before, after) in enumerate(zip(plain, found, strict=True)):
        count = sum(1 for span in spans_of_rank(PLAN, rank) if span.end - span.start > overhead[rank])
        assert after.between >= count * overhead[rank] * (1 - 1e-9) > 0
        assert after.operations + after.between == pytest.approx(before.operations)
        assert (after.waiting, after.end) == pytest.approx((before.waiting, before.end))


def test_cores_that_others_had_are_no_part_of_the_operations() -> None:
    spans = [spans_of_rank(PLAN, rank) for rank in RANKS]
    spans[0] = [replace(s, core_seconds=0.75 * (s.end - s.start)) for s in spans[0]]
    first, second = measured_breakdown(PLAN, spans, [None] * len(RANKS))
    assert first.cores_lent == pytest.approx(first.operations / 3)
    assert second.cores_lent == 0.0


def test_reading_counts_where_it_holds_up_an_operation() -> None:
    plain = [spans_of_rank(PLAN, rank) for rank in RANKS]
    # The last operation of rank 0 starts 4 s late, of which 3 s were reading.
    late = [list(line) for line in plain]
    last = late[0][-1]
    late[0][-1] = replace(last, start=last.start + 4.0, end=last.end + 4.0, reading_seconds=3.0)
    before, after = (measured_breakdown(PLAN, spans, [None] * len(RANKS))[0] for spans in (plain, late))
    assert after.waiting == pytest.approx(before.waiting)
    assert after.reading + after.between == pytest.approx(before.between + 4.0)
    # What was read while another rank's stage still ran costs nothing.
    assert after.reading <= 3.0
    assert before.reading == 0.0
    assert max(gaps(PLAN, late), default=0.0) <= 4.0 + max(gaps(PLAN, plain), default=0.0)


def breakdown(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["trace", "--breakdown", *arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_a_run_is_broken_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, 8, 0.125)
    status, out, _ = breakdown(capsys, str(tmp_path))
    assert status == 0
    for words in (
        "medians of 3",
        "rank 0, planned",
        "rank 1, measured",
        "more than planned",
        "125.0 ms",
        "predicted",
        "beyond the plan's: operations",
    ):
        assert words in out
    status, out, _ = breakdown(capsys, str(tmp_path / "iterations.jsonl"), "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["iterations"], len(found["planned"]), len(found["measured"])) == (3, 2, 2)
    assert found["measured_seconds"] == pytest.approx(2 * found["predicted_seconds"])
    assert found["prediction_error"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"iteration": 1}\n', "no iteration with a breakdown"),
        ("{\n", "line 1: not JSON"),
        ("[]\n", "not an iteration"),
    ],
)
def test_what_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:  # fmt: skip
    path = tmp_path / "iterations.jsonl"
    path.write_text(text)
    status, _, err = breakdown(capsys, str(tmp_path))
    assert status == 2
    assert words in err
    assert str(path) in err
    assert breakdown(capsys, str(tmp_path / "nowhere"))[0] == 2
