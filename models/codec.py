"""Joins the rooms: image -> latent -> base code -> bytes, and bytes -> base code -> one denoising step -> image.

    X --E--> x --VQ-E--> k --entropy coder--> bytes --entropy decoder--> k --> z_q --VQ-D--> y
                                                                               |             |
                                         X^ <--D-- x^ <--U(scaled x~, t, z_q)--+-- x~ = y + kappa sqrt(eta) eps

The decoder's only inputs are the bytes and the weights. Axes: N batch, d latent channels, H and W picture rows and
columns, h = ceil(H/16) and w = ceil(W/16) latent ones.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import bitstream, diffusion, entropy_coding
from models.autoencoder import Autoencoder, AutoencoderParams
from models.bitstream import CodedPicture
from models.diffusion import DiffusionParams, RateParams, Schedule
from models.unet import UNet, UNetParams
from models.vq_base import BaseCode, VQBase, VQBaseParams
from utils.errors import BitstreamError, CheckpointError
from utils.images import to_signed, to_uint8
from utils.precision import full_precision

CELL = bitstream.LATENT_STRIDE  # pixels per latent position along each side


@dataclass(frozen=True)
class CodecParams:
    """All that decides what the weights mean. The defaults are the paper's."""

    autoencoder: AutoencoderParams = field(default_factory=AutoencoderParams)
    vq_base: VQBaseParams = field(default_factory=VQBaseParams)
    unet: UNetParams = field(default_factory=UNetParams)
    diffusion: DiffusionParams = field(default_factory=DiffusionParams)
    rate: RateParams = field(default_factory=RateParams)

    def __post_init__(self):
        ae, vq, unet = self.autoencoder, self.vq_base, self.unet
        for left, right, what in [
            (ae.downsampling, CELL, "autoencoder.ch_mult must have five levels (downsampling by 16)"),
            (len(vq.ch_mult), 1, "vq_base.ch_mult must have one level (one index per latent position)"),
            (vq.in_channels, ae.embed_dim, "vq_base.in_channels must equal autoencoder.embed_dim"),
            (unet.latent_channels, ae.embed_dim, "unet.latent_channels must equal autoencoder.embed_dim"),
            (unet.condition_channels, vq.embed_dim, "unet.condition_channels must equal vq_base.embed_dim"),
        ]:
            if left != right:
                raise ValueError(f"{what}: {left} is not {right}")
        # A 1x1 latent has one value per channel, and a normalisation over a single value is undefined. (The UNet pads.)
        for name, width, groups in [("autoencoder", ae.ch * ae.ch_mult[-1], ae.groups), ("vq_base", vq.ch, vq.groups)]:
            if width < 2 * groups:
                raise ValueError(f"{name}.groups {groups}: at least two channels a group are needed at latent size")


@dataclass(frozen=True)
class CodecOutput:
    """What one training pass knows.

    Attributes:
        x, y, x_hat: latent, base reconstruction and prediction, N x d x h x w.
        image: prediction D(x_hat), N x 3 x H x W, unclamped.
        base: indices, codes and code-book statistics.
    """

    x: Tensor
    y: Tensor
    x_hat: Tensor
    image: Tensor
    base: BaseCode


@dataclass(frozen=True)
class Draws:
    """The random numbers of a training pass, one entry per sample.

    Attributes:
        t: steps, int64 (N,). eta: noise levels of the decoder's own input, float (N,); used at the last step only,
        NaN where the published forward process is meant. noise: standard normal, N x d x h x w.
    """

    t: Tensor
    eta: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Sampling:
    """How the decoder denoises. The default is the codec's: one step, noise level from the rate, seed from the file.

    Attributes:
        steps: None for the single step; otherwise how many of the schedule's steps to run.
        ddim: deterministic steps instead of ancestral ones, where there are several.
        eta: noise level of the single step in (0, 1]; None takes it from the rate.
        seed: of the noise; None takes it from the base section.
    """

    steps: int | None = None
    ddim: bool = True
    eta: float | None = None
    seed: int | None = None

    def __post_init__(self):
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps {self.steps}: at least 1, or None for the single step")
        if self.eta is not None and not 0 < self.eta <= 1:
            raise ValueError(f"eta {self.eta}: in (0, 1], or None to take it from the rate")


@dataclass(frozen=True)
class Decoded:
    """A decoded picture, uint8 (3, H, W), and the noise level eta it was made with."""

    image: Tensor
    eta: float


class Codec(nn.Module):
    """The whole codec. `forward` trains; `compress` and `decompress` write and read files.

    Attributes:
        base_table: integer frequency table of the base indices, int32 (K,), learnt at release; None before.
        fingerprint: 4 bytes that name the weights; None while they are being trained.
    """

    def __init__(self, params: CodecParams):
        super().__init__()
        self.params = params
        self.autoencoder = Autoencoder(params.autoencoder)
        self.vq_base = VQBase(params.vq_base)
        self.unet = UNet(params.unet)
        self.schedule = Schedule.exponential(params.diffusion)
        self.rate = params.rate
        self.base_table: np.ndarray | None = None
        self.fingerprint: bytes | None = None

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in_extended.weight.device

    @property
    def nominal_bpp(self) -> float:
        """Rate of the base at fixed length, in bits per pixel."""
        return math.log2(self.params.vq_base.codebook_size) / CELL**2

    def memory(self, height: int, width: int) -> int:
        """Bytes that coding a whole picture of this size takes, about: weights, and feature maps at full resolution.

        Six maps of the outermost level are alive at the widest moment, and three copies of the picture. Measured peaks:
        0.28 GB and 0.53 GB for one and two megapixels with the small model, where this gives 0.26 and 0.49.
        """
        weights = sum(p.numel() for p in self.parameters())
        return 4 * (weights + height * width * (6 * self.params.autoencoder.ch + 9))

    # Steps shared by training, coding and decoding ------------------------------------------------------------------

    def to_latent(self, image: Tensor) -> Tensor:
        """x = E(X), padded by edge values to whole cells: N x 3 x H x W in [-1, 1] -> N x d x h x w."""
        bottom, right = -image.shape[2] % CELL, -image.shape[3] % CELL
        return self.autoencoder.encode(F.pad(image, (0, right, 0, bottom), mode="replicate"))

    def to_image(self, x_hat: Tensor) -> Tensor:
        """D(x^), not yet clamped: N x d x h x w -> N x 3 x 16h x 16w."""
        return self.autoencoder.decode(x_hat)

    # Training -------------------------------------------------------------------------------------------------------

    def forward(self, image: Tensor, draws: Draws) -> CodecOutput:
        """One training pass (DiffO, section 3): N x 3 x H x W in [-1, 1], sides multiples of 16."""
        with torch.no_grad():  # E is frozen in this stage
            x = self.to_latent(image)  # x = E(X)
        base = self.vq_base(x)  # k, z_q
        y = self.vq_base.reconstruct(base.z_q)  # y = VQ-D(z_q)
        x_t, eta = self.noisy_input(x, y, draws)
        scaled = diffusion.scale_input(x_t, eta, self.schedule.kappa)
        time = diffusion.time_of_eta(eta, self.params.diffusion).float()
        x_hat = self.unet(scaled, time, base.z_q)  # x^ = U(scaled x_t, t, z_q)
        return CodecOutput(x, y, x_hat, self.to_image(x_hat), base)

    def noisy_input(self, x: Tensor, y: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """x_t and its noise level, per sample: q(x_t | x, y) as published, or the decoder's own input y + noise."""
        published = diffusion.q_sample(self.schedule, x, y, draws.t, draws.noise)
        scheduled = torch.from_numpy(self.schedule.etas).to(draws.t.device)[draws.t]
        own = ~draws.eta.isnan() & (draws.t == len(self.schedule) - 1)
        eta = torch.where(own, draws.eta.double(), scheduled)
        decoders = diffusion.prior_sample(y, eta, self.schedule.kappa, draws.noise)
        return torch.where(own.view(-1, 1, 1, 1), decoders, published), eta

    # Coding ---------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    @full_precision()
    def compress(self, image: Tensor) -> bytes:
        """Code a picture: uint8 (3, H, W), sides from 16 -> the bytes of a `.dfo` file.

        Raises:
            CheckpointError: the weights have no fingerprint. ValueError: a side under 16.
        """
        if self.fingerprint is None:
            raise CheckpointError("these weights have no fingerprint: load them with load_codec before coding")
        height, width = image.shape[1:]
        if min(height, width) < bitstream.MIN_SIDE:
            raise ValueError(
                f"pictures start at {bitstream.MIN_SIDE}x{bitstream.MIN_SIDE} pixels, not {width}x{height}"
            )
        x = self.to_latent(to_signed(image).to(self.device)[None])
        k = self.vq_base.indices(x).flatten().cpu().numpy()
        base, fixed = entropy_coding.encode_indices(k, self.params.vq_base.codebook_size, self.base_table)
        return bitstream.pack(CodedPicture(height, width, self.fingerprint, base, fixed))

    def read(self, data: bytes) -> tuple[CodedPicture, Tensor]:
        """Parse a file and decode its indices: the header and k, int64 (h, w).

        Raises:
            BitstreamError: damaged or foreign file. CheckpointError: it was written with other weights.
        """
        file = bitstream.unpack(data)
        if file.fingerprint != self.fingerprint:
            own = self.fingerprint.hex() if self.fingerprint else "none"
            raise CheckpointError(
                f"the file was written with the weights {file.fingerprint.hex()}, these are {own}: "
                "decode it with the release of that fingerprint"
            )
        h, w = file.latent_size
        k = entropy_coding.decode_indices(
            file.base, h * w, self.params.vq_base.codebook_size, self.base_table, file.fixed_length
        )
        return file, torch.from_numpy(k).view(h, w)

    @torch.inference_mode()
    def decompress(self, data: bytes) -> Tensor:
        """Decode a file with the codec's single step: bytes -> uint8 (3, H, W). Errors as `read`."""
        return self.decode(data).image

    @torch.inference_mode()
    @full_precision()
    def decode(self, data: bytes, sampling: Sampling = Sampling()) -> Decoded:
        """Decode a file: x~ = y + kappa sqrt(eta) eps, x^ = U(x~ scaled, t(eta), z_q), X^ = D(x^) (DiffO, Alg. 1)."""
        file, k = self.read(data)
        h, w = file.latent_size
        z_q = self.vq_base.rows(k[None].to(self.device))  # 1 d_q h w
        y = self.vq_base.reconstruct(z_q)  # 1 d h w
        seed = bitstream.noise_seed(file.base) if sampling.seed is None else sampling.seed
        noise = portable_noise(seed, y)
        if sampling.steps is None:
            eta = self.rate.eta(8 * len(file.base) / (CELL**2 * h * w)) if sampling.eta is None else sampling.eta
            levels = torch.tensor([eta], dtype=torch.float64, device=self.device)
            x_hat = diffusion.one_step(self.unet, y, z_q, levels, next(noise), self.params.diffusion)
        else:
            schedule = self.schedule.spaced(sampling.steps)
            eta = float(schedule.etas[-1])
            x_hat = diffusion.sample(schedule, self.unet, y, z_q, lambda: next(noise), sampling.ddim)
        image = self.to_image(x_hat)[0, :, : file.height, : file.width]
        if not image.isfinite().all():
            raise BitstreamError(
                "the decoded picture is not finite: the weights or the precision cannot decode this file"
            )
        return Decoded(to_uint8(image.float().cpu()), eta)


def portable_noise(seed: int, like: Tensor):
    """Endless standard normal draws shaped as `like` (1 x d x h x w), the same on every machine and NumPy version.

    NumPy guarantees the stream of the legacy RandomState for good; it is drawn in float64 and cast to float32.
    """
    state = np.random.RandomState(seed)
    while True:
        values = state.standard_normal(tuple(like.shape[1:])).astype(np.float32)
        yield torch.from_numpy(values)[None].to(like.device)
