"""Tests with Megatron-Bridge, in the environment that has it (``scripts/test`` builds it); elsewhere there are none."""

import importlib.util

if importlib.util.find_spec("megatron.bridge") is None:
    collect_ignore_glob = ["test_*"]
else:
    from tests import forked

    forked.preload("tests.bridge.preloaded")
