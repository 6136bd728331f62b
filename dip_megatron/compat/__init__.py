"""What DIP leans on in Megatron-Core, Transformer Engine and torch that they don't promise: one file a topic."""
