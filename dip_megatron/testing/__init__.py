"""What benchmarks and tests of other projects use: models and schedules that no training run needs."""
