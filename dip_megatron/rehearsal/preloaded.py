"""What every rank of a rehearsal needs, loaded once: ranks are forked with it, and share its memory."""

from __future__ import annotations

import gc
import logging
import os
import warnings

warnings.simplefilter("ignore")  # Megatron's and torch's, of what this machine hasn't and the cluster has
logging.disable(logging.WARNING)

from ..megatron.hooks import Hooks  # noqa: E402
from ..planner.warm import warm_up_plans  # noqa: E402
from . import rank  # noqa: E402, F401

logging.disable(logging.NOTSET)
Hooks.installed().runs.families()
warm_up_plans()
gc.collect()
gc.freeze()  # a collection in a rank would write to, and so copy, what is shared
# Libraries complain of themselves when this process ends; ranks have logs of their own.
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
