"""Scores of our own: by hand, and beside pyiqa's."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from skimage import data

from measuring import metrics
from measuring.pyiqa_metrics import score_with_pyiqa
from tests.commands import run
from utils.images import read_image

KODAK = Path(__file__).resolve().parents[2] / "shared" / "data" / "kodak"


def as_tensor(image: Image.Image | np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()


def distortions(picture: torch.Tensor) -> dict[str, torch.Tensor]:
    """From nearly equal to opposed, so that the cut of negative terms is met too."""
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    coded = io.BytesIO()
    image.save(coded, "JPEG", quality=1)
    noise = torch.randint(-40, 41, picture.shape, generator=torch.Generator().manual_seed(1))
    return {
        "jpeg": as_tensor(Image.open(coded)),
        "blur": as_tensor(image.filter(ImageFilter.GaussianBlur(6))),
        "noise": (picture + noise).clamp(0, 255).to(torch.uint8),
        "dark": picture // 3,
        "mirrored": picture.flip(2),
        "inverted": 255 - picture,
    }


ASTRONAUT = as_tensor(data.astronaut())[:, :200, 120:320]
CHELSEA = as_tensor(data.chelsea())[:, 50:211, 100:283]


@pytest.mark.parametrize("kodak", [False, True])
def test_ms_ssim_and_psnr_agree_with_pyiqa(kodak):
    originals = {"astronaut": ASTRONAUT, "chelsea": CHELSEA}
    if kodak:
        if not KODAK.is_dir():
            pytest.skip("the Kodak pictures are not beside the project")
        originals = {name: read_image(KODAK / f"{name}.png")[:, 60:240, 40:221] for name in ("kodim08", "kodim19")}
    pairs = {(name, kind): (a, b) for name, a in originals.items() for kind, b in distortions(a).items()}
    for key, theirs in zip(pairs, score_with_pyiqa(["ms_ssim", "psnr"], pairs.values()), strict=True):
        assert metrics.ms_ssim(*pairs[key]) == pytest.approx(theirs["ms_ssim"], abs=1e-5), key
        assert metrics.psnr(*pairs[key]) == pytest.approx(theirs["psnr"], abs=1e-3), key


def test_psnr_by_hand():
    black = torch.zeros(3, 16, 20, dtype=torch.uint8)
    one_channel = black.clone()
    one_channel[1] = 30
    assert metrics.psnr(black, one_channel) == pytest.approx(10 * math.log10(255**2 / (30**2 / 3)), abs=1e-9)
    assert metrics.psnr(black, black + 255) == pytest.approx(0)
    assert metrics.psnr(one_channel, one_channel) == math.inf


def test_ms_ssim_needs_five_scales():
    for height, width, expected in ((160, 200, None), (200, 160, None), (161, 161, pytest.approx(1, abs=1e-12))):
        assert metrics.ms_ssim(*(ASTRONAUT[:, :height, :width],) * 2) == expected


def test_colour_shift_has_the_sign_of_the_decoded_picture():
    original = torch.full((3, 16, 16), 100, dtype=torch.uint8)
    decoded = original.clone()
    decoded[0] = 103
    decoded[2, :8] = 90
    assert metrics.colour_shift(original, decoded) == pytest.approx((3, 0, -5))


@pytest.mark.parametrize("score", [metrics.psnr, metrics.ms_ssim, metrics.colour_shift])
def test_pairs_that_do_not_fit_are_refused(score):
    picture = torch.zeros(3, 200, 200, dtype=torch.uint8)
    with pytest.raises(ValueError, match="different size"):
        score(picture, picture[:, 1:])
    with pytest.raises(ValueError, match="expected a uint8 tensor"):
        score(picture, picture.float())


def test_simple_scores_import_no_metric_library():
    code = (
        "import sys, torch\n"
        "from measuring import charts, metrics, pyiqa_metrics\n"
        "a = torch.zeros(3, 161, 161, dtype=torch.uint8)\n"
        "metrics.psnr(a, a), metrics.ms_ssim(a, a), list(map(pyiqa_metrics.unavailable, pyiqa_metrics.METRICS))\n"
        "print([m for m in ('pyiqa', 'transformers', 'lpips', 'torchvision', 'matplotlib') if m in sys.modules])\n"
    )
    assert run("-c", code).stdout.strip() == "[]"
