"""A run of stage decoder or texture -> a release: that which it started from, with the network that learnt."""

from dataclasses import replace
from pathlib import Path

from models.released import Triple, load_triple, states_of
from models.texture import Texture
from release.making import copy_light, halved, require_empty, taken, write_release
from training.config import TrainConfig
from utils import checkpoints
from utils.errors import CheckpointError

BEHIND_D = ("sharpening", "colour_blur", "fade")  # rules of what comes after D
LEARNT = {"decoder": "autoencoder", "texture": "texture"}  # network of the codec, by stage


def with_learnt(out: Path, config: TrainConfig, iteration: int, source: Triple | Path) -> dict:
    """Write the release of a run; the entries of its release.json.

    Networks, tables and integer models of the release that the run started from stay: its files have as many bytes, and
    another fingerprint, since pictures differ. Beside another D neither its light decoder nor its texture goes along,
    which know the D that it had; texture is added, in half precision, with the run's rules for what comes after it.

    Args:
        source: the run's averages, a triple or a checkpoint of its stage.
    Raises:
        CheckpointError: a damaged checkpoint; the release is no longer there, or another. DiffoError: `out` is not empty.
    """
    require_empty(out)
    (stage,) = config.stages
    name, before = LEARNT[stage], Path(config.release)
    codec, told, notes = taken(before)
    if isinstance(source, Triple):
        path, states = source.files[name], states_of(load_triple(source))
    else:
        path, content = source, checkpoints.read(source)
        if content.get("stage") != stage or not {"averages", "vq_base"} <= content.keys():
            raise CheckpointError(f"{source}: not a checkpoint of stage {stage}")
        states = content | content["averages"]
    for same in {"vq_base", "autoencoder"} - {name}:
        if checkpoints.digest(states[same]) != checkpoints.digest(getattr(codec, same).state_dict()):
            raise CheckpointError(f"{path}: of a run that started from another release than {before} is now")
    codec.params = replace(codec.params, texture=config.networks.texture)
    if name == "texture":
        codec.params = codec.params.with_rules({rule: config.networks.rules[rule] for rule in BEHIND_D})
    sizes = codec.params.texture, codec.params.autoencoder.embed_dim
    codec.texture = Texture(*sizes) if name == "texture" else None
    state = halved(states[name], name) if name == "texture" else states[name]
    checkpoints.load_strictly(getattr(codec, name), state, path)
    about = write_release(out, iteration, codec, replace(config, networks=codec.params), **notes)
    return copy_light(before, out, told, about) if name == "texture" else about
