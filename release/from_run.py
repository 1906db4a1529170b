"""Make a release from a training run: averaged networks in half precision, integer tables, fingerprint, digests.

Last, two small networks are fitted to what was counted. With one, indices take far fewer bits (models/index_model.py), with the
other, symbols of the residual do (models/context_model.py).

A run of stage decoder gives the release that it started from, with another D, one of stage texture with a network that adds
texture, and with the D that learnt with it. One of stage light gives its light decoder to a release that is there, the one
that it was distilled from.

python -m release runs/tiny weights/mine --data pictures/
python -m release runs/light weights/mine
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from datapipe.sources import data_options
from models.codec import Codec
from models.records import CodecParams
from models.released import NAMES, NETWORKS, Triple, assembled, load_triple
from models.stated import stored_params
from release import context_model, index_model
from release.alone import BEHIND_D, with_learnt
from release.light import add_light
from release.making import COUNTED, require_empty, round_to_half, write_release
from release.tables import BATCH, count
from training.checkpointing import AVERAGES, BEST, CHECKPOINTS
from training.config import ALONE, RUN_CONFIG, load_config
from utils import checkpoints
from utils.commandline import command_parser, number, positive
from utils.distributed import local_device
from utils.errors import CheckpointError, DiffoError

RULES = {  # parameters that may change after training: range, what the option says
    "masking": ((0, 1), "how much finer symbols are where the base is smooth, and coarser where it is busy"),
    "stretch": ((0, 0.5), "share by which symbols of the lowest level are decoded further from their mean"),
    "sharpening": ((0, 1), "share of grey detail of 3x3 pixels that decoders add"),
    "colour_blur": ((0, 1), "share of colour's detail of 3x3 pixels that decoders take away"),
    "fade": ((0, 1), "share of texture that files of the last level go without"),
}
NEEDED = {"masking": "residual codec (networks.residual)", "stretch": "residual codec (networks.residual)"}
NEEDED |= {"fade": "texture network (networks.texture)"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, "python -m release")
    parser.add_argument("run", type=Path, help="run folder of main_diffusion_train_vq.py")
    parser.add_argument(
        "out", type=Path, help="release folder, for instance weights/mine; of stage light, one that is there"
    )
    parser.add_argument("--iteration", metavar="N", help="or `best` by validation (default: the newest)")
    parser.add_argument("--data", metavar="PATH", help="training pictures as for training (default: the run's)")
    parser.add_argument("--crops", type=positive, default=COUNTED, metavar="N", help=f"to count (default {COUNTED})")
    parser.add_argument("--batch", type=positive, default=BATCH, metavar="N", help=f"crops at once (default {BATCH})")
    parser.add_argument(
        "--index_steps",
        type=number(int, lambda value: value >= 0, "from 0 up"),
        default=index_model.STEPS,
        metavar="N",
        help=f"to fit the index model in (default {index_model.STEPS}); 0: without one, indices with one table as the paper",
    )
    parser.add_argument(
        "--context_steps",
        type=number(int, lambda value: value >= 0, "from 0 up"),
        default=context_model.STEPS,
        metavar="N",
        help=f"to fit the context model in (default {context_model.STEPS}); 0: without one, symbols by the hyperprior alone",
    )
    for rule, ((least, most), what) in RULES.items():
        kind = number(float, lambda value, least=least, most=most: least <= value <= most, f"{least} to {most}")
        parser.add_argument(f"--{rule}", type=kind, metavar="X", help=f"{what} (default: the run's)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    return parser.parse_args(argv)


def candidates(run: Path, stage: str) -> dict[str, Triple | Path]:
    """All that a run has saved of a stage, by iteration: the averaged triple, or else the checkpoint."""
    found = {path.stem.removeprefix(f"{stage}_"): path for path in (run / CHECKPOINTS).glob(f"{stage}_*.pth")}
    for path in (run / AVERAGES).glob(
        NAMES["unet"].format("*")
    ):  # of stage codec, or of stage decoder or texture alone
        triple = Triple.of(path.parent, iteration := path.stem.removeprefix("ema_model_"))
        if all(file.is_file() for file in vars(triple).values()):
            found[iteration] = triple
    return {iteration: source for iteration, source in found.items() if iteration.isdecimal()}


def chosen(run: Path, iteration: str | None, stage: str = "codec") -> tuple[int, Triple | Path]:
    """The iteration that is asked for (a number, `best`, or None for the newest) and where its averages are.

    Raises:
        CheckpointError: there is none, or no such one.
    """
    found = candidates(run, stage)
    if iteration == "best":
        best = checkpoints.read_json(run / BEST) if (run / BEST).is_file() else {}
        if best.get("stage") != stage:
            raise CheckpointError(f"{run}: no validation of stage {stage} has chosen one (validation.folder=DIR)")
        iteration = str(best["step"])
    elif iteration is None:
        iteration = max(found, key=int, default=None)
    if not found:
        raise CheckpointError(f"{run}: no checkpoint of stage {stage}; it has not saved yet")
    if iteration not in found:
        there = ", ".join(sorted(found, key=int))
        raise CheckpointError(f"{run}: no checkpoint of stage {stage}, iteration {iteration}; there are: {there}")
    return int(iteration), found[iteration]


def averaged(path: Path) -> Codec:
    """The codec of a training checkpoint's averages, densities included, in evaluation mode.

    Raises:
        CheckpointError: not a checkpoint of stage codec, or damaged.
    """
    content = checkpoints.read(path)
    if content.get("stage") != "codec" or not {"networks", "averages"} <= content.keys():
        raise CheckpointError(f"{path}: not a checkpoint of stage codec")
    params = stored_params(content["networks"], path)
    frozen = {"autoencoder": content["autoencoder"]} if "autoencoder" in content else {}  # else it has an average
    states = content["averages"] | frozen
    return assembled(params, states, dict.fromkeys(NETWORKS, path))


def ruled(params: CodecParams, rules: Mapping[str, float]) -> CodecParams:
    """Parameters with rules of `RULES`. Raises CheckpointError if they lack the network that one is of."""
    if lacking := sorted(rules.keys() - params.rules):
        raise CheckpointError(f"--{lacking[0]}: the run has no {NEEDED[lacking[0]]}")
    return params.with_rules(rules)


def set_rules(codec: Codec, rules: Mapping[str, float]) -> None:
    """Give a codec rules of `RULES`. Raises CheckpointError if it lacks the network that one is of."""
    codec.params = ruled(codec.params, rules)
    if codec.residual:
        codec.residual.params = codec.params.residual


def release(args: argparse.Namespace) -> None:
    config = load_config(str(args.run / RUN_CONFIG), values=data_options(args.data) if args.data else {})
    rules = {rule: value for rule in RULES if (value := getattr(args, rule)) is not None}
    stage = config.stages[-1]
    if fixed := rules.keys() - (RULES if stage == "codec" else BEHIND_D if stage == "texture" else ()):
        raise DiffoError(f"--{min(fixed)}: a run of stage {stage} leaves the rules of its release as they are")
    if config.stages == ("light",):
        print(json.dumps(add_light(args.out, *chosen(args.run, args.iteration, "light")), indent=1))
        return
    if stage in ALONE:
        config = replace(config, networks=ruled(config.networks, rules))
        about = with_learnt(args.out, config, *chosen(args.run, args.iteration, stage))
        print(json.dumps(about, indent=1))
        return
    require_empty(args.out)
    device = local_device(args.device)
    iteration, source = chosen(args.run, args.iteration)
    codec = load_triple(source, densities=True) if isinstance(source, Triple) else averaged(source)
    set_rules(codec, rules)
    round_to_half(codec)
    counts = count(codec.to(device), config, args.crops, args.batch)
    notes = counts.install(codec.cpu())
    notes |= index_model.install(codec, counts.crops, args.index_steps, config.seed, device)
    notes |= context_model.install(codec, counts.coded, args.context_steps, config.seed, device)
    about = write_release(args.out, iteration, codec, replace(config, networks=codec.params), "float16", **notes)
    print(json.dumps(about, indent=1))
