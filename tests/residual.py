"""A codec with every part and random weights, for tests of files with residual sections."""

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from models.codec import Codec
from models.entropy_coding import centred_table, frequency_table
from models.residual_hyperprior import HYPER_REACH, SYMBOL_REACH, ResidualHyperprior, ResidualTables
from models.residual_networks import SCALE_MIN, SCALE_STEP, SCALES, ResidualParams
from tests.commands import NANO
from tests.networks import off_zero
from training.config import load_config
from utils.images import to_signed, to_uint8

SMALL = ResidualParams(
    channels=6, width=8, blocks=1, hyper_channels=3, scale_width=6, code_width=4, levels=3, first_gain=2, last_gain=12
)
D, K = 8, 16
FINGERPRINT = b"test"


def gaussian_counts(sigma: float, reach: int) -> np.ndarray:
    """Of the integers -reach to reach, among 10^6 draws of N(0, sigma^2)."""
    edges = (np.arange(-reach, reach + 2) - 0.5) / sigma
    below = np.array([math.erf(edge / math.sqrt(2)) for edge in edges])
    return np.round(5e5 * np.diff(below)).astype(np.int64)


def residual_tables(params: ResidualParams) -> ResidualTables:
    hyper = [
        [
            centred_table(gaussian_counts(0.4 * (1 + level + channel), HYPER_REACH))
            for channel in range(params.hyper_channels)
        ]
        for level in range(params.levels)
    ]
    symbols = [centred_table(gaussian_counts(SCALE_MIN * SCALE_STEP**i, SYMBOL_REACH)) for i in range(SCALES)]
    return ResidualTables(np.array(hyper), np.array(symbols))


def new_residual(params: ResidualParams = SMALL, seed: int = 0) -> ResidualHyperprior:
    """Random weights, no layer at zero, table indices that cover much of their range."""
    torch.manual_seed(seed)
    residual = ResidualHyperprior(params, D, K).eval()
    for network in (residual.analysis, residual.synthesis, residual.mean_network):
        torch.nn.init.normal_(network.conv_out.weight, std=0.1)
    torch.nn.init.normal_(residual.scale_network.code.weight, std=2.0)
    torch.nn.init.normal_(residual.hyper_analysis.conv2.weight, std=0.3)
    return residual


def new_codec(**changes) -> Codec:
    """Random weights, a code book in the middle of the latents, tables, and a fingerprint.

    Args:
        changes: to the codec's parameters.
    """
    networks = replace(load_config(str(NANO)).networks, residual=SMALL, **changes)
    torch.manual_seed(0)
    codec = Codec(networks).eval().requires_grad_(False)
    off_zero(codec)
    codec.residual = new_residual().requires_grad_(False)
    x = codec.to_latent(to_signed(picture(256, 256))[None])
    z = codec.vq_base(x).z.permute(0, 2, 3, 1).flatten(0, 2)
    codec.vq_base.quantize.revive(z[: K // 2].repeat(2, 1), everything=True)  # half of the codes serve
    codec.base_table = frequency_table(np.array([75, 38, 9, 18, 27, 5, 68, 16] + [0] * (K // 2)))  # as often as they do
    codec.residual.freeze(residual_tables(SMALL))
    codec.fingerprint = FINGERPRINT
    return codec


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth colours with some noise: uint8 (3, height, width)."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 8 + 2, width // 8 + 2, generator=random) * 2 - 1
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    return to_uint8((smooth + 0.2 * torch.randn(smooth.shape, generator=random)).clamp(-1, 1))
