"""How ranks are used."""

from __future__ import annotations

from dataclasses import dataclass

from .faults import ModelError, positive

MOST_RANKS = 1 << 20  # of one dimension: more than any cluster has


@dataclass(frozen=True)
class Parallel:
    """How ranks are used: tensor, pipeline, data and context parallel sizes, what is sharded over them, and over how
    many of the ranks of a stage experts are spread (``ep``) and each of them is split (``etp``; 0: as ``tp``).
    ``joined``: all replicas meet in layers with experts, whoever holds these (for a loss over the counts of all)."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = True
    distributed_optimizer: bool = True
    cp: int = 1
    ep: int = 1
    etp: int = 0
    joined: bool = False

    def __post_init__(self) -> None:
        sizes = {"tp": self.tp, "pp": self.pp, "dp": self.dp, "cp": self.cp, "ep": self.ep, "etp": self.expert_tp}
        positive("parallel", **sizes)
        for name, size in sizes.items():
            if size > MOST_RANKS:  # arrays of all ranks would take all memory before anything is refused
                raise ModelError(f"parallel.{name}: {size} ranks; at most {MOST_RANKS}")

    @property
    def gpus(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def expert_tp(self) -> int:
        """Ranks that an expert is split over."""
        return self.etp or self.tp

    @property
    def coupled(self) -> int:
        """Data-parallel replicas that meet in layers with experts, as a rule those that share a group of experts: 1 if
        each has its own, and so plans alone."""
        return self.dp if self.joined else self.sharing

    @property
    def sharing(self) -> int:
        """Data-parallel replicas that share a group of experts."""
        return max(1, -(-self.ep * self.expert_tp // (self.tp * self.cp)))

    @property
    def expert_dp(self) -> float:
        """Ranks of a stage, of all replicas, that hold the same experts."""
        return self.tp * self.cp * self.dp / (self.ep * self.expert_tp)
