"""Text to video: a language model that encodes captions, and a diffusion transformer."""
