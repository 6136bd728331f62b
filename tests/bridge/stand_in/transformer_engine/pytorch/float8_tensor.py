class Float8Tensor:
    """Without FP8 no tensor is one."""
