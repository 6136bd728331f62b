"""The live objects of a DIP run: model in segments, planner, executor, reports. Built on first use, one per process."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ..compat.process_groups import shared_store
from ..config import DipConfig
from ..describe.cost import Cluster, Costs, load_cluster
from ..describe.model import MultimodalModel, Parallel, Partition, Training, TrainingMismatchError
from ..describe.workload import load_workload
from ..families.family import ModelFamily
from ..planner.feed import PlanFeed
from ..planner.greedy import greedy
from ..planner.live import ModelGraphs
from ..planner.maker import LivePlanMaker
from ..planner.partitioning import choose_partition
from ..planner.searchers import make_searcher, static_order
from ..planner.service import PlannerService
from ..report.progress import RunProgress
from ..report.recorder import RunRecorder
from ..runtime.clock import Clock
from ..runtime.executor import Executor
from ..runtime.protocol import StageProgram
from ..runtime.transport_choice import choose_transport
from ..runtime.watch import Watchdog
from .build import ChunkList, configured_partition, record_blueprint
from .checkpoints import Checkpoint, find_checkpoint, record, warn_of_bound_state
from .exchange import GlooExchange
from .forward_backward import DipForwardBackward, IterationConsumer, PlanningPolicy
from .scalars import write_scalars
from .shared_gpu import single_ranks_on_nccl

logger = logging.getLogger(__name__)


class DipSession:
    """What the hooks share between building the model and running its iterations."""

    def __init__(self, args: Any, config: DipConfig, families: Sequence[ModelFamily]):
        """``args`` are Megatron's, validated; ``config`` is not ``off``; ``families`` are the models to look for."""
        single_ranks_on_nccl(args)
        self._args = args
        self._config = config
        self._families = families
        self._program: StageProgram | None = None
        self._graphs: ModelGraphs | None = None
        self._exchange: GlooExchange | None = None
        self._service: PlannerService | None = None
        self._step: DipForwardBackward | None = None

    # -- model ---------------------------------------------------------------------------------------------------
    def segmented(self, provider: Callable[..., Any]) -> Callable[..., ChunkList]:
        """A model provider that builds what ``provider`` would, in segments."""

        def build(*args: Any, **kwargs: Any) -> ChunkList:
            family, blueprint = record_blueprint(self._families, provider, *args, **kwargs)
            a = self._args
            parallel = Parallel(
                a.tensor_model_parallel_size, a.pipeline_model_parallel_size, a.data_parallel_size,
                a.sequence_parallel, a.use_distributed_optimizer,
            )  # fmt: skip
            model = family.describe(blueprint, parallel)
            cluster, costs = self._cluster(), None if self._config.costs is None else Costs.load(self._config.costs)
            checkpoint = find_checkpoint(a)
            partition = self._partition(model, cluster, costs, family.workload, checkpoint)
            record(a, partition)
            for sentence in (checkpoint and checkpoint.compare(partition), warn_of_bound_state(a)):
                if sentence:
                    _tell(sentence)
            self._graphs = ModelGraphs(
                model,
                cluster,
                partition,
                costs,
                self._config.memory_limit,
                self._config.recompute,
                self._config.offload,
            )
            self._program = family.program(
                blueprint, {m.module: m.layers for m in partition.modules},
                rank=parallel_state.get_pipeline_model_parallel_rank(), micro_batch_size=a.micro_batch_size,
            )  # fmt: skip
            chunks = ChunkList(self._program.build_chunks())
            self._start_planner(self._program, self._graphs)
            return chunks

        return build

    def _start_planner(self, program: StageProgram, graphs: ModelGraphs) -> None:
        """Start the planner's workers now: they warm up while Megatron builds its optimizer and reads its data."""
        config = self._config
        replica = sorted(dist.get_process_group_ranks(parallel_state.get_model_parallel_group()))
        self._exchange = GlooExchange(replica, config.timeout_seconds)
        supported = self._exchange.gather(b"yes" if program.supports_split else b"no")
        if config.split_backward and b"no" in supported:
            logger.warning("some layers can't defer weight gradients: plans split no backward")
            config = config.model_copy(update={"split_backward": False})
        if self._exchange.rank == 0:
            planners_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) // len(replica)
            order = static_order if config.schedule == "static" else greedy
            maker = LivePlanMaker(
                graphs,
                program.shapes,
                make_searcher(config, planners_here, not torch.cuda.is_available()),
                config.schedule,
                order,
            )
            # One worker process, whose threads search together: only one iteration is planned ahead.
            self._service = PlannerService(maker, min(config.planner_workers, 1) if config.schedule == "dynamic" else 0)
            atexit.register(self._service.close)

    def _cluster(self) -> Cluster:
        name = self._config.cluster
        if name == "auto":
            name = "h100" if torch.cuda.is_available() else "cpu"
        return load_cluster(name)

    def _partition(
        self, model: MultimodalModel, cluster: Cluster, costs: Costs | None, workload: str,
        checkpoint: Checkpoint | None,
    ) -> Partition:  # fmt: skip
        """As configured, or that of the checkpoint to go on from, or the partitioner's choice: made on one rank,
        because a search may be timed."""
        chosen = configured_partition(model, self._config)
        if chosen is not None:
            return chosen
        chosen = None if checkpoint is None else checkpoint.partition_for(model)
        if chosen is not None:
            _tell(f"going on with the checkpoint's partition:\n{chosen.explain()}")
            return chosen
        found: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                found = [self._choose(model, cluster, costs, workload)]
            except Exception as error:  # told to all ranks, which would otherwise wait
                found = [error]
        dist.broadcast_object_list(found, 0)
        if isinstance(found[0], Exception):
            raise found[0]
        partition: Partition = found[0]
        for m in partition.modules:
            _tell(f"{m.module}: layers {m.layers}, sub-microbatches of {m.unit_size or 'all'}")
        return partition

    def _choose(self, model: MultimodalModel, cluster: Cluster, costs: Costs | None, workload: str) -> Partition:
        """Chunks are built before the first batch is read, so the partitioner judges by a published mix, packed to the
        model's sequence length."""
        args = self._args
        count = max(args.global_batch_size // (args.micro_batch_size * args.data_parallel_size), 1)
        batches = load_workload(workload, model, 2, count, args.seed)
        return choose_partition(
            model, cluster, batches, costs=costs, memory_limit=self._config.memory_limit, budget_seconds=5.0
        )

    # -- iterations ----------------------------------------------------------------------------------------------
    def forward_backward(self, *_: Any, **__: Any) -> DipForwardBackward:
        """What Megatron's ``get_forward_backward_func`` returns under DIP."""
        if self._step is None:
            self._step = self._start()
        return self._step

    def _start(self) -> DipForwardBackward:
        if self._program is None or self._exchange is None:
            raise RuntimeError(
                "DIP found no model to schedule: it must be built through megatron.training's get_model after "
                "dip_megatron.install(); or use --dip-schedule off"
            )
        config, program = self._config, self._program
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        pipeline = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
        rank = pipeline.index(dist.get_rank())
        clock = Clock(device)
        exchange = GlooExchange(pipeline, config.timeout_seconds)
        executor = Executor(
            rank, choose_transport(pipeline, rank, device, config.timeout_seconds, exchange), clock,
            alone=self._args.tensor_model_parallel_size == 1,
        )  # fmt: skip
        feed = PlanFeed(self._exchange, self._service, config.recalibrate)
        watchdog = Watchdog(shared_store(), executor.position, dist.get_rank())
        recorder = None
        progress = self._progress(exchange)
        consumers: list[IterationConsumer] = [progress.record]
        if config.trace_dir is not None:
            recorder = RunRecorder(config.trace_dir / _replica_folder(), exchange)
            consumers.append(recorder.record)
        atexit.register(self._close, feed, watchdog, recorder)
        return DipForwardBackward(
            program, executor, feed, clock,
            policy=PlanningPolicy(config.search_budget, self._another_follows), iteration=self._iteration,
            watchdog=watchdog,
            on_iteration=lambda *iteration: [consume(*iteration) for consume in consumers],
            tensor_parallel=self._tensor_parallel_exchange(), everyone=self._everyone(),
            on_training=self._training_is,
        )  # fmt: skip

    def _iteration(self) -> int:
        """As Megatron's log counts; evaluations have that of the iteration before."""
        return int(getattr(self._args, "curr_iteration", self._args.iteration - 1)) + 1

    def _another_follows(self) -> bool:
        """Whether the running iteration is followed by one that trains: data sets may hold no more than is trained on,
        and iterations to skip are read by Megatron itself."""
        following = int(self._args.curr_iteration) + 1
        skipped = self._args.iterations_to_skip or []  # counted from 0 in releases before 0.17
        return following < self._args.train_iters and not {following, following + 1} & set(skipped)

    def _tensor_parallel_exchange(self) -> GlooExchange | None:
        ranks = dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group())
        return GlooExchange(ranks, self._config.timeout_seconds) if len(ranks) > 1 else None

    def _everyone(self) -> GlooExchange | None:
        """All ranks, where there are several replicas."""
        if parallel_state.get_data_parallel_world_size(with_context_parallel=True) == 1:
            return None
        return GlooExchange(list(range(dist.get_world_size())), self._config.timeout_seconds)

    def _training_is(self, training: Training, first: bool) -> None:
        """Compare the description of the model with the model as built. Leaves with a message if it is wrong."""
        if not first:
            _tell("what trains has changed; plans follow it from this iteration on")
            return
        assert self._graphs is not None
        try:
            sentences = training.against(self._graphs.model)
        except TrainingMismatchError as error:  # on all ranks alike
            sys.exit(f"dip: {error}")
        for sentence in sentences:
            _tell(sentence)

    def _progress(self, exchange: GlooExchange) -> RunProgress:
        """Megatron writes its log, and everything else, on the last rank."""
        args, last = self._args, dist.get_rank() == dist.get_world_size() - 1

        def say(line: str) -> None:
            if last:
                print(line, flush=True)

        return RunProgress(exchange, args.log_interval, say, write_scalars)

    @staticmethod
    def _close(feed: PlanFeed, watchdog: Watchdog, recorder: RunRecorder | None) -> None:
        watchdog.close()
        feed.close()
        if recorder is not None:
            recorder.close()


def _tell(sentence: str) -> None:
    """Print on one rank."""
    if dist.get_rank() == 0:
        print(f"[dip] {sentence}", flush=True)


def _replica_folder() -> str:
    """Traces of one pipeline each: the trace directory itself for the first, a folder for each other."""
    data, tensor = parallel_state.get_data_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
    return "." if data == tensor == 0 else f"dp{data}_tp{tensor}"
