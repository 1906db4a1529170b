"""Reading ../shared/parity: parameters, inputs and outputs of the reference networks."""

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity"

MAX, RMS = 2e-5, 3e-6  # float32 on a CPU, from the fixtures' README
PICTURE_MAX, PICTURE_RMS = 5e-5, 6e-6
EMA_RELATIVE = 2e-6


def fixture_file(name: str) -> Path:
    """The path of a fixture, or a skip that says why."""
    path = PARITY / name
    if not path.exists():
        pytest.skip(f"{name} is not there: parity fixtures are looked for in ../shared/parity beside the repository")
    return path


class Fixture:
    """One .safetensors file and the .json beside it."""

    def __init__(self, name: str):
        self.tensors = load_file(fixture_file(f"{name}.safetensors"))
        self.info = json.loads(fixture_file(f"{name}.json").read_text())

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """Parameters under `<prefix>weights/`, int8 entries multiplied by their scale."""
        found = {}
        for name, value in self.tensors.items():
            if name.startswith(f"{prefix}weights/"):
                key = name[len(f"{prefix}weights/") :]
                scale = self.tensors.get(f"{prefix}scale/{key}", torch.tensor(1.0))
                found[key] = value.float() * scale
        return found


def compare(name: str, ours: Tensor, reference: Tensor, limit: float = MAX, rms_limit: float = RMS) -> None:
    """Print how far off a tensor is, and fail beyond the limits."""
    assert ours.shape == reference.shape, f"{name}: {tuple(ours.shape)} against {tuple(reference.shape)}"
    difference = (ours.detach().double() - reference.double()).abs()
    largest, rms = difference.max().item(), difference.square().mean().sqrt().item()
    line = f"{name}: max {largest:.2e} (limit {limit:.0e}), rms {rms:.2e} (limit {rms_limit:.0e})"
    print(line)
    assert largest <= limit and rms <= rms_limit, line


def compare_picture(name: str, ours: Tensor, reference: Tensor) -> None:
    compare(name, ours, reference, PICTURE_MAX, PICTURE_RMS)


def splitmix_stream(name: str, count: int) -> np.ndarray:
    """u in [-1, 1) of `full_seeded`: a splitmix64 counter whose base is the CRC-32 of the name."""
    with np.errstate(over="ignore"):
        base = np.uint64(zlib.crc32(name.encode()) << 32)
        z = (base + np.arange(1, count + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(40)).astype(np.int64) - 2**23).astype(np.float64) / 2**23


def seeded_value(tag: str, key: str, shape: tuple[int, ...]) -> Tensor:
    """The parameter `key` of `full_seeded`, by the rules stated in its JSON."""
    if key == "quantize.embedding.weight":
        centre, amplitude = 0.0, 1.0
    elif key.endswith("relative_position_bias_table"):
        centre, amplitude = 0.0, 1.0
    elif len(shape) >= 2:
        centre, amplitude = 0.0, np.sqrt(3 / np.prod(shape[1:]))
    elif key.endswith(".bias"):
        centre, amplitude = 0.0, 0.2
    else:
        centre, amplitude = 1.0, 0.25
    u = splitmix_stream(f"{tag}/{key}", int(np.prod(shape)))
    return torch.from_numpy((centre + amplitude * u).astype(np.float32)).view(shape)


def seed_parameters(network: nn.Module, tag: str, left_out: list[str]) -> str:
    """Fill a full-width network by formula; returns the SHA-256 of the parameters in sorted key order."""
    state = network.state_dict()
    digest = hashlib.sha256()
    for key in sorted(state):
        if key not in left_out:
            state[key].copy_(seeded_value(tag, key, tuple(state[key].shape)))
            digest.update(state[key].numpy().tobytes())
    return digest.hexdigest()
