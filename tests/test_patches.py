"""Distances between sets of patches: the patches, KID and FID by hand and beside other implementations."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage import data

from measuring import patches
from measuring.intervals import Interval
from measuring.patches import DISTANCES, PatchDistances, fid, kid
from tests.test_metrics import KODAK, as_tensor
from utils.errors import DiffoError
from utils.images import read_image


def one_each(*values: float) -> list[torch.Tensor]:
    """Features of pictures with one patch of one channel."""
    return [torch.tensor([[value]]) for value in values]


def normal(seed: int, pictures: int, channels: int, mean: float = 0.0, each: int = 1) -> list[torch.Tensor]:
    drawn = torch.randn(pictures, each, channels, generator=torch.Generator().manual_seed(seed))
    return list(drawn + mean)


def test_patches_are_two_grids_shifted_by_half():
    place = torch.arange(520 * 800).view(1, 520, 800).expand(3, -1, -1)  # a pixel's value tells where it is
    found = patches.patches(place)
    corners = [divmod(value, 800) for value in found[:, 0, 0, 0].tolist()]
    assert corners == [(y, x) for y in (0, 256) for x in (0, 256, 512)] + [(128, 128), (128, 384)]
    for patch, (y, x) in zip(found, corners, strict=True):
        assert torch.equal(patch, place[:, y : y + 256, x : x + 256])
    assert len(patches.patches(place[:, :255])) == 0 and len(patches.patches(place[:, :400])) == 3


def test_kodak_has_the_patches_that_the_convention_counts():
    if not KODAK.is_dir():
        pytest.skip("the Kodak pictures are not beside the project")
    assert len(patches.patches(read_image(KODAK / "kodim01.png"))) * 24 == 192


def test_kid_by_hand():
    """k(0, .) = 1 and k(1, 1) = 8, so a pair of pictures (x, y) adds 7 for two of (0, 1) and 0 with one of (1, 1).

    Of the 6 pairs among (0, 1), (1, 1), (0, 1), (1, 1) one adds 7. A half is one pair, and 1 in 6 of the halves is 7.
    """
    found = kid(one_each(0, 1, 0, 1), one_each(1, 1, 1, 1))
    assert found == Interval(pytest.approx(7 / 6), 0.0, 7.0)


def test_a_change_of_kid_is_of_the_same_halves():
    """By hand as above: from a set that is the originals themselves, and the other way about."""
    originals, ones = one_each(0, 1, 0, 1), one_each(1, 1, 1, 1)
    assert kid(originals, ones, originals) == kid(originals, ones)
    assert kid(originals, originals, ones) == Interval(pytest.approx(-7 / 6), -7.0, 0.0)
    x, y, other = normal(0, 40, 4), normal(1, 40, 4, mean=0.8), normal(2, 40, 4, mean=0.9)
    change, alone = kid(x, y, other), kid(x, y)
    assert change.mean == pytest.approx(alone.mean - kid(x, other).mean)
    assert kid(x, y, y) == Interval(0, 0, 0)


def test_kid_is_the_unbiased_statistic_of_torch_fidelity():
    from torch_fidelity.metric_kid import mmd2

    x, y = normal(0, 40, 5), normal(1, 40, 5, mean=0.4)
    a, b = (torch.cat(side).double().numpy() for side in (x, y))
    kernels = [(p @ q.T / 5 + 1) ** 3 for p, q in ((a, a), (a, b), (b, b))]
    assert kid(x, y).mean == pytest.approx(mmd2(*kernels, mmd_est="u-statistic"), rel=1e-9)


def test_kid_leaves_out_patches_of_one_picture():
    """Twelve patches in six pictures, against the sum over all pairs of patches that are not of one picture."""
    x, y = normal(0, 6, 3, each=2), normal(1, 6, 3, mean=0.3, each=2)
    a, b = torch.cat(x).double(), torch.cat(y).double()
    total = [
        sum(sign * (p[i] @ q[j] / 3 + 1) ** 3 for p, q, sign in ((a, a, 1), (b, b, 1), (a, b, -1), (b, a, -1)))
        for i in range(12)
        for j in range(12)
        if i // 2 != j // 2
    ]
    assert kid(x, y).mean == pytest.approx(torch.stack(total).mean().item(), rel=1e-9)


def test_kid_of_a_set_with_itself_is_zero_and_of_two_draws_about_it():
    x, y, other = normal(0, 60, 4), normal(1, 60, 4), normal(2, 60, 4, mean=1.0)
    same, alike, apart = kid(x, x), kid(x, y), kid(x, other)
    assert (same.mean, same.low, same.high) == pytest.approx((0, 0, 0), abs=1e-12)
    assert alike.low < 0 < alike.high < apart.low < apart.mean < apart.high


def test_the_interval_of_kid_is_as_wide_as_kid_varies():
    """Over fresh draws of the same two sources, KID stays within such an interval of its mean about 95 times in 100."""
    found = [kid(normal(2 * s, 40, 3), normal(2 * s + 1, 40, 3, mean=0.5)) for s in range(60)]
    truth = np.mean([interval.mean for interval in found])
    assert 51 <= sum(interval.low < truth < interval.high for interval in found) <= 59


def test_fid_by_hand():
    """Means 0 and 3, variances 2 and 8: 3^2 + 2 + 8 - 2 sqrt(2 x 8) = 11. It has no interval."""
    assert fid(one_each(-1, 1), one_each(1, 5)) == Interval(pytest.approx(11, abs=1e-4))


@pytest.fixture(scope="module")
def lite0():
    return PatchDistances(["kid-lite0", "fid-lite0"])


def test_features_are_those_of_a_network_that_knows_a_cat(lite0):
    from efficientnet_lite_pytorch import EfficientNet

    from utils import checkpoints

    cat = as_tensor(data.chelsea())
    (features,) = lite0.features(cat).values()
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(checkpoints.read(patches.LITE0.path))
    assert features.shape == (1, 1280)
    assert set(network._fc(features).topk(3).indices[0].tolist()) == {281, 282, 285}  # tabby, tiger and Egyptian cat
    both = torch.cat([cat, cat.flip(1)], 1)  # a second patch, upside down, is not normalised with the first
    torch.testing.assert_close(lite0.features(both)["lite0"][:1], features, rtol=1e-3, atol=1e-4)


def test_the_trunk_of_st_lpips_sees_blur_and_no_shift():
    """Its features are means of vectors of length 16, the root of 256."""
    by = PatchDistances(["kid-stlpips-alex"])
    chelsea = as_tensor(data.chelsea())
    picture, shifted = (part[:, :256, :256] for part in (chelsea, chelsea[:, 1:, 1:]))
    blurred = F.interpolate(F.avg_pool2d(picture[None].float(), 4), scale_factor=4, mode="bilinear")[0].to(torch.uint8)
    seen = [by.features(each)["stlpips-alex"] for each in (picture, shifted, blurred)]
    assert seen[0].shape == (1, 256) and 8 < seen[0].norm() < 16
    near, far = (torch.dist(seen[0], other).item() for other in seen[1:])
    assert 10 * near < far
    sides = [[{"stlpips-alex": each + i / 100} for i in range(4)] for each in seen]
    found, refused = by.between(sides[0], sides[2])
    assert not refused and found["kid-stlpips-alex"].mean > 0.01
    changes = by.changes(sides[0], sides[2], sides[1])
    assert changes["kid-stlpips-alex"] == kid(*([each["stlpips-alex"] for each in sides[i]] for i in (0, 2, 1)))


def test_few_patches_and_small_pictures_are_refused_by_name(lite0):
    features = [{"lite0": picture} for picture in normal(0, 5, 3, each=8)]
    found, refused = lite0.between(features, features)
    assert list(found) == ["kid-lite0"] and found["kid-lite0"].mean == pytest.approx(0, abs=1e-12)
    assert refused == {"fid-lite0": "fid-lite0: 40 patches, and it is biased for fewer than 5,000"}
    found, refused = lite0.between(features[:3], features[:3])
    assert not found and refused["kid-lite0"] == "kid-lite0: 3 pictures, and its interval needs 4"
    small = {"lite0": torch.zeros(0, 3)}
    found, refused = lite0.between([*features, small], [*features, small])
    assert not found and "1 of 6 pictures" in refused["kid-lite0"] and "1 of 6 pictures" in refused["fid-lite0"]


def test_fid_is_measured_from_5000_patches_on(lite0):
    features = [{"lite0": picture} for picture in normal(0, 50, 3, each=100)]
    shifted = [{"lite0": picture["lite0"] + 2} for picture in features]
    found, refused = lite0.between(features, shifted)
    assert found["fid-lite0"].mean == pytest.approx(3 * 2**2, abs=1e-3) and not refused


def test_inception_is_left_out_without_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    asked = PatchDistances(list(DISTANCES))
    name = "weights-inception-2015-12-05-6726825d.pth (looked in " + str(tmp_path / "checkpoints")
    assert list(asked.left_out) == ["kid", "fid"] and asked.names == list(DISTANCES)[2:]
    assert asked.left_out["fid"].startswith(f"fid lacks {name}") and not list(tmp_path.iterdir())
    with pytest.raises(DiffoError, match="unknown distance fid-swav; known are kid, fid, "):
        PatchDistances(["fid-swav"])


def test_inception_gives_2048_features_of_whole_pictures(tmp_path, monkeypatch):
    """With made-up weights, in the cache where its library looks."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    patches.INCEPTION.path.parent.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_: None)
        made_up = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(made_up.state_dict(), patches.INCEPTION.path)
    picture = as_tensor(data.chelsea())
    (features,) = PatchDistances(["kid", "fid"]).features(picture).values()
    assert features.shape == (1, 2048) and features.isfinite().all() and features.std() > 0
