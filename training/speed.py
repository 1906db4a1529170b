"""Precision and speed of training: what a configuration's block `speed` asks for, applied to networks and process.

Nothing here changes what is trained but for rounding. Entropy models, integer network, VQ distances, losses, code-book
averages and the averaged weights are float32 whatever the precision: autocast surrounds the networks alone, and every
network gives its result in the precision of its input. LPIPS' network stays outside too: it compares features that are
nearly alike, whose differences bfloat16 would round away.
"""

import ctypes
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.autoencoder import Autoencoder
from models.blocks import AttnBlock, ResnetBlock
from models.codec import Codec
from models.unet import Stage, UNet
from models.vq_base import VQBase
from utils.precision import without_autocast

Switch = Literal["auto", True, False]
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
_NEVER = 2**31 - 1
WIDE = 64  # channels from which bfloat16 wins on a CPU; below, its normalisations cost more than its convolutions save
# What others call of a network; each gives its result in the precision of its input.
_ENTRIES = {Autoencoder: ("encode", "decode"), VQBase: ("forward", "reconstruct"), UNet: ("forward",)}


@dataclass(frozen=True)
class SpeedParams:
    """How fast and in how much memory to train. What `auto` comes to, and what was measured: docs/speed.md.

    Attributes:
        precision: `bfloat16` computes convolutions and matrix products in it (autocast); `auto` does so where the
            hardware has it: CUDA from Ampere on, and CPUs with AVX-512-BF16 or AMX-BF16, there in networks of at least
            64 channels alone.
        tf32: CUDA: 10-bit mantissas inside float32 convolutions and matrix products, everywhere in the process, VQ
            distances and validation included.
        channels_last: layout NHWC of feature maps; `auto` on CUDA and on CPUs with AVX-512.
        compile: torch.compile of the large networks; the first steps take minutes.
        fused_adamw: one kernel for the update of the weights; `auto` on CUDA.
        checkpointing: activations of the blocks are computed again in the backward pass instead of kept.
        keep_memory: Linux: memory that was freed stays with the process instead of going back and being cleared again
            by the system; `auto` on the CPU.
    """

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    tf32: bool = False
    channels_last: Switch = "auto"
    compile: bool = False
    fused_adamw: Switch = "auto"
    checkpointing: bool = False
    keep_memory: Switch = "auto"


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself; elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def has_avx512(device: torch.device) -> bool:
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_f"))


def _decided(switch: Switch, auto: bool) -> bool:
    return auto if switch == "auto" else switch


class Speed:
    """A block `speed`, decided for a device.

    Attributes:
        bfloat16, compile, channels_last, fused_adamw, keep_memory: what is done.
        wide_alone: bfloat16 leaves out networks under WIDE channels.
    """

    def __init__(self, params: SpeedParams, device: torch.device):
        self.params, self.device = params, device
        cuda = device.type == "cuda"
        real = device.type != "meta"  # shapes alone are neither rounded nor compiled
        auto = params.precision == "auto"
        self.bfloat16 = real and (has_bfloat16(device) if auto else params.precision == "bfloat16")
        self.compile = real and params.compile
        self.wide_alone = self.bfloat16 and auto and not cuda
        self.channels_last = _decided(params.channels_last, cuda or has_avx512(device))
        self.fused_adamw = real and _decided(params.fused_adamw, cuda)
        self.keep_memory = _decided(params.keep_memory, not cuda) and platform.libc_ver()[0] == "glibc"

    def settle(self) -> None:
        """Set what belongs to the process: TF32, and glibc's allocator, whose large blocks are mapped and returned at
        every use: clearing their pages again costs as much as computing with them."""
        torch.set_float32_matmul_precision("high" if self.params.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = self.params.tf32
        if self.keep_memory:
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, _NEVER)

    def prepare(self, network: nn.Module) -> None:
        """Apply layout, checkpointing and compilation to a network, in place; once more changes nothing."""
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        if self.wide_alone:
            for module in network.modules():
                if isinstance(module, tuple(_ENTRIES)) and _width(module) < WIDE:
                    _keep_float32(module)
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
        on = [name for name in ("channels_last", "fused_adamw", "keep_memory", "compile") if getattr(self, name)]
        on += [name for name in ("tf32", "checkpointing") if getattr(self.params, name)]
        wide = f" from {WIDE} channels up" if self.wide_alone else ""
        return ", ".join([f"bfloat16{wide}" if self.bfloat16 else "float32", *on])


def _width(network: nn.Module) -> int:
    """Channels of the narrowest 3x3 convolution that keeps their number."""
    kernels = (m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))
    return min(m.out_channels for m in kernels if m.in_channels == m.out_channels)


def _keep_float32(network: nn.Module) -> None:
    """No autocast inside. Its class's own methods are wrapped, so that none is wrapped twice."""
    for kind, names in _ENTRIES.items():
        for name in names if isinstance(network, kind) else ():
            setattr(network, name, partial(_without_autocast, partial(getattr(kind, name), network)))


def _without_autocast(compute: Callable, x: Tensor, *others: Tensor):
    with without_autocast(x.device):
        return compute(x, *others)


def _checkpoint(module: nn.Module) -> None:
    """Keep a block's input alone. Its class's own forward is wrapped, so that a block is never wrapped twice."""
    plain = partial(type(module).forward, module)
    module.forward = partial(checkpoint, plain, use_reentrant=False, preserve_rng_state=False)


def _large_networks(network: nn.Module) -> list[nn.Module]:
    if isinstance(network, Autoencoder):
        return [network.encoder, network.decoder]
    if isinstance(network, Codec):
        return [*_large_networks(network.autoencoder), network.vq_base.encoder, network.vq_base.decoder, network.unet]
    return []
