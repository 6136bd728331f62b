"""Code as the folders of Kimi-K2.5 and Kimi-VL have it, which Megatron-Bridge and mcore-bridge load from there: written
anew, with the names of modules, parameters and settings that the published folders have. Their language model is
Hugging Face's own DeepSeek-V3."""
