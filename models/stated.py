"""Parameters of a codec as its files state them: read, compared with a configuration, counted by fingerprints."""

import json
from pathlib import Path
from typing import Any

from models.records import CodecParams
from utils.checkpoints import first_of
from utils.config import build, load_mapping, to_mapping
from utils.errors import CheckpointError

APART = ("rate", "light")  # blocks of CodecParams that say nothing of the networks whose digests count
ONLY_TRAINING = ("decay", "epsilon", "revive_below")  # parameters of networks that no fingerprint counts
# Parameters that came after the first release: they count where they are not at this.
LATER = {
    "patch": 1,
    "shortcut": "none",
    "least_side": 1,
    "masking": 0.0,
    "masking_floor": 1.0,
    "stretch": 0.0,
    "fade": 0.0,
}


def meaning(params: CodecParams) -> dict[str, Any]:
    """Parameters that affect decoding; the rate's rule counts as a tensor. Old fingerprints hold: see `LATER`."""
    kept, usual = {}, to_mapping(CodecParams())
    for name, value in to_mapping(params).items():
        if name in APART:
            continue
        if isinstance(value, dict):
            kept[name] = {k: v for k, v in value.items() if k not in ONLY_TRAINING and (k, v) not in LATER.items()}
        elif value != usual[name]:
            kept[name] = value
    return kept


def _flat(mapping: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys: {"a": {"b": 1}, "c": 2} -> {"a.b": 1, "c": 2}."""
    blocks = {key: value if isinstance(value, dict) else {"": value} for key, value in mapping.items()}
    return {f"{key}.{k}".rstrip("."): v for key, block in blocks.items() for k, v in block.items()}


def params_of(text: str | None, config: str | Path | None, path: Path) -> CodecParams:
    """The parameters of a VQ file, which `config` must agree with; those of `config` for foreign files.

    Args:
        text: what the file states, JSON; None for a foreign file. config: YAML whose `networks` give the sizes, or None.
    Raises:
        CheckpointError: damaged, or not those of `config`; neither is there. ConfigError: bad YAML.
    """
    stored = None if text is None else stored_params(text, path)
    if config is None:
        if stored is None:
            raise CheckpointError(
                f"{path}: does not say how large its networks are; name their configuration (--config), or make a release of "
                "the three files (python -m release.import_weights diffo)"
            )
        return stored
    params = build(CodecParams, load_mapping(config).get("networks", {}), f"{config}: networks")
    if stored is None:
        return params
    require_same(params, stored, f"{path}: does not fit the configuration {config}")
    return stored


def require_same(asked: CodecParams, stored: CodecParams, told: str) -> None:
    """Raise CheckpointError, which names the keys, where parameters differ in what affects decoding, the rate's rule apart."""
    ours, theirs = _flat(meaning(asked)), _flat(meaning(stored))
    differing = [
        f"{key} {ours.get(key)} for {theirs.get(key)}" for key in theirs | ours if ours.get(key) != theirs.get(key)
    ]
    if differing:
        raise CheckpointError(f"{told}: {first_of(differing)}")


def stored_params(text: str, path: str | Path) -> CodecParams:
    """The parameters that a checkpoint states as JSON. Raises CheckpointError, ConfigError."""
    try:
        return build(CodecParams, json.loads(text), str(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: what it says of its networks is damaged ({error})") from error
