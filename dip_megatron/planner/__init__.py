"""Plans for coming iterations, made beside the training."""
