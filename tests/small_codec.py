"""A codec of tiny random networks, and what goes on in it while it decodes."""

import torch

from models.codec import Codec
from tests.commands import NANO
from tests.networks import off_zero
from tests.residual import picture
from training.config import load_config
from utils.images import to_signed

K = 64
PARAMS = load_config(str(NANO), [f"networks.vq_base.codebook_size={K}", "networks.diffusion.steps=4"]).networks


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
