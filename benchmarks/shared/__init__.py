"""What several benchmarks use: how ranks start, what they build and run, tables."""
