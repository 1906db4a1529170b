"""The projected discriminator: its augmentation by hand, what learns of it, and what a resumed run draws."""

import pytest
import torch

from tests.stages import new_stage
from training.adversary import Adversary
from training.projected import ProjectedDiscriminator, augmented


class Given:
    """Stands for a generator whose uniform numbers are known."""

    def __init__(self, monkeypatch, *values: float):
        drawn = torch.tensor(values).view(7, 1, 1, 1, 1)
        monkeypatch.setattr(torch, "rand", lambda *shape, generator: drawn.expand(shape))


NOTHING = dict(brightness=0.5, saturation=0.5, contrast=0.5, down=0.5, right=0.5, top=0.0, left=0.0)


@pytest.fixture
def picture():
    return torch.rand(1, 3, 16, 32, generator=torch.Generator().manual_seed(0)) - 0.5


def drawn(monkeypatch, picture, **values: float) -> torch.Tensor:
    Given(monkeypatch, *(NOTHING | values).values())
    return augmented(picture, None)


def test_colour(monkeypatch, picture):
    """In the quarter that no square erases: x + 0.5; x away from its grey by 1.5; x away from its mean by 0.75."""
    kept = (slice(None), slice(None), slice(8, 16), slice(16, 32))
    same = drawn(monkeypatch, picture)
    torch.testing.assert_close(same[kept], picture[kept])
    torch.testing.assert_close(drawn(monkeypatch, picture, brightness=0.75)[kept], picture[kept] + 0.5)
    grey = picture.mean(1, keepdim=True)
    wanted = (grey + 1.5 * (picture - grey))[kept]
    torch.testing.assert_close(drawn(monkeypatch, picture, saturation=0.75)[kept], wanted)
    wanted = (0.75 * picture + 0.25 * picture.mean())[kept]
    torch.testing.assert_close(drawn(monkeypatch, picture, contrast=0.25)[kept], wanted)


def test_translation_and_the_erased_square(monkeypatch, picture):
    """By 1/8 of 16 rows up and 1/16 of 32 columns to the left; a square of 8 x 16 around (12, 16) is grey."""
    moved = drawn(monkeypatch, picture, down=1.0, right=0.75, top=0.75, left=0.5)
    wanted = torch.zeros_like(picture)
    wanted[:, :, :14, :30] = picture[:, :, 2:, 2:]
    wanted[:, :, 8:16, 8:24] = 0
    torch.testing.assert_close(moved, wanted)


def test_every_resolution_sees_the_coarser_ones(shown):
    """Features of 1/32 alone: f_1 to f_3 are nothing but what comes up from below."""
    network = ProjectedDiscriminator()
    for conv in network.channels[:3]:
        conv.weight.zero_()
    finest, *_, coarsest = network.mixed(shown)
    assert finest.shape[2:] == (16, 16) and coarsest.shape[2:] == (2, 2)
    up = coarsest
    for side, conv in zip((4, 8, 16), reversed(network.resolutions[:3]), strict=True):
        up = conv(torch.nn.functional.interpolate(up, size=(side, side), mode="bilinear"))
    torch.testing.assert_close(finest, up)
    assert finest.abs().max() > 0


@pytest.fixture
def shown():
    coarse = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")


def test_only_the_heads_learn_and_gradients_reach_the_picture(shown):
    network, shown = ProjectedDiscriminator(), shown.requires_grad_()
    logits = network(shown)
    assert logits.shape == (2, 4)  # one for every resolution at 64 pixels
    logits.sum().backward()
    assert shown.grad.abs().sum() > 0
    moved = {name.partition(".")[0] for name, p in network.named_parameters() if p.grad is not None}
    assert moved == {"heads"}


def test_a_resumed_run_draws_what_it_would_have_drawn(shown):
    stage = new_stage("gt", "gt.adversary={kind: projected, weight: 0.5}", "gt.crop_size=64")
    adversary = Adversary(stage.params, stage.last_layer, stage.speed)
    adversary.judge(shown, -shown, [slice(0, 2)])
    other = Adversary(stage.params, stage.last_layer, stage.speed)
    other.load_state_dict(adversary.state_dict())
    ours, theirs = adversary.discriminator.eval(), other.discriminator.eval()
    with torch.no_grad():
        second = ours(shown)
        assert torch.equal(theirs(shown), second) and not torch.equal(ours(shown), second)
