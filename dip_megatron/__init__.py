"""DIP for Megatron-LM: pipeline schedules planned for every batch of a large multimodal model."""

__version__ = "0.1.0"


def install() -> None:
    """Hook DIP into ``megatron.training``: adds the argument group ``dip`` and acts only where ``--dip-schedule`` asks.

    Call it before Megatron parses its arguments. Calling it again changes nothing. Raises ImportError if
    ``megatron.training`` can't be imported.
    """
    import logging

    from .megatron.hooks import Hooks

    missing = Hooks().install()
    if missing:
        logging.getLogger(__name__).warning(
            "this Megatron has no %s: --dip-schedule will not work fully. Supported: Megatron-LM 0.16 to 0.19; "
            "see README.md",
            ", ".join(missing),
        )
