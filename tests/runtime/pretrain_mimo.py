"""A pretrain script in the manner of upstream's examples/mimo/train.py: Megatron's loop, a MimoModel, drawn samples."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dip_megatron import CPU_FLAGS, draw_by_name, install_cpu_platform

ON_CPU = install_cpu_platform()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.models.mimo import MimoModel  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.training import get_args, pretrain, training  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.arguments import parse_and_validate_args  # noqa: E402

from tests.runtime.mimo_case import Held, MimoCase, batches, mimo_config  # noqa: E402

FLAGS = """
--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 96 --max-position-embeddings 96
--position-embedding-type rope --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
--micro-batch-size 1 --global-batch-size 4 --train-iters 4 --lr 2e-3 --lr-decay-style constant --lr-warmup-iters 0
--calculate-per-token-loss --log-interval 1 --eval-interval 1000 --eval-iters 0 --seed 1234 --clip-grad 1.0
--init-method-std 0.05 --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion
"""


class Samples(torch.utils.data.Dataset[dict[str, Any]]):
    """Of pictures and sound, of one of both, and of text alone."""

    def __init__(self, count: int):
        held = [Held(i % 3, (i // 2) % 2, frames=2 + i % 4, text=6 + i % 5) for i in range(count)]
        self._items = batches(MimoCase(tuple(held)))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._items[index]


def model_provider(pre_process: bool = True, post_process: bool = True, **_: Any) -> MimoModel:
    given = mimo_config(MimoCase(()), get_args().pipeline_model_parallel_size)
    for part in (given.language_model_spec, *parts(given)):
        for name in ("config", "transformer_config"):
            if name in part.params:
                part.params[name].params_dtype = part.params[name].pipeline_dtype = torch.float32
    model = MimoModel(given)
    # Megatron's loop asks every model for it, which this class doesn't have; chunks under DIP do.
    model.pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    return model


def parts(given: Any) -> Any:
    for modality in given.modality_submodules_spec.values():
        yield from modality.submodules["encoders"].values()
        yield from modality.submodules["input_projections"]


def datasets_provider(sizes: tuple[int, int, int]) -> tuple[Samples, None, None]:
    return Samples(sizes[0]), None, None


datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def forward_step(data_iterator: Any, model: torch.nn.Module) -> Any:
    item = next(data_iterator)  # collated as a batch of one
    given = {
        name: {encoder: {key: value.squeeze(0).float() for key, value in inputs.items()}}
        for name, modality in item.pop("modality_inputs").items()
        for encoder, inputs in modality.items()
    }
    arguments = {name: value.squeeze(0) for name, value in item.items()}
    losses, mask = model(**arguments, modality_inputs=given or None)

    def loss_func(mask: torch.Tensor, losses: torch.Tensor) -> Any:
        total, count = (losses.float() * mask).sum(), mask.sum()
        return total, count.to(torch.int), {"lm loss": torch.stack([total.detach().clone(), count])}

    return losses, partial(loss_func, mask)


def draw_weights_by_name() -> None:
    get_model = training.get_model

    def get_model_and_draw(*arguments: Any, **keywords: Any) -> list[torch.nn.Module]:
        models: list[torch.nn.Module] = get_model(*arguments, **keywords)
        draw_by_name(models, 1234, lambda name, _: None if "norm" in name or "ln_" in name else 0.05)
        return models

    training.get_model = get_model_and_draw


if __name__ == "__main__":
    sys.argv[1:1] = [*(CPU_FLAGS if ON_CPU else ()), *shlex.split(FLAGS)]
    parsed = parse_and_validate_args(
        args_defaults={"tokenizer_type": "NullTokenizer", "vocab_size": 63, "num_workers": 0}
    )
    draw_weights_by_name()
    pretrain(
        pretrain_cfg_container_from_args(parsed), datasets_provider, ModelType.encoder_or_decoder, forward_step,
        model_provider, get_embedding_ranks=lambda ranks: [ranks[0]],
        get_position_embedding_ranks=lambda ranks: [ranks[0]],
    )  # fmt: skip
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
