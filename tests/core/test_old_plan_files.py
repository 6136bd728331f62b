"""Plan files that version 0.1 has written still load, and their plans still pass, predict and hash the same."""

from pathlib import Path

import pytest

from dip_megatron.core.files import format_plan, plan_sets_of, read_plans
from dip_megatron.core.verify import verify

FILES = Path(__file__).parent / "plans_0_1"


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("single", "835eb7e4c119e380f49bacb205f6cecd5583bda89425f44f45a32ec5c0053be7"),
        ("coupled", "d44462c6b8b56ecc12fcbc312b9ffccee91dad9d4eeee746c4d2db05e1c5e30d"),
    ],
)
def test_files_of_version_0_1_still_load(name, digest):
    path = FILES / f"{name}.jsonl"
    (together,) = plan_sets_of(read_plans(path), path)
    verify(*together.plans)
    assert together.timeline.iteration_time == together.iteration_time
    assert (together.digest() if name == "coupled" else together.plans[0].digest()) == digest
    assert "".join(format_plan(plan) + "\n" for plan in together.plans) == path.read_text(encoding="utf-8")
