"""Measuring schedules on one GPU that acts as several."""
