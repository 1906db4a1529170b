"""Attention that has a kernel for every width of a head."""

import math

import torch.nn.functional as F
from torch import Tensor

NARROWEST, STEP = 32, 8  # widths that CUDA's kernels of every precision have: multiples of 8, of which 32 is everywhere


def kernel_width(width: int) -> int:
    """Channels of a head as CUDA's kernels take them: at least `width`."""
    return max(NARROWEST, -(-width // STEP) * STEP)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, padded: bool | None = None) -> Tensor:
    """V softmax(QK / sqrt(C) + bias): N heads T C each, and a bias that broadcasts to N heads T T.

    Args:
        padded: heads that are no kernel's width get zeros, which change no product; None does so on CUDA. There some
            widths have no kernel that runs ("no kernel found to launch"), or one whose memory grows with T^2 alone.
    """
    width = q.shape[-1]
    missing = kernel_width(width) - width
    if not missing or not (q.is_cuda if padded is None else padded):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    q, k, v = (F.pad(part, (0, missing)) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1 / math.sqrt(width))[..., :width]
