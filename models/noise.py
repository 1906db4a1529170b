"""The decoder's noise: Philox4x32-10 (Salmon et al. 2011), keyed by the seed and counted by position and step.

A number depends on its own place alone, so it can be drawn on any device, in any order, for any tile. The integers are
the same everywhere; the normals that Box and Muller's transform makes of them may differ in their last bits.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

ROUNDS = 10
GRAIN_STEP = 1 << 31  # step whose numbers are the texture's; those of diffusion are the first
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key in every round
WORD = 0xFFFFFFFF


def philox(counter: list[Tensor], key: tuple[int | Tensor, int]) -> list[Tensor]:
    """Four random words of every counter.

    Args:
        counter: four int64 tensors of one shape, values of 32 bits. key: two words; a tensor is int64.
    Returns:
        four int64 tensors of that shape, values of 32 bits.
    """
    a, b, c, d = counter
    for round_ in range(ROUNDS):
        k0, k1 = ((word + round_ * step) & WORD for word, step in zip(key, WEYL, strict=True))
        # int64 products wrap modulo 2^64: their bits are those of the unsigned product.
        p, q = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (q >> 32 & WORD) ^ b ^ k0, q & WORD, (p >> 32 & WORD) ^ d ^ k1, p & WORD
    return [a, b, c, d]


def normal(
    seed: int | Tensor, step: int | Tensor, shape: tuple[int, int, int], device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal numbers of a latent, float32 (1, d, h, w).

    The words of counter (row, column, n, step) are the normals of channels 4n to 4n + 3 at that position.

    Args:
        seed: 32 bits. step: number of the draw, from 0. Both may be int64 tensors. shape: d, h, w.
    """
    d, h, w = shape
    axes = [torch.arange(size, dtype=torch.int64, device=device) for size in (-(-d // 4), h, w)]
    group, row, column = torch.meshgrid(*axes, indexing="ij")
    words = philox([row, column, group, torch.zeros_like(row) + step], (seed & WORD, 0))
    uniform = [((word >> 8).float() + 0.5) * 2.0**-24 for word in words]  # in (0, 1)
    values = []
    for u, v in (uniform[:2], uniform[2:]):
        radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
        values += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(values, dim=1).flatten(0, 1)[None, :d]


def drawn(like: Tensor, place: Tensor) -> Tensor:
    """One draw, of tensors alone, as a CUDA graph takes them: 1 x d x h x w like `like`; place: (seed, step), int64."""
    return normal(*place, tuple(like.shape[1:]), like.device)


def portable_noise(
    seed: int, like: Tensor, draw: Callable[[Tensor, Tensor], Tensor] = drawn, first: int = 0
) -> Iterator[Tensor]:
    """Endless standard normal draws shaped as `like`, 1 x d x h x w, on its device; float32, one of each step from `first` on."""
    return (draw(like, torch.tensor([seed & WORD, step], device=like.device)) for step in itertools.count(first))
