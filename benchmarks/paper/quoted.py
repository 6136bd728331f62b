"""The paper's own figures: DIP, ASPLOS 2026 (arXiv 2504.14145 v2), section 6."""

from __future__ import annotations

FAMILY_GAIN = {"vlm": (1.156, 1.762), "t2v": (1.366, 1.973)}
"""DIP's throughput over that of Megatron-LM (VPP, parameter-balanced), nnScaler* and Optimus: least and greatest of a
family (T2V without Optimus)."""

ABLATION = {
    "Megatron-LM": 26.13,
    "+ partitioner": 22.27,
    "+ interleaving": 18.81,
    "+ reordering": 17.61,
    "+ memory": 16.05,
}
"""VLM-S, seconds an iteration, each row with all rows before it."""

H20 = {"FSDP": 40.270, "Megatron-LM": 39.053, "DIP": 28.606}
"""VLM-S on 16 H20, seconds an iteration."""

UNIT_SIZE_GAP = 0.051
"""VLM-S: worst over best at sub-microbatches of 4 to 12 images, less one."""
UNIT_SIZE_BEST = 12
UNIT_SIZE_COST = 0.121
"""VLM-S: what fewer than 8 images at a time cost at most."""

DYNAMIC_MEGATRON = 0.529
"""Dynamic run of VLM-S, iteration 6: Megatron-LM takes so much longer than DIP."""
DYNAMIC_OTHERS = 0.104
"""The same of nnScaler* and Optimus."""

MEMORY_FLUCTUATION = -0.529
"""VLM-M, rank 0: DIP's fluctuation of memory against that under Megatron-LM's schedule."""
MEMORY_GAIN = 0.122
"""VLM-M: DIP's throughput over Optimus's at equal peak memory, less one."""

SEARCH_SECONDS = 10.0
"""A plan is near the best within this time, at any number of microbatches (64 cores)."""

LARGE_MFU = {"vlm-xl": 0.36, "t2v-xl": 0.39}
LARGE_GAIN = 0.828
"""The greatest gain in throughput of the simulated large models, less one."""
