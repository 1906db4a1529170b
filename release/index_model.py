"""Indices of training crops -> the index model of a release, fitted after everything else is fixed.

The network trains in the very integers that it codes with (integers.py), on the cost of all positions alike.
"""

import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

from models.codec import Codec
from models.entropy_coding import table_cost_bits
from models.index_model import PASSES, IndexModel, IndexNetwork, bordered, contexts, parts
from models.integers import ACTIVATION_UNIT
from training.optimiser import Optimiser
from training.stage_config import OptimParams

STEPS = 6000
BATCH = 2048  # positions, of all passes together
OPTIM = OptimParams(lr=5e-3, lr_end=0.0, warmup=50, betas=(0.9, 0.98))
HELD_OUT = 16  # one crop in so many is not trained on: what the model saves is measured there
ENOUGH = 100  # indices for each code; with fewer, one table for all is what can be learnt


def install(codec: Codec, crops: Sequence[np.ndarray], steps: int, seed: int, device: torch.device) -> dict:
    """Fit an index model to indices, (h, w) each, and give it to a codec that has its table of indices.

    Returns:
        entries of release.json; none, and no model, without steps, with too few indices, or where it saves nothing.
    """
    codes, count = codec.params.vq_base.codebook_size, sum(crop.size for crop in crops)
    if not steps:
        return {}
    if count < ENOUGH * codes:
        told = f"no index model: it takes {ENOUGH * codes:,} indices, and {count:,} were counted (more: --crops)"
        print(told, file=sys.stderr)
        return {}
    trained, held = [crop for i, crop in enumerate(crops) if i % HELD_OUT], crops[::HELD_OUT]
    book = codec.vq_base.quantize.embedding.weight.float().cpu()
    model = IndexModel(fit(trained, book, steps, seed, device))
    positions = sum(crop.size for crop in held)
    alone = sum(table_cost_bits(crop, codec.base_table) for crop in held) / positions
    in_passes = sum(model.bits(crop).sum() for crop in held) / positions
    if in_passes >= alone:
        print(f"no index model: {in_passes:.3f} bits per index with it, {alone:.3f} without", file=sys.stderr)
        return {}
    codec.index_model = model
    return {"index_model": {"held_out_bits_per_index": round(in_passes, 4), "with_one_table": round(alone, 4)}}


def fit(crops: Sequence[np.ndarray], book: Tensor, steps: int, seed: int, device: torch.device) -> IndexNetwork:
    """A network that was trained on the indices of crops, (h, w) each, by their cost in bits; `book` is the code book, (K, d_q)."""
    torch.manual_seed(seed)
    codes = len(book)
    network = IndexNetwork(codes)
    network.start_alike(book)
    counts = sum(np.bincount(crop.ravel(), minlength=codes) for crop in crops) + 1
    with torch.no_grad():
        network.out.bias.copy_(torch.from_numpy(np.log2(counts / counts.sum())))
    network.to(device)
    optimiser, samples = Optimiser(network.named_parameters(), OPTIM, steps), samples_of(crops, codes)
    total = sum(len(symbols) for _, symbols in samples.values())
    for step in trange(steps, desc="fitting the index model"):
        optimiser.zero_grad()
        cost = 0
        for number, (context, symbols) in samples.items():
            drawn = torch.randint(len(symbols), (math.ceil(BATCH * len(symbols) / total),))
            scores = network(number, context[drawn].to(device).long())
            nats = scores * (math.log(2) / ACTIVATION_UNIT)
            cost = cost + F.cross_entropy(nats, symbols[drawn].to(device).long(), reduction="sum") / BATCH
        cost.backward()
        optimiser.update(step)
    return network


def samples_of(crops: Sequence[np.ndarray], codes: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Contexts, (M, CONTEXT), and symbols, (M,), int16, by pass, of those that have positions."""
    found = {number: ([], []) for number in range(PASSES)}
    for crop in crops:
        grid = bordered(crop, codes)
        for number, rows, columns in parts(*crop.shape, codes):
            found[number][0].append(contexts(grid, number, rows, columns, codes))
            found[number][1].append(crop[rows, columns].astype(np.int16))
    return {
        n: tuple(torch.from_numpy(np.concatenate(arrays)) for arrays in pair) for n, pair in found.items() if pair[0]
    }
