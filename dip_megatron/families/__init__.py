"""Models in segments, built from Megatron-Core's own blocks."""
