"""What DIP says of Bridge configurations that it can't run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dip_megatron.describe.files import ConfigurationError
from tests.bridge.loop import Run, configuration
from tests.bridge.tiny import TINY
from tests.processes import team

UNFIT = {
    "pipeline_model_parallel_size": 1, "context_parallel_size": 2,
    "defer_embedding_wgrad_compute": True,
}  # fmt: skip


def change_model(settings: dict[str, Any], config: Any) -> None:
    for name, value in settings.items():
        setattr(config.model, name, value)


def said(rank: int, world: int, folder: Path) -> dict[str, str]:
    """By setting; nothing of a configuration that runs."""
    from dip_megatron.megatron.adapters.bridge_checks import check_bridge

    def refusal(change: Callable[[Any], None]) -> str:
        config = configuration(folder, Run(pipeline=2))
        change(config)
        try:
            check_bridge(config, "dynamic")
        except ConfigurationError as error:
            return str(error)
        return ""

    def given(name: str, value: Any) -> Callable[[Any], None]:
        return lambda config: setattr(config.model, name, value)

    found = {name: refusal(given(name, value)) for name, value in UNFIT.items()}
    found["FSDP"] = refusal(lambda c: setattr(c.dist, "use_megatron_fsdp", True))
    found["use_decentralized_pg"] = refusal(lambda c: setattr(c.dist, "use_decentralized_pg", True))
    found["non_persistent_ckpt_type"] = refusal(lambda c: setattr(c.checkpoint, "non_persistent_ckpt_type", "local"))
    experts = {"num_moe_experts": 4}
    for name, value in {"overlap_moe_expert_parallel_comm": True, "moe_enable_routing_replay": True}.items():
        found[name] = refusal(partial(change_model, experts | {name: value}))
    found[""] = refusal(lambda c: None)
    return found


def test_what_cannot_run_is_refused_in_one_line_that_names_it(tmp_path: Path) -> None:
    TINY["qwen2-5-vl"].save(tmp_path)
    (found,) = team(1).run(said, tmp_path)

    assert found.pop("") == ""
    for setting, line in found.items():
        assert setting in line
        assert line.endswith("or use schedule off")
        assert "\n" not in line


def refused_run(rank: int, world: int, folder: Path) -> str:
    from megatron.bridge.training.pretrain import pretrain

    import dip_megatron

    dip_megatron.install()
    config = configuration(folder, Run(dip={"schedule": "dynamic"}))
    with pytest.raises(SystemExit) as ended:
        pretrain(config, lambda *_: None)
    return str(ended.value)


def test_a_run_ends_with_the_line(tmp_path: Path) -> None:
    TINY["qwen2-5-vl"].save(tmp_path)
    assert "there is no pipeline to schedule" in team(1).run(refused_run, tmp_path)[0]


def of_releases(rank: int, world: int) -> list[str]:
    """What is said of an unknown release with everything in its place, and of one that lacks a function."""
    from unittest import mock

    import megatron.bridge.package_info as info
    import megatron.bridge.training.train as loop

    from dip_megatron.megatron.adapters.bridge_checks import check_release

    told: list[str] = []
    with mock.patch.object(info, "__version__", "0.42.1"):
        check_release(told.append)
        with mock.patch.object(loop, "make_data_iterator_list"):
            del loop.make_data_iterator_list
            with pytest.raises(ConfigurationError) as error:
                check_release(told.append)
            loop.make_data_iterator_list = None  # which the patch takes back
    check_release(told.append)
    return [*told, str(error.value)]


def test_an_unknown_release_gets_a_line_and_one_without_a_hook_is_refused() -> None:
    told, refused = team(1).run(of_releases)[0]
    assert told == "Megatron-Bridge 0.42.1 has all that DIP hooks into; DIP is tested with 0.6.2"
    assert refused.startswith(
        "Megatron-Bridge 0.42.1: megatron.bridge.training.train:make_data_iterator_list is missing"
    )
    assert refused.endswith("DIP is tested with 0.6.2: install that, or use schedule off")
    assert "\n" not in refused
