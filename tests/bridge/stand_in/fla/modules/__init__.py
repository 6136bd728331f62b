"""As flash-linear-attention's."""
