"""Make a release from a training run: averaged weights, integer tables, fingerprint, digests.

python -m release runs/tiny weights/tiny --data pictures/
"""

import argparse
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
from datapipe.sources import data_options
from models.codec import Codec
from models.entropy_coding import frequency_table, table_cost_bits
from release.triple import ABOUT, NAMES, Triple, load_codec, load_triple, save_triple
from training.config import RUN_CONFIG, load_config
from utils.commandline import answer, positive
from utils.config import to_mapping
from utils.errors import CheckpointError, DiffoError
from utils.files import atomic_write, make_folder

COUNTED = 2048  # crops whose indices are counted by default


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m release", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder of main_diffusion_train_vq.py")
    parser.add_argument("out", type=Path, help="release folder, for instance weights/mine")
    parser.add_argument("--iteration", type=int, metavar="N", help="of the checkpoint (default: the newest)")
    parser.add_argument("--data", metavar="PATH", help="training pictures as for training (default: the run's)")
    parser.add_argument(
        "--crops", type=positive, default=COUNTED, metavar="N", help=f"crops to count (default {COUNTED})"
    )
    return parser.parse_args(argv)


def newest(folder: Path) -> int:
    """Largest iteration of which `ema_ckpts` holds all three files."""
    names = (p.stem.removeprefix("ema_model_") for p in folder.glob(NAMES["unet"].format("*")))
    iterations = [int(name) for name in names if name.isdecimal()]
    complete = [n for n in iterations if all((folder / name.format(n)).is_file() for name in NAMES.values())]
    if not complete:
        raise CheckpointError(f"{folder}: no complete set of checkpoints to release; has the stage codec saved yet?")
    return max(complete)


@torch.inference_mode()
def count_indices(codec: Codec, pictures: Pictures, crops: int, batch: int = 8) -> np.ndarray:
    """How often each index is chosen on crops of the training pictures: int64 (K,)."""
    counts = np.zeros(codec.params.vq_base.codebook_size, dtype=np.int64)
    batches = iter(stream(pictures, batch, rank=0, world=1, first_step=0))
    for _ in tqdm(range(-(-crops // batch)), desc="counting indices"):
        image, _ = next(batches)
        k = codec.vq_base.indices(codec.to_latent(image))
        counts += np.bincount(k.flatten().numpy(), minlength=len(counts))
    return counts


def release(args: argparse.Namespace) -> None:
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise DiffoError(f"{args.out}: not an empty folder; a release stays as it is, choose another name")
    config = load_config(str(args.run / RUN_CONFIG), values=data_options(args.data) if args.data else {})
    iteration = newest(args.run / "ema_ckpts") if args.iteration is None else args.iteration
    codec = load_triple(Triple.of(args.run / "ema_ckpts", iteration))
    pictures = Pictures(config.data, config.codec.crop_size, config.seed)
    counts = count_indices(codec, pictures, args.crops)
    for line in pictures.source.unreadable_lines():
        print(line, file=sys.stderr)
    # Every index starts with one count: training pictures need not show them all.
    table = frequency_table(counts + 1)
    make_folder(args.out)
    triple = Triple.of(args.out, iteration)
    states = {network: getattr(codec, network).state_dict() for network in NAMES}
    save_triple(triple, states, codec.params, table)
    released = load_codec(args.out)
    entropy = table_cost_bits(np.repeat(np.arange(len(counts)), counts), table) / counts.sum()
    about = {
        "fingerprint": released.fingerprint.hex(),
        "iteration": iteration,
        "sha256": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in vars(triple).values()},
        "bytes": {p.name: p.stat().st_size for p in vars(triple).values()},
        "counted_indices": int(counts.sum()),
        "used_indices": int((counts > 0).sum()),
        "bits_per_index": round(entropy, 4),
    }
    atomic_write(args.out / ABOUT, (json.dumps(about, indent=1) + "\n").encode())
    # Where the pictures lay on the training machine means nothing elsewhere.
    config = replace(config, data=replace(config.data, folder=None, txt_file_path=None, shards=None))
    atomic_write(args.out / RUN_CONFIG, yaml.safe_dump(to_mapping(config), sort_keys=False).encode())
    print(json.dumps(about, indent=1))


def main(argv: list[str] | None = None) -> int:
    return answer(release, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
