"""Stages with tiny networks of random weights, and batches for them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from datapipe.pictures import Batch
from models.codec import Codec
from tests.commands import NANO
from tests.networks import off_zero
from tests.residual import SMALL, new_residual
from tests.small_runs import ALONE
from training.config import load_config
from training.stage import Stage
from training.stages import STAGES

SIDE = 32  # pixels of a crop: a latent of 2 x 2


def new_stage(
    name: str, *overrides: str, residual: bool = False, perceptual: dict[str, nn.Module] | None = None
) -> Stage:
    """A stage in float32 with no layer at zero and the code book in the middle of the latents.

    Args:
        perceptual: terms in the place of the configuration's, whose networks are large; it has their factors.
    """
    given = f"{name}.crop_size={SIDE}", "speed.precision=float32", *ALONE.get(name, ())
    config = load_config(str(NANO), [*given, *overrides])
    if residual:
        config = replace(config, networks=replace(config.networks, residual=SMALL))
    torch.manual_seed(0)
    codec = Codec(config.networks)
    off_zero(codec)
    if residual:
        codec.residual = new_residual()
        codec.residual.train_rates()
    with torch.no_grad():
        codec.autoencoder.quant_conv.weight.mul_(10)
        z = codec.vq_base(codec.to_latent(pictures(8, seed=9))).z
        codec.vq_base.quantize.revive(z.permute(0, 2, 3, 1).flatten(0, 2), everything=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.stage.perceptual_terms", lambda factors, **_: nn.ModuleDict(perceptual or {}))
        return STAGES[name](config, codec, torch.device("cpu"))


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    """Smooth colours in [-1, 1]: N x 3 x SIDE x SIDE."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")


def batch_of(stage: Stage, count: int = 2, seed: int = 0, **draws: list) -> Batch:
    """A batch as the loader makes it; some of its draws may be given."""
    drawn = stage.drawn(range(count), (SIDE, SIDE))
    given = {name: torch.tensor(values, dtype=drawn[name].dtype) for name, values in draws.items()}
    return Batch(pictures(count, seed), torch.arange(count), drawn | given)
