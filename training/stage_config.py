"""What the stages of a run depend on: lengths, optimiser, terms of the loss. Defaults are the paper's, or VQGAN's for stage gt."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from measuring.metrics import MS_SSIM_MIN_SIDE
from models.losses import GROUND, LEAST_LINES
from utils.config import require, require_from

# Of perceptual terms.
Factors = dict[
    Literal[
        "lpips", "stlpips", "features", "ms_ssim", "weave", "lines", "flat", "peak", "border", "detail", "spectrum"
    ],
    float,
]
# Pixels of a picture that has such a term.
LEAST_SIDE = {"ms_ssim": MS_SSIM_MIN_SIDE, "weave": GROUND, "lines": LEAST_LINES}
# By kind of adversary, in pixels: below, the PatchGAN has nothing to normalise over, and a projected head no logit.
DISCRIMINATOR_MIN = {"patch": 32, "projected": 64}


@dataclass(frozen=True)
class AdversaryParams:
    """A discriminator with hinge losses (VQGAN, Esser et al. 2021).

    Attributes:
        kind: `patch`, VQGAN's PatchGAN on pixels, or `projected`, small heads on fixed features of EfficientNet-Lite0
            (Projected GAN, Sauer et al. 2021), made to work with `adaptive: false`.
        weight: of its term in the loss; 0 leaves it out. start: iteration at which it joins.
        adaptive: multiply by lambda, the ratio of the gradients at the last trained layer (VQGAN, Eq. 7).
    """

    kind: Literal["patch", "projected"] = "patch"
    weight: float = 0.0
    start: int = 0
    adaptive: bool = True

    def __post_init__(self):
        require_from(0, self, "weight", "start")


@dataclass(frozen=True)
class StageParams:
    """Settings that all stages have.

    Attributes:
        iterations: updates, if `minutes` is None. minutes: otherwise the stage ends after so long by the clock, all its
            runs together; warm-up, start of the adversary and learning rate then follow the share of the time as they
            would that of the iterations.
        batch_size: crops per process and step. microbatch: crops that are on the device at once; a step adds up the
            gradients of as many micro-batches as it takes. None takes the whole batch.
        crop_size: pixels, a multiple of 16. ema: decay of the averaged weights.
        perceptual: perceptual terms with their factors in the loss: `lpips` (LPIPS-vgg), `stlpips` (ST-LPIPS-vgg),
            `features` (of EfficientNet-Lite0), `ms_ssim` (1 - MS-SSIM, crops above 160 pixels), `weave` (what repeats
            every 16 pixels on smooth ground), `lines` (what stands out of the error's spectrum at multiples of 1/16
            cycles per pixel), `flat` (absolute error where the original has one colour), `peak` (the same where it is
            largest), `border` (squared error of the outermost 8 pixels), `detail` (local energies of detail) and
            `spectrum` (the same by frequency, crops from 16 pixels). A file's replaces the default wholly, and is merged with its base's.
        vgg_window: side in pixels of the square in the middle of a crop that `lpips` and `stlpips` see; None shows them
            whole crops. Crops lie anywhere in their pictures, so their middles do too. On a CPU, VGG costs several times
            what a small model does.
        adversary: a discriminator of the stage's pictures.
    """

    iterations: int
    minutes: float | None = None
    batch_size: int = 8
    microbatch: int | None = None
    crop_size: int = 256
    ema: float = 0.999
    perceptual: Factors = field(default_factory=dict)
    vgg_window: int | None = None
    adversary: AdversaryParams = field(default_factory=AdversaryParams)

    def __post_init__(self):
        require(self.minutes is None or self.minutes > 0, f"minutes {self.minutes}: above 0, or null")
        require_from(1, self, "iterations", "batch_size")
        require(self.microbatch is None or self.microbatch >= 1, f"microbatch {self.microbatch}: at least 1, or null")
        require(self.crop_size >= 16 and self.crop_size % 16 == 0, f"crop_size {self.crop_size}: a multiple of 16")
        require(0 <= self.ema < 1, f"ema {self.ema}: in [0, 1)")
        for name, factor in self.perceptual.items():
            require(factor >= 0, f"perceptual.{name} {factor}: from 0 up")
        good = self.vgg_window is None or self.vgg_window >= 32
        require(good, f"vgg_window {self.vgg_window}: at least 32 pixels, or null")
        for name, side in self.least_sides.items():
            require(
                self.crop_size >= side, f"crop_size {self.crop_size}: perceptual.{name} needs sides from {side} pixels"
            )
        least = DISCRIMINATOR_MIN[self.adversary.kind] if self.adversary.weight > 0 else 0
        require(
            self.crop_size >= least, f"crop_size {self.crop_size}: adversary.{self.adversary.kind} needs {least} pixels"
        )

    @property
    def least_sides(self) -> dict[str, int]:
        """Pixels that a picture's sides have at least, by perceptual term; those that need no more than any are left out."""
        return {name: LEAST_SIDE[name] for name, factor in self.perceptual.items() if factor and name in LEAST_SIDE}


@dataclass(frozen=True)
class OptimParams:
    """AdamW with linear warm-up and, where lr_end differs from lr, a cosine between them.

    Attributes:
        lr, lr_end: learning rate after the warm-up and at the last iteration; lr_end None keeps lr. warmup: iterations.
        clip: largest norm of the gradient; 0 leaves it alone.
    """

    lr: float = 5e-5
    lr_end: float | None = None
    warmup: int = 0
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 0.0

    def __post_init__(self):
        require(self.lr > 0, f"lr {self.lr}: above 0")
        require(self.lr_end is None or self.lr_end >= 0, f"lr_end {self.lr_end}: from 0 up, or null")
        good = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        require(good, f"betas {list(self.betas)}: two, in [0, 1)")
        require_from(0, self, "warmup", "weight_decay", "clip")


@dataclass(frozen=True)
class GtParams(StageParams):
    """Stage `gt`: the image autoencoder, trained as VQGAN's but with a continuous latent.

    Attributes:
        distortion: `l1`, VQGAN's, or `mse`.
        chroma_weight: of a further squared error, that of the colour alone (what remains of RGB without its mean).
        statistics: crops over which the latent's mean and deviation are measured at the end.
        latent_scale: the deviation that becomes 1 then: of every `channel`, or one `common` to all, which keeps the
            channels' order of variance. `kept` leaves the latent as it is, for a codec that was trained on it.
        latent_noise: normal noise on the latent, in shares of its deviation in the micro-batch (of each channel or of
            all, as latent_scale), so that D forgives an inexact latent.
    """

    iterations: int = 100_000
    optim: OptimParams = field(default_factory=lambda: OptimParams(betas=(0.5, 0.9)))
    perceptual: Factors = field(default_factory=lambda: {"lpips": 1.0})
    distortion: Literal["l1", "mse"] = "l1"
    distortion_weight: float = 1.0
    chroma_weight: float = 0.0
    adversary: AdversaryParams = field(default_factory=lambda: AdversaryParams(weight=0.8, start=10_000))
    statistics: int = 1024
    latent_scale: Literal["channel", "common", "kept"] = "channel"
    latent_noise: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require_from(1, self, "statistics")
        require_from(0, self, "distortion_weight", "chroma_weight", "latent_noise")


@dataclass(frozen=True)
class CodecStageParams(StageParams):
    """Stage `codec`: VQ base and UNet together, DiffO Eq. 10.

    Attributes:
        forward: input of the last step: `published` (x_t = x + eta (y - x) + noise, which still holds 36 % of the
            original) or `decoder` (what the decoder starts from, with eta within a factor 2 of the rate's).
        last_step_share: probability of t = T-1; None draws all steps alike, as published.
        shift: False drops the shift towards y^ from the published forward process (the paper's VQ-residual training).
        rate_weights: lambda_g at the first and the last level of the residual, geometric in between.
        base_only_share: of samples that are trained at level 0.
        distortion_weight, commitment: w_d and beta. chroma_weight: as in stage `gt`.
        energy_weight: of the energy score of two pictures that are decoded from the same code and other noise, in features
            of EfficientNet-Lite0: a loss for which noise is of use. A step takes twice as long.
        latent_weight: of |x - x^|^2, the squared error of the latent (ResShift's loss, Yue et al. 2023). Without any
            term of the picture D is not run, and a step takes a third of the time: a cheap start.
        copies: U sees each latent among mirror images of it, in as many rows and columns as are drawn from these for every
            micro-batch. Maps of one size would teach it to rely on what their borders do to its normalisations.
        train_decoder, train_encoder: D, or E, goes on learning, at this share of the learning rate; 0 freezes it.
    """

    iterations: int = 60_000
    optim: OptimParams = field(default_factory=OptimParams)
    perceptual: Factors = field(default_factory=lambda: {"lpips": 0.2})
    forward: Literal["published", "decoder"] = "published"
    shift: bool = True
    last_step_share: float | None = None
    distortion_weight: float = 0.8
    chroma_weight: float = 0.0
    commitment: float = 0.25
    energy_weight: float = 0.0
    latent_weight: float = 0.0
    copies: tuple[int, ...] = (1,)
    train_decoder: float = 0.0
    train_encoder: float = 0.0
    rate_weights: tuple[float, ...] = (1.0, 0.05)
    base_only_share: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        good = len(self.rate_weights) == 2 and min(self.rate_weights) > 0
        require(good, f"rate_weights {list(self.rate_weights)}: two, above 0")
        require(0 <= self.base_only_share < 1, f"base_only_share {self.base_only_share}: in [0, 1)")
        require(self.copies and min(self.copies) >= 1, f"copies {list(self.copies)}: whole numbers from 1")
        share = self.last_step_share
        require(share is None or 0 <= share <= 1, f"last_step_share {share}: in [0, 1], or null")
        factors = ("distortion_weight", "chroma_weight", "commitment", "energy_weight", "latent_weight")
        require_from(0, self, *factors, "train_decoder", "train_encoder")
        draws = min(self.batch_size, self.microbatch or self.batch_size)
        require(
            not self.energy_weight or draws > 1, "energy_weight: batch_size and microbatch are at least 2 (other noise)"
        )
        learns = self.decodes or self.latent_weight > 0
        require(
            learns,
            "distortion_weight, chroma_weight, perceptual, adversary.weight, energy_weight and latent_weight are all 0",
        )
        for name, network in (("train_decoder", "D"), ("train_encoder", "E")):
            good = self.decodes or not getattr(self, name)
            require(good, f"{name}: {network} learns from terms of the picture; none is on")

    @property
    def decodes(self) -> bool:
        """Whether some term is of the decoded picture."""
        factors = (self.distortion_weight, self.chroma_weight, self.adversary.weight, self.energy_weight)
        return any((*factors, *self.perceptual.values()))


@dataclass(frozen=True)
class DecoderStageParams(StageParams):
    """Stage `decoder`: D of a release goes on learning, all else stays.

    Attributes:
        clean_share: of samples whose latent is E(X); the others' is the codec's own x^, as a file gives it.
        base_only_share: of samples that are coded at level 0. The others' levels are drawn between the first and the last.
    """

    squared_errors: ClassVar[tuple[str, ...]] = ("distortion_weight", "chroma_weight")  # names of their factors

    iterations: int = 20_000
    optim: OptimParams = field(default_factory=OptimParams)
    perceptual: Factors = field(default_factory=lambda: {"lpips": 0.2})
    distortion_weight: float = 0.8
    chroma_weight: float = 0.0
    clean_share: float = 0.1
    base_only_share: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        for name in ("clean_share", "base_only_share"):
            require(0 <= getattr(self, name) <= 1, f"{name} {getattr(self, name)}: in [0, 1]")
        require_from(0, self, *self.squared_errors)
        factors = [getattr(self, name) for name in self.squared_errors]
        learns = any((*factors, self.adversary.weight, *self.perceptual.values()))
        require(learns, f"{', '.join(self.squared_errors)}, perceptual and adversary.weight are all 0")


@dataclass(frozen=True)
class LightStageParams(DecoderStageParams):
    """Stage `light`: the light decoder, distilled from the D of a release.

    Attributes:
        target: what distortion_weight, chroma_weight and perceptual terms compare with: the `original`, or the picture that
            D, the `teacher`, makes of the same latent. A distance to the original would take away texture that D paints.
        teacher_weight: of the squared error to D's picture, beside them.
        start: light decoder of another release, `light_model_<it>.pth`, to go on from; None fits the linear map and starts
            the rest from nothing.
        statistics: crops that the linear map is fitted to before the first step.
    """

    squared_errors: ClassVar[tuple[str, ...]] = ("teacher_weight", *DecoderStageParams.squared_errors)

    start: str | None = None
    target: Literal["original", "teacher"] = "original"
    teacher_weight: float = 1.0
    clean_share: float = 0.25
    statistics: int = 256

    def __post_init__(self):
        super().__post_init__()
        require_from(1, self, "statistics")


@dataclass(frozen=True)
class TextureStageParams(DecoderStageParams):
    """Stage `texture`: the network that adds texture to decoded pictures, and D with it; all else of a release stays.

    Attributes:
        train_decoder: D goes on learning behind which texture comes, at this share of the learning rate; 0 freezes it.
        start: folder of another release whose texture network it goes on from, that of the same codec before its D learnt on.
    """

    distortion_weight: float = 0.0
    train_decoder: float = 0.0
    start: str | None = None

    def __post_init__(self):
        super().__post_init__()
        require_from(0, self, "train_decoder")
