"""Schedules hooked from the outside: what is loaded before, after, without a line in the script, and by a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from tests.forked import alone, done
from tests.marks import needs_megatron_training
from tests.patience import LONG

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="started on the CPU platform")


def said(source: str, **environment: str) -> str:
    """What a new Python writes when it runs ``source``, errors and all."""
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, timeout=LONG, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout + ended.stderr


def test_whoever_holds_the_function_has_ours_and_off_it_is_megatrons_own(tmp_path: Path) -> None:
    program = """
        import sys, types
        from megatron.core.pipeline_parallel import schedules
        originals = [schedules.get_forward_backward_func]  # a global of this module would be replaced
        before = types.ModuleType("a_loop")
        before.by_another_name = originals[0]
        sys.modules["a_loop"] = before
        import dip_megatron
        dip_megatron.install()
        import megatron.core.pipeline_parallel as package
        after = types.ModuleType("another_loop")
        exec("from megatron.core.pipeline_parallel import get_forward_backward_func", after.__dict__)
        held = [package.get_forward_backward_func, schedules.get_forward_backward_func, before.by_another_name,
                after.get_forward_backward_func]
        assert len({id(f) for f in held}) == 1 and held[0] is not originals[0]
        for arguments in ((1, None), (2, None), (2, 2)):
            assert held[0](*arguments) is originals[0](*arguments)
        assert held[0](pp_size=2, vp_size=2) is schedules.forward_backward_pipelining_with_interleaving
        print("all well")
    """
    assert "all well" in alone(program, tmp_path / "log")


def test_one_that_another_package_has_replaced_is_named(tmp_path: Path) -> None:
    program = """
        import logging
        logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
        from megatron.core.pipeline_parallel import schedules
        def choose(*args, **kwargs): return "theirs"
        schedules.get_forward_backward_func = choose
        import dip_megatron
        dip_megatron.install()
        print(schedules.get_forward_backward_func())
    """
    text = alone(program, tmp_path / "log")
    assert text.count("get_forward_backward_func was replaced by __main__.choose before DIP was installed") == 1
    assert text.count("theirs") == 1


def test_the_start_up_file_hooks_what_loads_and_costs_nothing_unasked() -> None:
    line = (ROOT / "dip_megatron_startup.pth").read_text(encoding="utf-8")
    source = f"""
        import sys
        exec({line!r})
        print("watching", any("dip_megatron" in type(finder).__module__ for finder in sys.meta_path))
        print("loaded", [name for name in sys.modules if name.startswith(("dip_megatron", "megatron", "torch"))])
        """
    assert "watching False\nloaded []" in said(source, DIP_SCHEDULE="", DIP_CONFIG="")
    started = said(source, DIP_SCHEDULE="dynamic", DIP_CONFIG="")
    assert "watching True" in started
    assert "'torch'" not in started
    assert "'megatron.core" not in started


@needs_megatron_training
def test_started_up_all_of_megatrons_training_is_hooked_as_it_loads() -> None:
    line = (ROOT / "dip_megatron_startup.pth").read_text(encoding="utf-8")
    text = said(
        f"""
        exec({line!r})
        import megatron.training.arguments as arguments
        import megatron.training.training as training
        import megatron.training.checkpointing as checkpointing
        from megatron.training.models import dist_utils
        import megatron.core.pipeline_parallel as package
        for function in (arguments.add_megatron_arguments, arguments.validate_args, training.get_model,
                         checkpointing.generate_state_dict, dist_utils.build_virtual_pipeline_stages,
                         training.get_forward_backward_func, package.get_forward_backward_func):
            assert hasattr(function, "dip_megatron_hook"), function
        print("all well")
        """,
        DIP_SCHEDULE="dynamic",
        DIP_CONFIG="",
    )
    assert "all well" in text
    assert "dip:" not in text


def test_a_setting_that_makes_no_sense_names_its_variable(tmp_path: Path) -> None:
    command = ["-m", "dip_megatron.cli", "run", __file__]
    ended = done(command, tmp_path, DIP_SCHEDULE="dynamic", DIP_SEARCH_BUDGET="long")
    assert ended.status != 0
    assert ended.err.splitlines()[-1].startswith("dip: DIP_SEARCH_BUDGET=long: search_budget: ")
