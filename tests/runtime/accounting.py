"""A probe of live tensor memory on the host, and stages measured with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.processes import transport
from tests.runtime import gpt_case
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
from tests.runtime.split_case import split_orders, with_ddp


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


class CardBytes:
    """The same on a GPU, by its allocator."""

    def __enter__(self) -> CardBytes:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def now(self) -> int:
        """Bytes live at this moment."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what copies on other streams have read is given back, too
        return torch.cuda.memory_allocated()


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
    deferred_activation: int


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
    from dip_megatron.families.describe import describe_llava

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


@dataclass(frozen=True)
class Left:
    """After a strategy's run: bytes that something still holds; matrices with a gradient before any W, and all those
    with one after the last."""

    bytes: int
    early: set[str]
    late: set[str]


def measure(rank: int, world: int, sizes: Sizes, strategies: list[str], device: str = "cpu") -> Any:
    """One microbatch on one process, once with each strategy for all its stages: what the microbatch holds, ``Held`` by
    (strategy, module, segment), and ``Left`` by strategy."""
    initialize(world)
    from dip_megatron.families.llava.program import LlavaProgram
    from dip_megatron.megatron.step import MegatronStep
    from dip_megatron.runtime.protocol import MicrobatchInputs

    case, kwargs = model_arguments(sizes)
    program = LlavaProgram(
        kwargs, {"vision": case.vision, "language": case.language}, rank=0, freeze=freeze_arguments(case)
    )
    chunks = program.build_chunks()
    seed_parameters(chunks)
    chunks = with_ddp([chunk.to(device) for chunk in chunks], overlap=False)
    item = {name: t.to(device) for name, t in batch_of(sizes).items()}
    arguments = program.bind(
        item["images"], item["tokens"], item["position_ids"], None, item["labels"], item["loss_mask"]
    )
    microbatch = MicrobatchInputs(arguments, [item])
    held: dict[tuple[str, str, int], Held] = {}
    left = {}
    # First once for the buffers that Megatron keeps for good.
    for strategy in [strategies[0], *strategies]:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        step = MegatronStep(
            chunks[0].config, forward_step, num_microbatches=1, context_parallel_size=1, collect_non_loss_data=False
        )
        found, left[strategy] = _run_stages(program, chunks, microbatch, step, sizes, strategy)
        held |= {(strategy, *place): value for place, value in found.items()}
    return program.load(microbatch), held, left


def _run_stages(program: Any, chunks: Any, microbatch: Any, step: Any, sizes: Sizes, strategy: str) -> Any:
    from dip_megatron.core import Kind, Operation, Unit
    from dip_megatron.runtime.chunk_runner import ChunkRunner, IterationState, OperationLookAhead

    units = {"vision": Unit(0, "vision", 0, 0, sizes.images, (1,)), "language": Unit(1, "language", 0)}
    keys = {(m, k): [Operation(kind, m, k, units[m].id, 0) for kind in (Kind.F, Kind.B, Kind.W)] for m, k in PLACES}
    state = IterationState([microbatch], False, remaining=dict.fromkeys(PLACES, 1))
    look_ahead = OperationLookAhead(frozenset((units[m].id, k) for m, k in PLACES))
    stages = ChunkRunner(program, chunks, step, state, last_rank=0, look_ahead=look_ahead)
    activation, deferred_activation = {}, {}

    def received(payloads: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        return [{k: t.detach().clone() for k, t in payload.items()} for payload in payloads]

    on_host = microbatch.items[0]["tokens"].device.type == "cpu"
    with LiveBytes() if on_host else CardBytes() as live:
        payloads: list[dict[str, torch.Tensor]] = []
        for place in PLACES:
            unit, key = units[place[0]], keys[place][0]
            before = live.now()
            outputs = stages.forward(key, unit, strategy, received(payloads))
            before -= _bytes(payloads)
            payloads = received([outputs]) if outputs else []
            del outputs
            offloaded = state.saved[unit.id, place[1]].offloaded
            host = 0 if offloaded is None or not on_host else offloaded.host_bytes
            activation[place] = live.now() - _bytes(payloads) - host - before
        gradients: list[dict[str, torch.Tensor]] = []
        for place in reversed(PLACES):
            gradients = received(stages.backward(keys[place][1], units[place[0]], strategy, gradients))
        gradients = []
        early = matrices_with_gradients(chunks)
        for place in PLACES:
            host = state.left[units[place[0]].id, place[1]].host_bytes if on_host else 0
            before = live.now() - host
            stages.weight(keys[place][2], units[place[0]], strategy)
            deferred_activation[place] = before - live.now()
        losses = step.forward_data_store
        assert len(losses) == 1
        left = Left(live.now(), early, matrices_with_gradients(chunks))
    return {place: Held(activation[place], deferred_activation[place]) for place in PLACES}, left


def _offloaded(state: Any) -> int:
    """Bytes in host memory, and of what is on its way back."""
    places = [saved.offloaded for saved in state.saved.values() if saved.offloaded is not None]
    copies = [copy for place in places for layer in place._layers.values() for copy in layer]
    copies += [x for left in state.left.values() for work in left._work for x in work.operands if hasattr(x, "host")]
    back = sum(copy.on_device.untyped_storage().nbytes() for copy in copies if copy.on_device is not None)
    return back + sum(place.host_bytes for place in (*places, *state.left.values()))


def _under_way(executor: Any) -> int:
    letters = executor._letters.values()
    transfers = [x.transfer.tensors for x in letters if getattr(x.transfer, "tensors", None)]
    arrived = [x.tensors for x in letters if x.tensors and x.message.target.rank == executor.position.rank]
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for payload in [*transfers, *arrived]
        for t in payload.values()
    }
    return sum(storages.values())


def matrices_with_gradients(chunks: Any) -> set[str]:
    """Names of parameters with two dimensions or more whose gradient isn't zero."""
    return {
        name
        for chunk in chunks
        for name, p in chunk.named_parameters()
        if p.dim() > 1 and p.shape[0] > 1 and p.main_grad.any()
    }


def _bytes(payloads: list[dict[str, torch.Tensor]]) -> int:
    return sum(t.untyped_storage().nbytes() for payload in payloads for t in payload.values())


@dataclass(frozen=True)
class Iteration:
    """A GPT's iteration to be run whole, in a drawn order with drawn strategies."""

    microbatches: int = 4
    tokens: int = 200
    hidden: int = 64
    layers: int = 3
    segments: int = 2
    seed: int = 0


def peak(rank: int, world: int, what: Iteration) -> tuple[float, int]:
    """Bytes beside the static ones at this rank's peak: as the plan predicts, and of live tensors after any of its
    operations. Left out is what static bytes have room for: the layer that is being prefetched, and messages under way,
    of which gloo doesn't tell when it has sent one."""
    initialize(world)
    from dip_megatron.core import Schedule
    from dip_megatron.core.lower import make_plan
    from dip_megatron.describe.cost import CostModel, load_cluster, priced_graph
    from dip_megatron.describe.model import ModulePartition, Parallel, Partition
    from dip_megatron.families.describe import describe_gpt
    from dip_megatron.families.gpt.program import GptProgram
    from dip_megatron.megatron.step import MegatronStep
    from dip_megatron.planner.maker import payloads
    from dip_megatron.runtime.chunk_runner import ChunkRunner, IterationState, OperationLookAhead
    from dip_megatron.runtime.clock import Clock
    from dip_megatron.runtime.executor import Executor
    from dip_megatron.runtime.protocol import MicrobatchInputs
    from dip_megatron.schedulers.greedy import greedy

    layers = ((what.layers,) * world,) * what.segments
    kwargs = gpt_case.gpt_kwargs(gpt_case.GptCase(what.microbatches, layers), world)
    config = kwargs["config"]
    config.hidden_size, config.ffn_hidden_size, config.kv_channels = what.hidden, 160, what.hidden // 4
    kwargs["max_sequence_length"] = what.tokens
    program = GptProgram(kwargs, {"language": layers}, rank=rank)
    chunks = program.build_chunks()
    gpt_case.seed_chunks(chunks)
    chunks = with_ddp(chunks, overlap=False)
    ids = torch.arange(what.tokens)[None]
    item = {"tokens": ids % VOCABULARY, "labels": ids % 7, "loss_mask": torch.ones(ids.shape), "position_ids": ids}
    arguments = program.bind(item["tokens"], ids, None, labels=item["labels"], loss_mask=item["loss_mask"])
    inputs = [MicrobatchInputs(arguments, [item]) for _ in range(what.microbatches)]
    loads = tuple(program.load(m) for m in inputs)

    pricer = CostModel(describe_gpt(kwargs, Parallel(1, world, 1, False, False)), load_cluster("cpu"))
    graph = priced_graph(pricer, Partition((ModulePartition("language", layers),)), loads)
    draw = np.random.default_rng(what.seed)
    choice = draw.integers(0, graph.forward.shape[0], (graph.virtual_microbatches, graph.ranks)).astype(np.int8)
    orders = split_orders(greedy(graph), graph.virtual_microbatches, 0.7, draw)
    plan = make_plan(graph, Schedule(orders, choice), lower_bound=0.0,
                     payloads=payloads(graph, loads, program.shapes))  # fmt: skip
    step = MegatronStep(
        chunks[0].config, gpt_case.forward_step, num_microbatches=what.microbatches, context_parallel_size=1,
        collect_non_loss_data=False,
    )  # fmt: skip
    state = IterationState(inputs, False, remaining={("language", k): what.microbatches for k in range(what.segments)})
    stages = ChunkRunner(
        program, chunks, step, state, last_rank=world - 1, look_ahead=OperationLookAhead.of(plan, rank)
    )  # fmt: skip
    executor = Executor(rank, transport(world, rank), Clock(torch.device("cpu")))
    most = 0
    with LiveBytes() as live:

        class Probe:
            """Looks before and after every operation; after one with an output, that isn't on its way yet."""

            def __getattr__(self, name: str) -> Any:
                def run(*arguments: Any) -> Any:
                    look()
                    result = getattr(stages, name)(*arguments)
                    if name != "forward" or not result:
                        look()
                    return result

                def look() -> None:
                    nonlocal most
                    most = max(most, live.now() - _offloaded(state) - _under_way(executor))

                return run

        executor.run(plan, Probe())
    torch.distributed.barrier()
    return float(plan.predicted.peak_bytes[rank] - graph.static_bytes[rank]), most
