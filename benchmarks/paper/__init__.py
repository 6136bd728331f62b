"""The paper's evaluation, from the simulator."""
