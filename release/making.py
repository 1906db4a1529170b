"""A codec with its integer tables -> a release folder: three checkpoints, digests, configuration."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import yaml
from torch import Tensor

from datapipe.sources import KINDS
from models.codec import Codec
from models.diffusion import RateParams
from models.released import ABOUT, DENSITIES, Triple, load_release, load_triple, save_triple, states_of
from training.config import RUN_CONFIG, TrainConfig
from utils import checkpoints
from utils.config import load_mapping, to_mapping
from utils.errors import CheckpointError, DiffoError
from utils.files import atomic_write, make_folder, require_writable

EXACT = {
    "vq_base": ("quantize.embedding.",),
    "residual": ("scale_network.", "log_gain", "median", DENSITIES),
}  # stored as they are
WRITTEN = (
    "fingerprint",
    "iteration",
    "levels",
    "c",
    "sha256",
    "bytes",
    "light",
)  # entries that are of one release alone
STARTS = ("autoencoder", "vq_base", "unet", "release")  # keys of a configuration that name earlier weights
COUNTED = 2048  # crops whose indices are counted by default


def require_empty(out: Path) -> None:
    """Raise DiffoError, before any work, where something stands already, since releases stay as they are, or nothing can."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DiffoError(f"{out}: not an empty folder; a release stays as it is, choose another name")
    require_writable(next(folder for folder in (out, *out.resolve().parents) if folder.is_dir()))


def halved(state: Mapping[str, Tensor], network: str) -> dict[str, Tensor]:
    """A network's tensors in float16, but for those of `EXACT` and integers.

    Raises:
        CheckpointError: a value that float16 cannot hold; names its tensor.
    """
    small = {
        k: v.half() for k, v in state.items() if v.is_floating_point() and not k.startswith(EXACT.get(network, ()))
    }
    for key, value in small.items():
        if not value.isfinite().all():
            largest = state[key].abs().max().item()
            raise CheckpointError(f"{network}: {key}: float16, as releases are stored, cannot hold {largest:.4g}")
    return {**state, **small}


def round_to_half(codec: Codec) -> None:
    """Round the networks, in place and still in float32, to what float16 stores. Errors as `halved`."""
    for name, state in states_of(codec).items():
        getattr(codec, name).load_state_dict(halved(state, name))


def write_release(
    out: Path, iteration: int | str, codec: Codec, config: TrainConfig | dict, precision: str = "float32", **notes
) -> dict:
    """Write the release of a codec, with the integer tables that it has; the entries of its release.json.

    Args:
        config: of the run, or the mapping that another release kept of it.
        precision: that networks are stored in, `float32` or, once the codec is rounded to it, `float16`.
        notes: further entries of release.json.
    """
    make_folder(out)
    triple = Triple.of(out, iteration)
    states = states_of(codec)
    if precision == "float16":
        states = {name: halved(state, name) for name, state in states.items()}
    tables = codec.residual and codec.residual.tables
    contexts = codec.residual and codec.residual.context_model
    save_triple(triple, states, codec.params, codec.base_table, tables, codec.index_model, contexts, deflated=True)
    about = {
        "fingerprint": load_release(out).fingerprint.hex(),
        "iteration": iteration,
        "levels": codec.has_levels,
        "c": codec.params.rate.c,
        "precision": precision,
        "sha256": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in vars(triple).values()},
        "bytes": {p.name: p.stat().st_size for p in vars(triple).values()},
    }
    about |= notes
    write_about(out, about)
    kept = to_mapping(config) if isinstance(config, TrainConfig) else config
    # Where pictures and earlier weights lay on the training machine means nothing elsewhere.
    for part, names in (kept, STARTS), *((kept.get(stage, {}), ("start",)) for stage in ("light", "texture")):
        part |= {name: Path(path).name for name in names if (path := part.get(name))}
    kept["data"] |= dict.fromkeys(KINDS)
    kept["validation"] = kept.get("validation", {}) | {"folder": None}
    atomic_write(out / RUN_CONFIG, yaml.safe_dump(kept, sort_keys=False).encode())
    return about


def write_about(out: Path, about: dict) -> None:
    """Write the release.json of a release."""
    atomic_write(out / ABOUT, (json.dumps(about, indent=1) + "\n").encode())


def taken(source: Path) -> tuple[Codec, dict, dict]:
    """A release that another is made of: its codec with densities, its release.json, and the entries of that which go along."""
    codec = load_triple(Triple.in_folder(source), densities=True)
    told = checkpoints.read_json(source / ABOUT)
    return codec, told, {key: value for key, value in told.items() if key not in WRITTEN}


def with_rate(source: Path, rate: RateParams, out: Path) -> dict:
    """The release in `source` once more, with another rule for the noise level; the entries of its release.json.

    Its fingerprint differs: decoded pictures do. Precision, densities, the notes on training and a light decoder stay.
    """
    require_empty(out)
    codec, told, notes = taken(source)
    codec.params = replace(codec.params, rate=rate)
    config = load_mapping(source / RUN_CONFIG)
    config["networks"]["rate"] = to_mapping(rate)
    return copy_light(source, out, told, write_release(out, told["iteration"], codec, config, **notes))


def copy_light(source: Path, out: Path, told: dict, about: dict) -> dict:
    """Take the light decoder of one release, if it has one, along to another that has its D; the entries of its release.json.

    Args:
        told, about: release.json of the one, and of the other.
    """
    path, own = Triple.in_folder(source).light, Triple.in_folder(out).light
    if path.is_file() and path.name in told["sha256"]:
        atomic_write(own, path.read_bytes())
        for entry in ("sha256", "bytes"):  # as they were stated: a file that was damaged is refused as before
            about[entry][own.name] = told[entry][path.name]
        about["light"] = told["light"]
        write_about(out, about)
    return about
