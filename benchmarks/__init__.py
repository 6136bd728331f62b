"""Benchmarks of the project: ``scripts/bench NAME`` runs ``benchmarks.NAME``."""
