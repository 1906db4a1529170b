"""A run of stage decoder -> a release: that which it started from, with the D that went on learning."""

from dataclasses import replace
from pathlib import Path

from models.released import Triple
from release.making import require_empty, taken, write_release
from training.config import TrainConfig
from utils import checkpoints
from utils.errors import CheckpointError


def with_decoder(out: Path, config: TrainConfig, iteration: int, source: Triple | Path) -> dict:
    """Write the release of a run; the entries of its release.json.

    Networks, tables and integer models of the release that the run started from stay: its files have as many bytes, and
    another fingerprint, since pictures differ. A light decoder does not go along: it was distilled from another D.

    Args:
        source: the run's averages, a triple or a checkpoint of stage decoder.
    Raises:
        CheckpointError: a damaged checkpoint; the release is no longer there, or another. DiffoError: `out` is not empty.
    """
    require_empty(out)
    before = Path(config.release)
    codec, _, notes = taken(before)
    if isinstance(source, Triple):
        path, state = source.autoencoder, checkpoints.parameters_of(checkpoints.read(source.autoencoder))[0]
        base = checkpoints.parameters_of(checkpoints.read(source.vq_base))[0]
    else:
        path, content = source, checkpoints.read(source)
        if content.get("stage") != "decoder" or not {"averages", "vq_base"} <= content.keys():
            raise CheckpointError(f"{source}: not a checkpoint of stage decoder")
        state, base = content["averages"]["autoencoder"], content["vq_base"]
    if checkpoints.digest(base) != checkpoints.digest(codec.vq_base.state_dict()):
        raise CheckpointError(f"{path}: of a run that started from another release than {before} is now")
    checkpoints.load_strictly(codec.autoencoder, state, path)
    return write_release(out, iteration, codec, replace(config, networks=codec.params), **notes)
