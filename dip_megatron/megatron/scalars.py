"""Scalars beside Megatron's own, wherever its TensorBoard and Weights & Biases writers are on."""

from __future__ import annotations

from megatron.training import global_vars


def write_scalars(scalars: dict[str, float], iteration: int) -> None:
    """To both writers; they exist on one rank of the job, the last. Does nothing elsewhere."""
    board = global_vars.get_tensorboard_writer()
    if board is not None:
        for name, value in scalars.items():
            board.add_scalar(name, value, iteration)
    weights_and_biases = global_vars.get_wandb_writer()
    if weights_and_biases is not None:
        weights_and_biases.log(scalars, iteration)
