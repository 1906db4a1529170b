"""Scores by pyiqa, and the files of weights that they need."""

import hashlib
import importlib.util
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from measuring import pyiqa_metrics as metrics
from tests.test_metrics import ASTRONAUT, CHELSEA, distortions
from utils.errors import DiffoError

WITHOUT_WEIGHTS = ["psnr", "ms_ssim", "fsim", "nlpd", "gmsd", "vsi", "vif"]


def test_scores_that_need_no_weights_are_ordered_finite_and_quiet(capfd):
    original = ASTRONAUT
    near, far = original // 4 * 4, distortions(original)["jpeg"]
    tiny = original[:, :32, :32]
    scores = list(metrics.score_with_pyiqa(WITHOUT_WEIGHTS, [(original, near), (original, far), (tiny, tiny)]))
    assert [list(score) for score in scores] == [WITHOUT_WEIGHTS] * 3
    for name in WITHOUT_WEIGHTS:
        better, worse = scores[0][name], scores[1][name]
        assert (better < worse) if name in ("nlpd", "gmsd") else (better > worse), name
    assert {name for name, score in scores[2].items() if score is None} == {"ms_ssim", "vif"}
    assert scores[2]["fsim"] == pytest.approx(1, abs=1e-5) and scores[2]["gmsd"] == pytest.approx(0, abs=1e-5)
    assert capfd.readouterr() == ("", "")


def test_the_original_comes_first():
    # VIF is not symmetric: a copy of lower contrast has lost information, one of higher contrast scores above 1.
    original = ASTRONAUT
    lost, gained = metrics.score_with_pyiqa(["vif"], [(original, original // 3), (original // 3, original)])
    assert lost["vif"] < 0.6 < 1.5 < gained["vif"]


def test_smallest_sides_are_those_of_pyiqa():
    picture = ASTRONAUT
    for name in ("vif", "ms_ssim"):
        side = metrics.METRICS[name].min_side
        network = metrics._load_quietly(name, torch.device("cpu"))
        good, small = (picture[None, :, :n, :200].float() / 255 for n in (side, side - 1))
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
    original = CHELSEA
    crops = [original[:, :side, :side] for side in (31, 30, 16)]
    pairs = [(original, 255 - original), (original, original)] + [(crop, crop) for crop in crops]
    different, equal, *small = metrics.score_with_pyiqa(learned, pairs)
    for name in learned:
        assert different[name] > equal[name] + 1e-5 and equal[name] == pytest.approx(0, abs=1e-5), name
    too_small = [[name for name in learned if score[name] is None] for score in small]
    assert too_small == [[], ["lpips-alex"], ["lpips-alex"]]
    for name in learned[:2]:
        file = metrics.METRICS[name].weights[1]
        assert hashlib.sha256(file.path.read_bytes()).hexdigest().startswith(file.sha256)
    assert capfd.readouterr() == ("", "")


def test_computed_without_tf32_whatever_was_set(monkeypatch):
    seen = []

    def network(distorted, reference):
        seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision(), distorted.dtype))
        return torch.tensor(1.0)

    monkeypatch.setattr(metrics, "_load_quietly", lambda *_: network)
    saved = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        list(metrics.score_with_pyiqa(["psnr"], [(CHELSEA,) * 2]))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(saved)
    assert seen == [(False, "highest", torch.float32)]


def test_unavailable_tells_file_folder_and_command(hub):
    for name in WITHOUT_WEIGHTS:
        assert metrics.unavailable(name) is None
    line = metrics.unavailable("lpips-vgg")
    for part in ("vgg16-397923af.pth", "LPIPS_v0.1_vgg-a78928a0.pth", "python reproduce.py weights"):
        assert part in line
    assert f"looked in {hub / 'checkpoints'}" in line and f"looked in {hub / 'pyiqa'}" in line
    assert "\n" not in line and not hub.exists()
    assert "alexnet-owt-7be5be79.pth" in metrics.unavailable("lpips-alex")
    assert "DISTS_weights-f5e65c96.pth" in metrics.unavailable("dists")


def test_unavailable_sees_files(hub):
    for file in metrics.METRICS["dists"].weights:
        assert metrics.unavailable("dists") is not None
        file.path.parent.mkdir(parents=True, exist_ok=True)
        file.path.touch()
    assert metrics.unavailable("dists") is None
    assert "LPIPS_v0.1_vgg" in metrics.unavailable("lpips-vgg") and "vgg16-" not in metrics.unavailable("lpips-vgg")


def test_missing_weights_and_packages_and_unknown_names_are_refused_at_once(hub, monkeypatch):
    with pytest.raises(DiffoError, match="python reproduce.py weights"):
        metrics.score_with_pyiqa(["psnr", "lpips-vgg"], [])
    with pytest.raises(DiffoError, match="unknown metric lpips; known are"):
        metrics.unavailable("lpips")
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda _: None)
    assert "pip install pyiqa" in metrics.unavailable("fsim")


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


BODY = b"weights" * 1000


class Server(BaseHTTPRequestHandler):
    def do_GET(self):
        page = self.path.split("/")[1]
        if page == "none":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        if page == "slow":
            self.server.released.wait(5)
        self.wfile.write(BODY[:100] if page == "cut" else BODY)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        server.released = threading.Event()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def one_file(monkeypatch, hub):
    """Make a single file at a given address the only one that any metric needs."""
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)

    def use(server: str, sha256: str = hashlib.sha256(BODY).hexdigest()[:8]) -> metrics.WeightFile:
        file = metrics.WeightFile(f"w-{sha256}.pth", server, "cache")
        monkeypatch.setattr(metrics, "METRICS", {"own": metrics.Metric("own", weights=(file,))})
        return file

    return use


def test_download_fetches_once(address, one_file, capsys):
    file = one_file(f"{address}/good")
    metrics.download_weights()
    assert file.path.read_bytes() == BODY
    metrics.download_weights()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "SHA-256 agrees" in lines[0] and "already in" in lines[1]
    assert list(file.path.parent.iterdir()) == [file.path]


@pytest.mark.parametrize(
    "page, message",
    [
        ("none", "404"),
        ("good", "does not begin with 00000000"),
        ("cut", "cut short|IncompleteRead"),
        ("slow", "timed out"),
    ],
)
def test_failed_download_leaves_nothing(address, one_file, page, message):
    file = one_file(f"{address}/{page}", *(["00000000"] if page == "good" else []))
    with pytest.raises(DiffoError, match=message) as caught:
        metrics.download_weights(timeout=0.3)
    assert "\n" not in str(caught.value) and file.url in str(caught.value)
    assert list(file.path.parent.iterdir()) == []


def test_offline_is_said_with_the_folder(one_file):
    file = one_file("http://127.0.0.1:9")
    with pytest.raises(DiffoError, match="Is this machine online") as caught:
        metrics.download_weights(timeout=2)
    assert str(file.path.parent) in str(caught.value)
