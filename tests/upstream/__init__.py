"""Megatron-LM's own scripts and tests, run with this project: what ``scripts/check_patches`` and others start."""
