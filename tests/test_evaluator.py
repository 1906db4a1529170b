"""The evaluator: each score's convention, by hand or by another implementation, and what is told where it cannot be."""

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from measuring import evaluator, scores, weights
from measuring.evaluator import Evaluator
from measuring.scores import SCORES, unavailable
from tests.test_metrics import ASTRONAUT, CHELSEA, distortions
from utils.errors import DiffoError
from utils.images import to_signed

WITHOUT_WEB = [name for name, score in SCORES.items() if not set(score.weights) & set(weights.FROM_THE_WEB)]
FROM_THE_WEB = [name for name in SCORES if name not in WITHOUT_WEB]
LUMA = ("ms_ssim", "nlpd", "gmsd", "vif")


@pytest.fixture(scope="module")
def offline():
    """All scores that need nothing from the web; loaded once."""
    return Evaluator(WITHOUT_WEB)


def test_scores_rise_or_fall_as_they_say_and_nothing_is_printed(offline, capfd):
    near, far, tiny = ASTRONAUT // 4 * 4, distortions(ASTRONAUT)["jpeg"], ASTRONAUT[:, :17, :32]
    better, worse, equal = offline(ASTRONAUT, near), offline(ASTRONAUT, far), offline(ASTRONAUT, ASTRONAUT)
    assert list(better) == offline.names == WITHOUT_WEB and not offline.left_out
    for name in WITHOUT_WEB:
        good, bad = (better, worse) if SCORES[name].lower_is_better else (worse, better)
        assert good[name] < bad[name], name
    best = {"psnr": math.inf, "psnr_red": math.inf, "cvvdp": 10}
    for name, value in equal.items():
        assert value == pytest.approx(0 if SCORES[name].lower_is_better else best.get(name, 1), abs=1e-5), name
    none = {name for name, value in offline(tiny, tiny).items() if value is None}
    assert none == {"ms_ssim", "ms_ssim_rgb", "vif", "stlpips-vgg", "stlpips-alex"}
    assert capfd.readouterr() == ("", "")


def test_luma_scores_are_blind_to_colour_and_the_others_are_not(offline):
    """A tint of -30, 18, -14 leaves luma as it is: 299 x 30 + 114 x 14 = 587 x 18."""
    grey = (CHELSEA.float().mean(0, keepdim=True) / 2 + 60).round().expand(3, -1, -1)
    tint = torch.tensor([-30.0, 18.0, -14.0]).view(3, 1, 1) * torch.ones(grey.shape[1:]).tril()
    original, tinted = grey.to(torch.uint8), (grey + tint).to(torch.uint8)
    same, seen = offline(original, original), offline(original, tinted)
    for name in WITHOUT_WEB:
        moved = math.inf if math.isinf(same[name]) else abs(seen[name] - same[name])
        assert (moved < 1e-5) if name in LUMA else (moved > 0.01), (name, moved)


def test_the_original_comes_first(offline):
    # VIF is not symmetric: a copy of lower contrast has lost information, one of higher contrast scores above 1.
    dark = ASTRONAUT // 3
    assert offline(ASTRONAUT, dark)["vif"] < 0.6 < 1.5 < offline(dark, ASTRONAUT)["vif"]


def test_gmsd_is_the_deviation_of_similar_gradients_of_luma_at_half_size(offline):
    """Against the definition in NumPy: means of 2x2 pixels, Prewitt gradients over 3 with zeros around, T = 170."""

    def gradients(picture):
        luma = np.tensordot((0.299, 0.587, 0.114), picture.double().numpy(), 1).round()
        half = np.pad(luma.reshape(luma.shape[0] // 2, 2, luma.shape[1] // 2, 2).mean((1, 3)), 1)
        rows = half[:-2] + half[1:-1] + half[2:]
        columns = half[:, :-2] + half[:, 1:-1] + half[:, 2:]
        return np.hypot(rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]) / 3

    decoded = distortions(ASTRONAUT)["noise"]
    a, b = gradients(ASTRONAUT), gradients(decoded)
    expected = np.std((2 * a * b + 170) / (a**2 + b**2 + 170), ddof=1)
    assert offline(ASTRONAUT, decoded)["gmsd"] == pytest.approx(expected, rel=1e-4)


def test_st_lpips_is_that_of_the_trunk_in_its_name(offline):
    """VGG against the network that training looks through, AlexNet against pyiqa's own way to load it."""
    import pyiqa

    from training.perceptual_networks import StLpips

    decoded = distortions(CHELSEA)["noise"]
    found = offline(CHELSEA, decoded)
    with torch.no_grad():
        vgg = StLpips()(to_signed(decoded)[None], to_signed(CHELSEA)[None]).item()
        path = str(weights.STLPIPS_ALEX.path)
        alex = pyiqa.create_metric("stlpips", pretrained_model_path=path, device="cpu").net
        alex = alex(decoded[None].float() / 255, CHELSEA[None].float() / 255).item()
    assert found["stlpips-vgg"] == pytest.approx(vgg, rel=1e-5) and found["stlpips-alex"] == pytest.approx(
        alex, rel=1e-6
    )
    assert abs(vgg - alex) > 0.01
    assert all(SCORES[name].heading.startswith("ST-LPIPS") for name in ("stlpips-vgg", "stlpips-alex"))


def test_colorvideovdp_looks_at_the_display_that_its_convention_names(offline):
    import pycvvdp

    eye = pycvvdp.vvdp_display_geometry((3840, 2160), distance_m=0.7472, diagonal_size_inches=30)
    lit = pycvvdp.vvdp_display_photo_eotf(Y_peak=200, contrast=1000, EOTF="sRGB", E_ambient=250)
    metric = pycvvdp.cvvdp(display_photometry=lit, display_geometry=eye, device=torch.device("cpu"), quiet=True)
    decoded = distortions(ASTRONAUT)["blur"]
    expected = metric.predict(decoded.permute(1, 2, 0).numpy(), ASTRONAUT.permute(1, 2, 0).numpy(), "HWC")[0].item()
    assert offline(ASTRONAUT, decoded)["cvvdp"] == pytest.approx(expected, abs=1e-3) and expected < 9
    width = 30 * 0.0254 * 16 / math.hypot(16, 9)  # metres
    assert eye.get_ppd() == pytest.approx(1 / math.degrees(2 * math.atan(width / 3840 / 2 / 0.7472)), rel=1e-3)


def test_smallest_sides_are_those_of_the_libraries():
    for name in ("vif", "gmsd", "stlpips-alex", "stlpips-vgg"):
        side, network = SCORES[name].min_side, evaluator.network_of(name, torch.device("cpu"))
        good, small = (ASTRONAUT[None, :, :n, :200].float() / 255 for n in (side, side - 1))
        assert math.isfinite(network(good, good).item())
        with pytest.raises(RuntimeError):
            network(small, small)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache folder of torch.hub, under which all caches lie."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def untrained(hub, monkeypatch):
    """Caches filled with the real LPIPS layers, which the package lpips carries, and with made-up other weights."""
    import torchvision
    from pyiqa.archs.musiq_arch import MUSIQ

    vgg = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    alexnet = torchvision.models.alexnet(weights=None).features
    monkeypatch.setattr(torchvision.models, "vgg16", lambda weights: SimpleNamespace(features=vgg))
    monkeypatch.setattr(torchvision.models, "alexnet", lambda weights: SimpleNamespace(features=alexnet))
    monkeypatch.setattr("pyiqa.utils.download_util.DEFAULT_CACHE_DIR", str(hub / "pyiqa"))
    for file in weights.FROM_THE_WEB:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        file.path.write_bytes(b"stands for the trunk")
    layers = Path(importlib.util.find_spec("lpips").origin).parent / "weights" / "v0.1"
    for net, file in (("vgg", weights.LPIPS_VGG), ("alex", weights.LPIPS_ALEX)):
        file.path.write_bytes((layers / f"{net}.pth").read_bytes())
    torch.save({name: torch.full((1, 1475, 1, 1), 0.1) for name in ("alpha", "beta")}, weights.DISTS.path)
    torch.save(MUSIQ(pretrained=False).state_dict(), weights.MUSIQ.path)


def test_learned_scores_run_on_cached_weights(untrained, capfd):
    learned = ["lpips-vgg", "lpips-alex", "dists", "musiq"]
    evaluate = Evaluator(learned)
    different, equal = evaluate(CHELSEA, 255 - CHELSEA), evaluate(CHELSEA, CHELSEA)
    for name in ("lpips-vgg", "lpips-alex", "dists"):
        assert different[name] > equal[name] + 1e-5 and equal[name] == pytest.approx(0, abs=1e-5), name
    crops = [CHELSEA[:, :side, :side] for side in (32, 31, 30, 16)]
    too_small = [[name for name, score in evaluate(crop, crop).items() if score is None] for crop in crops]
    assert too_small == [[], ["musiq"], ["lpips-alex", "musiq"], ["lpips-alex", "musiq"]]
    without = evaluate(255 - CHELSEA, CHELSEA)["musiq"]
    assert without == equal["musiq"] != different["musiq"]  # it sees the decoded picture alone
    assert capfd.readouterr() == ("", "")


def test_clip_iqa_runs_on_a_small_network_of_its_kind(untrained, monkeypatch, capfd):
    with evaluator._pkg_resources():
        from pyiqa.archs import clip_model, clipiqa_arch
    torch.manual_seed(0)
    small = clip_model.CLIP(32, 224, (1, 1, 1, 1), 8, None, 77, 49408, 16, 2, 1).eval()
    monkeypatch.setattr(clipiqa_arch, "load", lambda *_: small)
    evaluate = Evaluator(["clip-iqa"])
    (score,), (without,), (other,) = (
        evaluate(*pair).values() for pair in ((CHELSEA, CHELSEA), (255 - CHELSEA, CHELSEA), (CHELSEA, 255 - CHELSEA))
    )
    assert 0 < score < 1 and without == score != other
    crops = [CHELSEA[:, :side, :100] for side in (32, 31)]
    assert [evaluate(crop, crop)["clip-iqa"] is None for crop in crops] == [False, True]
    assert capfd.readouterr() == ("", "")


def test_computed_without_tf32_whatever_was_set(monkeypatch):
    seen = []

    def network(*pictures):
        settings = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision(), torch.is_grad_enabled()
        seen.append((len(pictures), pictures[0].max().item(), pictures[0].dtype, *settings))
        return torch.tensor(1.0)

    monkeypatch.setattr(evaluator, "network_of", lambda *_: network)
    monkeypatch.setattr(evaluator, "unavailable", lambda _: None)
    saved = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    decoded = torch.full((3, 32, 32), 51, dtype=torch.uint8)
    assert Evaluator(["fsim", "clip-iqa"])(decoded * 5, decoded) == {"fsim": 1.0, "clip-iqa": 1.0}
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision(saved)
    shared = (pytest.approx(0.2), torch.float32, False, "highest", False)
    assert seen == [(2, *shared), (1, *shared)]


def test_missing_weights_and_packages_and_unknown_names_are_told_at_once(hub, monkeypatch):
    assert not any(map(unavailable, WITHOUT_WEB))
    both = {
        "lpips-vgg": ("vgg16-397923af.pth", "LPIPS_v0.1_vgg-a78928a0.pth"),
        "lpips-alex": ("alexnet-owt-7be5be79.pth", "LPIPS_v0.1_alex-df73285e.pth"),
        "dists": ("vgg16-397923af.pth", "DISTS_weights-f5e65c96.pth"),
    }
    fetch = "; fetch with: python reproduce.py weights"
    expected = {
        name: f"{name} lacks {trunk} (looked in {hub / 'checkpoints'}) and {file} (looked in {hub / 'pyiqa'}){fetch}"
        for name, (trunk, file) in both.items()
    }
    expected["clip-iqa"] = f"clip-iqa lacks RN50.pt (looked in {hub / 'clip'}){fetch}"
    expected["musiq"] = f"musiq lacks musiq_koniq_ckpt-e95806b9.pth (looked in {hub / 'pyiqa'}){fetch}"
    asked = Evaluator(["psnr", *FROM_THE_WEB])
    assert asked.names == ["psnr"] and asked.left_out == expected
    assert asked(CHELSEA, CHELSEA) == {"psnr": math.inf}
    with pytest.raises(DiffoError, match="unknown metric lpips; known are psnr, psnr_red, "):
        Evaluator(["psnr", "lpips"])
    monkeypatch.setattr(scores.importlib.util, "find_spec", lambda _: None)
    assert "pip install pyiqa" in unavailable("fsim") and "pip install cvvdp" in unavailable("cvvdp")
    assert unavailable("psnr") is None and not hub.exists()


def test_weight_files_are_those_that_the_packages_load(hub):
    import torch_fidelity.feature_extractor_inceptionv3 as inception
    from pyiqa.archs import clip_model, dists_arch, lpips_arch, musiq_arch
    from pyiqa.default_model_configs import DEFAULT_CONFIGS
    from pyiqa.utils import download_util
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    vgg, alexnet = VGG16_Weights.IMAGENET1K_V1.url, AlexNet_Weights.IMAGENET1K_V1.url
    layers = lpips_arch.default_model_urls
    for name, urls in {
        "lpips-vgg": [vgg, layers["0.1_vgg"]],
        "lpips-alex": [alexnet, layers["0.1_alex"]],
        "dists": [vgg, dists_arch.default_model_urls["url"]],
        "clip-iqa": [clip_model._MODELS["RN50"]],
        "musiq": [musiq_arch.default_model_urls["koniq10k"]],
    }.items():
        assert [file.url for file in SCORES[name].weights] == urls
    assert weights.INCEPTION.url == inception.URL_INCEPTION_V3
    options = {name: DEFAULT_CONFIGS[SCORES[name].pyiqa]["metric_opts"] for name in SCORES if SCORES[name].pyiqa}
    nets = {"lpips-vgg": "vgg", "lpips-alex": "alex", "stlpips-vgg": "vgg", "stlpips-alex": "alex"}
    assert {name: options[name]["net"] for name in nets} == nets
    assert options["fsim"]["chromatic"] and options["musiq"]["pretrained"] == "koniq10k"
    assert weights.DISTS.path.parent.name == Path(download_util.DEFAULT_CACHE_DIR).name


def test_weights_are_fetched_once_into_their_folders(hub, monkeypatch, capsys):
    asked = []

    def fetch(url, path, sha256, timeout):
        asked.append((url, sha256, timeout))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"7 bytes")

    monkeypatch.setattr(weights, "fetch", fetch)
    weights.download_weights(timeout=3)
    assert len(asked) == 8 and ("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af", 3) in asked
    assert {path.name for path in hub.iterdir()} == {"checkpoints", "pyiqa", "clip"}
    assert not any(map(unavailable, SCORES))
    weights.download_weights()
    lines = capsys.readouterr().out.splitlines()
    assert len(asked) == 8 and len(lines) == 16
    assert "SHA-256 agrees" in lines[0] and all("already in" in line for line in lines[8:])
