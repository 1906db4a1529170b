"""Making a release folder: integer tables, three checkpoints, digests."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import yaml

from models.codec import Codec
from models.diffusion import RateParams
from models.released import ABOUT, NETWORKS, Triple, load_codec, save_triple
from training.config import RUN_CONFIG, TrainConfig, load_config
from utils.config import to_mapping
from utils.errors import DiffoError
from utils.files import atomic_write, make_folder

WRITTEN = ("fingerprint", "iteration", "levels", "c", "sha256", "bytes")  # entries that write_release makes
COUNTED = 2048  # crops whose indices are counted by default


def require_empty(out: Path) -> None:
    """Raise DiffoError, before any work, where something stands already: releases stay as they are."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DiffoError(f"{out}: not an empty folder; a release stays as it is, choose another name")


def write_release(out: Path, iteration: int | str, codec: Codec, config: TrainConfig, **notes) -> dict:
    """Write the release of a codec with the integer tables that it has, and return what its release.json says.

    Without tables, base sections are at fixed length and there are no levels.

    Args:
        notes: further entries of release.json.
    """
    make_folder(out)
    triple = Triple.of(out, iteration)
    states = {name: getattr(codec, name).state_dict() for name in NETWORKS if getattr(codec, name) is not None}
    save_triple(triple, states, codec.params, codec.base_table, codec.residual and codec.residual.tables)
    about = {
        "fingerprint": load_codec(out).fingerprint.hex(),
        "iteration": iteration,
        "levels": codec.has_levels,
        "c": codec.params.rate.c,
        "sha256": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in vars(triple).values()},
        "bytes": {p.name: p.stat().st_size for p in vars(triple).values()},
    }
    about |= notes
    atomic_write(out / ABOUT, (json.dumps(about, indent=1) + "\n").encode())
    # Where pictures and earlier weights lay on the training machine means nothing elsewhere.
    starts = {name: Path(path).name for name in ("autoencoder", "vq_base", "unet") if (path := getattr(config, name))}
    config = replace(config, **starts, data=replace(config.data, folder=None, txt_file_path=None, shards=None))
    atomic_write(out / RUN_CONFIG, yaml.safe_dump(to_mapping(config), sort_keys=False).encode())
    return about


def with_rate(codec: Codec, rate: RateParams, source: Path, out: Path) -> dict:
    """The release in `source`, which `codec` was loaded from, once more, with another rule for the noise level.

    Its fingerprint differs: decoded pictures do. What release.json says of training stays.
    """
    require_empty(out)
    told = json.loads((source / ABOUT).read_text())
    notes = {key: value for key, value in told.items() if key not in WRITTEN}
    codec.params = replace(codec.params, rate=rate)
    config = load_config(str(source / RUN_CONFIG))
    config = replace(config, networks=replace(config.networks, rate=rate))
    return write_release(out, told["iteration"], codec, config, **notes)
