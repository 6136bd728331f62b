"""A stand-in for flash-linear-attention, for ``deterministic_mode``, in which Megatron computes all else itself."""
