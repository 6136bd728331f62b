"""DIP for Megatron-LM: pipeline schedules planned for every batch of a large multimodal model."""

__version__ = "0.1.0"
