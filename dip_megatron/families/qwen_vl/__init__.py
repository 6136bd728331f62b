"""Qwen2.5-VL as Megatron-Bridge builds it: Hugging Face's vision transformer before Megatron-Core's GPT."""
