"""Measures a device, for the cost model."""
