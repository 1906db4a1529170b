"""Scores by pyiqa, and the files of weights that they need."""

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from measuring import pyiqa_metrics as metrics
from tests.test_metrics import ASTRONAUT, CHELSEA, distortions
from utils.errors import DiffoError

WITHOUT_WEIGHTS = ["psnr", "ms_ssim", "fsim", "nlpd", "gmsd", "vsi", "vif"]


def test_scores_that_need_no_weights_are_ordered_finite_and_quiet(capfd):
    near, far, tiny = ASTRONAUT // 4 * 4, distortions(ASTRONAUT)["jpeg"], ASTRONAUT[:, :32, :32]
    scores = list(metrics.score_with_pyiqa(WITHOUT_WEIGHTS, [(ASTRONAUT, near), (ASTRONAUT, far), (tiny, tiny)]))
    assert [list(score) for score in scores] == [WITHOUT_WEIGHTS] * 3
    for name in WITHOUT_WEIGHTS:
        better, worse = scores[0][name], scores[1][name]
        assert (better < worse) if name in ("nlpd", "gmsd") else (better > worse), name
    assert {name for name, score in scores[2].items() if score is None} == {"ms_ssim", "vif"}
    assert scores[2]["fsim"] == pytest.approx(1, abs=1e-5) and scores[2]["gmsd"] == pytest.approx(0, abs=1e-5)
    assert capfd.readouterr() == ("", "")


def test_the_original_comes_first():
    # VIF is not symmetric: a copy of lower contrast has lost information, one of higher contrast scores above 1.
    dark = ASTRONAUT // 3
    lost, gained = metrics.score_with_pyiqa(["vif"], [(ASTRONAUT, dark), (dark, ASTRONAUT)])
    assert lost["vif"] < 0.6 < 1.5 < gained["vif"]


def test_smallest_sides_are_those_of_pyiqa():
    for name in ("vif", "ms_ssim"):
        side = metrics.METRICS[name].min_side
        network = metrics._load_quietly(name, torch.device("cpu"))
        good, small = (ASTRONAUT[None, :, :n, :200].float() / 255 for n in (side, side - 1))
        assert math.isfinite(network(good, good).item())
        with pytest.raises(RuntimeError):
            network(small, small)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache folder of torch.hub, under which both caches lie."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def untrained(hub, monkeypatch):
    """Caches filled with the real LPIPS layers, which the package lpips carries, and with made-up other weights."""
    import torchvision

    vgg = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    alexnet = torchvision.models.alexnet(weights=None).features
    monkeypatch.setattr(torchvision.models, "vgg16", lambda weights: SimpleNamespace(features=vgg))
    monkeypatch.setattr(torchvision.models, "alexnet", lambda weights: SimpleNamespace(features=alexnet))
    monkeypatch.setattr("pyiqa.utils.download_util.DEFAULT_CACHE_DIR", str(hub / "pyiqa"))
    for file in {file for metric in metrics.METRICS.values() for file in metric.weights}:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        file.path.write_bytes(b"stands for the trunk")
    layers = Path(importlib.util.find_spec("lpips").origin).parent / "weights" / "v0.1"
    for net, name in (("vgg", "LPIPS_v0.1_vgg-a78928a0.pth"), ("alex", "LPIPS_v0.1_alex-df73285e.pth")):
        (hub / "pyiqa" / name).write_bytes((layers / f"{net}.pth").read_bytes())
    dists = {name: torch.full((1, 1475, 1, 1), 0.1) for name in ("alpha", "beta")}
    torch.save(dists, hub / "pyiqa" / "DISTS_weights-f5e65c96.pth")


def test_learned_metrics_run_on_cached_weights(untrained, capfd):
    learned = ["lpips-vgg", "lpips-alex", "dists"]
    assert [metrics.unavailable(name) for name in learned] == [None] * 3
    crops = [CHELSEA[:, :side, :side] for side in (31, 30, 16)]
    pairs = [(CHELSEA, 255 - CHELSEA), (CHELSEA, CHELSEA)] + [(crop, crop) for crop in crops]
    different, equal, *small = metrics.score_with_pyiqa(learned, pairs)
    for name in learned:
        assert different[name] > equal[name] + 1e-5 and equal[name] == pytest.approx(0, abs=1e-5), name
    too_small = [[name for name in learned if score[name] is None] for score in small]
    assert too_small == [[], ["lpips-alex"], ["lpips-alex"]]
    assert capfd.readouterr() == ("", "")


def test_computed_without_tf32_whatever_was_set(monkeypatch):
    seen = []

    def network(distorted, reference):
        seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision(), distorted.dtype))
        return torch.tensor(1.0)

    monkeypatch.setattr(metrics, "_load_quietly", lambda *_: network)
    saved = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    list(metrics.score_with_pyiqa(["psnr"], [(CHELSEA,) * 2]))
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision(saved)
    assert seen == [(False, "highest", torch.float32)]


def test_missing_weights_and_packages_and_unknown_names_are_told_at_once(hub, monkeypatch):
    assert not any(map(metrics.unavailable, WITHOUT_WEIGHTS))
    for name, files in {
        "lpips-vgg": ("vgg16-397923af.pth", "LPIPS_v0.1_vgg-a78928a0.pth"),
        "lpips-alex": ("alexnet-owt-7be5be79.pth", "LPIPS_v0.1_alex-df73285e.pth"),
        "dists": ("vgg16-397923af.pth", "DISTS_weights-f5e65c96.pth"),
    }.items():
        told = f"{files[0]} (looked in {hub / 'checkpoints'}) and {files[1]} (looked in {hub / 'pyiqa'})"
        assert metrics.unavailable(name) == f"{name} lacks {told}; fetch with: python reproduce.py weights"
    with pytest.raises(DiffoError, match="lpips-vgg lacks"):
        metrics.score_with_pyiqa(["psnr", "lpips-vgg"], [])
    with pytest.raises(DiffoError, match="unknown metric lpips; known are"):
        metrics.unavailable("lpips")
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda _: None)
    assert "pip install pyiqa" in metrics.unavailable("fsim") and not hub.exists()


def test_weight_files_are_those_that_the_packages_load(hub):
    from pyiqa.archs import dists_arch, lpips_arch
    from pyiqa.default_model_configs import DEFAULT_CONFIGS
    from pyiqa.utils import download_util
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    vgg, alexnet = VGG16_Weights.IMAGENET1K_V1.url, AlexNet_Weights.IMAGENET1K_V1.url
    layers = lpips_arch.default_model_urls
    for name, urls in {
        "lpips-vgg": [vgg, layers["0.1_vgg"]],
        "lpips-alex": [alexnet, layers["0.1_alex"]],
        "dists": [vgg, dists_arch.default_model_urls["url"]],
    }.items():
        assert [file.url for file in metrics.METRICS[name].weights] == urls
    networks = {name: DEFAULT_CONFIGS[metrics.METRICS[name].pyiqa_name]["metric_opts"] for name in metrics.METRICS}
    assert networks["lpips-vgg"]["net"] == "vgg" and networks["lpips-alex"]["net"] == "alex"
    assert metrics.METRICS["dists"].weights[1].path.parent.name == Path(download_util.DEFAULT_CACHE_DIR).name


def test_weights_are_fetched_once_into_their_folders(hub, monkeypatch, capsys):
    asked = []

    def fetch(url, path, sha256, timeout):
        asked.append((url, sha256, timeout))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"7 bytes")

    monkeypatch.setattr(metrics, "fetch", fetch)
    metrics.download_weights(timeout=3)
    assert len(asked) == 5 and ("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af", 3) in asked
    assert {path.name for path in (hub / "checkpoints").iterdir()} == {"vgg16-397923af.pth", "alexnet-owt-7be5be79.pth"}
    assert not any(map(metrics.unavailable, metrics.METRICS))
    metrics.download_weights()
    lines = capsys.readouterr().out.splitlines()
    assert len(asked) == 5 and len(lines) == 10
    assert "SHA-256 agrees" in lines[0] and all("already in" in line for line in lines[5:])
