"""scripts/bench executor at its smallest: both sides train the same model, and all that is to be compared is there."""

from __future__ import annotations

import json

from benchmarks import executor as bench_executor
from tests.bench.forked_ranks import run_script


def test_both_cases(tmp_path):
    numbers = tmp_path / "numbers.json"
    printed = run_script(bench_executor.main, ["--quick", "--rounds", "2", "--json", str(numbers)], tmp_path)
    assert "executor, interleaved order" in printed
    assert "split backward, against 1F1B" in printed
    record = json.loads(numbers.read_text())
    for result in (record["results"]["interleaved"], record["results"]["split"]):
        assert result["difference"] < 1e-4
        assert len(result["ratios"]) == record["setting"]["rounds"]
        assert min(result["ratios"]) > 0
    assert "between two operations: " in printed
    low, middle, high = record["results"]["interleaved"]["gaps"]
    assert 0 < low <= middle <= high < 1
    split = record["results"]["split"]
    assert min(split["predicted_ours"], split["predicted_theirs"]) > 0
    assert all(s["forward"] > 0 and s["fused"] > 0 for line in split["stages"] for s in line)
