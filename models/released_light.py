"""The fourth file of a release, which it may have: the light decoder, `light_model_<it>.pth`.

    state_dict   its parameters
    networks     JSON of LightParams
    autoencoder  SHA-256 of the parameters of the image autoencoder whose latents it reads

The release's fingerprint does not count it; release.json has the file's SHA-256.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from models.codec import Codec
from models.light import LightDecoder, LightParams
from utils import checkpoints
from utils.config import build, to_mapping
from utils.errors import CheckpointError


def save_light(path: Path, state: Mapping[str, Tensor], params: LightParams, autoencoder: str) -> None:
    """Write the file. Raises DiffoError as `checkpoints.save`.

    Args:
        state: parameters, in the precision that is to be stored. autoencoder: digest of the image autoencoder.
    """
    networks = json.dumps(to_mapping(params), sort_keys=True)
    checkpoints.save(path, {"state_dict": dict(state), "networks": networks, "autoencoder": autoencoder}, deflated=True)


def load_light(path: Path, codec: Codec, about: Path) -> None:
    """Give a released codec its light decoder in D's place, whose weights are let go.

    Args:
        about: the release's release.json.
    Raises:
        CheckpointError: there is none, or it is not this release's.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent}: this release has no light decoder ({path.name}); decode with its own, or distil one "
            "(docs/training.md)"
        )
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if checkpoints.read_json(about).get("sha256", {}).get(path.name) != sha256:
        raise CheckpointError(f"{path}: damaged, or of another release: its SHA-256 is not the one in {about.name}")
    content = checkpoints.read(path)
    if content.get("autoencoder") != checkpoints.digest(codec.autoencoder.state_dict()):
        raise CheckpointError(f"{path}: reads latents of another image autoencoder than this release's")
    params = build(LightParams, json.loads(content["networks"]), str(path))
    light = LightDecoder(params, codec.params.autoencoder.embed_dim)
    checkpoints.load_strictly(light, content["state_dict"], path)
    light.sha256 = sha256
    codec.autoencoder.forget_decoder()
    codec.light = light.eval().requires_grad_(False).to(codec.device)
