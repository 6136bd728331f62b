"""What Megatron-Core's layer specs and Megatron-Bridge use of Transformer Engine, in plain torch, for ranks on a CPU.

Names, arguments, parameter names and shapes are Transformer Engine's. FP8, tensor parallelism, context parallelism of
packed sequences and fused kernels aren't here: what would need them is refused.
"""

from . import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "1.10.0"  # at 1.9 Megatron expects grouped linears, from 1.13 on fusible operations
