"""Records that the codec is built from, takes and gives: sizes, random draws, results of training and coding."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from models.autoencoder import AutoencoderParams
from models.bitstream import CELL, CodedPicture
from models.diffusion import DiffusionParams, RateParams
from models.light import LightParams
from models.residual_hyperprior import Symbols
from models.residual_networks import ResidualParams
from models.texture import TextureParams
from models.unet import UNetParams
from models.vq_base import BaseCode, VQBaseParams
from utils.config import require


@dataclass(frozen=True)
class CodecParams:
    """All that decides what the weights mean. The defaults are the published ones.

    Attributes:
        residual: the residual codec; None leaves it out (the paper's pure-VQ mode).
        adapter: input of the denoiser: `published`, U(x~, t, z_q), or `difference`, the paper's U(x~ - y^, t, y^).
        prediction: `latent`, x^ = U(...) as published, or `correction`, x^ = y^ + U(...), where training starts from y^
            and what the residual sends need not pass through the denoiser.
        detail_branch: False puts 0 for y^ in x~. perceptual_branch: False puts 0 for lq (the paper's Figs. 4 and 10).
        light: the light decoder, while stage `light` trains it; released, it lies in a file of its own.
        texture: the network that adds texture to decoded pictures; None adds none. Stage `texture` trains it.
        sharpening, colour_blur: share of the grey picture's difference to its mean over 3x3 pixels that decoders add, and
            share of the colour's that they take away (`models.blocks.finished`), after texture; stage `texture` alone sees them.
    """

    autoencoder: AutoencoderParams = field(default_factory=AutoencoderParams)
    vq_base: VQBaseParams = field(default_factory=VQBaseParams)
    unet: UNetParams = field(default_factory=UNetParams)
    diffusion: DiffusionParams = field(default_factory=DiffusionParams)
    rate: RateParams = field(default_factory=RateParams)
    residual: ResidualParams | None = None
    adapter: Literal["published", "difference"] = "published"
    prediction: Literal["latent", "correction"] = "latent"
    detail_branch: bool = True
    perceptual_branch: bool = True
    light: LightParams | None = None
    texture: TextureParams | None = None
    sharpening: float = 0.0
    colour_blur: float = 0.0

    @property
    def rules(self) -> dict[str, float]:
        """Parameters that size no network, and may change after training."""
        own = {"sharpening": self.sharpening, "colour_blur": self.colour_blur}
        return own | (self.residual.rules if self.residual else {}) | (self.texture.rules if self.texture else {})

    def with_rules(self, rules: Mapping[str, float]) -> "CodecParams":
        """The same sizes, and some `rules` as told."""
        parts = {name: part for name in ("residual", "texture") if (part := getattr(self, name))}
        told = {name: {key: rules[key] for key in part.rules if key in rules} for name, part in parts.items()}
        own = {key: rule for key, rule in rules.items() if not any(key in each for each in told.values())}
        return replace(self, **own, **{name: replace(parts[name], **each) for name, each in told.items()})

    def __post_init__(self):
        for name in ("sharpening", "colour_blur"):
            require(0 <= getattr(self, name) <= 1, f"{name} {getattr(self, name)}: 0 to 1")
        ae, vq, unet = self.autoencoder, self.vq_base, self.unet
        sizes = f"autoencoder.patch {ae.patch}, autoencoder.ch_mult {list(ae.ch_mult)}"
        told = f"patch * 2^(resolutions - 1) must be 16 (patch 1: five resolutions), not {ae.downsampling}"
        require(ae.downsampling == CELL, f"{sizes}: {told}")
        difference = self.adapter == "difference"
        lq, name = (ae.embed_dim, "autoencoder") if difference else (vq.embed_dim, "vq_base")
        for left, right, what in [
            (len(vq.ch_mult), 1, "vq_base.ch_mult must have one resolution (one index per latent position)"),
            (vq.in_channels, ae.embed_dim, "vq_base.in_channels must equal autoencoder.embed_dim"),
            (unet.latent_channels, ae.embed_dim, "unet.latent_channels must equal autoencoder.embed_dim"),
            (unet.condition_channels, lq, f"unet.condition_channels must equal {name}.embed_dim"),
        ]:
            require(left == right, f"{what}: {left} is not {right}")
        parted = not (self.detail_branch and self.perceptual_branch)
        told = "y^ is its only branch; detail_branch and perceptual_branch are parts of adapter published"
        require(not (difference and parted), f"adapter difference: {told}")
        good = self.prediction != "correction" or self.detail_branch
        require(good, "prediction correction: adds to y^, which detail_branch: false puts at 0")
        # A 1x1 latent has one value per channel, and a normalisation over a single value is undefined. (The UNet pads.)
        for name, key, width, groups in [
            ("autoencoder", "ch_mult", ae.ch * ae.ch_mult[-1], ae.groups),
            ("vq_base", "ch", vq.ch, vq.groups),
        ]:
            told = f"{name}.groups {groups}: at least two channels a group are needed at latent size"
            require(width >= 2 * groups, f"{told} ({name}.{key}: {width} there)")


@dataclass(frozen=True)
class CodecOutput:
    """Results of one training pass.

    Attributes:
        x, y_hat, x_hat: latent, what the decoder knows of it, and prediction, N x d x h x w.
        image: prediction D(x_hat), N x 3 x H x W, unclamped; None where it was not asked for.
        base: indices, codes and code-book statistics.
        residual_bpp: rate of the residual per sample, in bits per pixel, (N,); 0 at level 0 and without a residual.
        auxiliary: CompressAI's loss of the quantiles, a scalar; None without a residual codec.
        other: the picture from other noise, as `image`; None where it was not asked for.
    """

    x: Tensor
    y_hat: Tensor
    x_hat: Tensor
    image: Tensor | None
    base: BaseCode
    residual_bpp: Tensor
    auxiliary: Tensor | None
    other: Tensor | None = None


@dataclass(frozen=True)
class Draws:
    """The random numbers of a training pass, one entry per sample (`datapipe.draws`).

    Attributes:
        t: steps, int64 (N,). noise: standard normal, N x d x h x w.
        decoder_input: bool (N,), True where x_t is the decoder's own input y^ + kappa sqrt(eta) noise, else the
            published forward process. spread: factor on the noise level that the rate gives there, float64 (N,).
        level: of the residual, float64 (N,), 0 for none, else 1 to L. uniform: in [-1/2, 1/2), (N,
            `residual.noise_size(h, w)`). Both None without a residual codec.
        grain: standard normal, N x 256 x h x w, one number for each pixel; None without a texture network.
        shift: False drops the shift towards y^ from the published forward process.
    """

    t: Tensor
    spread: Tensor
    decoder_input: Tensor
    noise: Tensor
    level: Tensor | None = None
    uniform: Tensor | None = None
    grain: Tensor | None = None
    shift: bool = True


@dataclass(frozen=True)
class Sampling:
    """How the decoder denoises. The default is the codec's: one step, noise level from the rate, seed from the file.

    Attributes:
        steps: None for the single step; otherwise how many of the schedule's steps to run.
        ddim: deterministic steps instead of ancestral ones, where there are several.
        eta: noise level of the single step in (0, 1]; None takes it from the rate.
        seed: of the noise; None takes it from the base section.
        texture: share of the weights' texture that is added, 0 for none, up to 2.
    """

    steps: int | None = None
    ddim: bool = True
    eta: float | None = None
    seed: int | None = None
    texture: float = 1.0

    def __post_init__(self):
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps {self.steps}: at least 1, or None for the single step")
        if self.eta is not None and not 0 < self.eta <= 1:
            raise ValueError(f"eta {self.eta}: in (0, 1], or None to take it from the rate")
        if not 0 <= self.texture <= 2:
            raise ValueError(f"texture {self.texture}: 0 (none) to 2")


ONE_STEP = Sampling()


@dataclass(frozen=True)
class Decoded:
    """A decoded picture, uint8 (3, H, W), and the noise level eta it was made with."""

    image: Tensor
    eta: float


@dataclass(frozen=True)
class Analysed:
    """A picture after the image encoder: everything that its files of all levels are written from.

    Attributes:
        file: the base-only file. x, y: 1 x d x h x w. k: int64 1 x h x w.
        s: g_a(x - y, y), 1 x M x h x w; None without a residual codec.
    """

    file: CodedPicture
    x: Tensor
    k: Tensor
    y: Tensor
    s: Tensor | None


@dataclass(frozen=True)
class Contents:
    """A parsed file: header and sections, indices k (int64 1 x h x w) and, above level 0, n_z and n."""

    file: CodedPicture
    k: Tensor
    symbols: Symbols | None
