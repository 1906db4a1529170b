"""Random numbers of a run: each a pure function of (seed, purpose, position), the same on every machine.

Position counts samples over all ranks from a stage's start, so neither a stop nor the number of processes changes what
a sample is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

EPOCH, CROP, DRAWS, REVIVAL, LEVELS, COPIES = range(6)  # purposes: independent random streams of one seed


def generator(seed: int, purpose: int, position: int) -> np.random.Generator:
    """The random numbers of one purpose at one position."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, purpose, position])))


@dataclass(frozen=True)
class DrawParams:
    """Distribution of a sample's random numbers, in the stages that need some.

    Attributes:
        latent: d, h and w of a sample's latent. steps: T of the schedule.
        last_step_share: probability of t = T-1; None draws all steps alike.
        decoder_input: the last step starts from the decoder's own input instead of the published forward process.
        base_only_share: probability of level 0. levels: L of the residual codec, 0 without one.
        uniforms: numbers that the residual codec's quantisation noise takes.
        grain: numbers per latent position that the texture network takes.
    """

    latent: tuple[int, int, int]
    steps: int
    last_step_share: float | None = None
    decoder_input: bool = False
    base_only_share: float = 0.0
    levels: int = 0
    uniforms: int = 0
    grain: int = 0


def draw(params: DrawParams, seed: int, position: int) -> dict[str, Tensor]:
    """The random numbers of one sample; `models.records.Draws` says what each is for.

    Returns:
        t, int64 (). spread, float64 (), log-uniform in [1/2, 2]. decoder_input, bool (). noise, standard normal
        float32 (d, h, w). With a residual codec also level, float64 (), 0 or uniform in [1, L]; uniform, float32
        (uniforms,) in [-1/2, 1/2). With a texture network also grain, standard normal float32 (grain, h, w).
    """
    random = generator(seed, DRAWS, position)
    last = params.steps - 1
    if params.last_step_share is None:
        t = int(random.integers(0, params.steps))
    else:
        t = last if last == 0 or random.random() < params.last_step_share else int(random.integers(0, last))
    numbers = {
        "t": torch.tensor(t),
        "spread": torch.tensor(2 ** random.uniform(-1, 1), dtype=torch.float64),
        "decoder_input": torch.tensor(params.decoder_input and t == last),
        "noise": torch.from_numpy(random.standard_normal(params.latent, dtype=np.float32)),
    }
    if params.levels:
        sent = random.random() >= params.base_only_share
        level = random.uniform(1, params.levels) if sent else 0.0
        numbers["level"] = torch.tensor(level, dtype=torch.float64)
        numbers["uniform"] = torch.from_numpy(random.random(params.uniforms, dtype=np.float32) - 0.5)
    if params.grain:
        size = (params.grain, *params.latent[1:])
        numbers["grain"] = torch.from_numpy(random.standard_normal(size, dtype=np.float32))
    return numbers


def draw_batch(params: DrawParams, seed: int, positions: Sequence[int]) -> dict[str, Tensor]:
    """The random numbers of several samples, stacked along a first axis N."""
    drawn = [draw(params, seed, position) for position in positions]
    return {name: torch.stack([numbers[name] for numbers in drawn]) for name in drawn[0]}
