"""Residual symbols of training crops -> the context model of a release, fitted after everything else is fixed.

The network trains in the very integers that it codes with (integers.py), on the cost of symbols as Gaussian; tables are then counted
for what it chooses.
"""

import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm, trange

from models.codec import Codec
from models.context_model import (
    MOST_CHANNELS,
    PASSES,
    SKEWS,
    TAPS,
    ContextModel,
    ContextNetwork,
    bordered,
    grouped,
    parts,
)
from models.entropy_coding import frequency_table, symbol_bits
from models.residual_hyperprior import SYMBOL_REACH, Symbols
from models.residual_networks import SCALE_MIN, SCALE_STEP, SCALES
from release.tables import with_prior
from training.optimiser import Optimiser
from training.stage_config import OptimParams

STEPS = 4000
BATCH = 256  # positions of each pass
OPTIM = OptimParams(lr=6e-3, lr_end=0.0, warmup=50, betas=(0.9, 0.98))
HELD_OUT = 16  # one crop in so many is not trained on: what the model saves is measured there
ENOUGH = 256  # crops; with fewer, tables by h_s alone are what can be learnt
_LEAST = 2.0**-16  # of a probability: no table has less


def install(codec: Codec, crops: Sequence[Symbols], steps: int, seed: int, device: torch.device) -> dict:
    """Fit a context model to the symbols of crops, all of one size, and give it to the residual codec.

    Returns:
        entries of release.json; none, and no model, without steps, with too few crops, or where it saves nothing.
    """
    if not steps or codec.residual is None:
        return {}
    if (channels := codec.residual.params.channels) > MOST_CHANNELS:
        print(
            f"no context model: {channels} channels of the residual, and it takes up to {MOST_CHANNELS}",
            file=sys.stderr,
        )
        return {}
    if len(crops) < ENOUGH:
        print(
            f"no context model: it takes {ENOUGH} crops, and {len(crops)} were counted (more: --crops)", file=sys.stderr
        )
        return {}
    trained, held = [crop for i, crop in enumerate(crops) if i % HELD_OUT], crops[::HELD_OUT]
    network = fit(trained, steps, seed, device)
    model = ContextModel(network, counted(network, trained), codec.residual.tables.reach("symbols"))
    positions = sum(crop.index[0].size for crop in held)
    tables = codec.residual.tables.symbols
    alone = sum(symbol_bits(crop.residual.ravel(), crop.index.ravel(), tables).sum() for crop in held) / positions
    in_passes = sum(model.bits(crop.residual, crop.index).sum() for crop in held) / positions
    if in_passes >= alone:
        print(f"no context model: {in_passes:.2f} bits per position with it, {alone:.2f} without", file=sys.stderr)
        return {}
    codec.residual.context_model = model
    told = {"held_out_bits_per_position": round(in_passes, 3), "without": round(alone, 3)}
    return {"context_model": told}


def fit(crops: Sequence[Symbols], steps: int, seed: int, device: torch.device) -> ContextNetwork:
    """A network that was trained on the symbols of crops, all of one size, by their cost in bits as Gaussian."""
    torch.manual_seed(seed)
    activity = sum(np.abs(crop.residual).mean((1, 2)) for crop in crops)
    network = ContextNetwork(len(activity))
    network.group.copy_(torch.from_numpy(grouped(activity)))
    network.to(device)
    grids = torch.from_numpy(np.stack([bordered(crop.residual) for crop in crops])).to(device)  # S h+2 w+2 M
    indices = torch.from_numpy(np.stack([crop.index.transpose(1, 2, 0) for crop in crops])).to(device)  # S h w M
    optimiser = Optimiser(network.named_parameters(), OPTIM, steps)
    for step in (bar := trange(steps, desc="fitting the context model")):
        optimiser.zero_grad()
        cost = 0
        for number in range(PASSES):
            crop, row, column = drawn(number, *indices.shape[:3], BATCH)
            context = torch.stack([grids[crop, row + 1 + down, column + 1 + right] for down, right in TAPS], dim=1)
            moved, skew = network(number, context.float(), indices[crop, row, column].float())
            cost = cost + gaussian_bits(context[:, 0, network.members(number)], moved, skew).sum() / (2 * BATCH)
        cost.backward()
        optimiser.update(step)
        if step % 50 == 0:
            bar.set_postfix(bits_per_position=f"{float(cost.detach()):.2f}")
    return network.cpu()


def drawn(number: int, crops: int, h: int, w: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Crops, rows and columns of `count` random positions of a pass. A crop has at least two columns."""
    crop, row = torch.randint(crops, (count,)), torch.randint(h, (count,))
    column = 2 * torch.randint(w // 2, (count,)) + (row + number) % 2
    return crop, row, column


def gaussian_bits(n: Tensor, index: Tensor, skew: Tensor) -> Tensor:
    """-log2 of the mass of N(sigma u / SKEWS, sigma^2) in [n - 1/2, n + 1/2], sigma that of index i'; all of one shape."""
    sigma = SCALE_MIN * SCALE_STEP**index
    distance = (n - sigma * skew / SKEWS).abs()
    upper, lower = ((edge - distance) / (sigma * math.sqrt(2)) for edge in (0.5, -0.5))
    return -(0.5 * (torch.erfc(-upper) - torch.erfc(-lower))).clamp(min=_LEAST).log2()


def counted(network: ContextNetwork, crops: Sequence[Symbols]) -> np.ndarray:
    """Tables of what the network chooses in crops, as `ContextModel` takes them: n of a negative u counts as -n of a positive."""
    counts = np.zeros((SCALES, SKEWS + 1, 2 * SYMBOL_REACH + 1), dtype=np.int64)
    flat = np.ones(counts.shape, dtype=np.int32)
    model = ContextModel(network, flat, np.full(SCALES, SYMBOL_REACH))
    for crop in tqdm(crops, desc="counting for the context model"):
        grid = bordered(crop.residual)
        for number, rows, columns in parts(*crop.index.shape[1:]):
            scale, skew = model.chosen(grid, crop.index, number, rows, columns)
            n = grid[rows + 1, columns + 1][:, network.members(number)].astype(np.int64)
            np.add.at(counts, (scale, np.abs(skew), np.where(skew < 0, -n, n) + SYMBOL_REACH), 1)
    priors = np.stack([with_prior(counts[:, u], u / SKEWS) for u in range(SKEWS + 1)], axis=1)
    return np.apply_along_axis(frequency_table, 2, priors)
