"""Chunks that a run of Megatron-Bridge's goes on with: a file beside its checkpoints says which."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dip_megatron.describe.files import ConfigurationError
from dip_megatron.describe.model import ModulePartition, Partition
from dip_megatron.megatron.adapters.bridge_checkpoints import NAME, find_bridge_checkpoint, record_beside

ONE = Partition((ModulePartition("vision", ((1, 1), (2, 0)), 1), ModulePartition("language", ((1, 3),))))
OTHER = Partition((ModulePartition("vision", ((2, 1), (1, 0)), 1), ModulePartition("language", ((1, 3),))))


def test_a_run_goes_on_with_the_chunks_that_its_optimizer_is_stored_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharding = "dp_reshardable"
    config = SimpleNamespace(
        checkpoint=SimpleNamespace(
            save=str(tmp_path), finetune=False, load_optim=True, dist_ckpt_optim_fully_reshardable=False
        ),
        optimizer=SimpleNamespace(use_distributed_optimizer=True),
    )
    monkeypatch.setattr(
        "dip_megatron.compat.bridge.loaded_checkpoint", lambda _: (str(tmp_path / "iter_0000002"), sharding)
    )
    unknown = find_bridge_checkpoint(config)  # Bridge's own, for one
    assert unknown is not None
    with pytest.raises(ConfigurationError, match=r"was written without DIP, .* can only be loaded into"):
        unknown.compare(ONE)

    assert record_beside(config, OTHER, first=False) is not None
    assert not (tmp_path / NAME).exists()
    assert NAME in (record_beside(config, ONE, first=True) or "")
    found = find_bridge_checkpoint(config)
    assert found is not None
    assert found.partition == ONE
    assert found.compare(ONE) is None
    with pytest.raises(ConfigurationError, match="can only be loaded into the chunks that wrote it"):
        found.compare(OTHER)

    whole = (tmp_path / NAME).read_text()
    (tmp_path / NAME).write_text(whole[:-20])
    with pytest.raises(ConfigurationError, match=f"{NAME}: .* restore it"):
        find_bridge_checkpoint(config)
    (tmp_path / NAME).write_text(whole)

    sharding = "fully_reshardable"
    found = find_bridge_checkpoint(config)
    assert found is not None
    assert "this run has" in (found.compare(OTHER) or "")


def test_a_folder_that_cannot_be_written_to_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = SimpleNamespace(checkpoint=SimpleNamespace(save=str(tmp_path / "file" / "saved")))
    assert "may choose another partition" in (record_beside(config, ONE, first=True) or "")
