"""scripts/bench executor at its smallest: both sides train the same model, and all that is to be compared is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_both_cases(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench_executor.py"), "--quick", "--rounds", "2", "--json",
         str(tmp_path / "numbers.json")],
        capture_output=True, text=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "executor, interleaved order" in done.stdout
    assert "split backward, against 1F1B" in done.stdout
    record = json.loads((tmp_path / "numbers.json").read_text())
    for result in (record["results"]["interleaved"], record["results"]["split"]):
        assert result["difference"] < 1e-4
        assert len(result["ratios"]) == record["setting"]["rounds"]
        assert min(result["ratios"]) > 0
    assert "between two operations: " in done.stdout
    low, middle, high = record["results"]["interleaved"]["gaps"]
    assert 0 < low <= middle <= high < 1
    split = record["results"]["split"]
    assert min(split["predicted_ours"], split["predicted_theirs"]) > 0
    assert all(s["forward"] > 0 and s["fused"] > 0 for line in split["stages"] for s in line)
