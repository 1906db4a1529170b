"""Start from public weights: a VQGAN's image autoencoder, or the three files of a published DiffO model.

python -m release.import_weights vqgan last.ckpt public
python -m release.import_weights diffo --ckpt ema_model_60000.pth --vqckpt vq_model_60000.pth.tar \\
    --GT_vqckpt GT_vq_model_60000.pth.tar weights/published
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

from torch import Tensor, nn

from datapipe.sources import data_options
from models.released import NAMES, OURS
from release.making import COUNTED, require_empty, write_release
from release.tables import count
from training.config import load_config
from training.start import new_codec
from utils import checkpoints
from utils.commandline import answer, command_parser, positive
from utils.errors import CheckpointError, DiffoError
from utils.files import make_folder

# Beside its tensors, a checkpoint of PyTorch Lightning names the classes of its callbacks and hyper-parameters.
LIGHTNING = (
    *("pytorch_lightning", "lightning", "omegaconf", "numpy", "argparse", "collections", "typing"),
    *(f"builtins.{plain}" for plain in ("dict", "list", "tuple", "str", "int", "float", "bool")),
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, "python -m release.import_weights")
    sizes = argparse.ArgumentParser(add_help=False)
    sizes.add_argument("--config", default="configs/config.yaml", metavar="YAML", help="default: configs/config.yaml")
    kinds = parser.add_subparsers(required=True, metavar="vqgan|diffo")
    vqgan = kinds.add_parser("vqgan", parents=[sizes], help="a VQGAN's checkpoint -> GT_vq_model_<it>.pth.tar")
    vqgan.add_argument("checkpoint", type=Path, help="last.ckpt of a VQGAN f16-16384")
    vqgan.add_argument("out", type=Path, help="folder for GT_vq_model_<it>.pth.tar")
    vqgan.set_defaults(work=import_vqgan)
    diffo = kinds.add_parser("diffo", parents=[sizes], help="three published files -> a release folder")
    diffo.add_argument("--ckpt", type=Path, required=True, metavar="FILE", help="averaged UNet, ema_model_<it>.pth")
    diffo.add_argument("--vqckpt", type=Path, required=True, metavar="FILE", help="vq_model_<it>.pth.tar")
    diffo.add_argument("--GT_vqckpt", type=Path, required=True, metavar="FILE", help="GT_vq_model_<it>.pth.tar")
    diffo.add_argument("out", type=Path, help="release folder, for instance weights/published")
    diffo.add_argument("--data", metavar="PATH", help="pictures to count indices on, for shorter files (default: none)")
    diffo.add_argument("--crops", type=positive, default=COUNTED, metavar="N", help=f"to count (default {COUNTED})")
    diffo.set_defaults(work=import_diffo)
    return parser.parse_args(argv)


def take(network: nn.Module, content: dict, path: Path) -> None:
    """Load a checkpoint's parameters into a network, strictly, and print what was taken and what was left out.

    Raises:
        CheckpointError: names the file and the first keys that differ.
    """
    state, dropped = checkpoints.parameters_of(content)
    checkpoints.load_strictly(network, state, path)
    print(f"{path}: took {len(state)} tensors, {sum(value.numel() for value in state.values()):,} parameters")
    around = content if "state_dict" in content else {k: v for k, v in content.items() if not isinstance(v, Tensor)}
    left = checkpoints.told_by_group(dropped) + [str(key) for key in around if key != "state_dict"]
    print(f"{path}: left out {', '.join(left) or 'nothing'}")


def import_vqgan(args: argparse.Namespace) -> None:
    config = load_config(args.config)
    content = checkpoints.read(args.checkpoint, inert=LIGHTNING)
    step = content.get("global_step")
    path = args.out / NAMES["autoencoder"].format(step if isinstance(step, int) else 0)
    if path.exists():
        raise DiffoError(f"{path}: is there already; choose another folder")
    autoencoder = new_codec(config).autoencoder
    take(autoencoder, content, args.checkpoint)
    make_folder(args.out)
    checkpoints.save(path, {"state_dict": autoencoder.state_dict()})
    print(f"wrote {path}; train with stages=[codec] autoencoder={path}")


def import_diffo(args: argparse.Namespace) -> None:
    require_empty(args.out)
    config = load_config(args.config, values=data_options(args.data) if args.data else {})
    paths = {"unet": args.ckpt, "vq_base": args.vqckpt, "autoencoder": args.GT_vqckpt}
    contents = {network: checkpoints.read(path) for network, path in paths.items()}
    if OURS in contents["vq_base"]:
        raise CheckpointError(f"{args.vqckpt}: is of a release or run of this project already, with sizes of its own")
    codec = new_codec(config).eval().requires_grad_(False)
    for network, path in paths.items():
        take(getattr(codec, network), contents.pop(network), path)
    notes = count(codec, config, args.crops).install(codec) if args.data else {}
    sources = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths.values()}
    numbered = re.search(r"_(\d+)$", args.ckpt.stem)
    about = write_release(args.out, int(numbered[1]) if numbered else 0, codec, config, **notes, imported_from=sources)
    if not notes:
        print(f"{args.out}: base indices at fixed length, for want of pictures to count them on (--data)")
    print(json.dumps(about, indent=1))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return answer(args.work, args)


if __name__ == "__main__":
    sys.exit(main())
