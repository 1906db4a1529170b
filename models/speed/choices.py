"""Names of what makes networks fast. Without torch, so that a wrong command line is answered at once."""

from typing import Literal, get_args

Precision = Literal["auto", "float32", "bfloat16"]
PRECISIONS = get_args(Precision)
CUDA_PATHS = ("fused_norm", "graphs")  # where one cannot run, it says so in a line, and the rest goes on
FAST_PATHS = (*CUDA_PATHS, "keep_memory")  # that of CPUs belongs to the process, not to a codec
