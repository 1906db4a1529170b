"""Latent -> indices -> structural base y: the vector-quantised base code of the codec (VQ-E, code book, VQ-D).

    VQ-E(x) = quant_conv(f(x))               VQ-D(z) = g(post_quant_conv(z))               as published
    VQ-E(x) = quant_conv(f(x)) + A x         VQ-D(z) = g(post_quant_conv(z)) + B z         shortcut: linear

f and g are the networks of `blocks`, A and B linear maps of each position, with a bias. f and g normalise over the whole map
as their last act, so that what is the same everywhere in it, the level of a flat picture, can pass only beside them.
The code book moves by exponential averages, not by gradients. The forward pass only reports what it saw (counts and
sums per code); whoever trains adds these over micro-batches and ranks and applies them once per optimiser step.
Axes: N batch, d latent channels, h and w latent rows and columns, K codes, M = N*h*w positions.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import Decoder, Encoder, LinearMaps, distances, nearest_codes, start_linear
from models.sizes.mirrors import mirrored
from utils.config import require, require_from


@dataclass(frozen=True)
class VQBaseParams:
    """Size of the VQ base. The defaults are the published ones.

    Attributes:
        shortcut: `linear` adds a linear map beside VQ-E and VQ-D, which start as that alone: A takes the latent's first
            d_q channels, the largest where `gt.latent_scale` is `common`, and B puts them back.
        least_side: of the maps that VQ-E and VQ-D run on, in positions: smaller ones are mirrored to it, and the result
            is cut. What they normalise over, and how much of it touches their padding, is then as in training.
    """

    ch: int = 128
    ch_mult: tuple[int, ...] = (4,)  # a single resolution: one index per latent position
    num_res_blocks: int = 2
    z_channels: int = 256
    embed_dim: int = 256
    in_channels: int = 256  # channels of the image latent x
    codebook_size: int = 256  # K: 64, 256, 2048 and 8192 in the paper
    groups: int = 32
    decay: float = 0.99
    epsilon: float = 1e-5
    revive_below: float = 0.01  # a code whose average count per step falls below this is started anew
    shortcut: Literal["none", "linear"] = "none"
    least_side: int = 1

    def __post_init__(self):
        k = self.codebook_size
        require(2 <= k <= 8192 and k.bit_count() == 1, f"codebook_size {k}: a power of two from 2 to 8192")
        require_from(1, self, "ch", "ch_mult", "num_res_blocks", "z_channels", "embed_dim", "groups", "least_side")
        require_from(0, self, "revive_below")
        require(self.ch % self.groups == 0, f"ch {self.ch}: a multiple of groups, {self.groups}")
        require(0 <= self.decay < 1, f"decay {self.decay}: in [0, 1)")
        require(self.epsilon > 0, f"epsilon {self.epsilon}: above 0")


@dataclass(frozen=True)
class BaseCode:
    """A latent after VQ-E and the code book.

    Attributes:
        z: VQ-E(x) before quantisation, N x d_q x h x w.
        z_q: code-book rows chosen by k, with the straight-through gradient to z; as z.
        indices: k, int64 N x h x w in [0, K).
        counts: positions assigned to each code in this pass, float32 (K,).
        sums: sums of the vectors z assigned to each code, float32 (K, d_q).
    """

    z: Tensor
    z_q: Tensor
    indices: Tensor
    counts: Tensor
    sums: Tensor


class Codebook(nn.Module):
    """K vectors moved by exponential averages of the vectors assigned to them (van den Oord et al. 2017, App. A).

    Published keys: `embedding.weight` v, `embedding.cluster_size` n, `embedding.embed_avg` m.
    """

    def __init__(self, params: VQBaseParams):
        super().__init__()
        self.decay, self.epsilon, self.revive_below = params.decay, params.epsilon, params.revive_below
        size = params.codebook_size
        self.embedding = nn.Module()
        self.embedding.weight = nn.Parameter(torch.randn(size, params.embed_dim), requires_grad=False)
        # Sizes of one, not zero: with zeros, the first update divides averages that start at the codes by almost
        # nothing, and every unused code explodes.
        self.embedding.cluster_size = nn.Parameter(torch.ones(size), requires_grad=False)
        self.embedding.embed_avg = nn.Parameter(self.embedding.weight.clone(), requires_grad=False)

    @property
    def spacing(self) -> float:
        """Median over the codes of the squared distance to the nearest other one."""
        apart = distances(self.embedding.weight, self.embedding.weight)
        return apart.fill_diagonal_(torch.inf).amin(1).median().item()

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor) -> None:
        """One step of the exponential averages, with counts (K,) and sums (K, d_q) over the whole batch."""
        n, m = self.embedding.cluster_size, self.embedding.embed_avg
        n.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        m.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        total = n.sum()
        smoothed = (n + self.epsilon) / (total + len(n) * self.epsilon) * total
        self.embedding.weight.copy_(m / smoothed.unsqueeze(1))

    @torch.no_grad()
    def revive(self, vectors: Tensor, everything: bool = False) -> Tensor:
        """Start unused codes anew at vectors of the present batch.

        Args:
            vectors: candidates VQ-E(x), (M, d_q), the same on every rank and already shuffled.
            everything: place all codes (the very first step), not only those below `revive_below`.
        Returns:
            the indices of the codes that were moved, int64.
        """
        n = self.embedding.cluster_size
        unused = torch.ones_like(n, dtype=torch.bool) if everything else n < self.revive_below
        slots = unused.nonzero().flatten()
        fresh = vectors[torch.arange(len(slots), device=vectors.device) % len(vectors)]
        # A size of one makes size and average agree, and gives the code time to be chosen before it counts as unused.
        self.embedding.weight[slots] = fresh
        self.embedding.embed_avg[slots] = fresh
        n[slots] = 1.0
        return slots


class LinearChannels(LinearMaps):
    """A and B: between the d channels of the latent and the d_q of a code."""

    @torch.no_grad()
    def start_as_choice(self) -> None:
        """A: the first d_q channels (with zeros, if there are fewer); B: back."""
        for conv in (self.analysis, self.synthesis):
            conv.weight.copy_(torch.eye(*conv.weight.shape[:2])[..., None, None])
            conv.bias.zero_()


class VQBase(nn.Module):
    """x -> k -> y. One index per latent position; the decoder needs the indices alone."""

    def __init__(self, params: VQBaseParams):
        super().__init__()
        self.params = params
        shared = dict(ch=params.ch, ch_mult=params.ch_mult, num_res_blocks=params.num_res_blocks, groups=params.groups)
        self.encoder = Encoder(params.in_channels, params.z_channels, **shared)
        self.decoder = Decoder(params.z_channels, params.in_channels, **shared)
        self.quantize = Codebook(params)
        self.quant_conv = nn.Conv2d(params.z_channels, params.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(params.embed_dim, params.z_channels, 1)
        self.shortcut = LinearChannels(params.in_channels, params.embed_dim) if params.shortcut == "linear" else None
        start_linear(self)
        if self.shortcut:
            self.shortcut.start_as_choice()
            nn.init.zeros_(self.encoder.conv_out.weight)
            nn.init.zeros_(self.decoder.conv_out.weight)

    def forward(self, x: Tensor) -> BaseCode:  # N d h w
        """VQ-E, nearest codes, and what the code-book update needs."""
        z = self.encode(x)
        vectors = z.permute(0, 2, 3, 1).flatten(0, 2)  # M d_q
        k = nearest_codes(vectors, self.quantize.embedding.weight)  # M
        counts, sums = self._statistics(vectors.detach(), k)
        n, _, h, w = z.shape
        indices = k.view(n, h, w)
        z_q = z + (self.rows(indices) - z).detach()  # straight-through; as the reference computes it
        return BaseCode(z, z_q, indices, counts, sums)

    def encode(self, x: Tensor) -> Tensor:
        """z = VQ-E(x), not yet quantised: N x d x h x w -> N x d_q x h x w."""
        h, w = x.shape[2:]
        z = self.quant_conv(self.encoder(self._large_enough(x)))[..., :h, :w]
        z = z.to(x.dtype)  # distances and averages keep the precision of x
        return z + self.shortcut.encode(x) if self.shortcut else z

    def _statistics(self, vectors: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        codebook = self.quantize.embedding.weight
        counts = codebook.new_zeros(len(codebook)).index_add_(0, k, codebook.new_ones(len(k)))
        sums = torch.zeros_like(codebook).index_add_(0, k, vectors.to(codebook.dtype))
        return counts, sums

    def indices(self, x: Tensor) -> Tensor:
        """k of a latent: N x d x h x w -> int64 N x h x w."""
        return self(x).indices

    def rows(self, indices: Tensor) -> Tensor:
        """z_q from indices alone: int64 N x h x w -> N x d_q x h x w."""
        return F.embedding(indices, self.quantize.embedding.weight).permute(0, 3, 1, 2)

    def reconstruct(self, z_q: Tensor) -> Tensor:
        """y = VQ-D(z_q): N x d_q x h x w -> N x d x h x w."""
        h, w = z_q.shape[2:]
        y = self.decoder(self.post_quant_conv(self._large_enough(z_q)))[..., :h, :w].to(z_q.dtype)
        return y + self.shortcut.decode(z_q) if self.shortcut else y

    def _large_enough(self, x: Tensor) -> Tensor:
        return mirrored(x, self.params.least_side, self.params.least_side)


def perplexity(counts: Tensor) -> Tensor:
    """Exponential of the entropy of the code usage: from 1 (one code) to K (all alike). counts: (K,)."""
    p = counts / counts.sum().clamp(min=1)
    return torch.exp(-(p * torch.log(p + 1e-10)).sum())
