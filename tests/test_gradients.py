"""Which networks the gradient of each term reaches, derived from the equations, and which way it moves them."""

import pytest
import torch

from tests.stages import batch_of, new_stage
from training.adversary import Adversary

# Parameters by the names that codec.md gives the networks, longest prefix first.
NETWORKS = {
    "residual.rate_model.bottleneck.quantiles": "quantiles",
    "residual.rate_model": "density of z",
    "residual.analysis": "g_a",
    "residual.synthesis": "g_s",
    "residual.hyper_analysis": "h_a",
    "residual.scale_network": "h_s",
    "residual.mean_network": "m_s",
    "residual.log_gain": "gains",
    "autoencoder.encoder": "E",
    "autoencoder.quant_conv": "E",
    "autoencoder.decoder": "D",
    "autoencoder.post_quant_conv": "D",
    "vq_base.quantize": "code book",
    "vq_base.encoder": "VQ-E",
    "vq_base.quant_conv": "VQ-E",
    "vq_base.decoder": "VQ-D",
    "vq_base.post_quant_conv": "VQ-D",
    "unet.": "U",
    "discriminator.": "discriminator",
}
# X^ = D(U(y^ + noise, z_q)), y^ = y + g_s(s^ / gain, y). The rounding is s^ = round(s_g - mu) + mu, whose gradient by
# mu is -1 + 1 = 0: what only mu and sigma see (h_a, h_s, m_s) learns nothing from the picture. The gain is seen through
# the rounding's error, E and D are frozen.
OF_THE_PICTURE = {"VQ-E", "VQ-D", "U", "g_a", "g_s", "gains"}
TABLE = {
    ("gt", "distortion"): {"E", "D"},
    ("gt", "chroma"): {"E", "D"},
    ("gt", "lpips"): {"E", "D"},
    ("gt", "adversarial"): {"E", "D"},
    ("gt", "discriminator"): {"discriminator"},
    ("codec", "distortion"): OF_THE_PICTURE,
    ("codec", "chroma"): OF_THE_PICTURE,
    ("codec", "lpips"): OF_THE_PICTURE,
    ("codec", "latent"): OF_THE_PICTURE,  # |x - x^|^2, all but D of the way to the picture
    ("codec", "adversarial"): OF_THE_PICTURE,
    ("codec", "discriminator"): {"discriminator"},
    # |sg(z_q) - VQ-E(x)|^2; averages move the code book.
    ("codec", "commitment"): {"VQ-E"},
    # R of n_z = h_a(gain g_a(x - y, y)) and n, priced with mu and sigma; y = VQ-D(z_q), straight through to VQ-E.
    ("codec", "rate"): {"VQ-E", "VQ-D", "g_a", "gains", "h_a", "h_s", "m_s", "density of z"},
    ("codec", "auxiliary"): {"quantiles"},
}


class Everything(torch.nn.Module):
    """A stage with a discriminator, and the terms of a batch."""

    def __init__(self, name: str, *overrides: str, **draws: list):
        super().__init__()
        options = [f"{name}.adversary.weight=0.5", f"{name}.adversary.start=0", f"{name}.chroma_weight=1.0"]
        options += ["codec.latent_weight=1.0"] if name == "codec" else []
        terms = {"lpips": torch.nn.L1Loss()}
        stage = new_stage(name, *options, *overrides, residual=name == "codec", perceptual=terms)
        self.stage, self.draws = stage, draws
        self.adversary = Adversary(stage.params, stage.last_layer, stage.speed)
        self.codec, self.discriminator = stage.codec, self.adversary.discriminator

    def compute(self):
        batch = batch_of(self.stage, **self.draws)
        out = self.stage.forward(self.stage.network, batch)
        return out, batch, self.stage.losses(out, batch) | {"adversarial": self.adversary.generator_term(out.image)}

    def reached(self, term: str) -> set[str]:
        """Networks with a gradient other than 0; `part of` those where some parts have none."""
        self.zero_grad(set_to_none=True)
        out, batch, terms = self.compute()
        if term == "discriminator":
            self.adversary.judge(batch.image, out.image.detach(), [slice(0, 2)])
        else:
            terms[term].backward()
        parts: dict[str, bool] = {}
        for name, parameter in self.named_parameters():
            name = name.removeprefix("codec.")
            part = next(prefix for prefix in NETWORKS if name.startswith(prefix))
            moved = parameter.grad is not None and parameter.grad.abs().max() > 0
            parts[part] = bool(parts.get(part) or moved)
        whole: dict[str, list[bool]] = {}
        for part, moved in parts.items():
            whole.setdefault(NETWORKS[part], []).append(moved)
        return {name if all(moved) else f"part of {name}" for name, moved in whole.items() if any(moved)}


SENT = dict(level=[1.5, 2.5], t=[1, 1], decoder_input=[True, True], spread=[1.0, 1.5])


@pytest.fixture(scope="module")
def both():
    return {"gt": Everything("gt"), "codec": Everything("codec", **SENT)}


@pytest.mark.parametrize("stage, term", TABLE, ids=[" ".join(key) for key in TABLE])
def test_networks_that_a_term_reaches(both, stage, term):
    assert both[stage].reached(term) == TABLE[stage, term]


def test_a_decoder_that_goes_on_learning():
    """`train_decoder`: D learns from the picture as U does, and no other term reaches it; E stays."""
    everything = Everything("codec", "codec.train_decoder=0.1", **SENT)
    assert everything.stage.last_layer is everything.codec.autoencoder.decoder.last_layer
    assert set(everything.stage.trained) == {"vq_base", "unet", "residual", "autoencoder"}  # are averaged and saved
    for term in ("distortion", "lpips", "adversarial"):
        assert everything.reached(term) == OF_THE_PICTURE | {"D"}
    for term in ("rate", "commitment", "auxiliary"):
        assert everything.reached(term) == TABLE["codec", term]


def test_an_encoder_that_goes_on_learning():
    """`train_encoder`: E learns from the picture, the bits and the codes by what a file sends; D stays."""
    everything = Everything("codec", "codec.train_encoder=0.1", **SENT)
    assert set(everything.stage.trained) == {"vq_base", "unet", "residual", "autoencoder"}
    assert not any(p.requires_grad for part in everything.codec.autoencoder.decoding() for p in part.parameters())
    for term in ("distortion", "lpips", "rate", "commitment"):
        assert everything.reached(term) == TABLE["codec", term] | {"E"}
    for term in ("latent", "auxiliary"):  # the latent is the target there: it must not come nearer by itself
        assert everything.reached(term) - {"E"} == TABLE["codec", term]
    given, noisy_input = [], everything.codec.noisy_input
    everything.codec.noisy_input = lambda x, *rest: (given.append(x), noisy_input(x, *rest))[1]
    everything.compute()
    assert [x.requires_grad for x in given] == [False]  # x_t holds x, which no file sends


def test_level_0_teaches_the_base_alone():
    base = Everything("codec", **SENT | {"level": [0.0, 0.0]})
    assert base.reached("distortion") == {"VQ-E", "VQ-D", "U"} and base.reached("rate") == set()


def test_without_the_shift_the_picture_does_not_teach_the_base_decoder():
    """x_t = x + noise then holds nothing of y^; z_q still is the condition."""
    draws = SENT | {"decoder_input": [False, False]}
    assert Everything("codec", "codec.shift=false", **draws).reached("distortion") == {"VQ-E", "U"}
    assert Everything("codec", "codec.shift=true", **draws).reached("distortion") == OF_THE_PICTURE


@pytest.mark.parametrize("term", ["distortion", "rate", "commitment"])
def test_a_step_down_a_term_lowers_what_it_stands_for(term):
    """Squared error of the picture, bits, and distance of the latents to their codes, each measured in the results."""
    everything = Everything("codec", **SENT)

    def measured():
        out, batch, terms = everything.compute()
        if term == "distortion":
            return (out.image - batch.image).pow(2).mean(), terms
        return (out.residual_bpp.mean() if term == "rate" else (out.base.z - out.base.z_q).pow(2).mean()), terms

    before, terms = measured()
    (everything.stage.factors[term] * terms[term]).backward()
    parameters = [p for p in everything.codec.parameters() if p.grad is not None]
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    with torch.no_grad():
        for parameter in parameters:
            parameter -= 1e-3 * parameter.grad / norm
    assert measured()[0] < before
