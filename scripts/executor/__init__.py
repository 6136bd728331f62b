"""Ranks of scripts/bench executor."""
