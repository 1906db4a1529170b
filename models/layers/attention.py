"""Attention by the way that is fast for its inputs, and that has a kernel for every width of a head."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NARROWEST, STEP = 32, 8  # widths that CUDA's kernels of every precision have: multiples of 8, of which 32 is everywhere
ROWS = 512  # queries at a time, where logits are held
WIDEST = 256  # channels of a head that CUDA's fast kernels take


def kernel_width(width: int) -> int:
    """Channels of a head as CUDA's kernels take them: at least `width`."""
    return max(NARROWEST, -(-width // STEP) * STEP)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, padded: bool | None = None) -> Tensor:
    """V softmax(QK / sqrt(C) + bias): N heads T C each, and a bias that broadcasts to N heads T T.

    Without a bias on a CPU in bfloat16 by matrix products, a few rows of logits at a time: they take a quarter of the time
    of PyTorch's own kernel. So do they where weights learn on CUDA in half precision, for heads that only a slow kernel takes.
    PyTorch's own serves everywhere else.

    Args:
        padded: heads that are no kernel's width get zeros, which change no product; None does so on CUDA. There some
            widths have no kernel that runs ("no kernel found to launch"), or one whose memory grows with T^2 alone.
    """
    if bias is None and q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.is_grad_enabled():
        heads = zip(*(part.flatten(0, 1) for part in (q, k, v)), strict=True)
        return torch.stack([_by_rows(*head) for head in heads]).view(q.shape)
    width = q.shape[-1]
    if bias is None and q.is_cuda and q.dtype != torch.float32 and width > WIDEST and torch.is_grad_enabled():
        return by_products(q, k, v)
    missing = kernel_width(width) - width
    if not missing or not (q.is_cuda if padded is None else padded):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    q, k, v = (F.pad(part, (0, missing)) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1 / math.sqrt(width))[..., :width]


def by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """V softmax(QK / sqrt(C)): N heads T C each, in float32 between the two products."""
    logits = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[-1])
    return torch.softmax(logits, dim=3).to(v.dtype) @ v


def _by_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # T C each
    parts = (q * q.shape[1] ** -0.5).split(ROWS)
    return torch.cat([torch.softmax(rows @ k.T, dim=1) @ v for rows in parts])
