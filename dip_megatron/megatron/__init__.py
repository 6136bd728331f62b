"""Every touch of Megatron outside the models: arguments, hooks, step functions, gradients, the CPU platform."""
