"""What trains of the model as built, known alike to all ranks of a replica, and followed where a script changes it.

Ranks report what their own parameters say. The first reports are exchanged before the first training iteration is
planned; later ones, which are rare, travel with the hash of a plan and cost no exchange of their own.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence

import torch
from megatron.core import parallel_state

from ..core import Plan
from ..core.protocols import Exchange
from ..describe.model import Training, TrainingMismatchError
from ..describe.model.training import Report, check_replicas
from ..planner.delivery import PlanDelivery
from ..runtime.protocol import RunnableChunks
from ..runtime.trained import Names, TrainedParameters, report

TrainingConsumer = Callable[[Training, bool], object]
"""Is told what trains, before the first iteration (True) and after every change, on all ranks."""


class TrainingAgreement:
    """One rank's view, the same on all of its replica between two iterations."""

    def __init__(
        self,
        program: RunnableChunks,
        rank: int,
        delivery: PlanDelivery,
        *,
        peers: Exchange | None = None,
        on_change: TrainingConsumer | None = None,
        built: Sequence[Names] | None = None,
    ):
        """``rank`` is the pipeline rank; ``peers`` are the ranks at this place of all replicas, if there are several;
        ``built`` see :func:`dip_megatron.runtime.trained.report`."""
        self.training: Training | None = None
        self._modules = program.modules
        self._rank = rank
        self._delivery = delivery
        self._peers = peers
        self._on_change = on_change
        self._built = built
        self._parameters = TrainedParameters()
        self._reports: list[tuple[int, Report]] = []
        places = [(m, k) for m in self._modules for k in range(m.segments)]
        self._begins = [
            k == 0 and (m.replicated or rank == (len(m.layers[0]) - 1 if m.runs_back(0) else 0)) for m, k in places
        ]  # fmt: skip

    def news(self, chunks: Sequence[torch.nn.Module]) -> bytes:
        """What to send along with the next plan's hash: this rank's report if it has changed, else nothing. The first
        time all reports are exchanged at once. Raises TrainingMismatchError if ranks disagree."""
        if not self._parameters.changed(chunks):
            return b""
        mine = self._rank, report(chunks, self._begins, self._built)
        if self.training is not None:
            return pickle.dumps(mine)
        told = [pickle.loads(data) for data in self._delivery.share(pickle.dumps((mine, self._difference(mine[1]))))]
        differences = [difference for _, difference in told if difference]
        if differences:  # of every replica some ranks have seen it, and have told the others
            raise TrainingMismatchError(differences[0])
        self._learn([reported for reported, _ in told], first=True)
        return b""

    def learn(self, news: Sequence[bytes]) -> bool:
        """Take in what the ranks of the replica sent, in their order; whether anything has changed."""
        if not any(news):
            return False
        both = zip(news, self._reports, strict=True)
        self._learn([pickle.loads(data) if data else known for data, known in both], first=False)
        return True

    def check(self, plan: Plan, subject: str) -> None:
        """Raises TrainingMismatchError if the plan leaves out weight gradients of the model."""
        missing = None if self.training is None else self.training.missing_in(plan.graph)
        if missing is not None:
            raise TrainingMismatchError(
                f"{missing} trains in the model as built, but the plan for {subject} has no weight gradients there; "
                "plan for what trains (a plan file: write it again), freeze that chunk, or use --dip-schedule off"
            )

    def _learn(self, reports: list[tuple[int, Report]], first: bool) -> None:
        self._reports = reports
        self.training = Training.of(self._modules, reports)
        if self._on_change is not None:
            self._on_change(self.training, first)

    def _difference(self, mine: Report) -> str:
        """In what this place of the replicas differs, or nothing. Peers alone are asked: an exchange among all ranks
        would have a connection for each pair of them."""
        if self._peers is None:
            return ""
        own = self._rank, parallel_state.get_tensor_model_parallel_rank(), mine
        try:
            check_replicas(self._modules, [pickle.loads(data) for data in self._peers.gather(pickle.dumps(own))])
        except TrainingMismatchError as error:
            return str(error)
        return ""
