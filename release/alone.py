"""A run of stage decoder or texture -> a release: that which it started from, with the networks that learnt."""

import sys
from dataclasses import replace
from pathlib import Path

from models.released import Triple, load_triple, states_of
from models.texture import Texture
from release.making import copy_light, halved, require_empty, taken, write_release
from training.config import TrainConfig
from utils import checkpoints
from utils.errors import CheckpointError

BEHIND_D = ("sharpening", "colour_blur", "fade")  # rules of what comes after D


def learnt(config: TrainConfig) -> tuple[str, ...]:
    """The codec's networks that a run of stage decoder or texture trains."""
    if config.stages == ("decoder",):
        return ("autoencoder",)
    return ("texture", "autoencoder") if config.texture.train_decoder else ("texture",)


def with_learnt(out: Path, config: TrainConfig, iteration: int, source: Triple | Path) -> dict:
    """Write the release of a run; the entries of its release.json.

    Networks, tables and integer models of the release that the run started from stay: its files have as many bytes, and
    another fingerprint, since pictures differ. Beside another D neither its light decoder nor texture goes along, which
    know the D that it had, but for texture that learnt with it. Texture is in half precision, and comes with the run's
    rules for what follows D.

    Args:
        source: the run's averages, a triple or a checkpoint of its stage.
    Raises:
        CheckpointError: a damaged checkpoint; the release is no longer there, or another. DiffoError: `out` is not empty.
    """
    require_empty(out)
    (stage,) = config.stages
    names, before = learnt(config), Path(config.release)
    codec, told, notes = taken(before)
    if "autoencoder" in names:
        with_d = {"light decoder": "light" in told, "texture": codec.texture is not None and stage != "texture"}
        if left := [network for network, there in with_d.items() if there]:
            print(f"without the {' and '.join(left)} of {before}: trained for the D that it had", file=sys.stderr)
    if isinstance(source, Triple):
        paths, states = source.files, states_of(load_triple(source))
    else:
        paths, content = dict.fromkeys(names, source), checkpoints.read(source)
        if content.get("stage") != stage or not {"averages", "vq_base"} <= content.keys():
            raise CheckpointError(f"{source}: not a checkpoint of stage {stage}")
        states = content | content["averages"]
    for same in {"vq_base", "autoencoder"} - {*names}:
        if checkpoints.digest(states[same]) != checkpoints.digest(getattr(codec, same).state_dict()):
            raise CheckpointError(f"{paths[names[0]]}: of a run that started from another release than {before} is now")
    codec.params = replace(codec.params, texture=config.networks.texture)
    if stage == "texture":
        codec.params = codec.params.with_rules({rule: config.networks.rules[rule] for rule in BEHIND_D})
        states = states | {"texture": halved(states["texture"], "texture")}
    sizes = codec.params.texture, codec.params.autoencoder.embed_dim
    codec.texture = Texture(*sizes) if stage == "texture" else None
    for name in names:
        checkpoints.load_strictly(getattr(codec, name), states[name], paths[name])
    about = write_release(out, iteration, codec, replace(config, networks=codec.params), **notes)
    return about if "autoencoder" in names else copy_light(before, out, told, about)
