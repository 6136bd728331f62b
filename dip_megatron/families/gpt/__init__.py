"""GPT: a language model alone."""
