"""The networks of the codec, what is computed with them everywhere, and a training pass.

    X --E--> x --VQ-E--> k --> z_q --VQ-D--> y        r^ of x - y and y        y^ = y + r^
                                                                               X^ = D(U(x_t scaled, t, z_q))

Coding, decoding and files are in codec.py. Axes: N batch, d latent channels, H and W picture rows and columns,
h = ceil(H/16) and w = ceil(W/16) latent ones.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import diffusion
from models.autoencoder import Autoencoder
from models.bitstream import CELL
from models.diffusion import Denoiser, Schedule
from models.light import LightDecoder
from models.records import CodecOutput, CodecParams, Draws
from models.residual_hyperprior import ResidualHyperprior
from models.sizes.mirrors import among_images
from models.sizes.tiles import direct
from models.texture import Texture
from models.unet import UNet
from models.vq_base import VQBase
from utils.precision import without_autocast


def padded(image: Tensor) -> Tensor:
    """A picture, N 3 H W, padded by edge values to whole cells."""
    return F.pad(image, (0, -image.shape[3] % CELL, 0, -image.shape[2] % CELL), mode="replicate")


class Networks(nn.Module):
    """E, D, VQ-E, VQ-D, U and the residual codec; `forward` is a training pass.

    Attributes:
        residual: the residual codec, or None.
        light: decodes pictures in D's place; None where D does.
        texture: adds texture to decoded pictures, or None.
    """

    def __init__(self, params: CodecParams):
        super().__init__()
        self.params = params
        self.autoencoder = Autoencoder(params.autoencoder)
        self.vq_base = VQBase(params.vq_base)
        self.unet = UNet(params.unet)
        if params.prediction == "correction":
            self.unet.start_silent()
        sizes = params.autoencoder.embed_dim, params.vq_base.codebook_size
        self.residual = ResidualHyperprior(params.residual, *sizes) if params.residual else None
        self.light = LightDecoder(params.light, params.autoencoder.embed_dim) if params.light else None
        self.texture = Texture(params.texture, params.autoencoder.embed_dim) if params.texture else None
        self.schedule = Schedule.exponential(params.diffusion)
        self.rate = params.rate

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in_extended.weight.device

    @property
    def nominal_bpp(self) -> float:
        """Rate of the base at fixed length, in bits per pixel."""
        return math.log2(self.params.vq_base.codebook_size) / CELL**2

    # Steps shared by training, coding and decoding ------------------------------------------------------------------

    def to_latent(self, image: Tensor) -> Tensor:
        """x = E(X) of the picture, `padded`: N x 3 x H x W in [-1, 1] -> N x d x h x w."""
        return self.autoencoder.encode(padded(image))

    def denoiser_inputs(self, y_hat: Tensor, z_q: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """(y^, lq, centre) as the branches and the adapter are set: what x~ starts from, the condition, the origin.

        A branch that is off is 0 times its tensor: its parameters still take part in every step, as DDP expects.
        """
        difference = self.params.adapter == "difference"
        lq = y_hat if difference else z_q
        if not self.params.perceptual_branch:
            lq = 0.0 * lq
        if not self.params.detail_branch:
            y_hat = 0.0 * y_hat
        return y_hat, lq, y_hat if difference else 0.0

    def denoiser(self, y_hat: Tensor, run: Callable[..., Tensor] = direct) -> Denoiser:
        """x^ of a scaled noisy latent, as a function: U(x, t, lq), or y^, which the decoder knows, corrected by that.

        Args:
            run: `Tiles.run` of the picture; U on the whole latent without it.
        """

        def unet(x: Tensor, t: Tensor, lq: Tensor) -> Tensor:
            return run(lambda x, lq: self.unet(x, t, lq), x, lq)

        correction = self.params.prediction == "correction"
        return lambda x, t, lq: y_hat + unet(x, t, lq) if correction else unet(x, t, lq)

    # Training -------------------------------------------------------------------------------------------------------

    def forward(
        self,
        image: Tensor,
        draws: Draws,
        decode: bool = True,
        twice: bool = False,
        copies: tuple[int, int] = (1, 1),
    ) -> CodecOutput:
        """One training pass (DiffO, section 3): N x 3 x H x W in [-1, 1], sides multiples of 16.

        Args:
            decode: compute D(x^), nearly all of the work; a loss of the latent alone needs no picture.
            twice: and once more from the noise of the sample before, which is as good.
            copies: rows and columns of mirror images that U sees a latent among; of what it makes, one is taken.
        """
        x = self.to_latent(image)  # x = E(X)
        base = self.vq_base(x)  # k, z_q
        y = self.vq_base.reconstruct(base.z_q)  # y = VQ-D(z_q)
        y_hat, residual_bpp = self.with_residual(x, y, base.indices, draws)  # y^ = y + r^
        known, lq, centre = self.denoiser_inputs(y_hat, base.z_q)
        denoiser = self.denoiser(y_hat, partial(among_images, copies))

        def denoised(draws: Draws) -> Tensor:
            # E, where it learns, is not to hide in x what a file does not send.
            x_t, eta = self.noisy_input(x.detach(), known, residual_bpp.detach(), draws)
            return diffusion.one_step(denoiser, x_t, lq, eta, self.params.diffusion, centre)

        x_hat = denoised(draws)
        with without_autocast(x.device):
            auxiliary = self.residual.rate_model.auxiliary_loss() if self.residual else None
        decoded = self.autoencoder.decode(x_hat) if decode else None
        other = self.autoencoder.decode(denoised(replace(draws, noise=draws.noise.roll(1, 0)))) if twice else None
        return CodecOutput(x.detach(), y_hat, x_hat, decoded, base, residual_bpp, auxiliary, other)

    def with_residual(self, x: Tensor, y: Tensor, k: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """y^ and the residual's rate. Computed for every sample and masked at level 0: all parameters take part."""
        if self.residual is None:
            return y, torch.zeros(len(x), device=x.device)
        sent = draws.level > 0
        with without_autocast(x.device):
            out = self.residual(x, y, k, draws.level, draws.uniform)
        bits = torch.where(sent, out.hyper_bits + out.residual_bits, 0.0)
        return y + sent.to(y.dtype).view(-1, 1, 1, 1) * out.r_hat, bits / (CELL**2 * k[0].numel())

    def noisy_input(self, x: Tensor, y_hat: Tensor, residual_bpp: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """x_t and its noise level, per sample: q(x_t | x, y^) as published, or the decoder's own input y^ + noise."""
        target = y_hat if draws.shift else x + 0.0 * y_hat  # without the shift, VQ-D still takes part in the step
        published = diffusion.q_sample(self.schedule, x, target, draws.t, draws.noise)
        rate = self.rate.c / (self.nominal_bpp + residual_bpp.double())
        drawn = (rate.clamp(self.rate.eta_min, self.rate.eta_max) * draws.spread).clamp(max=1.0)
        eta = torch.where(draws.decoder_input, drawn, self.schedule.etas[draws.t])
        decoders = diffusion.prior_sample(y_hat, eta, self.schedule.kappa, draws.noise)
        return torch.where(draws.decoder_input.view(-1, 1, 1, 1), decoders, published), eta
