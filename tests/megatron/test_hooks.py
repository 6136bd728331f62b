"""What installing the hooks says of a Megatron that isn't one of the tested releases, in processes of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="started on the CPU platform"),
    pytest.mark.skipif(importlib.util.find_spec("megatron.training") is None, reason="needs megatron.training"),
]


def installed_after(preparation: str) -> str:
    """What ``install()`` writes to the standard error after ``preparation``."""
    source = f"""
        import logging
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        from dip_megatron.megatron.cpu import install_cpu_platform
        install_cpu_platform()
        import megatron.core.package_info, megatron.training.training as training
        from megatron.training.models import dist_utils
        {preparation}
        import dip_megatron
        dip_megatron.install()
        dip_megatron.install()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return "\n".join(line for line in done.stderr.splitlines() if line.startswith("dip:"))


def test_a_tested_release_is_no_news() -> None:
    assert installed_after("") == ""


def test_an_unknown_release_is_named_once_with_what_could_not_be_hooked() -> None:
    said = installed_after(
        "megatron.core.package_info.__version__ = '0.42.1'; del training.get_model; "
        "del dist_utils.build_virtual_pipeline_stages"
    )
    assert said.count("dip:") == 1
    assert "0.42.1 has no megatron.training.models.dist_utils.build_virtual_pipeline_stages (models that Meg" in said
    assert "no megatron.training.training.get_model (models of a script's provider)" in said
    assert "DIP is tested with 0.16 to 0.19" in said


def test_an_unknown_release_with_everything_in_its_place_is_named_too() -> None:
    said = installed_after("megatron.core.package_info.__version__ = '0.42.1'")
    assert said.startswith("dip: Megatron-Core 0.42.1 has all it hooks into. DIP is tested with 0.16 to 0.19")
