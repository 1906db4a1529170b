"""The configuration of a training run: what it starts from, its networks, pictures and stages (stage_config.py)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from datapipe.pictures import DataParams
from models.records import CodecParams
from training.speed import SpeedParams
from training.stage_config import CodecStageParams, DecoderStageParams, GtParams, LightStageParams, TextureStageParams
from utils.config import build, load_mapping, origin_of, require, require_from

RUN_CONFIG = "config.yaml"  # the resolved configuration, in the run's folder


@dataclass(frozen=True)
class ValidationParams:
    """Scores on pictures that are not trained on, with the averaged weights; the best checkpoint is chosen by them.

    Attributes:
        folder: pictures, sub-folders included; None leaves validation out. limit: pictures taken, in order of name.
        every: iterations between validations. crop: side of the square from the middle that is scored, in pixels, a
            multiple of 16; None takes whole pictures, cut to multiples of 16.
    """

    folder: str | None = None
    limit: int = 24
    every: int = 1000
    crop: int | None = None

    def __post_init__(self):
        require_from(1, self, "limit", "every")
        good = self.crop is None or (self.crop >= 16 and self.crop % 16 == 0)
        require(good, f"crop {self.crop}: a multiple of 16, or null")


ALONE = ("decoder", "light", "texture")  # stages that no other comes before or after


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; it is written beside the run's results.

    Attributes:
        name: folder of the run, below --save_dir. seed: of initial weights, data order and noise, from 0.
        stages: run in this order. autoencoder: GT checkpoint to start from; without it, stage gt comes first. Beside a
            release it takes the place of the release's, whose latent it must share.
        vq_base, unet: checkpoints whose published parameters stage codec starts from; without them, from nothing.
        release: folder of a release that training goes on from, with residual codec and densities. Stages decoder,
            light and texture stand alone: decoder changes D and nothing else of it, texture the network that adds texture
            (and D, with texture.train_decoder), light nothing.
        networks: sizes, schedule and rate modulation.
        log_every: iterations between logged scalars. save_every: between checkpoints. picture_every: between
            TensorBoard pictures.
        keep_last: newest checkpoints that are kept; the best one by validation stays besides.
        deterministic: on CUDA, only algorithms that give the same bits every time, so that a resumed run is exact there
            too; it costs speed. On a CPU runs are exact at the same number of threads and processes anyway.
    """

    name: str = "diffo"
    seed: int = 0
    stages: tuple[Literal["gt", "codec", "decoder", "light", "texture"], ...] = ("gt", "codec")
    autoencoder: str | None = None
    vq_base: str | None = None
    unet: str | None = None
    release: str | None = None
    networks: CodecParams = field(default_factory=CodecParams)
    data: DataParams = field(default_factory=DataParams)
    gt: GtParams = field(default_factory=GtParams)
    codec: CodecStageParams = field(default_factory=CodecStageParams)
    decoder: DecoderStageParams = field(default_factory=DecoderStageParams)
    light: LightStageParams = field(default_factory=LightStageParams)
    texture: TextureStageParams = field(default_factory=TextureStageParams)
    speed: SpeedParams = field(default_factory=SpeedParams)
    validation: ValidationParams = field(default_factory=ValidationParams)
    log_every: int = 50
    save_every: int = 5000
    picture_every: int = 500
    keep_last: int = 3
    deterministic: bool = False

    def __post_init__(self):
        allowed = [("gt",), ("gt", "codec")] + ([("codec",)] if self.autoencoder or self.release else [])
        allowed += [(name,) for name in ALONE] if self.release else []
        require(
            self.stages in allowed,
            f"stages {list(self.stages)}: [gt], [gt, codec], or [codec] with an image autoencoder to start from "
            "(autoencoder: path of a GT_vq_model_<it>.pth.tar, or release: folder), or [decoder], [light] or [texture] with a release: folder",
        )
        for name in ("light", "texture"):
            told = f"stages {list(self.stages)}: networks.{name} is what stage {name} trains, and no other"
            require((name in self.stages) == (getattr(self.networks, name) is not None), told)
        require(0 <= self.seed < 2**63, f"seed {self.seed}: from 0 up, below 2^63")
        # Beside a release, an image autoencoder is one that stage gt has trained on from there.
        apart = ("autoencoder", "vq_base", "unet") if self.stages[0] in ALONE else ("vq_base", "unet")
        single = [name for name in apart if getattr(self, name)]
        require(not (self.release and single), f"release is a whole codec: leave out {', '.join(single)}")
        rescaled = self.release and "gt" in self.stages and self.gt.latent_scale != "kept"
        told = "kept beside a release, whose codec knows the latent as it is (or leave stage gt out: 'stages=[codec]')"
        require(not rescaled, f"gt.latent_scale {self.gt.latent_scale}: {told}")
        require_from(1, self, "log_every", "save_every", "picture_every", "keep_last")
        crop = self.validation.crop
        for name, side in [each for stage in self.stages for each in getattr(self, stage).least_sides.items()]:
            small = crop is not None and crop < side
            require(not small, f"validation.crop {crop}: perceptual.{name} needs sides from {side} pixels")
        require("/" not in self.name and self.name not in ("", ".", ".."), f"name {self.name!r}: one folder name")


def load_config(path: str, overrides: Sequence[str] = (), values: dict[str, Any] | None = None) -> TrainConfig:
    """A YAML file, `key=value` overrides, and values set as they are (`load_mapping`). Raises ConfigError."""
    return build(TrainConfig, load_mapping(path, overrides, values), origin_of(path, overrides, values))
