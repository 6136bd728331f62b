"""Train a small text-to-video model on moving handwritten digits, with Megatron's own loop, and draw what it learned.

    torchrun --nproc-per-node 2 -m dip_megatron.cli run scripts/pretrain_t2v.py \
        --dip-config t2v_tiny_cpu

An ordinary Megatron pretrain script: it builds a ``TextToVideoModel`` (GPT layers as text encoder, a diffusion
transformer) from flags and hands it to ``megatron.training.pretrain``. ``t2v/tiny.args`` holds the flags of a model
that learns on two CPU cores; they come first, so that flags of the command line override them. Without a pipeline
(``--pipeline-model-parallel-size 1``) it runs under Megatron's own schedule.

One microbatch is two to sixteen clips of several sizes, lengths and prompts. ``flow loss`` is the mean squared error of
the velocity. At the end ten clips are sampled, one of every digit, and saved as one picture.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dip_megatron import CPU_FLAGS, install_cpu_platform

ON_CPU = install_cpu_platform()  # does nothing where CUDA is available

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.datasets.utils import Split  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.training import get_args, pretrain, print_rank_0, training  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.arguments import (  # noqa: E402
    core_transformer_config_from_args,
    parse_and_validate_args,
)

from dip_megatron.families.shared.weights import draw_by_name, gather_weights, load_weights  # noqa: E402
from dip_megatron.families.t2v.diffusion import diffusion_layer_spec  # noqa: E402
from dip_megatron.families.t2v.program import TextToVideoModel  # noqa: E402
from dip_megatron.families.t2v.text_encoder import text_layer_spec  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from scripts.t2v.digits import BLOCK, CHANNELS, PATCH, VOCABULARY, PackedClips, split_scans  # noqa: E402
from scripts.t2v.sample import draw_digits  # noqa: E402


def add_t2v_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The diffusion transformer; the text encoder has Megatron's own flags."""
    group = parser.add_argument_group("text to video")
    group.add_argument("--dit-num-layers", type=int, default=6, help="layers of the diffusion transformer")
    group.add_argument("--dit-hidden-size", type=int, default=128)
    group.add_argument("--dit-ffn-hidden-size", type=int, default=None, help="default: 4 x the hidden size")
    group.add_argument("--dit-num-attention-heads", type=int, default=4)
    group.add_argument("--freeze-text-encoder", action="store_true", help="train projector and diffusion alone")
    group.add_argument("--picture", type=Path, default=Path("out/t2v/samples.png"), help="where to draw samples")
    group.add_argument("--sample-steps", type=int, default=25, help="Euler steps of a sample")
    group.add_argument("--guidance", type=float, default=2.0, help="weight of the caption in sampling; 1: none")
    return parser


def model_arguments(args: argparse.Namespace, text: TransformerConfig) -> dict[str, Any]:
    """The model that the flags ask for."""
    diffusion = copy.deepcopy(text)
    diffusion.num_layers = args.dit_num_layers
    diffusion.hidden_size = args.dit_hidden_size
    diffusion.ffn_hidden_size = args.dit_ffn_hidden_size or 4 * args.dit_hidden_size
    diffusion.num_attention_heads = diffusion.num_query_groups = args.dit_num_attention_heads
    diffusion.kv_channels = args.dit_hidden_size // args.dit_num_attention_heads
    transformer_engine = args.transformer_impl == "transformer_engine"
    return {
        "text_config": text,
        "text_layer_spec": text_layer_spec(transformer_engine),
        "vocabulary": args.padded_vocab_size,
        "diffusion_config": diffusion,
        "diffusion_layer_spec": diffusion_layer_spec(transformer_engine),
        "latent_channels": CHANNELS,
        "patch": PATCH,
        "compression": BLOCK,
        "largest_grid": (8, 8, 8),
        "text_rotary_base": args.rotary_base,
    }


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    config: TransformerConfig | None = None,
    pg_collection: Any = None,
    vp_stage: int | None = None,
) -> TextToVideoModel:
    """The whole model; a pipeline's stages are DIP's business."""
    args = get_args()
    print_rank_0("building a text-to-video model ...")
    model = TextToVideoModel(
        **model_arguments(args, config or core_transformer_config_from_args(args)), pg_collection=pg_collection
    )
    model.freeze(freeze_text_encoder=args.freeze_text_encoder)
    return model


def datasets_provider(sizes: tuple[int, int, int]) -> tuple[PackedClips, ...]:
    """Clips of disjoint scans, as many microbatches as Megatron asks for."""
    splits = (Split.train, Split.valid, Split.test)
    return tuple(
        PackedClips(scans, split, size, seed=get_args().seed)
        for scans, split, size in zip(split_scans(), splits, sizes, strict=True)
    )


# Every rank reads the same items for itself: nothing has to be broadcast, and every pipeline rank knows the batch.
datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def loss_func(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the patches' losses, their number, and both to report."""
    total, count = losses.sum(), torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    return total, count, {"flow loss": torch.stack([total.detach().clone(), count.float()])}


def forward_step(
    data_iterator: Iterator[dict[str, Any]], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[..., Any]]:
    """One microbatch through the model, or through this rank's stage of it."""
    item = next(data_iterator)  # collated as a batch of one
    losses = model(
        item["tokens"].squeeze(0).cuda(non_blocking=True),
        [int(length) for length in item["prompt_lengths"]],
        [latent.squeeze(0).cuda(non_blocking=True) for latent in item["latents"]],
        item["timesteps"].squeeze(0).cuda(non_blocking=True),
        [noise.squeeze(0).cuda(non_blocking=True) for noise in item["noise"]],
    )
    return losses, loss_func


def weights_by_name(args: argparse.Namespace, built: list[torch.nn.Module]) -> None:
    """Let Megatron's ``get_model`` return models whose initial weights don't depend on the pipeline, and keep them in
    ``built``."""
    get_model = training.get_model

    def deviation(name: str, parameter: torch.nn.Parameter) -> float | None:
        constant = "norm" in name or "modulation" in name or name.endswith("bias") or "diffusion.output" in name
        if constant:
            return None
        return 0.3 if "positions" in name else args.init_method_std

    def get_model_and_draw(*arguments: Any, **keywords: Any) -> list[torch.nn.Module]:
        built[:] = get_model(*arguments, **keywords)
        draw_by_name(built, args.seed, deviation)
        return built

    training.get_model = get_model_and_draw


def draw_samples(args: argparse.Namespace, models: list[torch.nn.Module]) -> None:
    """Sample with the whole model on the first rank of a pipeline."""
    if parallel_state.get_data_parallel_rank() > 0:
        return
    weights = gather_weights(models, parallel_state.get_pipeline_model_parallel_group())
    if weights is None:
        return
    text = core_transformer_config_from_args(args)
    text.pipeline_model_parallel_size = 1
    model = TextToVideoModel(**model_arguments(args, text))
    load_weights(model, weights)
    draw_digits(model.eval(), args.picture, steps=args.sample_steps, guidance=args.guidance, seed=args.seed)
    print(f"samples of every digit: {args.picture}", flush=True)


def check(args: argparse.Namespace) -> None:
    """Refuse what the data can't do, in one line."""
    if args.micro_batch_size != 1:
        sys.exit(f"--micro-batch-size {args.micro_batch_size}: must be 1, a microbatch is one pack of clips")
    if args.tensor_model_parallel_size > 1:
        sys.exit("--tensor-model-parallel-size: weights are drawn and gathered by name, which needs size 1")


if __name__ == "__main__":
    defaults = shlex.split((HERE / "t2v" / "tiny.args").read_text(), comments=True)
    sys.argv[1:1] = [*(CPU_FLAGS if ON_CPU else ()), *defaults]  # first, so that the command line has the last word
    arguments = parse_and_validate_args(
        extra_args_provider=add_t2v_arguments,
        args_defaults={"tokenizer_type": "NullTokenizer", "vocab_size": VOCABULARY - 1, "num_workers": 0},
    )
    check(arguments)
    chunks: list[torch.nn.Module] = []
    weights_by_name(arguments, chunks)
    pretrain(
        pretrain_cfg_container_from_args(arguments),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider,
        get_embedding_ranks=lambda ranks: [ranks[0]],
        get_position_embedding_ranks=lambda ranks: [ranks[0]],
    )
    draw_samples(arguments, chunks)
    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
