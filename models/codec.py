"""Joins the rooms: image -> latent -> base code and residual -> bytes -> one denoising step -> image.

    X --E--> x --VQ-E--> k ------------- coder --> bytes --> decoder ---> k --> z_q --VQ-D--> y
             |                            |                     |                             |
             +--x - y--> n_z, n (levels above 0) ---------------+--> n_z, n --g_s--> r^ --+-- y^ = y + r^
                                                                                          |
                        X^ <--D-- x^ <--U(scaled x~, t, z_q)-- x~ = y^ + kappa sqrt(eta) eps

The decoder's only inputs are the bytes and the weights. Axes: N batch, d latent channels, H and W picture rows and
columns, h = ceil(H/16) and w = ceil(W/16) latent ones.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import bitstream, diffusion, entropy_coding
from models.autoencoder import Autoencoder
from models.bitstream import CELL, CodedPicture, CodedResidual
from models.diffusion import Denoiser, Schedule
from models.index_model import IndexModel
from models.light import LightDecoder
from models.noise import drawn, portable_noise
from models.records import ONE_STEP, Analysed, CodecOutput, CodecParams, Contents, Decoded, Draws, Sampling
from models.residual_hyperprior import LEVEL_CODES, ResidualHyperprior, Symbols
from models.sizes import memory
from models.sizes.mirrors import among_images
from models.sizes.tiles import SIDE, Tiles, direct
from models.unet import UNet
from models.vq_base import VQBase
from utils.errors import BitstreamError, CheckpointError
from utils.images import to_signed, to_uint8
from utils.limits import MAX_PIXELS, MIN_SIDE
from utils.precision import full_precision, without_autocast


class Codec(nn.Module):
    """The whole codec. `forward` trains; `compress` and `decompress` write and read files.

    Attributes:
        residual: the residual codec, or None.
        light: decodes pictures in D's place; None where D does.
        max_pixels: files that claim more are refused before anything is allocated.
        tile_side: of the tiles that large pictures are coded in, in pixels, a multiple of 64 (models.sizes.tiles).
        base_table: integer frequency table of the base indices, int32 (K,), learnt at release; None before.
        index_model: codes the base indices in passes, fitted at release; None without one.
        fingerprint: 4 bytes that name the weights; None while they are being trained.
    """

    drawn = staticmethod(drawn)  # noise, of which there may be a graph as of the networks

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
        self.schedule = Schedule.exponential(params.diffusion)
        self.rate = params.rate
        self.max_pixels = MAX_PIXELS
        self.tile_side = SIDE
        self.base_table: np.ndarray | None = None
        self.index_model: IndexModel | None = None
        self.fingerprint: bytes | None = None

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in_extended.weight.device

    @property
    def nominal_bpp(self) -> float:
        """Rate of the base at fixed length, in bits per pixel."""
        return math.log2(self.params.vq_base.codebook_size) / CELL**2

    def memory(self, height: int, width: int, way: memory.Way | None = None) -> int:
        """Bytes that one way of a picture of this size takes, or the larger of both, about (models.sizes.memory)."""
        weights = sum(p.nbytes for p in self.parameters())
        return memory.peak(self.params, weights, self.tiles(height, width), self.light and self.light.params, way)

    # Steps shared by training, coding and decoding ------------------------------------------------------------------

    def to_latent(self, image: Tensor) -> Tensor:
        """x = E(X), padded by edge values to whole cells: N x 3 x H x W in [-1, 1] -> N x d x h x w."""
        bottom, right = -image.shape[2] % CELL, -image.shape[3] % CELL
        return self.autoencoder.encode(F.pad(image, (0, right, 0, bottom), mode="replicate"))

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

    def tiles(self, height: int, width: int) -> Tiles:
        """How a picture of this size is coded and decoded."""
        return Tiles(height, width, self.tile_side)

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
        with torch.no_grad():  # E is frozen in this stage
            x = self.to_latent(image)  # x = E(X)
        base = self.vq_base(x)  # k, z_q
        y = self.vq_base.reconstruct(base.z_q)  # y = VQ-D(z_q)
        y_hat, residual_bpp = self.with_residual(x, y, base.indices, draws)  # y^ = y + r^
        known, lq, centre = self.denoiser_inputs(y_hat, base.z_q)
        denoiser = self.denoiser(y_hat, partial(among_images, copies))

        def denoised(draws: Draws) -> Tensor:
            x_t, eta = self.noisy_input(x, known, residual_bpp.detach(), draws)
            return diffusion.one_step(denoiser, x_t, lq, eta, self.params.diffusion, centre)

        x_hat = denoised(draws)
        with without_autocast(x.device):
            auxiliary = self.residual.rate_model.auxiliary_loss() if self.residual else None
        decoded = self.autoencoder.decode(x_hat) if decode else None
        other = self.autoencoder.decode(denoised(replace(draws, noise=draws.noise.roll(1, 0)))) if twice else None
        return CodecOutput(x, y_hat, x_hat, decoded, base, residual_bpp, auxiliary, other)

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

    # Coding ---------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    @full_precision()
    def compress(self, image: Tensor, quality: float = 0.0) -> bytes:
        """Code a picture: uint8 (3, H, W), sides from 16 -> the bytes of a `.dfo` file.

        Args:
            quality: 0 sends the base alone; above it, up to 100, the residual as well, at a level whose code is 1 to 255.
        Raises:
            CheckpointError: the weights have no fingerprint, or no residual codec for a quality above 0.
            ValueError: a side under 16, or a quality outside its range.
        """
        return self.write(self.analyse(image), self.level_code(quality))

    def level_code(self, quality: float) -> int:
        """The byte that stands for a quality: 0 for the base alone, else 1 to 255. Errors as `compress`."""
        if not 0 <= quality <= 100:
            raise ValueError(f"quality {quality}: from 0 (the base alone) to 100")
        if quality > 0 and not self.has_levels:
            raise CheckpointError("these weights code the base alone (quality 0): take a release with a residual codec")
        return 0 if quality == 0 else max(1, round(quality / 100 * LEVEL_CODES))

    @property
    def has_levels(self) -> bool:
        """Whether these weights can send a residual."""
        return self.residual is not None and self.residual.tables is not None

    def analyse(self, image: Tensor) -> Analysed:
        """The image encoder, the base code and g_a, run once: uint8 (3, H, W). Errors as `compress`."""
        return self.analysed(*image.shape[1:], *self.signals(image[None]))

    @torch.inference_mode()
    @full_precision()
    def signals(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The encoder's networks: uint8 N x 3 x H x W -> k, y and s of `Analysed`, of N pictures. Errors as `compress`."""
        if self.fingerprint is None:
            raise CheckpointError("these weights have no fingerprint: load them with load_release before coding")
        height, width = images.shape[2:]
        if min(height, width) < MIN_SIDE:
            raise ValueError(f"pictures start at {MIN_SIDE}x{MIN_SIDE} pixels, not {width}x{height}")
        tiles = self.tiles(height, width)
        x = tiles.run(lambda part: self.to_latent(to_signed(part).to(self.device)), images)
        k = tiles.latent.run(self.vq_base.indices, x)
        y = tiles.latent.run(self.vq_base.reconstruct, self.vq_base.rows(k))
        return k, y, self.residual.analysis(x - y, y) if self.has_levels else None

    def analysed(self, height: int, width: int, k: Tensor, y: Tensor, s: Tensor | None) -> Analysed:
        """The base of one picture, coded, with the `signals` that its files are written from."""
        file = CodedPicture(height, width, self.fingerprint, **self.coded_base(k[0].cpu().numpy()))
        return Analysed(file, k, y, s)

    def coded_base(self, k: np.ndarray) -> dict[str, bytes | bool]:
        """Indices (h, w) in the shortest of the ways that these weights have: fields of `CodedPicture`."""
        base, fixed = entropy_coding.encode_indices(k.ravel(), self.params.vq_base.codebook_size, self.base_table)
        if self.index_model and len(in_passes := self.index_model.encode(k)) < len(base):
            return {"base": in_passes, "fixed_length": False, "in_passes": True}
        return {"base": base, "fixed_length": fixed, "in_passes": False}

    @torch.inference_mode()
    @full_precision()
    def write(self, analysed: Analysed, code: int) -> bytes:
        """The file of a level's code: 0 for the base alone, else 1 to 255."""
        if code == 0:
            return bitstream.pack(analysed.file)
        symbols = self.residual.symbols(analysed.s, analysed.y, analysed.k, code, self.residual.tables)
        residual = CodedResidual(code, *self.residual.sections(symbols, code))
        return bitstream.pack(replace(analysed.file, residual=residual))

    @torch.inference_mode()
    def read(self, data: bytes, preview: bool = False) -> Contents:
        """Parse a file and decode its integers.

        Args:
            preview: read the base alone, whatever follows it.
        Raises:
            BitstreamError: damaged or foreign file. CheckpointError: it was written with other weights.
        """
        file = bitstream.unpack(data, preview)
        if file.fingerprint != self.fingerprint:
            own = self.fingerprint.hex() if self.fingerprint else "none"
            raise CheckpointError(
                f"the file was written with the weights {file.fingerprint.hex()}, these are {own}: "
                "decode it with the release of that fingerprint"
            )
        self.require_allowed(file.height, file.width)
        k = torch.from_numpy(self._read_base(file))[None]
        return Contents(file, k, self._read_residual(file.residual, k) if file.residual else None)

    def require_allowed(self, height: int, width: int) -> None:
        """Raise BitstreamError for a size above `max_pixels`."""
        if height * width > self.max_pixels:
            raise BitstreamError(
                f"a picture of {width}x{height} pixels is above the limit of {self.max_pixels:,}: "
                "raise max_pixels (--max_pixels) if you trust the file"
            )

    def _read_base(self, file: CodedPicture) -> np.ndarray:
        h, w = file.latent_size
        if not file.in_passes:
            how = self.params.vq_base.codebook_size, self.base_table, file.fixed_length
            return entropy_coding.decode_indices(file.base, h * w, *how).reshape(h, w)
        if self.index_model is None:
            raise BitstreamError("the base is coded in passes and its weights have no index model: the file is damaged")
        entropy_coding.require_shorter(file.base, h * w, self.params.vq_base.codebook_size)
        return self.index_model.decode(file.base, h, w)

    def base_bits(self, file: CodedPicture, k: Tensor) -> np.ndarray:
        """Ideal cost of every index of a file that holds k, 1 x h x w, as it codes them: float64 (1, h, w)."""
        k = k.numpy()
        if file.fixed_length:
            return np.full(k.shape, math.log2(self.params.vq_base.codebook_size))
        return self.index_model.bits(k[0])[None] if file.in_passes else entropy_coding.index_bits(k, self.base_table)

    def _read_residual(self, coded: CodedResidual, k: Tensor) -> Symbols:
        if not self.has_levels:
            raise BitstreamError("the file has a residual and its weights have no residual codec: it is damaged")
        return self.residual.read(coded.hyper, coded.symbols, k, coded.code)

    @torch.inference_mode()
    def decompress(self, data: bytes) -> Tensor:
        """Decode a file with the codec's single step: bytes -> uint8 (3, H, W). Errors as `read`."""
        return self.decode(data).image

    @torch.inference_mode()
    @full_precision()
    def decode(self, data: bytes, sampling: Sampling = ONE_STEP, preview: bool = False) -> Decoded:
        """Decode a file. Errors as `read`."""
        return self.render(self.read(data, preview), sampling)

    def render(self, contents: Contents, sampling: Sampling = ONE_STEP) -> Decoded:
        """x~ = y^ + kappa sqrt(eta) eps, x^ = U(x~ scaled, t(eta), lq), X^ = D(x^) (DiffO, Alg. 1).

        Raises:
            BitstreamError: the picture is not finite.
        """
        return self.render_all([contents], sampling)[0]

    @torch.inference_mode()
    @full_precision()
    def render_all(self, contents: Sequence[Contents], sampling: Sampling = ONE_STEP) -> list[Decoded]:
        """`render` of files whose pictures have one size, through the networks at once. Errors as `render`."""
        files = [each.file for each in contents]
        y_hat, z_q = self.known(contents)
        x_hat, etas = self.denoise(y_hat, z_q, files, sampling)
        images = self.tiles(files[0].height, files[0].width).run(self.to_picture, x_hat)
        return list(map(Decoded, images, etas))

    def picture(self, x_hat: Tensor) -> Tensor:
        """X^ = D(x^), or the light decoder's: N x d x h x w -> N x 3 x 16h x 16w, unclamped."""
        return (self.light or self.autoencoder.decode)(x_hat)

    def to_picture(self, x_hat: Tensor) -> Tensor:
        """`picture` in 8 bits: uint8, on the CPU. Raises BitstreamError if it is not finite."""
        image = self.picture(x_hat)
        if not image.isfinite().all():
            raise BitstreamError("the decoded picture is not finite: these weights or this precision cannot decode it")
        return to_uint8(image.float().cpu())

    def known(self, contents: Sequence[Contents]) -> tuple[Tensor, Tensor]:
        """y^ = y + r^, N x d x h x w, and z_q, N x d_q x h x w: what N files of one size tell of the latents."""
        file = contents[0].file
        k = torch.cat([each.k for each in contents]).to(self.device)
        z_q = self.vq_base.rows(k)
        y_hat = self.tiles(file.height, file.width).latent.run(self.vq_base.reconstruct, z_q)
        for i, each in enumerate(contents):
            if each.symbols:  # levels differ
                own, code = slice(i, i + 1), each.file.residual.code
                r_hat = self.residual.restore(each.symbols.hyper, each.symbols.residual, k[own], y_hat[own], code)
                y_hat[own] += r_hat
        return y_hat, z_q

    def denoise(
        self, y_hat: Tensor, z_q: Tensor, files: Sequence[CodedPicture], sampling: Sampling
    ) -> tuple[Tensor, list[float]]:
        """x^ of N files, N x d x h x w, and the noise levels that they were made with."""
        known, lq, centre = self.denoiser_inputs(y_hat, z_q)
        seeds = [bitstream.noise_seed(file.base) if sampling.seed is None else sampling.seed for file in files]
        noises = [portable_noise(seed, known, self.drawn) for seed in seeds]

        def draw() -> Tensor:
            return torch.cat([next(noise) for noise in noises])

        denoiser = self.denoiser(y_hat, self.tiles(files[0].height, files[0].width).latent.run)
        if sampling.steps is not None:
            schedule = self.schedule.spaced(sampling.steps)
            x_hat = diffusion.sample(schedule, denoiser, known, lq, draw, sampling.ddim, centre)
            return x_hat, [float(schedule.etas[-1])] * len(files)
        levels = [self.rate.eta(file.section_bpp) if sampling.eta is None else sampling.eta for file in files]
        etas = torch.tensor(levels, dtype=torch.float64, device=self.device)
        x_noisy = diffusion.prior_sample(known, etas, self.schedule.kappa, draw())
        return diffusion.one_step(denoiser, x_noisy, lq, etas, self.params.diffusion, centre), levels
