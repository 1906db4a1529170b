"""Precision and speed of training: what a configuration's block `speed` asks for, applied to networks and process.

Nothing here changes what is trained but for rounding. Entropy models, integer network, VQ distances, losses, code-book
averages and the averaged weights are float32 whatever the precision: autocast surrounds the networks alone, and every
network gives its result in the precision of its input. Networks of perceptual terms stay outside too: they compare features
that are nearly alike, whose differences bfloat16 would round away, and TF32 does not.
"""

import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.autoencoder import Autoencoder
from models.blocks import AttnBlock, ResnetBlock
from models.codec import Codec
from models.speed.choices import Precision
from models.speed.fast import computes_bfloat16
from models.unet import Stage
from utils.memory import keep_freed_memory

Switch = Literal["auto", True, False]


@dataclass(frozen=True)
class SpeedParams:
    """How fast and in how much memory to train. What `auto` comes to, and what was measured: docs/speed.md.

    Attributes:
        precision: `bfloat16` computes convolutions and matrix products in it (autocast); `auto` does so where the
            hardware has it: CUDA from Ampere on, and CPUs with AVX-512-BF16 or AMX-BF16.
        tf32: CUDA: 10-bit mantissas inside float32 convolutions and matrix products, everywhere in the process, VQ
            distances and validation included.
        perceptual_tf32: the same in the networks of perceptual terms alone, while training: it moves their values by less
            than 0.5 %; `auto` on CUDA.
        channels_last: layout NHWC of feature maps; `auto` on CUDA and on CPUs with AVX-512.
        compile: torch.compile of the large networks; the first steps take minutes.
        fused_adamw: one kernel for the update of the weights; `auto` on CUDA.
        graphs: CUDA: forward and backward passes are recorded, and started as one program (training/graphs.py);
            `auto` on CUDA, but where networks are compiled.
        checkpointing: activations of the blocks are computed again in the backward pass instead of kept.
        keep_memory: Linux: memory that was freed stays with the process instead of going back and being cleared again
            by the system; `auto` on the CPU.
    """

    precision: Precision = "auto"
    tf32: bool = False
    perceptual_tf32: Switch = "auto"
    channels_last: Switch = "auto"
    compile: bool = False
    fused_adamw: Switch = "auto"
    graphs: Switch = "auto"
    checkpointing: bool = False
    keep_memory: Switch = "auto"


def _decided(switch: Switch, auto: bool) -> bool:
    return auto if switch == "auto" else switch


class Speed:
    """A block `speed`, decided for a device.

    Attributes:
        bfloat16, compile, perceptual_tf32, channels_last, fused_adamw, graphs, keep_memory: what is done.
    """

    def __init__(self, params: SpeedParams, device: torch.device):
        self.params, self.device = params, device
        cuda = device.type == "cuda"
        real = device.type != "meta"  # shapes alone are neither rounded nor compiled
        automatic = params.precision == "auto"
        self.bfloat16 = real and (params.precision == "bfloat16" or (automatic and computes_bfloat16(device)))
        self.perceptual_tf32 = real and _decided(params.perceptual_tf32, cuda)
        self.compile = real and params.compile
        wide = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_f", False)
        self.channels_last = _decided(params.channels_last, cuda or wide)
        self.fused_adamw = real and _decided(params.fused_adamw, cuda)
        self.graphs = cuda and not self.compile and _decided(params.graphs, cuda)
        self.keep_memory = _decided(params.keep_memory, not cuda) and platform.libc_ver()[0] == "glibc"

    def settle(self) -> None:
        """Set what belongs to the process: TF32, and what becomes of freed memory."""
        torch.set_float32_matmul_precision("high" if self.params.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = self.params.tf32
        if self.keep_memory:
            keep_freed_memory()

    def prepare(self, network: nn.Module) -> None:
        """Apply layout, checkpointing and compilation to a network, in place; once more changes nothing."""
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        if self.params.checkpointing and self.device.type != "meta":
            for module in network.modules():
                if isinstance(module, (ResnetBlock, AttnBlock, Stage)):
                    _checkpoint(module)
        if self.compile:
            # The adaptive weight runs backward passes through a graph that it retains, which donated buffers forbid.
            torch._functorch.config.donated_buffer = False
            for module in _large_networks(network):
                module.compile(dynamic=False)  # two encoders of other sizes must not make one of any size

    def autocast(self) -> AbstractContextManager:
        """Surrounds the networks' forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bfloat16 else nullcontext()

    def eager(self) -> AbstractContextManager:
        """Around pictures of many sizes, for each of which a network would be compiled again."""
        return torch.compiler.set_stance("force_eager") if self.compile else nullcontext()

    def __str__(self) -> str:
        on = [
            name
            for name in ("perceptual_tf32", "channels_last", "fused_adamw", "graphs", "keep_memory", "compile")
            if getattr(self, name)
        ]
        on += [name for name in ("tf32", "checkpointing") if getattr(self.params, name)]
        return ", ".join(["bfloat16" if self.bfloat16 else "float32", *on])


def _checkpoint(module: nn.Module) -> None:
    """Keep a block's input alone. Its class's own forward is wrapped, so that a block is never wrapped twice."""
    plain = partial(type(module).forward, module)
    module.forward = partial(checkpoint, plain, use_reentrant=False, preserve_rng_state=False)


def _large_networks(network: nn.Module) -> list[nn.Module]:
    if isinstance(network, Autoencoder):
        return [network.encoder, network.decoder]
    if isinstance(network, Codec):
        own = [network.light] if network.light else []
        coded = [network.vq_base.encoder, network.vq_base.decoder, network.unet]
        return [*_large_networks(network.autoencoder), *coded, *own]
    return []
