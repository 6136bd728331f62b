"""A text-only GPT in segments: Megatron-Core's own GPTModel, cut at any layer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from ...core import ModalityModule, Operation, Unit
from ...describe.workload import Microbatch
from ...runtime.protocol import MicrobatchInputs, Tensors
from ..shared.layout import segment_config
from ..shared.packing import complete_ends, packed_lengths, shared_ends
from ..shared.segmented import SegmentedProgram, bound, dtype_name, unwrapped
from ..shared.shapes import LANGUAGE, GptShapes

_SIGNATURE = inspect.signature(GPTModel.forward)
_UNSUPPORTED = {
    "decoder_input": "embeddings instead of tokens",
    "inference_context": "inference",
    "inference_params": "inference",
    "output_processor": "a processor of the model's output",
}
_PLACEMENT = ("pre_process", "post_process", "vp_stage")


class GptProgram(SegmentedProgram):
    """Stage program of a GPT described by the keyword arguments of Megatron's ``GPTModel``.

    ``layers`` gives ``{"language": layers[segment][rank]}``. Embedding and head may be tied: the first rank's chunk and
    the last one's each hold a copy, whose gradients Megatron's ``finalize_model_grads`` adds up. A spec that lists the
    layers (dense ones and mixtures of experts, say) must list all of the model's. Multi-token prediction stands with
    the head on the last chunk, which has a copy of the embedding then.
    """

    def __init__(
        self,
        kwargs: Mapping[str, Any],
        layers: Mapping[str, tuple[tuple[int, ...], ...]],
        *,
        rank: int,
        micro_batch_size: int = 1,
    ):
        """Raises ValueError for models that can't be segmented."""
        super().__init__(layers, rank)
        self.kwargs = {k: v for k, v in kwargs.items() if k not in _PLACEMENT}
        config = kwargs["config"]
        self.check_layers(LANGUAGE, config.num_layers)
        self.chunk_spec(kwargs["transformer_layer_spec"], LANGUAGE, 0)  # refused now rather than when chunks are built
        if getattr(config, "mtp_num_layers", None) and kwargs.get("mtp_block_spec") is None:
            raise ValueError(
                f"the model has {config.mtp_num_layers} depths of multi-token prediction and the script gives no "
                "mtp_block_spec for them; give it on every rank, or use --dip-schedule off"
            )
        if kwargs.get("position_embedding_type") == "mrope":
            raise ValueError("DIP can't segment a GPT with multimodal positions (mrope); use --dip-schedule off")
        if self.ranks == 1 and len(layers[LANGUAGE]) > 1 and kwargs.get("share_embeddings_and_output_weights"):
            raise ValueError("embedding and head can't be tied over two chunks of one rank; use one segment")
        self.modules = (ModalityModule(LANGUAGE, layers[LANGUAGE]),)
        self.shapes = GptShapes(
            hidden=config.hidden_size,
            micro_batch_size=micro_batch_size,
            sequence_parallel_size=config.tensor_model_parallel_size if config.sequence_parallel else 1,
            dtype=dtype_name(config),
            context_parallel_size=config.context_parallel_size,
        )

    def build_chunks(self) -> list[torch.nn.Module]:
        """One chunk per segment."""
        config = segment_config(self.kwargs["config"], self.layers[LANGUAGE], self.rank)
        chunks = []
        for segment, first, last in self.places(LANGUAGE):
            spec = self.chunk_spec(self.kwargs["transformer_layer_spec"], LANGUAGE, segment)
            own = self.kwargs | {"config": config, "transformer_layer_spec": spec}
            if not last:
                own["mtp_block_spec"] = None  # beside the head alone
            chunks.append(GPTModel(**own, pre_process=first, post_process=last, vp_stage=segment))
        return self.finish(chunks, config)

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Arguments of ``GPTModel.forward`` by name. Raises ValueError for what has no segmented form."""
        arguments = bound(_SIGNATURE, args, kwargs, _UNSUPPORTED)
        if arguments.get("packed_seq_params") is not None and self.shapes.context_parallel_size > 1:
            raise ValueError(
                "DIP can't run a GPT's packed sequences with context parallelism (packed_seq_params is set); use "
                "--context-parallel-size 1, or --dip-schedule off"
            )
        return arguments

    def load(self, inputs: MicrobatchInputs) -> Microbatch:
        """One sequence per sample, packed ones too; only the first rank, which plans, needs to have the tokens.
        Context-parallel ranks have a share each, as scripts cut it."""
        ids = inputs.arguments["input_ids"]
        if ids is None:
            raise ValueError("the script's forward_step gives the first pipeline rank no tokens")
        samples, length = ids.shape
        whole = int(length) * self.shapes.context_parallel_size
        rows = 0 if samples == self.shapes.micro_batch_size else int(samples)
        packed = inputs.arguments.get("packed_seq_params")
        sequences = (whole,) * samples if packed is None else packed_lengths(packed, samples * whole)
        return Microbatch(samples * whole, sequences=sequences, rows=rows)

    def shared(self, inputs: MicrobatchInputs) -> Any:
        """Where samples begin and end in a packed sequence."""
        return shared_ends(inputs)

    def complete(self, inputs: MicrobatchInputs, shared: Any) -> None:
        """See ModelProgram."""
        complete_ends(inputs, shared)

    def forward(
        self, chunk: torch.nn.Module, stage: Operation, unit: Unit, inputs: list[Tensors], microbatch: MicrobatchInputs
    ) -> Tensors:
        """One stage; see ModelProgram."""
        return {"hidden": self._compute(chunk, inputs, microbatch.arguments)}

    def final(self, chunk: torch.nn.Module, inputs: list[Tensors], arguments: Mapping[str, Any]) -> Any:
        """Loss per token ``[b, s]``, or logits without labels, as GPTModel returns them."""
        return self._compute(chunk, inputs, arguments)

    def _compute(self, chunk: torch.nn.Module, inputs: list[Tensors], arguments: Mapping[str, Any]) -> torch.Tensor:
        model = unwrapped(chunk, GPTModel)
        if inputs:
            model.set_input_tensor(inputs[0]["hidden"])
        output: torch.Tensor = chunk(**arguments)
        model.decoder.input_tensor = None  # Megatron's block would hold it until it gets the next
        return output
