"""A codec of tiny random networks, and what goes on in it while it decodes."""

import torch

from models.autoencoder import AutoencoderParams
from models.codec import Codec
from models.diffusion import DiffusionParams
from models.records import CodecParams
from models.unet import UNetParams
from models.vq_base import VQBaseParams
from tests.networks import off_zero
from utils.images import to_signed, to_uint8

D, K = 8, 64
PARAMS = CodecParams(
    autoencoder=AutoencoderParams(
        ch=8, ch_mult=(1, 1, 1, 1, 2), num_res_blocks=1, z_channels=8, embed_dim=D, n_embed=0, groups=4
    ),
    vq_base=VQBaseParams(
        ch=8, ch_mult=(2,), num_res_blocks=1, z_channels=8, embed_dim=4, in_channels=D, codebook_size=K, groups=4
    ),
    unet=UNetParams(
        latent_channels=D,
        condition_channels=4,
        condition_width=4,
        model_channels=16,
        channel_mult=(1, 1, 1, 1),
        num_res_blocks=1,
        swin_embed_dim=16,
        head_channels=8,
        mlp_ratio=1,
        groups=8,
    ),
    diffusion=DiffusionParams(steps=4),
)


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 8 + 2, width // 8 + 2, generator=random)
    return to_uint8(torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0] * 2 - 1)


def new_codec() -> Codec:
    """Random weights, no layer at zero, a code book in the middle of the latents."""
    torch.manual_seed(0)
    codec = Codec(PARAMS)
    off_zero(codec)
    with torch.no_grad():
        codec.autoencoder.quant_conv.weight.mul_(10)
        z = codec.vq_base(codec.to_latent(to_signed(picture(256, 256, seed=9))[None])).z
        codec.vq_base.quantize.revive(z.permute(0, 2, 3, 1).flatten(0, 2)[:K], everything=True)
    codec.fingerprint = b"\x01\x02\x03\x04"
    return codec.eval()


class Traced:
    """The denoiser's inputs while a file is decoded."""

    def __init__(self, codec, data, sampling=None):
        self.calls = []
        handle = codec.unet.register_forward_pre_hook(lambda _, args: self.calls.append([a.clone() for a in args]))
        try:
            self.decoded = codec.decode(data, *([sampling] if sampling else []))
        finally:
            handle.remove()

    @property
    def times(self):
        return [t.item() for _, t, _ in self.calls]


@torch.no_grad()
def y_of(codec, data):
    return codec.vq_base.reconstruct(codec.vq_base.rows(codec.read(data).k))
