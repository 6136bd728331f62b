"""Code as a folder of InternVL has it in its own layout, which mcore-bridge loads from there: written anew, with the
names of modules, parameters and settings that the published folders have. Its language model is Hugging Face's own."""
