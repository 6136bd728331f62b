"""Models of ROLL's ``mcore_adapter`` of a folder, asked for as Megatron-Bridge's are. ``DIP_ROLL_CHECKOUT`` is a
working tree of ROLL."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(os.environ["DIP_ROLL_CHECKOUT"]) / "mcore_adapter" / "src"))

# isort: split
from mcore_adapter.models import AutoConfig
from mcore_adapter.models.auto.modeling_auto import get_model_cls
from mcore_adapter.models.converter.convert_utils import gather_tensor_parallel
from mcore_adapter.models.converter.dist_converter import DistConverter
from mcore_adapter.models.converter.model_converter import ModelConverter
from mcore_adapter.models.model_factory import VirtualModels

from dip_megatron.compat import mcore_adapter
from dip_megatron.megatron.adapters.roll import Roll

if not hasattr(DistConverter.__init__, "hooked"):
    DistConverter.__init__ = Roll._converter(DistConverter.__init__)
    DistConverter.__init__.hooked = True


class RollModels:
    """Of ``stages`` pipeline stages of ``tensor`` ranks each, with ``sequence`` parallelism or without, whose
    sequences ``context`` ranks share."""

    def __init__(self, folder: Path, stages: int, tensor: int = 1, sequence: bool = False, context: int = 1):
        self.config = AutoConfig.from_pretrained(str(folder))
        self._folder = str(folder)
        given = {
            "params_dtype": torch.float32, "pipeline_model_parallel_size": stages,
            "tensor_model_parallel_size": tensor, "sequence_parallel": sequence, "context_parallel_size": context,
            "use_cpu_initialization": True, "masked_softmax_fusion": False, "bias_dropout_fusion": False,
            "bias_activation_fusion": False, "gradient_accumulation_fusion": False, "moe_permute_fusion": False,
        }  # fmt: skip
        for name, value in given.items():
            setattr(self.config, name, value)
        self.config.post_init()

    def provide(self, **given: Any) -> Any:
        return get_model_cls(self.config.hf_model_type)(self.config, **given)

    def mark(self, chunks: Sequence[Any], layers: Any, rank: int) -> None:
        mcore_adapter.mark(self.config, chunks, layers, rank)

    def load_hf_weights(self, models: list[Any]) -> None:
        """As ``from_pretrained`` does."""
        converter = ModelConverter(self.config)
        single = len(models) == 1
        states = {
            "model" if single else f"model{i}": converter.load_mca_state_dict_from_hf(self._folder, vp_stage=i)
            for i in range(len(models))
        }
        virtual = object.__new__(VirtualModels)
        virtual.models, virtual.config = models, self.config
        missing, unexpected = virtual.load_state_dict(states, strict=False)
        assert not [name for name in missing if not name.endswith("_extra_state")], missing
        if not self.config.tie_embeddings_and_output_weights:
            assert not unexpected, unexpected

    def export_hf_weights(self, models: list[Any], **_: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """As its updates of rollouts' weights do, over all ranks of a pipeline."""
        from megatron.core import parallel_state

        converter = ModelConverter(models[0].config, to_hf=True)
        found: dict[str, torch.Tensor] = {}
        for _, stage, name, weight in converter._mca_named_params_with_vp_stage(models):
            shards = gather_tensor_parallel(weight, async_op=False)
            if shards is not None:  # on the first of a stage's ranks
                found |= converter.convert_to_hf({name: shards}, vp_stage=stage)
        group = parallel_state.get_pipeline_model_parallel_group()
        gathered: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(gathered, found, group=group)
        for part in gathered:
            yield from part.items()
