"""The live objects of a DIP run: model in segments, planner, executor, reports. Built on first use, one per process."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ..compat.experts import configs_of_experts
from ..compat.process_groups import shared_store
from ..config import DipConfig
from ..core.experts import NO_EXPERTS, ExpertLayers
from ..describe.files import ConfigurationError
from ..describe.model import Training, TrainingMismatchError
from ..families.family import ModelFamily
from ..families.shared import deferred_linear
from ..planner.delivery import CoupledReplicas, PlanDelivery
from ..planner.facade import live_maker
from ..planner.from_file import FilePlanner, PlanFile
from ..planner.model_graphs import ModelGraphs
from ..planner.request import Service
from ..planner.searchers import live_effort
from ..planner.service import AT_CALL_SECONDS, IMPROVE_SECONDS, PlannerService
from ..report.about import about_run
from ..report.plans import NAME as PLANS
from ..report.plans import PlanWriter
from ..report.progress import RunProgress
from ..report.recorder import RunRecorder
from ..runtime.clock import Clock
from ..runtime.executor import Executor, Position
from ..runtime.protocol import ModelProgram
from ..runtime.trained import Names, names_in
from ..runtime.transport_choice import choose_transport
from ..runtime.watch import Watchdog
from ..schedulers.entry import ScheduleEntry
from ..schedulers.registry import UnknownScheduleError, find_schedule
from .adapters.loop import TrainingLoop
from .build import ChunkList, check_placement, record_blueprint
from .call import ScheduleCall, as_list, check_call, check_functions
from .chunks import ChunkChoice, cluster_of, costs_of, unlike_the_loop
from .configs import check_configs
from .copies import begin_alike, check_unchanged, copied
from .coupling import coupled_exchanges, coupled_ranks, experts_of, meet_in_backwards
from .exchange import GlooExchange
from .experts import check_coupled, joined_by_balance
from .forward_backward import DipForwardBackward, IterationConsumer, PlanningPolicy
from .mixed import check_entry, make_program
from .ranks import replica_folder, replica_ranks
from .replicas import AT_CALL, NOT_FREE, ExchangesAhead, begin_exchanges
from .samples import Samples, check_resample

logger = logging.getLogger(__name__)


class DipSession:
    """What the hooks share between building the model and running its iterations."""

    def __init__(
        self,
        loop: TrainingLoop,
        config: DipConfig,
        families: Sequence[ModelFamily],
        tell: Callable[[str], object] = logger.warning,
    ):
        """``config`` is not ``off``; ``families`` are the models to look for; ``tell`` takes warnings."""
        if config.balance == "free" and not loop.settings.weights_by_tokens:
            raise ConfigurationError(NOT_FREE)
        self._loop, self._config = loop, config
        self._check_replicas()
        self._file = self._plan_file(config, loop.settings.parallel.pp)
        self._entry = self._schedule()
        self._families = families
        self._tell = tell
        self.chunks: list[torch.nn.Module] = []  # this rank's, in their order
        self._own: dict[int, torch.nn.Module] = {}
        self._built: list[Names] = []
        self._running = False
        self._program: ModelProgram | None = None
        self._graphs: ModelGraphs | None = None
        self._exchange: GlooExchange | None = None
        self._service: Service | None = None
        self._coupled: CoupledReplicas | None = None
        self._experts: ExpertLayers | None = None
        self._step: DipForwardBackward | None = None
        self._watchdog: Watchdog | None = None
        self._closing = contextlib.ExitStack()
        atexit.register(self.close)

    def close(self) -> None:
        """End threads and processes, and write what is left to write, while the ranks can still talk. Done at the end
        of the process, unless before."""
        atexit.unregister(self.close)
        self._closing.close()

    @staticmethod
    def _plan_file(config: DipConfig, ranks: int, replica: str = ".") -> PlanFile | None:
        """The plans to run; of a folder of traces, those of one replica."""
        path = config.plan_file
        return None if path is None else PlanFile.read(path / replica / PLANS if path.is_dir() else path, ranks)

    def _schedule(self) -> ScheduleEntry:
        """The schedule that is asked for; without one, the one that made the plans of the file, if it is known."""
        if self._config.schedule != "off" or self._file is None:
            return find_schedule(self._config.schedule)
        try:
            return find_schedule(self._file.plans[0].name)
        except UnknownScheduleError:  # the greedy's, or a person's own
            return find_schedule("dynamic")

    def _check_replicas(self) -> None:
        check_resample(self._config, self._loop.settings)
        if self._loop.settings.parallel.coupled > 1:
            check_coupled(self._config)

    # -- model ---------------------------------------------------------------------------------------------------
    def segmented(self, provider: Callable[..., Any]) -> Callable[..., ChunkList]:
        """A model provider that builds what ``provider`` would, in segments."""

        def build(*args: Any, **kwargs: Any) -> ChunkList:
            if self._program is not None:
                self._tell("a second model of this run is built and runs as without DIP")
                return provider(*args, **kwargs)
            family, blueprint = record_blueprint(self._families, provider, *args, **kwargs)
            loop = self._loop
            # If the loop hasn't said so.
            parallel = joined_by_balance(blueprint.kwargs.values(), loop.settings.parallel)
            loop.settings = replace(loop.settings, parallel=parallel)
            self._check_replicas()
            for note in check_configs(blueprint.kwargs.values(), parallel):
                _tell(note)
            if self._file is not None and self._file.path.parent == self._config.plan_file:
                self._file = self._plan_file(self._config, loop.settings.parallel.pp, replica_folder())
            model = family.describe(blueprint, parallel)
            check_placement(model, self._config, family)
            check_entry(self._entry, model, family, loop.settings.num_microbatches)
            cluster = cluster_of(self._config, _tell)
            costs = costs_of(self._config, _tell)
            checkpoint = loop.checkpoint()
            choice = ChunkChoice(loop.settings, self._config, self._entry, self._file, _tell)
            held = choice.chunks(model, cluster, costs, family, checkpoint)
            for sentence in (checkpoint and checkpoint.compare(held), loop.record(held), unlike_the_loop(model)):
                if sentence:
                    _tell(sentence)
            limits = self._config.memory_limit, self._config.recompute, self._config.offload
            self._graphs = ModelGraphs(model, cluster, held, costs, *limits)
            rank = parallel_state.get_pipeline_model_parallel_rank()
            patience, here = self._config.timeout_seconds, (dist.get_rank(), dist.get_world_size())
            position = Position(rank, global_ranks=self._pipeline())
            # Groups are made by asking the store, whose host may be gone.
            self._watchdog = Watchdog(shared_store(), position, *here, patience_seconds=patience)
            self._closing.callback(self._watchdog.close)
            self._program = make_program(
                family, blueprint, held, rank=rank, micro_batch_size=loop.settings.micro_batch_size
            )
            if self._file is not None:
                self._file.check(self._program.modules)
            chunks = ChunkList(self._program.build_chunks())
            check_configs([*configs_of_experts(chunks), *(c.config for c in chunks)], parallel)  # however told
            begin_alike([chunks[i] for i in copied(self._program.modules)])
            for chunk in chunks:
                chunk.register_forward_pre_hook(self._guard())
            self.chunks = list(chunks)
            self._own = {id(chunk): chunk for chunk in chunks}
            self._built = [names_in(chunk) for chunk in chunks]
            self._start_planner(self._program, self._graphs, chunks)
            return chunks

        return build

    def _start_planner(self, program: ModelProgram, graphs: ModelGraphs, chunks: ChunkList) -> None:
        """Start the planner's workers now: they warm up while Megatron builds its optimizer and reads its data."""
        config, parallel = self._config, self._loop.settings.parallel
        ranks, places = coupled_ranks(parallel.joined) if parallel.coupled > 1 else (replica_ranks(), None)
        self._exchange = everyone = GlooExchange(ranks, config.timeout_seconds)
        if places is not None:
            self._experts = experts_of(chunks, program.modules, everyone, places)
            self._exchange, self._coupled = coupled_exchanges(ranks, places, config.timeout_seconds)
            meet_in_backwards(chunks)
        experts = self._experts
        supported = everyone.gather(b"yes" if program.supports_split else b"no")
        if config.split_backward and b"no" in supported:
            logger.warning("some layers can't defer weight gradients: plans split no backward")
            config = config.model_copy(update={"split_backward": False})
        if everyone.rank == 0:
            planners_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) // len(ranks)
            cores = self._loop.computes_on_cores()
            effort = live_effort(config, planners_here, thrifty=cores)
            label = config.schedule if (asked := config.schedule != "off") else self._entry.name
            maker = live_maker(self._entry, graphs, program.shapes, effort, label=label, experts=experts or NO_EXPERTS)
            # One worker process, whose threads search together: only one iteration is planned ahead.
            workers = min(config.planner_workers, 1) if asked and self._entry.ahead else 0
            improve = IMPROVE_SECONDS if config.search_budget is None else config.search_budget
            if self._reads_ahead() or config.search_evaluations is not None or experts is not None:
                improve = 0.0
            self._service = service = PlannerService(maker, workers, improve_seconds=improve, last=cores)
            if self._file is not None:
                self._service = FilePlanner(self._file, graphs.model, program.shapes, service, falls_back=asked)
            self._closing.callback(service.close)

    # -- iterations ----------------------------------------------------------------------------------------------
    def owns(self, model: Any) -> bool:
        """Whether ``model``, as a schedule is given it, has a chunk that was built here."""
        return any(self._found(chunk) is not None for chunk in as_list(model))

    def check_other_call(self, data_iterator: Any) -> None:
        """Raises ValueError for the call of a schedule with another model, where that would hang or miss microbatches:
        within an iteration of this one, or with data that has been read ahead for it."""
        if self._running:
            raise ValueError(
                "the schedule of another model is called from within an iteration of the one that DIP built, whose "
                "order differs from rank to rank; call it between iterations, or use --dip-schedule off"
            )
        waiting = 0 if self._step is None else self._step.read_ahead_of(as_list(data_iterator))
        if waiting:
            raise ValueError(
                f"another model is called with a data iterator of which {waiting} microbatches have been read ahead "
                "for the one that DIP built; set read_ahead: false in --dip-config (DIP_READ_AHEAD=false), or give "
                "each its own iterator"
            )

    def run(self, call: ScheduleCall) -> list[Any]:
        """Run an iteration, as Megatron's schedules do.

        Raises ValueError, before any step, for a call that DIP can't follow.
        """
        if self._running:
            raise ValueError(
                "the schedule is called while it runs, from within an iteration of the same model; DIP can't nest them"
            )
        check_call(call, self.chunks, self._found, self._pipeline())
        if self._loop.settings.finalizes and not call.forward_only:
            check_functions(call)
        if self._step is None:
            self._step = self._start()
        self._running = True
        try:
            return self._step(call)
        finally:
            self._running = False

    def _found(self, chunk: Any) -> Any:
        """The chunk built here that is in ``chunk``, or None."""
        while chunk is not None and id(chunk) not in self._own:
            chunk = getattr(chunk, "module", None)  # within Megatron's wrappers
        return chunk

    def _guard(self) -> Callable[[torch.nn.Module, Any], None]:
        """A chunk has a part of its module's layers, in an order of its own: run by anything but its plan, it would
        compute something else than the model."""

        def only_in_a_stage(chunk: torch.nn.Module, _: Any) -> None:  # a function, so that models can be copied
            if not self._running:
                raise RuntimeError(
                    f"a {type(chunk).__name__} that DIP built is run without DIP's schedule: the loop calls the model "
                    "by itself (for inference, too, call the schedule, with forward_only), or has got its schedule "
                    "before dip_megatron.install() or from another package; see docs/any-loop.md, or use "
                    "--dip-schedule off"
                )

        return only_in_a_stage

    @staticmethod
    def _pipeline() -> list[int]:
        """Global ranks of this rank's pipeline."""
        return list(dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group()))

    def _start(self) -> DipForwardBackward:
        assert self._program is not None, "run() is for chunks built here"
        assert self._exchange is not None
        assert self._watchdog is not None
        config, program = self._config, self._program
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        rank, pipeline = self._watchdog.position.rank, self._pipeline()
        clock = self._clock(device)
        exchange = GlooExchange(pipeline, config.timeout_seconds)
        executor = self._executor(pipeline, rank, clock, exchange, device)
        delivery = PlanDelivery(self._exchange, self._service, config.recalibrate, self._coupled)
        self._watchdog.begin()
        executor.position = self._watchdog.position
        recorder = None
        consumers = self._consumers(exchange)
        if config.trace_dir is not None:
            recorder = RunRecorder(config.trace_dir / replica_folder(), exchange, about_run(config))
            consumers.append(recorder.record)
            if config.trace_plans and rank == 0:
                consumers.append(PlanWriter(config.trace_dir / replica_folder()).record)
        self._closing.callback(self._close, delivery, self._watchdog, recorder)
        for i in copied(program.modules):
            check_unchanged(self.chunks[i], self._built[i])
        for chunk in self.chunks:  # what a loop has put into them since, adapters for one
            deferred_linear.install(chunk, program.mode)
        return DipForwardBackward(
            program, executor, delivery, clock,
            policy=PlanningPolicy(
                self._budget(), self._another_follows, self._loop.about_to_read_ahead,
                at_call_seconds=AT_CALL_SECONDS if self._entry.ahead and not self._reads_ahead() else 0.0,
            ), iteration=self._loop.iteration, watchdog=self._watchdog, built=self._built, counts=self._loop.counts,
            on_iteration=lambda *iteration: [consume(*iteration) for consume in consumers],
            tensor_parallel=self._among(parallel_state.get_tensor_model_parallel_group()), pipeline=exchange,
            peers=self._among(parallel_state.get_data_parallel_group(with_context_parallel=True)),
            on_training=self._training_is, exchanges=self._exchanges(delivery, device),
        )  # fmt: skip

    def _clock(self, device: torch.device) -> Clock:
        return Clock(device)

    def _executor(
        self, pipeline: list[int], rank: int, clock: Clock, exchange: GlooExchange, device: torch.device
    ) -> Executor:
        """What runs plans here; ``exchange`` is among the ``pipeline``'s global ranks."""
        assert self._program is not None
        parallel = self._loop.settings.parallel
        transport = choose_transport(
            pipeline, rank, device, self._config.timeout_seconds, exchange,
            replicated=bool(copied(self._program.modules)),
        )  # fmt: skip
        return Executor(rank, transport, clock, alone=parallel.tp == parallel.cp == 1)

    def _consumers(self, exchange: GlooExchange) -> list[IterationConsumer]:
        """Who is told of every training iteration."""
        return [self._progress(exchange).record]

    def _exchanges(self, delivery: PlanDelivery, device: torch.device) -> ExchangesAhead | None:
        """Between replicas, where there are several."""
        config, at_call = self._config, not self._reads_ahead()
        if config.balance == "off" or parallel_state.get_data_parallel_world_size() == 1:
            return None
        if at_call:
            _tell(AT_CALL)
        samples = None
        if config.resample and self._loop.settings.samples is not None and self._program is not None:
            samples = Samples(self._loop.settings.samples, self._program)
        exchanges = begin_exchanges(
            self._graphs, delivery, config.timeout_seconds, device, config.balance, at_call, self._coupled,
            self._experts, samples,
        )  # fmt: skip
        self._closing.callback(exchanges.close)
        return exchanges

    def _budget(self) -> float | None:
        """Seconds for a plan; a search that counts its evaluations may take as long as they need."""
        return self._config.search_budget if self._config.search_evaluations is None else self._config.timeout_seconds

    def _another_follows(self) -> bool:
        return self._reads_ahead() and self._loop.another_follows()

    def _reads_ahead(self) -> bool:
        return self._config.read_ahead and self._loop.settings.read_ahead

    def _among(self, group: Any) -> GlooExchange | None:
        """The ranks of a group of Megatron's, where there are several."""
        ranks = list(dist.get_process_group_ranks(group))
        return GlooExchange(ranks, self._config.timeout_seconds) if len(ranks) > 1 else None

    def _training_is(self, training: Training, first: bool) -> None:
        """Compare the description of the model with the model as built. Leaves with a message if it is wrong."""
        if not first:
            _tell("what trains has changed; plans follow it from this iteration on")
            return
        assert self._graphs is not None
        if self._graphs.chunks.mixed:
            return  # mixed chunks are no parts of one module: plans take what trains from the model alone
        try:
            sentences = training.against(self._graphs.model)
        except TrainingMismatchError as error:  # on all ranks alike
            sys.exit(f"dip: {error}")
        for sentence in sentences:
            _tell(sentence)

    def _progress(self, exchange: GlooExchange) -> RunProgress:
        """Megatron writes its log, and everything else, on the last rank."""
        loop, last = self._loop, dist.get_rank() == dist.get_world_size() - 1

        def say(line: str) -> None:
            if last:
                print(line, flush=True)

        return RunProgress(exchange, loop.settings.log_interval, say, loop.write_scalars)

    @staticmethod
    def _close(delivery: PlanDelivery, watchdog: Watchdog, recorder: RunRecorder | None) -> None:
        watchdog.close()
        delivery.close()
        if recorder is not None:
            recorder.close()


def _tell(sentence: str) -> None:
    """Print on one rank."""
    if dist.get_rank() == 0:
        print(f"[dip] {sentence}", flush=True)
