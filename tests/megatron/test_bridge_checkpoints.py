"""Chunks that a run of Megatron-Bridge's goes on with: each checkpoint says which."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dip_megatron.describe.files import ConfigurationError
from dip_megatron.describe.model import ModulePartition, Partition
from dip_megatron.megatron.adapters.bridge_checkpoints import find_bridge_checkpoint, state_of, warn_of_bound_state

ONE = Partition((ModulePartition("vision", ((1, 1), (2, 0)), 1), ModulePartition("language", ((1, 3),))))
OTHER = Partition((ModulePartition("vision", ((2, 1), (1, 0)), 1), ModulePartition("language", ((1, 3),))))


def test_a_run_goes_on_with_the_chunks_that_its_optimizer_is_stored_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SimpleNamespace(
        checkpoint=SimpleNamespace(
            save=str(tmp_path), finetune=False, load_optim=True, dist_ckpt_optim_fully_reshardable=False
        ),
        optimizer=SimpleNamespace(use_distributed_optimizer=True),
    )
    state: dict[str, Any] = {"content_metadata": {"distrib_optim_sharding_type": "dp_reshardable"}}
    monkeypatch.setattr("dip_megatron.compat.bridge.loaded_checkpoint", lambda _: (str(tmp_path), state))
    unknown = find_bridge_checkpoint(config)  # Bridge's own, for one
    assert unknown is not None
    with pytest.raises(ConfigurationError, match=r"was written without DIP, .* can only be loaded into"):
        unknown.compare(ONE)

    assert "this very partition only" in (warn_of_bound_state(config) or "")
    state |= state_of(ONE)
    found = find_bridge_checkpoint(config)
    assert found is not None
    assert found.partition == ONE
    assert found.compare(ONE) is None
    with pytest.raises(ConfigurationError, match="can only be loaded into the chunks that wrote it"):
        found.compare(OTHER)

    state["content_metadata"] = {"distrib_optim_sharding_type": "fully_reshardable"}
    found = find_bridge_checkpoint(config)
    assert found is not None
    assert "this run has" in (found.compare(OTHER) or "")
    config.checkpoint.dist_ckpt_optim_fully_reshardable = True
    assert warn_of_bound_state(config) is None
