"""Code as a folder of Kimi-K2.5 has it, which Bridge loads from there: written anew, with the names of modules,
parameters and settings that the published folder has. Its language model is Hugging Face's own DeepSeek-V3."""
