"""The proof on a GPU, rehearsed: pieces end in time, are kept, and are not run twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import loops, proof
from benchmarks.gpu.proof import Piece


def piece(name: str, code: str, seconds: int = 200) -> Piece:
    def figures(folder: Path) -> dict[str, dict[str, float]]:
        return {name: {"runs": float(len(list(folder.iterdir())))}}

    return Piece(name, seconds, lambda folder, rehearsal: ["-c", f"folder = {str(folder)!r}\n{code}"], figures)


COUNT = "import os\nopen(os.path.join(folder, str(os.getpid())), 'w')"


def test_a_later_call_goes_on_where_the_last_one_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    good, hangs = piece("good", COUNT), piece("hangs", "import time\ntime.sleep(60)", seconds=1)
    fails = piece("fails", "print('why it failed')\nraise SystemExit(4)")
    assert proof.main([str(out), "--rehearse"], [good, hangs, fails]) == 1
    record = json.loads((out / "proof.json").read_text())["pieces"]
    assert [record[name]["status"] for name in ("good", "hangs", "fails")] == [
        "done",
        "stopped after 1 s",
        "failed (4)",
    ]
    assert record["fails"]["tail"] == ["why it failed"]
    mended = [good, piece("hangs", COUNT), piece("fails", COUNT)]
    assert proof.main([str(out), "--rehearse"], mended) == 0
    assert "good: runs 1" in capsys.readouterr().out  # not again
    assert proof.main([str(out), "--rehearse", "--only", "good"], mended) == 0
    assert "good: runs 2" in (out / "proof.txt").read_text()


def test_a_piece_is_not_begun_without_its_time(tmp_path: Path) -> None:
    pieces = [piece("first", COUNT + "\nimport time\ntime.sleep(1.5)"), piece("long", COUNT, seconds=249)]
    assert proof.main([str(tmp_path), "--seconds", "250"], pieces) == 3
    assert list(json.loads((tmp_path / "proof.json").read_text())["pieces"]) == ["first"]
    with pytest.raises(SystemExit, match="is of a proof"):
        proof.main([str(tmp_path), "--rehearse"], pieces)


def test_a_piece_that_was_cut_is_run_again(tmp_path: Path) -> None:
    state = proof.Proof(tmp_path, True)
    state.keep("first", {"status": "cut", "log": "first.txt"})
    assert proof.main([str(tmp_path), "--rehearse"], [piece("first", COUNT)]) == 0


def test_wheels_in_parts_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(11):
        (tmp_path / f"a-1-py3-none-any.whl.part{number}").write_bytes(bytes([number]))
    ran: list[list[str]] = []
    monkeypatch.setattr("subprocess.run", lambda command, check: ran.append(command))
    monkeypatch.setenv("PYTHONPATH", "before")
    proof.install(tmp_path, tmp_path / "site")
    assert (tmp_path / "a-1-py3-none-any.whl").read_bytes() == bytes(range(11))
    assert ran[0][-1] == str(tmp_path / "a-1-py3-none-any.whl")
    with pytest.raises(SystemExit, match="no wheels"):
        proof.install(tmp_path / "site", tmp_path)


def test_lines_of_a_loop_are_medians_over_the_reference() -> None:
    off = loops.Trained("off", seconds=[9.0, 9.0, 9.0, 2.0, 4.0, 3.0], losses=[2.0] * 6)
    plan = {"iteration_seconds": 1.0, "predicted_seconds": 0.8, "bubble_ratio_measured": 0.1,
            "bubble_ratio_planned": 0.05, "stall_seconds": 0.0}  # fmt: skip
    dip = loops.Trained("dip", seconds=[8.0, 8.0, 8.0, 1.0, 2.0, 2.0], losses=[2.0] * 5 + [2.2], planned=[plan] * 6)
    line = dip.line(off)
    assert (line["seconds"], line["gain"], line["measured_over_predicted"]) == (2.0, 2.0, 1.25)
    assert line["loss_difference"] == pytest.approx(0.1)
    assert off.line(off)["bubble"] is None
    loops.print_table("two", [off.line(off), line])
