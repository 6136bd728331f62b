"""A probe of live tensor memory on the host, and stages measured with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.runtime.llava_case import (
    IMAGE,
    VOCABULARY,
    Case,
    forward_step,
    freeze_arguments,
    initialize,
    llava_kwargs,
    seed_parameters,
)
from tests.runtime.split_case import with_ddp


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations under this mode allocated and that something still holds, the autograd
    graph included."""

    def __init__(self):
        super().__init__()
        self._known: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                place = storage._cdata
                if place not in given and (place not in self._known or self._known[place].expired()):
                    self._known[place] = StorageWeakRef(storage)
        return result

    def now(self) -> int:
        """Bytes live at this moment."""
        self._known = {place: reference for place, reference in self._known.items() if not reference.expired()}
        # As large as they are now, and each address once: a checkpoint may have emptied a storage that the graph holds,
        # or let it share what was computed again.
        storages = [torch.UntypedStorage._new_with_weak_ptr(reference.cdata) for reference in self._known.values()]
        return sum({s.data_ptr(): s.nbytes() for s in storages if s is not None and s.nbytes()}.values())


@dataclass(frozen=True)
class Sizes:
    """Of a model large enough that what the cost model leaves out (norm statistics, class tokens) is small."""

    hidden: int = 64
    ffn: int = 160
    text: int = 200
    image: int = 48
    images: int = 2
    layers: int = 3


@dataclass(frozen=True)
class Held:
    """Bytes that one stage holds between its F and its B, and between its B and its W."""

    activation: int
    hold: int


def model_arguments(sizes: Sizes) -> tuple[Case, dict[str, Any]]:
    """A LLaVA in two segments per module on one rank."""
    line = ((sizes.layers,), (sizes.layers,))
    case = Case((sizes.images,), line, line, unit_size=sizes.images)
    kwargs = llava_kwargs(case, 1)
    for name in ("language_transformer_config", "vision_transformer_config", "vision_projection_config"):
        kwargs[name].hidden_size, kwargs[name].ffn_hidden_size = sizes.hidden, sizes.ffn
        kwargs[name].kv_channels = sizes.hidden // 4
    kwargs["img_h"] = kwargs["img_w"] = sizes.image
    kwargs["language_max_sequence_length"] = 4 * (sizes.text + sizes.images * (sizes.image // 4) ** 2)
    return case, kwargs


def describe(rank: int, world: int, sizes: Sizes, parallel: Any) -> Any:
    """The model in the planner's words."""
    from dip_megatron.megatron.describe import describe_llava

    return describe_llava(model_arguments(sizes)[1], {}, parallel)


def batch_of(sizes: Sizes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (1, sizes.text + sizes.images), generator=generator)
    ids[0, : sizes.images] = IMAGE
    return {
        "images": torch.randn(sizes.images, 3, sizes.image, sizes.image, generator=generator),
        "tokens": ids, "labels": ids.clamp(min=0), "loss_mask": torch.ones(ids.shape),
        "position_ids": torch.arange(ids.shape[1])[None],
    }  # fmt: skip


PLACES = [("vision", 0), ("vision", 1), ("language", 0), ("language", 1)]


def measure(rank: int, world: int, sizes: Sizes, strategies: list[str]) -> Any:
    """One microbatch on one process, once with each strategy for all its stages: what the microbatch holds, and
    ``Held`` by (strategy, module, segment); beside it the bytes left at the end, which should be none."""
    initialize(world)
    from dip_megatron.megatron.step import MegatronStep
    from dip_megatron.models.llava import LlavaProgram
    from dip_megatron.models.protocol import MicrobatchInputs

    case, kwargs = model_arguments(sizes)
    program = LlavaProgram(
        kwargs, {"vision": case.vision, "language": case.language}, rank=0, freeze=freeze_arguments(case)
    )
    chunks = program.build_chunks()
    seed_parameters(chunks)
    chunks = with_ddp(chunks, overlap=False)
    item = batch_of(sizes)
    arguments = program.bind(
        item["images"], item["tokens"], item["position_ids"], None, item["labels"], item["loss_mask"]
    )
    microbatch = MicrobatchInputs(arguments, [item])
    held: dict[tuple[str, str, int], Held] = {}
    left = {}
    # First once for the buffers that Megatron keeps for good.
    for strategy in [strategies[0], *strategies]:
        step = MegatronStep(
            chunks[0].config, forward_step, num_microbatches=1, context_parallel_size=1, collect_non_loss_data=False
        )
        found, left[strategy] = _run_stages(program, chunks, microbatch, step, sizes, strategy)
        held |= {(strategy, *place): value for place, value in found.items()}
    return program.load(microbatch), held, left


def _run_stages(program: Any, chunks: Any, microbatch: Any, step: Any, sizes: Sizes, strategy: str) -> Any:
    from dip_megatron.runtime.stages import IterationState, ModelStages, StageLookAhead
    from dip_megatron.schedule import Kind, StageKey, Unit

    units = {"vision": Unit(0, "vision", 0, 0, sizes.images, (1,)), "language": Unit(1, "language", 0)}
    keys = {(m, k): [StageKey(kind, m, k, units[m].id, 0) for kind in (Kind.F, Kind.B, Kind.W)] for m, k in PLACES}
    state = IterationState([microbatch], False, remaining=dict.fromkeys(PLACES, 1))
    look_ahead = StageLookAhead(frozenset((units[m].id, k) for m, k in PLACES))
    stages = ModelStages(program, chunks, step, state, last_rank=0, look_ahead=look_ahead)
    activation, hold = {}, {}

    def received(payloads: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        return [{k: t.detach().clone() for k, t in payload.items()} for payload in payloads]

    with LiveBytes() as live:
        payloads: list[dict[str, torch.Tensor]] = []
        for place in PLACES:
            unit, key = units[place[0]], keys[place][0]
            before = live.now()
            outputs = stages.forward(key, unit, strategy, received(payloads))
            before -= _bytes(payloads)
            payloads = received([outputs]) if outputs else []
            stages.sent(key, unit)
            del outputs
            offloaded = state.saved[unit.id, place[1]].offloaded
            host = 0 if offloaded is None else offloaded.host_bytes
            activation[place] = live.now() - _bytes(payloads) - host - before
        gradients: list[dict[str, torch.Tensor]] = []
        for place in reversed(PLACES):
            gradients = received(stages.backward(keys[place][1], units[place[0]], strategy, gradients))
        gradients = []
        for place in PLACES:
            before = live.now()
            stages.weight(keys[place][2], units[place[0]], strategy)
            hold[place] = before - live.now()
        losses = step.forward_data_store
        assert len(losses) == 1
        left = live.now()
    return {place: Held(activation[place], hold[place]) for place in PLACES}, left


def _bytes(payloads: list[dict[str, torch.Tensor]]) -> int:
    return sum(t.untyped_storage().nbytes() for payload in payloads for t in payload.values())
