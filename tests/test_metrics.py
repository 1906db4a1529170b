"""Scores without networks: by hand, and beside pyiqa's."""

import importlib
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from skimage import data

from measuring import metrics
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
    import pyiqa

    importlib.import_module("pyiqa.archs.ssim_arch")  # or it imports all its networks
    theirs = {name: pyiqa.create_metric(name, device="cpu") for name in ("ms_ssim", "psnr")}
    pairs = {(name, kind): (a, b) for name, a in originals.items() for kind, b in distortions(a).items()}
    for key, (original, decoded) in pairs.items():
        x, y = decoded[None].float() / 255, original[None].float() / 255
        assert metrics.ms_ssim(original, decoded) == pytest.approx(theirs["ms_ssim"](x, y).item(), abs=1e-5), key
        assert metrics.psnr(original, decoded) == pytest.approx(theirs["psnr"](x, y).item(), abs=1e-3), key


def test_psnr_by_hand():
    black = torch.zeros(3, 16, 20, dtype=torch.uint8)
    one_channel = black.clone()
    one_channel[1] = 30
    assert metrics.psnr(black, one_channel) == pytest.approx(10 * math.log10(255**2 / (30**2 / 3)), abs=1e-9)
    assert metrics.psnr(black, black + 255) == pytest.approx(0)
    assert metrics.psnr(one_channel, one_channel) == math.inf


def test_psnr_of_red_looks_at_red_alone():
    black = torch.zeros(3, 16, 20, dtype=torch.uint8)
    green, red = black.clone(), black.clone()
    green[1], red[0] = 30, 30
    assert metrics.psnr_red(black, green) == math.inf
    assert metrics.psnr_red(black, red) == pytest.approx(10 * math.log10(255**2 / 30**2), abs=1e-9)


def ms_ssim_of_channels(original: torch.Tensor, decoded: torch.Tensor) -> float:
    """MS-SSIM of R, G and B from its definition, in NumPy: the mean over a channel is cut at 0, then taken to its power."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window /= window.sum()

    def blurred(x):
        for axis in (0, 1):
            x = np.apply_along_axis(np.convolve, axis, x, window, "valid")
        return x

    whole = []
    for x, y in zip(original.double().numpy(), decoded.double().numpy(), strict=True):
        score = 1.0
        for scale, exponent in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
            mx, my = blurred(x), blurred(y)
            vx, vy, vxy = blurred(x * x) - mx**2, blurred(y * y) - my**2, blurred(x * y) - mx * my
            term = (2 * vxy + 7.65**2) / (vx + vy + 7.65**2)
            if scale == 4:
                term *= (2 * mx * my + 2.55**2) / (mx**2 + my**2 + 2.55**2)
            score *= max(term.mean(), 0) ** exponent
            x, y = (
                (p.reshape(p.shape[0] // 2, 2, p.shape[1] // 2, 2).mean((1, 3)) for p in (x, y))
                if scale < 4
                else (x, y)
            )
        whole.append(score)
    return float(np.mean(whole))


def test_ms_ssim_of_rgb_is_the_mean_over_channels():
    square = ASTRONAUT[:, :176, :176]
    for kind in ("jpeg", "noise"):
        decoded = distortions(square)[kind]
        expected = ms_ssim_of_channels(square, decoded)
        assert metrics.ms_ssim_rgb(square, decoded) == pytest.approx(expected, abs=1e-5), kind
        assert abs(metrics.ms_ssim(square, decoded) - expected) > 1e-3, kind


def test_ms_ssim_needs_five_scales():
    for height, width, expected in ((160, 200, None), (200, 160, None), (161, 161, pytest.approx(1, abs=1e-6))):
        assert metrics.ms_ssim(*(ASTRONAUT[:, :height, :width],) * 2) == expected


def test_colour_shift_has_the_sign_of_the_decoded_picture():
    original = torch.full((3, 16, 16), 100, dtype=torch.uint8)
    decoded = original.clone()
    decoded[0] = 103
    decoded[2, :8] = 90
    assert metrics.colour_shift(original, decoded) == pytest.approx((3, 0, -5))


@pytest.mark.parametrize("score", [metrics.psnr, metrics.psnr_red, metrics.ms_ssim_rgb, metrics.colour_shift])
def test_pairs_that_do_not_fit_are_refused(score):
    picture = torch.zeros(3, 200, 200, dtype=torch.uint8)
    with pytest.raises(ValueError, match="different size"):
        score(picture, picture[:, 1:])
    with pytest.raises(ValueError, match="expected a uint8 tensor"):
        score(picture, picture.float())


def test_simple_scores_import_no_metric_library():
    code = (
        "import sys, torch\n"
        "from measuring import charts, evaluator, patches\n"
        "a = torch.zeros(3, 161, 161, dtype=torch.uint8)\n"
        "list(map(patches.unavailable, patches.DISTANCES)), evaluator.Evaluator(evaluator.SCORES)\n"
        "evaluator.Evaluator(['psnr', 'psnr_red', 'ms_ssim'])(a, a)\n"
        "heavy = ('pyiqa', 'pycvvdp', 'transformers', 'lpips', 'torchmetrics', 'torchvision', 'matplotlib', 'scipy')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    assert run("-c", code).stdout.strip() == "[]"
