"""Making a release folder: indices counted on pictures, integer tables, three checkpoints, digests."""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from tqdm import tqdm

from datapipe.pictures import Pictures, stream
from models.codec import Codec
from models.entropy_coding import frequency_table, table_cost_bits
from release.triple import ABOUT, NAMES, Triple, load_codec, save_triple
from training.config import RUN_CONFIG, TrainConfig
from utils.config import to_mapping
from utils.errors import DiffoError
from utils.files import atomic_write, make_folder

COUNTED = 2048  # crops whose indices are counted by default


def require_empty(out: Path) -> None:
    """Raise DiffoError, before any work, where something stands already: releases stay as they are."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DiffoError(f"{out}: not an empty folder; a release stays as it is, choose another name")


@torch.inference_mode()
def count_indices(codec: Codec, config: TrainConfig, crops: int, batch: int = 8) -> np.ndarray:
    """How often each index is chosen on crops of the configuration's training pictures: int64 (K,)."""
    pictures = Pictures(config.data, config.codec.crop_size, config.seed)
    counts = np.zeros(codec.params.vq_base.codebook_size, dtype=np.int64)
    batches = iter(stream(pictures, batch, rank=0, world=1, first_step=0))
    for _ in tqdm(range(-(-crops // batch)), desc="counting indices"):
        image, _ = next(batches)
        k = codec.vq_base.indices(codec.to_latent(image))
        counts += np.bincount(k.flatten().numpy(), minlength=len(counts))
    for line in pictures.source.unreadable_lines():
        print(line, file=sys.stderr)
    return counts


def write_release(
    out: Path, iteration: int, codec: Codec, config: TrainConfig, counts: np.ndarray | None, **notes
) -> dict:
    """Write the release of a codec, and return what its release.json says.

    Args:
        counts: how often each index was chosen, int64 (K,); None makes a release without an integer table, whose base
            sections are at fixed length.
        notes: further entries of release.json.
    """
    # Every index starts with one count: training pictures need not show them all.
    table = None if counts is None else frequency_table(counts + 1)
    make_folder(out)
    triple = Triple.of(out, iteration)
    states = {network: getattr(codec, network).state_dict() for network in NAMES}
    save_triple(triple, states, codec.params, table)
    about = {
        "fingerprint": load_codec(out).fingerprint.hex(),
        "iteration": iteration,
        "sha256": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in vars(triple).values()},
        "bytes": {p.name: p.stat().st_size for p in vars(triple).values()},
    }
    if table is not None:
        about["counted_indices"] = int(counts.sum())
        about["used_indices"] = int((counts > 0).sum())
        about["bits_per_index"] = round(
            table_cost_bits(np.repeat(np.arange(len(counts)), counts), table) / counts.sum(), 4
        )
    about |= notes
    atomic_write(out / ABOUT, (json.dumps(about, indent=1) + "\n").encode())
    # Where the pictures lay on the training machine means nothing elsewhere.
    config = replace(config, data=replace(config.data, folder=None, txt_file_path=None, shards=None))
    atomic_write(out / RUN_CONFIG, yaml.safe_dump(to_mapping(config), sort_keys=False).encode())
    return about
