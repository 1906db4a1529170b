"""A loaded codec made ready to code: which of its networks compute in bfloat16, and how their feature maps lie.

Entropy models, integer networks, the residual codec, VQ distances, the linear maps of the image autoencoder and of the light
decoder and the steps of the diffusion stay in float32: what a file holds decodes to the same integers in every precision.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.codec import Codec
from models.layers import fused_norm, norms
from models.light import LightDecoder
from models.speed.choices import Precision
from models.speed.graphs import leave_graphs, use_graphs

AMPERE = 8, 0  # compute capability of the first with bfloat16
WIDE = 64  # channels of a network from which bfloat16 pays


def computes_bfloat16(device: torch.device) -> bool:
    """Whether `auto` takes bfloat16: on CUDA from Ampere on, on CPUs that multiply in it (AVX-512-BF16, AMX-BF16)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= AMPERE
    has = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def prepare(codec: Codec, precision: Precision = "auto", without: Sequence[str] = ()) -> Codec:
    """Set how E, D or the light decoder, VQ-E, VQ-D, U and the texture network compute, in place, once; float32 leaves all as it was loaded.

    Args:
        precision: `bfloat16` casts the weights of all of them, and their feature maps lie NHWC; `auto` casts those of
            WIDE channels and more, and the texture network's, where the hardware computes in it, and none elsewhere.
        without: of CUDA_PATHS, those to leave out. `fused_norm` is a switch of the process.
    Returns:
        the codec.
    """
    if codec.device.type == "cuda":
        fused_norm.enabled = "fused_norm" not in without
        (leave_graphs if "graphs" in without else use_graphs)(codec)
    automatic = precision == "auto"
    if precision == "float32" or (automatic and not computes_bfloat16(codec.device)):
        return codec
    p = codec.params
    widths = {codec.autoencoder: p.autoencoder.ch, codec.vq_base: p.vq_base.ch}
    parts = [(part, width) for owner, width in widths.items() for part in (owner.encoder, owner.decoder)]
    for network, width in parts:
        if network and (not automatic or width >= WIDE):
            _cast(network)
    if codec.light and (not automatic or codec.light.params.ch[-1] >= WIDE):
        _cast_blocks(codec.light)
    if not automatic or p.unet.model_channels >= WIDE:
        _cast_layers(codec.unet)
        _between(codec.unet, torch.float32, torch.channels_last, torch.contiguous_format)
    if codec.texture:  # narrower, and a fifth faster all the same: its maps are large
        _cast_layers(codec.texture, torch.channels_last)
    return codec


def precision_of(codec: Codec) -> str:
    """What `prepare` came to: bfloat16 if any network computes in it."""
    return "bfloat16" if any(p.dtype == torch.bfloat16 for p in codec.parameters()) else "float32"


@contextmanager
def without_fast_paths() -> Iterator[None]:
    """Inside it, networks in float32 compute as PyTorch has their layers, one after the other: to compare with."""
    before, norms.in_place = norms.in_place, False
    try:
        yield
    finally:
        norms.in_place = before


def _cast(network: nn.Module) -> None:
    """Weights in bfloat16, NHWC; maps are cast where they enter, and come out as float32, NCHW, as its neighbours are."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Sequential) and hasattr(child, "nearest"):
                setattr(parent, name, DoublingConv(child.conv))
    network.to(torch.bfloat16).to(memory_format=torch.channels_last)
    _between(network, torch.bfloat16, torch.channels_last, torch.contiguous_format)


def _cast_blocks(light: LightDecoder) -> None:
    """Weights in bfloat16, NHWC, but for the linear map's; the decoder casts what enters and leaves its blocks itself."""
    for name, part in light.named_children():
        if name != "linear":
            part.to(torch.bfloat16).to(memory_format=torch.channels_last)


def _cast_layers(network: nn.Module, inside: torch.memory_format = torch.preserve_format) -> None:
    """Convolutions and matrix products in bfloat16, NHWC, what lies between them in float32.

    For the denoiser, in whose many small blocks this costs no time, and adds the fewer roundings: 2 dB; and for the
    texture network, whose filters and sums stay exact.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.to(torch.bfloat16).to(memory_format=torch.channels_last)
            _between(layer, torch.bfloat16, inside, torch.preserve_format)


def _between(network: nn.Module, dtype: torch.dtype, inside: torch.memory_format, outside: torch.memory_format) -> None:
    """Cast what enters a network to a precision and layout, and what leaves it to float32."""

    def enter(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(
            x if x.dim() == 1 else x.to(dtype, memory_format=inside) for x in inputs
        )  # the denoiser's times stay

    def leave(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.to(torch.float32, memory_format=outside)

    network.register_forward_pre_hook(enter)
    network.register_forward_hook(leave)


# Rows of a doubled map that a 3-tap kernel sees, as taps on rows of the map itself: for even rows the one before and its
# own, for odd ones its own and the one after.
_TAPS = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])


class DoublingConv(nn.Module):
    """`blocks.doubling` with 4/9 of its operations: what nearest neighbours repeat is summed in the weights.

    Args:
        conv: the 3x3 convolution of the doubled map. Even and odd rows and columns are four 2x2 convolutions.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.bias = conv.bias
        taps = _TAPS.to(conv.weight)
        summed = torch.einsum("pik,ockl,qjl->pqocij", taps, conv.weight, taps).flatten(0, 1)
        self.weights = nn.ParameterList(nn.Parameter(weight, requires_grad=False) for weight in summed)

    def forward(self, x: Tensor) -> Tensor:  # N C h w -> N C 2h 2w, NHWC
        n, _, h, w = x.shape
        doubled = x.new_empty(n, 2 * h, 2 * w, len(self.bias)).permute(0, 3, 1, 2)
        for i, weight in enumerate(self.weights):
            row, column = divmod(i, 2)
            part = F.conv2d(x, weight, self.bias, padding=1)  # N C h+1 w+1
            doubled[:, :, row::2, column::2] = part[:, :, row : row + h, column : column + w]
        return doubled
