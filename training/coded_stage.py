"""What stages share whose pictures come out of the codec: the random numbers of a sample, and validation."""

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from datapipe.draws import DrawParams
from datapipe.pictures import Batch
from models.bitstream import CELL
from models.records import Draws
from training.stage import Evaluated, Stage


class CodedStage(Stage):
    """A stage of the whole codec; its `params` have `base_only_share`."""

    def coded_draws(self, height: int, width: int, last_step_share: float | None, decoder_input: bool) -> DrawParams:
        """Random numbers that a pass of the codec takes; see `DrawParams`."""
        params, residual = self.codec.params, self.codec.residual
        h, w = height // CELL, width // CELL
        return DrawParams(
            latent=(params.autoencoder.embed_dim, h, w),
            steps=params.diffusion.steps,
            last_step_share=last_step_share,
            decoder_input=decoder_input,
            base_only_share=self.params.base_only_share,
            levels=residual.params.levels if residual else 0,
            uniforms=residual.noise_size(h, w) if residual else 0,
            grain=CELL**2 if params.texture else 0,
        )

    def as_decoded(self, draws: Draws) -> Draws:
        """The same noise and levels for the decoder's one step: from y^, at the noise level that the rate gives."""
        return replace(
            draws,
            t=torch.full_like(draws.t, self.codec.params.diffusion.steps - 1),
            spread=torch.ones_like(draws.spread),
            decoder_input=torch.ones_like(draws.decoder_input),
        )

    @abstractmethod
    def decoded(self, image: Tensor, draws: Draws) -> Any:
        """The forward pass with the weights as they are: has `image`, N x 3 x H x W, and `residual_bpp`, (N,)."""

    @torch.no_grad()
    def evaluate(self, image: Tensor, position: int) -> Evaluated:
        """One picture of validation, decoded as a file is: in one step from y^ and noise that belongs to the position,
        from the base alone and at the highest level. Rates are the model's: the base at fixed length, the residual by
        its densities.
        """
        levels = [0.0] if self.codec.residual is None else [0.0, float(self.codec.residual.params.levels)]
        batch = Batch(
            image.expand(len(levels), -1, -1, -1),
            torch.tensor([position] * len(levels)),
            self.drawn([position] * len(levels), image.shape[2:]),
        ).to(self.device)
        draws = self.as_decoded(Draws(**batch.draws))
        if draws.level is not None:
            draws = replace(draws, level=draws.level.new_tensor(levels))
        out = self.decoded(batch.image, draws)
        bpp = (self.codec.nominal_bpp + out.residual_bpp.double()).tolist()
        shown = {f"_level_{g:.0f}": (out.image[i : i + 1], bpp[i]) for i, g in enumerate(levels)}
        given = replace(batch, draws=batch.draws | ({} if draws.level is None else {"level": draws.level}))
        return Evaluated(self.losses(out, given)["loss"].item(), shown)
