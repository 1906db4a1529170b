"""A run of stage `light` -> the fourth file of the release that it was distilled from."""

import hashlib
from pathlib import Path

from models.released import ABOUT, Triple, load_release
from models.released_light import save_light
from models.stated import stored_params
from release.making import halved, write_about
from utils import checkpoints
from utils.errors import CheckpointError, DiffoError
from utils.files import require_writable


def add_light(out: Path, iteration: int, source: Path) -> dict:
    """Add a light decoder, in half precision, to a release, whose other files stay; the entries of its release.json.

    Args:
        source: checkpoint of stage light that it is taken from, its averages.
    Raises:
        CheckpointError: a damaged checkpoint, or of another release. DiffoError: the release has a light decoder.
    """
    triple = Triple.in_folder(out)
    path, about = triple.light, checkpoints.read_json(out / ABOUT)
    if path.exists():
        raise DiffoError(f"{path}: is there already; remove it to put another in its place")
    require_writable(out)
    content = checkpoints.read(source)
    if not {"networks", "averages", "autoencoder"} <= content.keys() or "light" not in content["averages"]:
        raise CheckpointError(f"{source}: not a checkpoint of stage light")
    digest = checkpoints.digest(content["autoencoder"])
    if digest != checkpoints.digest(checkpoints.parameters_of(checkpoints.read(triple.autoencoder))[0]):
        raise CheckpointError(f"{source}: distilled from another release than {out}: their image autoencoders differ")
    params = stored_params(content["networks"], source).light
    save_light(path, halved(content["averages"]["light"], "light"), params, digest)
    about["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    about["bytes"][path.name] = path.stat().st_size
    about["light"] = {"iteration": iteration}
    write_about(out, about)
    load_release(out, decoder="light")
    return about
