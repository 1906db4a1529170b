"""The three checkpoints that belong together <-> a codec.

Published names: `ema_model_<it>.pth` (UNet), `vq_model_<it>.pth.tar` (VQ base), `GT_vq_model_<it>.pth.tar` (image
autoencoder). Each holds exactly the published parameters under `state_dict`; all that is ours (networks' sizes,
integer tables, rate modulation, digests of the files that belong together) lies under the key `diffo` of the VQ file.
"""

import json
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.autoencoder import AutoencoderParams
from models.codec import Codec
from models.records import CodecParams
from models.residual_hyperprior import ResidualTables
from utils import checkpoints
from utils.config import build, load_mapping, to_mapping
from utils.errors import CheckpointError

OURS = "diffo"
NAMES = {"unet": "ema_model_{}.pth", "vq_base": "vq_model_{}.pth.tar", "autoencoder": "GT_vq_model_{}.pth.tar"}
NETWORKS = (*NAMES, "residual")
RATE_MODEL = "rate_model."  # densities of the residual codec: training's alone, tables take their place
RELEASES = Path(__file__).resolve().parents[1] / "weights"
SMALL = RELEASES / "tiny-2"
ABOUT = "release.json"

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

    def check(self) -> None:
        """Raise CheckpointError for the first file that is not there."""
        for path in (self.unet, self.vq_base, self.autoencoder):
            if not path.is_file():
                published = path.name in {n.format(60000) for n in NAMES.values()}
                raise CheckpointError(f"{path}: " + (NEVER_PUBLISHED if published else "no such checkpoint"))


def save_triple(
    triple: Triple,
    states: dict[str, dict[str, Tensor]],
    params: CodecParams,
    table: np.ndarray | None = None,
    residual_tables: ResidualTables | None = None,
    keep: Collection[Path] = (),
) -> None:
    """Write the three files.

    Args:
        states: state dicts under `unet`, `vq_base`, `autoencoder` and, where there is one, `residual`.
        params: sizes, schedule and rate modulation.
        table: integer frequencies of the base indices, int32 (K,), at release. residual_tables: those of the residual.
        keep: files that are there already with these very weights, and are not written again.
    """
    for network in ("autoencoder", "unet"):
        if (path := getattr(triple, network)) not in keep:
            checkpoints.save(path, {"state_dict": states[network]})
    ours = {
        "networks": json.dumps(to_mapping(params), sort_keys=True),
        "digests": {network: checkpoints.digest(states[network]) for network in ("autoencoder", "unet")},
        "base_table": None if table is None else torch.from_numpy(np.asarray(table, dtype=np.int32)),
    }
    if "residual" in states:
        state = {key: value for key, value in states["residual"].items() if not key.startswith(RATE_MODEL)}
        tables = vars(residual_tables) if residual_tables else {}
        ours["residual"] = {"state_dict": state, "tables": {key: torch.from_numpy(t) for key, t in tables.items()}}
    checkpoints.save(triple.vq_base, {"state_dict": states["vq_base"], OURS: ours})


def fingerprint(codec: Codec, digests: dict[str, str]) -> bytes:
    """4 bytes that name a triple: SHA-256 over the VQ release's tensors and the digests of the two others.

    What else changes a decoded picture (integer tables, schedule, rate modulation) counts as tensors of the VQ release.
    """
    tensors = dict(codec.vq_base.state_dict())
    if codec.base_table is not None:
        tensors[f"{OURS}.base_table"] = torch.from_numpy(codec.base_table)
    if codec.residual is not None:
        tensors |= {f"{OURS}.residual.{key}": value for key, value in codec.residual.state_dict().items()}
        tables = vars(codec.residual.tables) if codec.residual.tables else {}
        tensors |= {f"{OURS}.residual.tables.{key}": torch.from_numpy(table) for key, table in tables.items()}
    rate = codec.rate
    tensors[f"{OURS}.rate"] = torch.tensor([rate.c, rate.eta_min, rate.eta_max])
    # Shapes do not tell everything: into how many groups a normalisation divides its channels, the windows, the noise.
    tensors[f"{OURS}.networks"] = torch.tensor(list(json.dumps(meaning(codec.params), sort_keys=True).encode()))
    for network in ("autoencoder", "unet"):
        tensors[f"{OURS}.digests.{network}"] = torch.tensor(list(bytes.fromhex(digests[network])))
    return bytes.fromhex(checkpoints.digest(tensors))[:4]


def load_triple(triple: Triple, config: str | Path | None = None, device: str | torch.device = "cpu") -> Codec:
    """The codec of three checkpoints, in evaluation mode.

    Args:
        config: YAML whose `networks` give the sizes; None takes those stored in the VQ file.
    Raises:
        CheckpointError: a file is missing, does not fit, or belongs to another release. ConfigError: bad YAML.
    """
    triple.check()
    contents = {network: checkpoints.read(getattr(triple, network)) for network in NAMES}
    ours = contents["vq_base"].get(OURS)
    if ours is not None and not (isinstance(ours, dict) and {"networks", "digests", "base_table"} <= ours.keys()):
        raise CheckpointError(f"{triple.vq_base}: what it says of its networks ({OURS}) is not whole")
    params = _params(ours, config, triple.vq_base)
    codec = Codec(params)
    digests = {}
    for network, content in contents.items():
        state, dropped = checkpoints.parameters_of(content)
        if dropped:
            print(
                f"{getattr(triple, network)}: left out {', '.join(dropped[:4])}" + " ..." * (len(dropped) > 4),
                file=sys.stderr,
            )
        checkpoints.load_strictly(getattr(codec, network), state, getattr(triple, network))
        digests[network] = checkpoints.digest(state)
    for network, expected in (ours or {}).get("digests", {}).items():
        if digests[network] != expected:
            raise CheckpointError(
                f"{getattr(triple, network)}: does not belong to {triple.vq_base}, which was released with another "
                f"{network}; take the three files of one release"
            )
    if ours and ours["base_table"] is not None:
        codec.base_table = ours["base_table"].numpy()
    if codec.residual is not None:
        _load_residual(codec, ours, triple.vq_base)
    codec.fingerprint = fingerprint(codec, digests)
    return codec.eval().requires_grad_(False).to(device)


def _load_residual(codec: Codec, ours: dict | None, path: Path) -> None:
    if not ours or "residual" not in ours:
        raise CheckpointError(f"{path}: has no residual codec, which the configuration asks for (networks.residual)")
    stored = ours["residual"]
    checkpoints.load_strictly(codec.residual, stored["state_dict"], path)
    tables = {key: table.numpy() for key, table in stored["tables"].items()}
    codec.residual.freeze(ResidualTables(**tables) if tables else None)


def meaning(params: CodecParams) -> dict[str, Any]:
    """What of the parameters decides how the weights decode: all but what only training uses, and the rate's rule.

    What came later is there only where it is used, so that the fingerprints of older releases stay.
    """
    mapping = to_mapping(params)
    del mapping["rate"]
    later = CodecParams.__dataclass_fields__
    for key in ("residual", "adapter", "prediction", "detail_branch", "perceptual_branch"):
        if mapping[key] == later[key].default:
            del mapping[key]
    for key in ("patch", "shortcut"):
        if mapping["autoencoder"][key] == AutoencoderParams.__dataclass_fields__[key].default:
            del mapping["autoencoder"][key]
    for key in ("decay", "epsilon", "revive_below"):
        del mapping["vq_base"][key]
    return mapping


def flat(mapping: dict[str, Any]) -> dict[str, Any]:
    """One level of keys: {"a": {"b": 1}} -> {"a.b": 1}."""
    items = ((key, value if isinstance(value, dict) else None, value) for key, value in mapping.items())
    return {f"{key}.{k}" if inner else key: v for key, inner, value in items for k, v in (inner or {"": value}).items()}


def _params(ours: dict | None, config: str | Path | None, path: Path) -> CodecParams:
    """The parameters stored in the VQ file, which `config` must agree with; those of `config` for foreign files."""
    stored = build(CodecParams, json.loads(ours["networks"]), str(path)) if ours else None
    if config is None:
        if stored is None:
            raise CheckpointError(f"{path}: does not say how large its networks are; name their --config")
        return stored
    params = build(CodecParams, load_mapping(config).get("networks", {}), f"{config}: networks")
    if stored is None:
        return params
    theirs, own = flat(meaning(params)), flat(meaning(stored))
    differing = [
        f"{key} {theirs.get(key)} for {own.get(key)}"
        for key in dict.fromkeys([*own, *theirs])
        if theirs.get(key) != own.get(key)
    ]
    if differing:
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise CheckpointError(f"{path}: does not fit the configuration {config}: {'; '.join(differing[:4])}{more}")
    return stored


def load_codec(folder: str | Path, device: str | torch.device = "cpu") -> Codec:
    """The codec of a release folder, with `compress(image) -> bytes` and `decompress(bytes) -> image`.

    Raises:
        CheckpointError: no release there, or a damaged one.
    """
    return load_triple(Triple.in_folder(folder), device=device)


def releases() -> dict[str, Path]:
    """Folders of the releases that ship, by the fingerprint (hexadecimal) that each states in its release.json."""
    found = {}
    for path in sorted(RELEASES.glob(f"*/{ABOUT}")):
        found[json.loads(path.read_text())["fingerprint"]] = path.parent
    return found


def release_named(fingerprint: bytes) -> str | None:
    """Name of the shipped release of a fingerprint, or None."""
    folder = releases().get(fingerprint.hex())
    return folder and folder.name


def release_of(fingerprint: bytes | None) -> Path:
    """Folder of the release that a file needs; of the small one where no fingerprint is known.

    Raises:
        CheckpointError: no release of that fingerprint ships.
    """
    if fingerprint is None:
        return SMALL
    known = releases()
    if fingerprint.hex() not in known:
        names = ", ".join(f"{folder.name} ({key})" for key, folder in known.items()) or "none"
        raise CheckpointError(
            f"the file needs the weights {fingerprint.hex()}, and no release here has them ({names}); "
            "name the release that wrote it with --weights, or its files with --ckpt, --vqckpt and --GT_vqckpt"
        )
    return known[fingerprint.hex()]
