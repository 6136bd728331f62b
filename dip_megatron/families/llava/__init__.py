"""LLaVA: a ViT, a projector and a language model."""
