"""Every touch of Megatron: arguments, schedule hook, model building, gradients, checkpoints, CPU platform."""
