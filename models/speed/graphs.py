"""CUDA graphs of the networks that coding runs, and of its noise: hundreds of small programs started as one.

At latent resolution a network takes as long as its programs take to be started, one by one; as a graph, as long as they
compute. A graph is of one size of input. The first picture of a size runs as always, the second records, later ones
replay; a few sizes are kept, and large pictures, whose work hides the starting, have none.
"""

import sys
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from models.layers.kept import Kept, holding
from models.layers.sharing import is_sharing

SIZES = 4  # of inputs whose graphs are kept, each network's own
SEEN = 64  # sizes that are remembered as seen once
MOST = 1 << 22  # numbers of an input: a latent of 4 megapixels, a picture of 1.4
# (network of the codec, or the codec itself, its function). Each takes and gives tensors alone.
GRAPHED = (
    ("autoencoder", "encode"),
    ("vq_base", "encode"),
    ("vq_base", "reconstruct"),
    ("", "drawn"),
    ("", "grained"),
    ("unet", "forward"),
    ("residual.analysis", "forward"),
    ("residual.hyper_analysis", "forward"),
    ("residual.mean_network", "forward"),
    ("residual.synthesis", "forward"),
    ("autoencoder", "decode"),
    ("light", "forward"),
    ("texture", "forward"),
)

Replay = Callable[..., Tensor]


class Recorder:
    """Records functions on a CUDA device. Their graphs share one pool of memory: they replay one after the other.

    Attributes:
        failed: why there are no graphs any more; None while there are.
    """

    def __init__(self):
        self.failed: str | None = None
        self._pool: Any = None

    def fits(self, inputs: tuple[Tensor, ...]) -> bool:
        """Whether inputs are for a graph: on CUDA, in inference mode, and not inside another graph."""
        there = all(part.is_cuda and part.numel() <= MOST for part in inputs)
        return there and torch.is_inference_mode_enabled() and not torch.cuda.is_current_stream_capturing()

    def record(self, work: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Replay:
        """The graph of work at inputs of this size, as a function of others. Raises RuntimeError where it cannot be."""
        # Autocast would keep its copies of the weights outside the graph, and drop them behind its back.
        kind, dtype = "cuda", torch.get_autocast_dtype("cuda")
        autocast = torch.autocast(kind, dtype, torch.is_autocast_enabled(kind), cache_enabled=False)
        with torch.cuda.device(inputs[0].device), autocast:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            fixed = [part.clone() for part in inputs]
            aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                work(*fixed)  # libraries set themselves up for this stream
            here.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # What is kept between calls was made outside the graph's pool, and has to outlive it.
            with holding() as held, torch.cuda.graph(graph, pool=self._pool, stream=aside):
                result = work(*fixed)

        def replay(*inputs: Tensor) -> Tensor:
            for own, given in zip(fixed, inputs, strict=True):
                own.copy_(given)
            graph.replay()
            return result.clone()

        replay.held = held
        return replay


class Graphed:
    """A network's function of tensors, replayed where that can be; otherwise, and for gradients, the function itself.

    Args:
        work: tensors -> a tensor; the same programs for every input of one size. network: whose weights it reads.
    """

    def __init__(self, work: Callable[..., Tensor], network: nn.Module, recorder: Recorder):
        self.work, self.network, self.recorder = work, network, recorder
        self.seen, self.graphs = Kept(SEEN), Kept(SIZES)

    def __call__(self, *inputs: Tensor) -> Tensor:
        # In tiles a graph would keep what the first pass over one picture found.
        if self.recorder.failed or is_sharing() or not self.recorder.fits(inputs):
            return self.work(*inputs)
        key = self._key(inputs)
        if key not in self.graphs and key not in self.seen:
            self.seen.get(key, lambda: True)
            return self.work(*inputs)
        try:
            replay = self.graphs.get(key, lambda: self.recorder.record(self.work, inputs))
        except RuntimeError as error:  # memory among them
            self._fail(str(error).strip().splitlines()[0])
            return self.work(*inputs)
        return replay(*inputs)

    def _key(self, inputs: tuple[Tensor, ...]) -> tuple:
        """All that decides which programs run, and on which memory: networks move, and precision is a context."""
        weight = next(self.network.parameters())
        kind = inputs[0].device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        shapes = [(part.shape, part.stride(), part.dtype, part.device) for part in inputs]
        return weight.data_ptr(), autocast, torch.backends.cudnn.allow_tf32, *shapes

    def _fail(self, reason: str) -> None:
        self.recorder.failed = reason
        self.graphs.clear()
        print(f"graphs are left out, networks run as always: {reason}", file=sys.stderr)


def use_graphs(codec: nn.Module, recorder: Recorder | None = None) -> None:
    """Have the networks of a codec replay graphs, each of its own sizes; once more starts them anew."""
    recorder = recorder or Recorder()
    leave_graphs(codec)
    for owner, name in GRAPHED:
        if network := part_of(codec, owner):
            vars(network)[name] = Graphed(getattr(network, name), network, recorder)


def leave_graphs(codec: nn.Module) -> None:
    """Have the networks of a codec run as always."""
    for owner, name in GRAPHED:
        if (network := part_of(codec, owner)) and isinstance(vars(network).get(name), Graphed):
            del vars(network)[name]


def part_of(codec: nn.Module, path: str) -> Any:
    """The codec's part of a dotted path, the codec of an empty one; None where there is none."""
    return reduce(lambda owner, name: getattr(owner, name, None), filter(None, path.split(".")), codec)
