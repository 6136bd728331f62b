"""Errors of plans that must not run."""


class PlanError(ValueError):
    """A plan that must not run. The message names the first fault and its place."""


class CouplingError(PlanError):
    """Plans of replicas that must not run together.

    Attributes:
        condition: The rule that is broken: ``size`` (replicas, ranks or modules differ), ``plan`` (a single plan is
            invalid), ``order``, ``recompute``, ``pairing``, ``reduction`` or ``cycle``. The message names the first
            pair of operations.
    """

    def __init__(self, condition: str, message: str) -> None:
        super().__init__(message)
        self.condition = condition
