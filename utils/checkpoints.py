"""Checkpoints: read without executing anything, loaded strictly, written atomically, named by digests."""

import hashlib
import json
import pickle
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.errors import CheckpointError, out_of_memory
from utils.files import atomic_path

DERIVED = ("attn_mask", "relative_position_index")  # buffers that the networks compute themselves
SHOWN = 4  # differing keys that an error names


def save(path: str | Path, content: dict, deflated: bool = False) -> None:
    """torch.save to a temporary name, then rename; `deflated`: its records compressed. Raises DiffoError as `atomic_path`."""
    with atomic_path(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                torch.save(content, file)
        except RuntimeError as error:  # PyTorch's own complaint hides what the disk said
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        if deflated:
            _deflate(temporary)


def _deflate(path: Path) -> None:
    """Compress the records of a checkpoint, a ZIP archive, in place: networks in half precision lose a tenth.

    torch.load reads such archives as it does those that torch.save writes.
    """
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            archive.writestr(zipfile.ZipInfo(name), record, zipfile.ZIP_DEFLATED, 9)


class Placeholder:
    """Stands for an object that a checkpoint names and nobody needs: takes whatever is given to it, keeps nothing."""

    def __init__(self, *args, **kwargs): ...

    def __setstate__(self, state): ...


def read(path: str | Path, inert: Sequence[str] = ()) -> dict:
    """A checkpoint's dictionary, on the CPU; code in it is refused, never run.

    Args:
        inert: packages, or full names of classes and functions, that the file may name; each of them becomes a
            `Placeholder`. Nothing of them is imported or called.
    Raises:
        CheckpointError: missing, not a checkpoint, or with anything else than tensors and plain values in it.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        named = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the format before PyTorch 1.6, or a damaged file: loading will tell
        named = []
    known = [name for name in named if any(name == own or name.startswith(f"{own}.") for own in inert)]
    try:
        with torch.serialization.safe_globals([(Placeholder, name) for name in known]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = [name for name in named if name not in known]
        told = f" ({first_of(refused)})" if refused else ""
        raise CheckpointError(
            f"{path}: refused, it holds more than tensors and plain values{told}, so that code would run on loading, "
            "or is no checkpoint"
        ) from error
    except Exception as error:  # a damaged file makes the unpickler raise almost anything, at times without a message
        if out_of_memory(error):
            raise
        raise CheckpointError(f"{path}: not a checkpoint, cut short or damaged") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a checkpoint holds a dictionary, this one a {type(content).__name__}")
    return content


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not what it should be")
    return content


def first_of(names: Sequence[str]) -> str:
    """The first few of a list and how many more: "a, b, c, d and 2 more"."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


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


def told_by_group(dropped: Sequence[str]) -> list[str]:
    """Keys that `parameters_of` left out, counted by what they are: "loss.* (45 tensors)", "attn_mask (9 tensors)"."""
    groups = Counter("loss.*" if key.startswith("loss.") else key.split(".")[-1] for key in dropped)
    return [f"{group} ({count} tensor{'s' * (count > 1)})" for group, count in groups.items()]


def load_strictly(network: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load parameters that must fit exactly.

    Raises:
        CheckpointError: names the first missing, surplus and differently shaped keys.
    """
    own = network.state_dict()
    missing, surplus = [k for k in own if k not in state], [k for k in state if k not in own]
    both = [(k, list(state[k].shape), list(own[k].shape)) for k in own if k in state]
    shaped = [f"{k} {theirs} for {ours}" for k, theirs, ours in both if theirs != ours]
    problems = [("missing", missing), ("surplus", surplus), ("other shape", shaped)]
    if any(keys for _, keys in problems):
        told = "; ".join(f"{what}: {first_of(keys)}" for what, keys in problems if keys)
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
