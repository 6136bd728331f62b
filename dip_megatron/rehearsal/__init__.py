"""The job before the job: a run's processes, planners, exchanges, checkpoints and faults on one machine, with stages
that sleep for their price and hold no weights."""
