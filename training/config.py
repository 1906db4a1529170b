"""The configuration of a training run. Defaults are the paper's, or VQGAN's for the image autoencoder."""

from dataclasses import dataclass, field
from typing import Literal

from datapipe.pictures import DataParams
from models.codec import CodecParams
from utils.config import build, load_mapping

RUN_CONFIG = "config.yaml"  # the resolved configuration, in the run's folder


@dataclass(frozen=True)
class OptimParams:
    """AdamW with linear warm-up and, where lr_end differs from lr, a cosine between them.

    Attributes:
        lr, lr_end: learning rate after the warm-up and at the last iteration. warmup: iterations.
        clip: largest norm of the gradient; 0 leaves it alone.
    """

    lr: float = 5e-5
    lr_end: float = 5e-5
    warmup: int = 0
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 0.0


@dataclass(frozen=True)
class GtParams:
    """Stage `gt`: the image autoencoder, trained as VQGAN's but with a continuous latent.

    Attributes:
        batch_size: crops per process and step. crop_size: pixels. ema: decay of the averaged weights.
        distortion: `l1`, VQGAN's, or `mse`.
        chroma_weight: of a further squared error, that of the colour alone (what remains of RGB without its mean).
        perceptual: `lpips`, `ms_ssim` or `none`. adversarial_start: iteration at which the PatchGAN joins.
        statistics: crops over which the latent's mean and deviation are measured at the end.
    """

    iterations: int = 100_000
    batch_size: int = 8
    crop_size: int = 256
    ema: float = 0.999
    optim: OptimParams = field(default_factory=lambda: OptimParams(betas=(0.5, 0.9)))
    distortion: Literal["l1", "mse"] = "l1"
    distortion_weight: float = 1.0
    chroma_weight: float = 0.0
    perceptual: str = "lpips"
    perceptual_weight: float = 1.0
    adversarial_weight: float = 0.8
    adversarial_start: int = 10_000
    statistics: int = 1024


@dataclass(frozen=True)
class CodecStageParams:
    """Stage `codec`: VQ base and UNet together, DiffO Eq. 10.

    Attributes:
        forward: input of the last step: `published` (x_t = x + eta (y - x) + noise, which still holds 36 % of the
            original) or `decoder` (what the decoder starts from, with eta within a factor 2 of the rate's).
        last_step_share: probability of t = T-1; None draws all steps alike, as published.
        distortion_weight, perceptual_weight, commitment: w_d, w_p and beta. chroma_weight: as in stage `gt`.
    """

    iterations: int = 60_000
    batch_size: int = 8
    crop_size: int = 256
    ema: float = 0.999
    optim: OptimParams = field(default_factory=OptimParams)
    forward: Literal["published", "decoder"] = "published"
    last_step_share: float | None = None
    distortion_weight: float = 0.8
    chroma_weight: float = 0.0
    perceptual: str = "lpips"
    perceptual_weight: float = 0.2
    commitment: float = 0.25


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; it is written beside the run's results.

    Attributes:
        name: folder of the run, below --save_dir. seed: of initial weights, data order and noise.
        stages: run in this order. networks: sizes, schedule and rate modulation.
        save_every: iterations between checkpoints. picture_every: between TensorBoard pictures.
    """

    name: str = "diffo"
    seed: int = 0
    stages: tuple[Literal["gt", "codec"], ...] = ("gt", "codec")
    networks: CodecParams = field(default_factory=CodecParams)
    data: DataParams = field(default_factory=DataParams)
    gt: GtParams = field(default_factory=GtParams)
    codec: CodecStageParams = field(default_factory=CodecStageParams)
    save_every: int = 5000
    picture_every: int = 500


def load_config(path: str, overrides: list[str] = ()) -> TrainConfig:
    """A YAML file and `key=value` overrides. Raises ConfigError."""
    return build(TrainConfig, load_mapping(path, overrides), str(path))
