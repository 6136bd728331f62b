"""Benchmarks, the paper's tables and other programs of this repository; no part of the package."""
