"""What DIP asks of a training loop, whichever it is, and where an adapter hooks into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from ...compat.token_counts import TokenCounts
from .layout import GivenLayout

if TYPE_CHECKING:  # hooks are installed while Megatron is being imported
    from ...describe.model import Parallel, Partition
    from ...runtime.protocol import SamplePacking
    from ..checkpoints import Checkpoint


@dataclass(frozen=True)
class LoopSettings:
    """What a loop's own settings say before its first iteration.

    Args:
        num_microbatches: Microbatches of an iteration and replica, as far as they are known before the first one.
        log_interval: Iterations from one log to the next.
        read_ahead: Whether the next iteration's microbatches may be read while one trains. Without it they are planned
            when the schedule is called with them.
        layout: Layers of each stage, if the settings give them. The loop must not apply it itself.
        weights_by_tokens: Whether losses and gradients of all replicas are added up and divided by their tokens, so
            that replicas may train on different numbers of microbatches.
        finalizes: Whether the loop gives schedules a function that reduces gradients over replicas.
        adapts: Whether the loop puts adapters into the model once it is built.
        samples: How the loop packs samples into microbatches, if it says so.
    """

    parallel: Parallel
    micro_batch_size: int
    num_microbatches: int
    seed: int = 0
    log_interval: int = 100
    read_ahead: bool = False
    layout: GivenLayout | None = None
    weights_by_tokens: bool = False
    finalizes: bool = False
    adapts: bool = False
    samples: SamplePacking | None = None


class TrainingLoop:
    """One run of a loop: its settings, and what it is asked while it trains.

    The methods are those of a loop that keeps nothing DIP could use; adapters override them.
    """

    def __init__(self, settings: LoopSettings, counts: TokenCounts | None = None):
        """``counts`` are the tokens that its scripts count (None: Megatron's counts)."""
        self.settings = settings
        self.counts = counts or TokenCounts()

    def iteration(self) -> int | None:
        """The number of the iteration that runs, or ran last, as the loop counts. None: DIP counts those that train,
        from 1."""
        return None

    def another_follows(self) -> bool:
        """Whether the training iteration that is about to run is followed by another: data sets may hold no more than
        is trained on, and some loops read what they skip by themselves."""
        return True

    def computes_on_cores(self) -> bool:
        """Whether ranks compute on the host's cores, so that planning takes from training."""
        import torch

        return not torch.cuda.is_available()

    def about_to_read_ahead(self, data_iterator: Any) -> None:
        """Called in every training iteration once its microbatches are read: ``data_iterator`` gives the next
        iteration's from now on, None if none are read ahead."""

    def checkpoint(self) -> Checkpoint | None:
        """What the run is going to load, called on all ranks before the model is built. Raises ConfigurationError."""
        return None

    def record(self, chunks: Partition) -> str | None:
        """Have checkpoints carry what the ranks hold; a sentence if there is something to say of them."""
        return None

    def write_scalars(self, scalars: dict[str, float], iteration: int) -> None:
        """Beside the loop's own, on the ranks that write any."""


@dataclass(frozen=True)
class Target:
    """A function of a loop's module to wrap, or a method of a class in it (``Class.method``). ``purpose`` is what can't
    be done where it is missing; empty if nothing is lost."""

    attribute: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    purpose: str = ""


class LoopAdapter(Protocol):
    """Hooks into the modules of one loop. Modules may load at any time, before or after the hooks are installed."""

    def wanted(self, module: str) -> bool:
        """Whether the module of this name may be one of the loop's; asked of every module before it loads."""
        ...

    def targets(self, module: ModuleType) -> Sequence[Target]:
        """What to wrap in a module whose name is wanted, now that it has been loaded."""
        ...
