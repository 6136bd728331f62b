"""What DIP finds in an environment: what works, what doesn't, and what that costs.

A check is a function that returns :class:`Check` objects; :data:`~dip_megatron.doctor.checks.CHECKS` lists them in the
order in which ``dip doctor`` prints them.
"""

from .check import Check, Status, diagnose

__all__ = ["Check", "Status", "diagnose"]
