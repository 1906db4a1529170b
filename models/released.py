"""A codec <-> its three checkpoint files, and the releases that ship.

Published names: `ema_model_<it>.pth` (UNet), `vq_model_<it>.pth.tar` (VQ base), `GT_vq_model_<it>.pth.tar` (image
autoencoder). Each holds exactly the published parameters under `state_dict`; all that is ours lies in the VQ file:

    diffo   networks     JSON of CodecParams
            digests      SHA-256 of the parameters in the two other files
            base_table   int32 (K,), or None before release
            index_model  absent without one: the network's integers
            residual     absent without one: state_dict, tables and densities, which training alone needs; with a
                         context model, context_model: its integers and tables
            texture      absent without one: the network's parameters

A fourth file, `light_model_<it>.pth`, is optional: released_light.py.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.codec import Codec
from models.context_model import ContextModel
from models.growth import narrowed, widened
from models.index_model import IndexModel
from models.records import CodecParams
from models.released_light import load_light
from models.released_passes import context_model_of, index_model_of
from models.residual_hyperprior import ResidualTables
from models.stated import meaning, params_of, require_same
from utils import checkpoints
from utils.config import to_mapping
from utils.errors import CheckpointError

OURS = "diffo"
NAMES = {"unet": "ema_model_{}.pth", "vq_base": "vq_model_{}.pth.tar", "autoencoder": "GT_vq_model_{}.pth.tar"}
NETWORKS = (*NAMES, "residual", "texture")
DENSITIES = "rate_model."  # begins their keys in the residual codec's state dict
RELEASES = Path(__file__).resolve().parents[1] / "weights"
SMALL = RELEASES / "small"
ABOUT = "release.json"

States = dict[str, dict[str, Tensor]]  # state dicts by network

NEVER_PUBLISHED = (
    "no weights were ever published under this name. Train them (main_diffusion_train_vq.py), or leave out --ckpt, "
    "--vqckpt, --GT_vqckpt and --config to use the small weights that ship"
)


@dataclass(frozen=True)
class Triple:
    """Paths of the three checkpoints."""

    unet: Path
    vq_base: Path
    autoencoder: Path

    @classmethod
    def of(cls, folder: Path, iteration: int | str) -> "Triple":
        return cls(**{network: folder / name.format(iteration) for network, name in NAMES.items()})

    @classmethod
    def in_folder(cls, folder: str | Path) -> "Triple":
        """The one triple of a release folder.

        Raises:
            CheckpointError: none there, or more than one.
        """
        folder = Path(folder)
        found = sorted(folder.glob(NAMES["unet"].format("*")))
        if not found:
            raise CheckpointError(f"{folder}: no release there (no {NAMES['unet'].format('<it>')})")
        if len(found) > 1:
            raise CheckpointError(f"{folder}: several releases there ({', '.join(p.name for p in found)}); name one")
        return cls.of(folder, found[0].stem.removeprefix("ema_model_"))

    @property
    def light(self) -> Path:
        """Where the light decoder is, if there is one."""
        return self.unet.with_name(self.unet.name.replace("ema_", "light_", 1))

    @property
    def files(self) -> dict[str, Path]:
        """The file that each network is in."""
        return vars(self) | {"residual": self.vq_base, "texture": self.vq_base}

    def check(self) -> None:
        """Raise CheckpointError for the first file that is not there."""
        for path in vars(self).values():
            if not path.is_file():
                published = path.name in {n.format(60000) for n in NAMES.values()}
                raise CheckpointError(f"{path}: " + (NEVER_PUBLISHED if published else "no such checkpoint"))


def states_of(codec: Codec) -> States:
    """State dicts of the networks that a codec has."""
    return {name: network.state_dict() for name in NETWORKS if (network := getattr(codec, name)) is not None}


def save_triple(
    triple: Triple,
    states: States,
    params: CodecParams,
    table: np.ndarray | None = None,
    residual_tables: ResidualTables | None = None,
    index_model: IndexModel | None = None,
    context_model: ContextModel | None = None,
    deflated: bool = False,
) -> None:
    """Write the three files.

    Args:
        states: state dicts of the networks, in the precision that is to be stored.
        table: integer frequencies of the base indices, int32 (K,), at release. residual_tables: those of the residual.
        index_model: that of the base indices. context_model: that of the residual's symbols. deflated: compress the files, as releases are.
    """
    for network in ("autoencoder", "unet"):
        checkpoints.save(getattr(triple, network), {"state_dict": states[network]}, deflated)
    networks = {name: value for name, value in to_mapping(params).items() if name != "light"}  # in a file of its own
    ours = {
        "networks": json.dumps(networks, sort_keys=True),
        "digests": digests_of(states),
        "base_table": None if table is None else torch.from_numpy(np.asarray(table, dtype=np.int32)),
    }
    if index_model is not None:
        ours["index_model"] = index_model.network.integers()
    if "residual" in states:
        state, densities = parted(states["residual"])
        tables = {key: torch.from_numpy(t) for key, t in vars(residual_tables).items()} if residual_tables else {}
        ours["residual"] = {"state_dict": state, "tables": tables, "densities": densities}
        if context_model is not None:
            ours["residual"]["context_model"] = context_model.integers()
    if "texture" in states:
        ours["texture"] = states["texture"]
    checkpoints.save(triple.vq_base, {"state_dict": states["vq_base"], OURS: ours}, deflated)


def digests_of(states: States) -> dict[str, str]:
    """SHA-256 of the networks that the VQ file does not hold."""
    return {network: checkpoints.digest(states[network]) for network in ("autoencoder", "unet")}


def parted(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A residual codec's state dict without its densities, and the densities."""
    densities = {key: value for key, value in state.items() if key.startswith(DENSITIES)}
    return {key: state[key] for key in state if key not in densities}, densities


def fingerprint(codec: Codec, digests: dict[str, str]) -> bytes:
    """4 bytes that name a triple: SHA-256 over all that changes a decoded picture, as tensors in float32 or int64.

    The two networks outside the VQ file count by their digests; densities do not count.
    """
    tensors = dict(codec.vq_base.state_dict())
    if codec.base_table is not None:
        tensors[f"{OURS}.base_table"] = torch.from_numpy(codec.base_table)
    if codec.index_model is not None:
        state = codec.index_model.network.integers()
        tensors |= {f"{OURS}.index_model.{key}": value for key, value in state.items()}
    if codec.residual is not None:
        state, _ = parted(codec.residual.state_dict())
        tensors |= {f"{OURS}.residual.{key}": value for key, value in state.items()}
        tables = vars(codec.residual.tables) if codec.residual.tables else {}
        tensors |= {f"{OURS}.residual.tables.{key}": torch.from_numpy(table) for key, table in tables.items()}
        if codec.residual.context_model is not None:
            state = codec.residual.context_model.integers()
            tensors |= {f"{OURS}.residual.context_model.{key}": value for key, value in state.items()}
    if codec.texture is not None:
        tensors |= {f"{OURS}.texture.{key}": value for key, value in codec.texture.state_dict().items()}
    rate = codec.rate
    tensors[f"{OURS}.rate"] = torch.tensor([rate.c, rate.eta_min, rate.eta_max])
    # Shapes do not tell everything: into how many groups a normalisation divides its channels, the windows, the noise.
    tensors[f"{OURS}.networks"] = torch.tensor(list(json.dumps(meaning(codec.params), sort_keys=True).encode()))
    for network, digest in digests.items():
        tensors[f"{OURS}.digests.{network}"] = torch.tensor(list(bytes.fromhex(digest)))
    return bytes.fromhex(checkpoints.digest(tensors))[:4]


def load_triple(
    triple: Triple, config: str | Path | None = None, device: str | torch.device = "cpu", densities: bool = False
) -> Codec:
    """The codec of three checkpoints, in float32 and evaluation mode.

    Args:
        config: YAML whose `networks` give the sizes; None takes those stored in the VQ file.
        densities: take along those that the VQ file has, in `residual.rate_model`; coding needs none.
    Raises:
        CheckpointError: a file is missing, does not fit, or belongs to another release. ConfigError: bad YAML.
    """
    triple.check()
    contents = {network: checkpoints.read(getattr(triple, network)) for network in NAMES}
    ours = contents["vq_base"].get(OURS)
    if ours is not None and not (isinstance(ours, dict) and {"networks", "digests", "base_table"} <= ours.keys()):
        raise CheckpointError(f"{triple.vq_base}: what it says of its networks ({OURS}) is not whole")
    states = {}
    for network, content in contents.items():
        states[network], dropped = checkpoints.parameters_of(content)
        if dropped:
            left = ", ".join(checkpoints.told_by_group(dropped))
            print(f"{getattr(triple, network)}: left out {left}", file=sys.stderr)
    residual = (ours or {}).get("residual")
    if residual is not None:
        named = isinstance(residual, dict) and {"state_dict", "tables"} <= residual.keys()
        if not named or residual["tables"].keys() not in (set(), set(ResidualTables.__annotations__)):
            raise CheckpointError(
                f"{triple.vq_base}: what it says of its residual codec ({OURS}.residual) is not whole"
            )
        states["residual"] = residual["state_dict"] | (residual.get("densities", {}) if densities else {})
    if ours and "texture" in ours:
        states["texture"] = ours["texture"]
    params = params_of(ours and ours["networks"], config, triple.vq_base)
    digests = digests_of(states)
    for network, expected in (ours or {}).get("digests", {}).items():
        if digests[network] != expected:  # told before differing keys, which would not say why they differ
            raise CheckpointError(
                f"{getattr(triple, network)}: from another release than {triple.vq_base}, or not its {network}: "
                "take the three files of one release"
            )
    codec = assembled(params, states, triple.files)
    if ours and ours["base_table"] is not None:
        codec.base_table = ours["base_table"].numpy()
    if ours and "index_model" in ours:
        place = f"{triple.vq_base}: {OURS}.index_model"
        codec.index_model = index_model_of(ours["index_model"], codec.params.vq_base.codebook_size, place)
        codec.choose_by_rate()
    if residual and residual["tables"]:
        codec.residual.freeze(ResidualTables(**{key: table.numpy() for key, table in residual["tables"].items()}))
        if "context_model" in residual:
            place = f"{triple.vq_base}: {OURS}.residual.context_model"
            codec.residual.context_model = context_model_of(residual["context_model"], codec.residual, place)
    codec.fingerprint = fingerprint(codec, digests)
    return codec.to(device)


def assembled(params: CodecParams, states: States, files: Mapping[str, Path]) -> Codec:
    """A codec of given parameters, in evaluation mode, with densities where `states` has them, without tables.

    Raises:
        CheckpointError: a network is missing, or does not fit; names its file of `files`.
    """
    codec = Codec(params)
    if codec.residual and parted(states.get("residual", {}))[1]:
        codec.residual.train_rates()
    _fill(codec, states, files)
    if codec.residual:
        codec.residual.freeze(None)
    return codec.eval().requires_grad_(False)


def _fill(codec: Codec, states: States, files: Mapping[str, Path]) -> None:
    """Load the parameters of every network, strictly. Errors as `assembled`."""
    for name, what in (("residual", "residual codec"), ("texture", "texture network")):
        if (getattr(codec, name) is None) != (name not in states):
            has, wants = ("no", "asks for") if getattr(codec, name) else ("a", "leaves out")
            told = f"has {has} {what}, which the configuration {wants} (networks.{name})"
            raise CheckpointError(f"{files[name]}: {told}")
    for network, state in states.items():
        checkpoints.load_strictly(getattr(codec, network), state, files[network])


def start_from_release(folder: str | Path, codec: Codec) -> list[str]:
    """Load a release's parameters into a codec that is to be trained, in place; lines that tell what was taken.

    Schedule, rate rule and `rules` stay the codec's own, and so does `least_side` of the VQ base. Densities that
    the release does not have start around its medians, and a linear shortcut of the VQ base, which it lacks, at zero: so that
    the codec begins as the release is; so do channels of the latent and the residual beyond the release's (growth.py).

    Raises:
        CheckpointError: no release there, a damaged one, or one of other sizes; names keys that differ.
    """
    triple = Triple.in_folder(folder)
    released = load_triple(triple, densities=True)
    theirs, base = released.params, codec.params.vq_base
    grows = base.shortcut == "linear" and theirs.vq_base.shortcut == "none"
    base = replace(base, least_side=theirs.vq_base.least_side, shortcut="none" if grows else base.shortcut)
    asked = narrowed(replace(codec.params, diffusion=theirs.diffusion, vq_base=base), theirs)
    both = codec.texture is not None and released.texture is not None
    asked = asked if both else replace(asked, texture=theirs.texture)
    rules = {name: rule for name, rule in theirs.rules.items() if asked.rules.get(name, rule) != rule}
    asked = asked.with_rules(rules)
    require_same(asked, theirs, f"{folder}: of other networks")
    states = states_of(released)
    left = codec.texture is None and states.pop("texture", None)
    told = [f"{', '.join(states)} from {folder}"]
    told += [
        f"{folder} codes with {name} {rule}, here it is {codec.params.rules[name]}" for name, rule in rules.items()
    ]
    if left:
        told.append(f"{folder} adds texture, which is left out here")
    elif codec.texture is not None and not both:
        states["texture"] = codec.texture.state_dict()
        told.append(f"{folder} adds no texture")
    if grows:
        zeros = {f"shortcut.{key}": torch.zeros_like(v) for key, v in codec.vq_base.shortcut.state_dict().items()}
        states["vq_base"] |= zeros
        told.append(f"{folder} has no linear shortcut of the VQ base: it starts at zero")
    wider = codec.params.autoencoder.embed_dim, theirs.autoencoder.embed_dim
    if len(set(wider)) == 2 or codec.residual and codec.residual.params.channels != theirs.residual.channels:
        states = widened(states, theirs, codec)
        told.append(
            f"{folder} has {wider[1]} latent channels for {wider[0]}: it codes as before with the new ones at zero"
        )
    anew = codec.residual and "residual" in states and not parted(states["residual"])[1]
    if anew:
        states["residual"] |= parted(codec.residual.state_dict())[1]
        told.append(f"{folder} has no densities of the residual: they are fitted anew")
    _fill(codec, states, triple.files)
    if anew:
        with torch.no_grad():
            rate_model = codec.residual.rate_model
            rate_model.bottleneck.quantiles += (codec.residual.median - rate_model.median).view(-1, 1, 1)
    return told


def load_release(folder: str | Path, device: str | torch.device = "cpu", decoder: str = "full") -> Codec:
    """The codec of a release folder; `coding.api.load_codec` puts it behind functions for any program.

    Args:
        decoder: `full`, D, or `light`, the light decoder in its place.
    Raises:
        CheckpointError: no release there, a damaged one, or one without the decoder.
    """
    triple = Triple.in_folder(folder)
    codec = load_triple(triple, device=device)
    if decoder == "light":
        load_light(triple.light, codec, triple.light.with_name(ABOUT))
    return codec


def releases() -> dict[str, Path]:
    """Folders of the releases that ship, by the fingerprint (hexadecimal) that each states in its release.json."""
    paths = sorted(RELEASES.glob(f"*/{ABOUT}"))
    return {json.loads(path.read_text())["fingerprint"]: path.parent for path in paths}


def release_named(fingerprint: bytes) -> str | None:
    """Name of the shipped release of a fingerprint, or None."""
    folder = releases().get(fingerprint.hex())
    return folder and folder.name


def release_of(fingerprint: bytes) -> Path:
    """Folder of the release that a file needs.

    Raises:
        CheckpointError: no release of that fingerprint ships.
    """
    known = releases()
    if fingerprint.hex() not in known:
        names = ", ".join(f"{folder.name} ({key})" for key, folder in known.items()) or "none"
        raise CheckpointError(
            f"the file needs the weights {fingerprint.hex()}, and no release here has them ({names}); "
            "name the release that wrote it with --weights, or its files with --ckpt, --vqckpt and --GT_vqckpt"
        )
    return known[fingerprint.hex()]
