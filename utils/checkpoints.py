"""Checkpoints: read without executing anything, loaded strictly, written atomically, named by digests."""

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.errors import CheckpointError
from utils.files import atomic_path

DERIVED = ("attn_mask", "relative_position_index")  # buffers that the networks compute themselves
SHOWN = 4  # differing keys that an error names


def save(path: str | Path, content: dict) -> None:
    """torch.save to a temporary name, then rename."""
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def read(path: str | Path) -> dict:
    """A checkpoint's dictionary, on the CPU; code in it is refused, never run.

    Raises:
        CheckpointError: missing, not a checkpoint, or with anything but tensors and plain values in it.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, it holds more than tensors and plain values (code would run on loading), or is no checkpoint"
        ) from error
    except Exception as error:  # a damaged file makes the unpickler raise almost anything, at times without a message
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: not a readable checkpoint ({told})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a checkpoint holds a dictionary, this one a {type(content).__name__}")
    return content


def parameters_of(content: Mapping) -> tuple[dict[str, Tensor], list[str]]:
    """The parameters of a checkpoint, under published names, and the keys that were left out.

    A bare state dict and one under `state_dict` both do; a leading `module.` is dropped, as are derived buffers and
    the training loss (`loss.*`) of public VQGAN files.
    """
    state = content.get("state_dict", content)
    entries = state.items() if isinstance(state, Mapping) else ()
    state = {str(key).removeprefix("module."): value for key, value in entries if isinstance(value, Tensor)}
    dropped = [k for k in state if k.split(".")[-1] in DERIVED or k.startswith("loss.")]
    return {k: v for k, v in state.items() if k not in dropped}, dropped


def load_strictly(network: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load parameters that must fit exactly.

    Raises:
        CheckpointError: names the first missing, surplus and differently shaped keys.
    """
    own = network.state_dict()
    missing, surplus = [k for k in own if k not in state], [k for k in state if k not in own]
    shaped = [
        f"{k} {list(state[k].shape)} for {list(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    problems = [("missing", missing), ("surplus", surplus), ("other shape", shaped)]
    if any(keys for _, keys in problems):
        told = "; ".join(
            f"{what}: {', '.join(keys[:SHOWN])}" + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")
            for what, keys in problems
            if keys
        )
        raise CheckpointError(f"{path}: does not fit the configuration. {told}")
    network.load_state_dict(dict(state), strict=True)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values, in key order, as little-endian float32 or int64: the same on any device."""
    sha = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu()
        value = value.float() if value.is_floating_point() else value.long()
        sha.update(f"{key}{list(value.shape)}".encode())
        sha.update(value.contiguous().numpy().astype(value.numpy().dtype.newbyteorder("<")).tobytes())
    return sha.hexdigest()
