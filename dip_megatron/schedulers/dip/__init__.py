"""Finding schedules: list scheduling by keys, annealing, local search, and the paper's three phases."""
