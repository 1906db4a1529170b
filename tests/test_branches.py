"""`reproduce.py branches` of a release whose denoiser corrects."""

import torch

from experiments import branches
from models.released import load_release
from tests.small_codec import picture
from tests.small_releases import base_alone


def test_a_denoiser_that_corrects_is_taken_out(tmp_path):
    codec = load_release(base_alone(tmp_path / "correcting", "networks.prediction=correction"))
    torch.nn.init.constant_(codec.unet.last_layer, 0.1)
    alone, corrected = branches.variants_of("correcting", codec, 0)
    assert (alone.label, corrected.label) == ("y^ alone", "corrected by U")
    image = picture(80, 96)
    data = codec.compress(image)
    y = codec.vq_base.reconstruct(codec.vq_base.rows(codec.read(data).k))
    expected = codec.to_picture(y)[0]
    assert (alone.model.decompress(data).int() - expected.int()).abs().max() <= 1
    assert not torch.equal(corrected.model.decompress(data), alone.model.decompress(data))
    assert codec.unet.last_layer.any()  # the release itself keeps its denoiser
