"""DIP without a change to a script: what the wheel's start-up file runs where the environment asks for a schedule.

``dip_megatron_startup.pth`` stands beside the installed package. Python reads it at every start; unless
``DIP_SCHEDULE`` or ``DIP_CONFIG`` is set, its one line looks at the environment and nothing else.
"""

from __future__ import annotations


def watch() -> None:
    """Hook DIP in as soon as Megatron-Core and the modules of a training loop load; imports none of them."""
    from .megatron.hooks import Hooks

    Hooks.installed(import_core=False)
