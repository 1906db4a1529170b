"""What a part of coding takes, in seconds or in floating-point operations: calls inside a part count for their own."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from models import codec as rooms
from models import entropy_coding
from models.codec import Codec
from models.speed.graphs import part_of

CHOICE = "indices k of z: the nearest codes, or chosen by distance and bits, and coded"
# (owner in the codec, its attribute, the part, symbols spelled out)
NETWORKS = (
    ("", "encoded", "E: image encoder, picture to latent x"),
    ("vq_base", "encode", "VQ-E: base encoder, latent x to vectors z"),
    ("vq_base", "indices", CHOICE),
    ("vq_base", "reconstruct", "VQ-D: base decoder, codes to structural base y"),
    ("residual", "analysis", "residual codec, g_a: x - y to signal s"),
    ("residual", "symbols", "residual codec, h_a: s to hyper symbols, and rounding"),
    ("residual", "table_index", "residual codec, h_s: table of every symbol, in exact integers"),
    ("residual", "_mean", "residual codec, m_s: mean of every symbol"),
    ("residual", "restore", "residual codec, g_s: symbols to residual r^"),
    ("", "denoise", "U: denoiser, one step"),
    ("", "picture", "D: image decoder, latent x^ to picture"),
)
PASSES = [
    (model, name, part)
    for model, part in (
        ("index_model", "index model: indices in passes, in exact integers"),
        ("residual.context_model", "context model: symbols of the residual in passes, in exact integers"),
    )
    for name in ("encode", "decode")
]
PASSES += [("index_model", "choose", CHOICE), ("texture", "forward", "texture: detail and grain of the picture")]
CODER = ("encode_indices", "encode_symbols", "decode_indices", "decode_symbols")
ENTROPY, NOISE = "entropy coding of indices and symbols", "noise: standard normal, from the file's seed"
READ, WRITE = "file I/O: reading the input", "file I/O: writing the output"
REST = "the rest"


class Stopwatch:
    """Adds up what calls take, by part, as `clock` counts."""

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.spent: dict[str, float] = defaultdict(float)
        self.inside = [0.0]  # of the calls that are under way: what the parts within took

    def count(self, part: str, work: Callable, *args, **kwargs):
        """The result of work(*args, **kwargs), counted for a part."""
        self.inside.append(0.0)
        began = self.clock()
        result = work(*args, **kwargs)
        spent = self.clock() - began
        self.spent[part] += spent - self.inside.pop()
        self.inside[-1] += spent
        return result

    @contextmanager
    def watching(self, codec: Codec) -> Iterator[None]:
        """Inside it, every call of the codec's parts is counted."""
        watched = [(part_of(codec, owner), name, part) for owner, name, part in (*NETWORKS, *PASSES)]
        watched += [(entropy_coding, name, ENTROPY) for name in CODER]
        saved = []
        try:
            for owner, name, part in watched:
                if owner is None:  # these weights have no such part
                    continue
                if isinstance(getattr(owner, name), nn.Module):
                    owner, name = getattr(owner, name), "forward"
                saved.append((owner, name, vars(owner).get(name)))
                vars(owner)[name] = self._counted(part, getattr(owner, name))
            saved.append((rooms, "portable_noise", rooms.portable_noise))
            rooms.portable_noise = self._draws(rooms.portable_noise)
            yield
        finally:
            for owner, name, before in reversed(saved):
                if before is None:
                    del vars(owner)[name]
                else:
                    vars(owner)[name] = before

    def _counted(self, part: str, work: Callable) -> Callable:
        return lambda *args, **kwargs: self.count(part, work, *args, **kwargs)

    def _draws(self, noise: Callable) -> Callable:
        def draws(*args) -> Iterator[torch.Tensor]:
            source = noise(*args)
            while True:
                yield self.count(NOISE, next, source)

        return draws


def seconds(device: torch.device) -> float:
    """The time, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
