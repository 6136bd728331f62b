"""Train a small LLaVA to read handwritten digits, with Megatron's own loop.

An ordinary Megatron pretrain script: it builds Megatron's ``LLaVAModel`` (CLIP ViT, MLP projector, GPT) from flags and
hands it to ``megatron.training.pretrain``. It knows nothing of how its pipeline is scheduled: run it as it is for
Megatron's schedules, or through ``dip run`` for dynamic ones. ``quickstart.args`` beside it holds the flags of a model
that learns on two CPU cores, ``tiny.args`` those of a smaller one; on a GPU, add what the machine can do (``--bf16``,
larger sizes).

One microbatch is one packed sequence of ``--seq-length`` positions, image embeddings included; the number of its images
varies. ``lm loss`` is the loss per text token, with the labels of images weighted. ``digit accuracy`` is the share of
images whose digit the model gives more than half of its probability: then the digit is certainly its first choice, and
guessing, which makes one image in ten, scores nothing.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dip_megatron import CPU_FLAGS, install_cpu_platform

ON_CPU = install_cpu_platform()  # does nothing where CUDA is available

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.datasets.utils import Split  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.models.multimodal.llava_model import LLaVAModel  # noqa: E402
from megatron.core.models.multimodal.llava_spec import (  # noqa: E402
    decoder_model_with_local_default_spec,
    decoder_model_with_transformer_engine_default_spec,
)
from megatron.core.models.vision.clip_vit_model import get_num_image_embeddings  # noqa: E402
from megatron.core.models.vision.vit_layer_specs import (  # noqa: E402
    get_vit_layer_with_local_spec,
    get_vit_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.spec_utils import get_submodules  # noqa: E402
from megatron.training import get_args, pretrain, print_rank_0, training  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.arguments import (  # noqa: E402
    core_transformer_config_from_args,
    parse_and_validate_args,
)

from dip_megatron import draw_by_name, with_sdpa  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))
from documents import LABEL_WEIGHT, VOCABULARY, PackedDigitDocuments, split_images  # noqa: E402
from weights import deviations  # noqa: E402


def add_llava_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The vision side of the model; the language side has Megatron's own flags."""
    group = parser.add_argument_group("llava digits")
    group.add_argument("--vision-num-layers", type=int, default=6, help="layers of the ViT")
    group.add_argument("--vision-hidden-size", type=int, default=96, help="hidden size of the ViT")
    group.add_argument("--vision-ffn-hidden-size", type=int, default=None, help="default: 4 x the hidden size")
    group.add_argument("--vision-num-attention-heads", type=int, default=4, help="attention heads of the ViT")
    group.add_argument("--image-side", type=int, default=24, help="pixels; the 8x8 scans are enlarged to it")
    group.add_argument("--patch-side", type=int, default=8, help="pixels")
    group.add_argument(
        "--pixel-shuffle", action="store_true", help="2 x 2 patches become one position of the language model"
    )
    group.add_argument(
        "--weights-by-name", action="store_true", help="the same initial weights however they are spread"
    )
    group.add_argument("--freeze-language-model", action="store_true", help="train ViT and projector alone")
    group.add_argument("--freeze-vision-model", action="store_true", help="train projector and language model alone")
    return parser


def image_tokens(args: argparse.Namespace) -> int:
    """Positions one image takes in the language model (its patches: the class token is dropped)."""
    side = args.image_side
    return int(get_num_image_embeddings(side, side, args.patch_side, "clip", True, 1, args.pixel_shuffle))


def vision_config(language: TransformerConfig, args: argparse.Namespace) -> TransformerConfig:
    """The ViT's configuration: the language model's numerics, sizes of its own, whole on one pipeline stage."""
    config = copy.deepcopy(language)
    config.vision_model_type = "clip"
    config.num_layers = args.vision_num_layers
    config.hidden_size = args.vision_hidden_size
    config.ffn_hidden_size = args.vision_ffn_hidden_size or 4 * args.vision_hidden_size
    config.num_attention_heads = args.vision_num_attention_heads
    config.num_query_groups = args.vision_num_attention_heads
    config.kv_channels = args.vision_hidden_size // args.vision_num_attention_heads
    return on_one_stage(config)


def on_one_stage(config: TransformerConfig) -> TransformerConfig:
    """Megatron keeps encoder and projector on the first pipeline stage, outside sequence and context parallelism."""
    config.pipeline_model_parallel_size = 1
    config.virtual_pipeline_model_parallel_size = None
    config.num_layers_in_first_pipeline_stage = None
    config.num_layers_in_last_pipeline_stage = None
    config.pipeline_model_parallel_layout = None
    config.sequence_parallel = False
    config.context_parallel_size = 1
    config.tp_comm_overlap = False
    return config


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    add_encoder: bool | None = None,
    add_decoder: bool = True,
    config: TransformerConfig | None = None,
    pg_collection: Any = None,
    vp_stage: int | None = None,
) -> LLaVAModel:
    """Megatron's LLaVA; the ViT stands where the language model's embedding does."""
    args = get_args()
    print_rank_0("building a LLaVA model ...")
    language = config or core_transformer_config_from_args(args)
    if args.transformer_impl == "transformer_engine":
        language_spec = decoder_model_with_transformer_engine_default_spec(None, False)
        vision_spec = get_vit_layer_with_transformer_engine_spec()
    else:
        language_spec = decoder_model_with_local_default_spec(None, False)
        vision_spec = get_vit_layer_with_local_spec()
        if args.context_parallel_size > 1:
            language_spec = with_sdpa(language_spec)  # Megatron's own local attention knows no shards of sequences
    model = LLaVAModel(
        language_transformer_config=language,
        language_transformer_layer_spec=language_spec,
        language_vocab_size=args.padded_vocab_size,
        language_max_sequence_length=args.seq_length,
        vision_transformer_config=vision_config(language, args),
        vision_transformer_layer_spec=vision_spec,
        drop_vision_class_token=True,
        pixel_shuffle=args.pixel_shuffle,
        vision_projection_config=on_one_stage(copy.deepcopy(language)),
        vision_projection_layer_spec=copy.deepcopy(get_submodules(language_spec.submodules.mlp)),
        vision_projection_type="mlp",
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        language_position_embedding_type=args.position_embedding_type,
        language_rotary_percent=args.rotary_percent,
        language_rotary_base=args.rotary_base,
        pre_process=pre_process,
        post_process=post_process,
        add_encoder=pre_process if add_encoder is None else add_encoder,
        add_decoder=add_decoder,
        img_h=args.image_side,
        img_w=args.image_side,
        patch_dim=args.patch_side,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )
    model.freeze(
        freeze_language_model=args.freeze_language_model,
        freeze_vision_model=args.freeze_vision_model,
        freeze_vision_projection=False,
    )
    return model


def datasets_provider(sizes: tuple[int, int, int], vp_stage: int | None = None) -> tuple[PackedDigitDocuments, ...]:
    """Packed documents over disjoint images, as many sequences as Megatron asks for; the same for every chunk."""
    args = get_args()
    return tuple(
        PackedDigitDocuments(
            images,
            split,
            size,
            sequence_length=args.seq_length,
            image_tokens=image_tokens(args),
            side=args.image_side,
            seed=args.seed,
        )
        for images, split, size in zip(split_images(), (Split.train, Split.valid, Split.test), sizes, strict=True)
    )


# Every rank reads the same items for itself: nothing has to be broadcast, and every pipeline rank knows the batch.
datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def loss_func(
    loss_mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Loss summed over weighted tokens, their weight, and sums to report.

    ``output`` holds the loss of each position, ``loss_mask`` its weight, both ``[1, sequence]``.
    """
    losses, weights = output.view(-1).float(), loss_mask.view(-1).float()
    total, weight = torch.sum(losses * weights), weights.sum()
    labels = weights == LABEL_WEIGHT
    read = (losses.detach()[labels] < torch.log(torch.tensor(2.0))).sum()
    report = {
        "lm loss": torch.stack([total.detach().clone(), weight]),
        "digit accuracy": torch.stack([read, labels.sum()]).float(),
    }
    return total, weight.to(torch.int), report


def forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[..., Any]]:
    """One microbatch through the model, or through this rank's stage of it."""
    batch = {name: tensor.cuda(non_blocking=True) for name, tensor in next(data_iterator).items()}
    images = batch["images"].squeeze(0)  # [images, 3, side, side]: a microbatch is one sequence
    output, loss_mask = model(
        images.to(get_args().params_dtype),
        batch["tokens"],
        batch["position_ids"],
        None,  # the specs say it all: causal for the language model, none for the ViT
        batch["labels"],
        batch["loss_mask"],
        num_image_tiles=torch.ones(images.shape[0], dtype=torch.int, device=images.device),
    )
    return output, partial(loss_func, loss_mask)


def draw_built_weights_by_name(args: argparse.Namespace) -> None:
    """Let Megatron's ``get_model`` return models whose weights don't depend on their place in the pipeline."""
    get_model = training.get_model

    def get_model_and_draw(*arguments: Any, **keywords: Any) -> list[torch.nn.Module]:
        models: list[torch.nn.Module] = get_model(*arguments, **keywords)
        output_std = args.init_method_std / (2.0 * args.num_layers) ** 0.5
        draw_by_name(models, args.seed, deviations(args.init_method_std, output_std))
        return models

    training.get_model = get_model_and_draw


def check(args: argparse.Namespace) -> None:
    """Refuse what the data can't do, in one line."""
    if args.micro_batch_size != 1:
        sys.exit(f"--micro-batch-size {args.micro_batch_size}: must be 1, a microbatch is one packed sequence")
    if args.pixel_shuffle and args.image_side // args.patch_side % 2:
        sys.exit(f"--pixel-shuffle: --image-side {args.image_side} has to be an even number of --patch-side")
    if args.image_side % args.patch_side:
        sys.exit(f"--image-side {args.image_side}: must be a multiple of --patch-side {args.patch_side}")


if __name__ == "__main__":
    if ON_CPU:
        sys.argv[1:1] = CPU_FLAGS  # first, so that the command line has the last word
    arguments = parse_and_validate_args(
        extra_args_provider=add_llava_arguments,
        args_defaults={"tokenizer_type": "NullTokenizer", "vocab_size": VOCABULARY, "num_workers": 0},
    )
    check(arguments)
    if arguments.weights_by_name:
        draw_built_weights_by_name(arguments)
    pretrain(
        pretrain_cfg_container_from_args(arguments),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider,
        get_embedding_ranks=lambda ranks: [ranks[0]] if len(ranks) == 1 else [ranks[0], ranks[-1]],
        get_position_embedding_ranks=lambda ranks: [ranks[0]],
    )
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
