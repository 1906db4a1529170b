"""The training stages, by name, in the order in which a run takes them."""

from training.codec_stage import CodecStage
from training.decoder_stage import DecoderStage
from training.gt_stage import GtStage
from training.light_stage import LightStage
from training.texture_stage import TextureStage

STAGES = {stage.name: stage for stage in (GtStage, CodecStage, DecoderStage, LightStage, TextureStage)}
