"""What installing the hooks says of a Megatron that isn't one of the tested releases, in processes of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.forked import alone
from tests.marks import needs_megatron_training

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="started on the CPU platform"),
    needs_megatron_training,
]


Said = Callable[..., str]


@pytest.fixture
def installed_after(tmp_path: Path) -> Said:
    """What ``install()`` writes to the standard error after ``preparation``, and what ``then`` comes upon."""

    def said(preparation: str, then: str = "") -> str:
        text = alone(
            f"""
        import logging
        logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
        import megatron.core.package_info, megatron.training.training as training
        from megatron.training.models import dist_utils
        {preparation}
        import dip_megatron
        dip_megatron.install()
        dip_megatron.install()
        {then}
            """,
            tmp_path / "log",
        )
        return "\n".join(line for line in text.splitlines() if line.startswith("dip:"))

    return said


def test_a_tested_release_is_no_news(installed_after: Said) -> None:
    assert installed_after("") == ""


def test_an_unknown_release_is_named_once_with_what_could_not_be_hooked(installed_after: Said) -> None:
    said = installed_after(
        "megatron.core.package_info.__version__ = '0.42.1'; del training.get_model; "
        "del dist_utils.build_virtual_pipeline_stages"
    )
    assert said.count("dip:") == 1
    assert "0.42.1 has no megatron.training.models.dist_utils.build_virtual_pipeline_stages (models that Meg" in said
    assert "no megatron.training.training.get_model (models of a script's provider)" in said
    assert "DIP is tested with 0.16 to 0.19" in said


def test_an_unknown_release_with_everything_in_its_place_is_named_too(installed_after: Said) -> None:
    said = installed_after("megatron.core.package_info.__version__ = '0.42.1'")
    assert said.startswith("dip: Megatron-Core 0.42.1 has all it hooks into. DIP is tested with 0.16 to 0.19")


REPLACED = """
        import functools, types
        from dip_megatron.megatron.hooks import Hooks
        def theirs(*arguments, **keywords): ...
        training.get_model = {replacement}
        runs = Hooks.installed().runs
        runs.make_session = lambda *_: None
        runs.begin(types.SimpleNamespace(), None)
"""


def test_a_hook_that_another_package_has_replaced_is_named_when_a_run_begins(
    installed_after: Said,
) -> None:
    said = installed_after("", REPLACED.format(replacement="theirs"))
    assert said == (
        "dip: megatron.training.training.get_model, a hook of DIP's, has been replaced by __main__.theirs; if that "
        "doesn't call DIP's, install DIP after it"
    )


def test_a_hook_that_another_package_has_wrapped_is_no_news(installed_after: Said) -> None:
    assert installed_after("", REPLACED.format(replacement="functools.wraps(training.get_model)(theirs)")) == ""
